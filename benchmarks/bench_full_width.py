"""Every recipe's architecture at full width with two layers of each kind: ONNX against torch against Hugging Face.

Each is built from the recipe's facts with random weights in float32, exported with policy ``full``, and fed in
chunks and token by token. Weights are large enough for attention to be far from uniform, and sliding windows are
short enough to be exceeded. ``--num-hidden-layers`` would take only the first layers, which may not include all
kinds.

``--resume`` keeps the rows whose recipe has not changed, ``--only NAME`` measures one recipe (again).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from bench_common import RESULTS, write_results
from isolated import isolated

from less_export.exporter.check import TOLERANCE, two_of_each_kind
from less_export.hf import recipes
from less_export.hf.config_layers import keep_layers
from less_export.hf.random_checkpoint import write
from less_export.hf.sources import described
from tests import families

SECONDS = 1200
WINDOW = 12
STEPS = (16, 9, 1, 1, 16, 1, 1, 3)


def shortened(name: str) -> tuple[Any, list[int]]:
    """The config of a recipe with two layers of each kind, and the indices of these layers."""
    recipe = recipes.load(name)
    assert recipe is not None
    config = described(recipe)
    text, contract = config.get_text_config(), recipe.contract()
    layers = two_of_each_kind(config, contract)
    keep_layers(text, layers)
    config.dtype = torch.float32
    text.initializer_range = text.hidden_size**-0.5
    if any(s.window for s in contract.layers):
        text.sliding_window = WINDOW
    return config, layers


def measure(name: str) -> dict[str, Any]:
    """Both differences of one recipe, relative to the largest logit, with wall and CPU time."""
    began = time.perf_counter()
    torch.set_num_threads(2)
    config, layers = shortened(name)
    ids = families.text(1, sum(STEPS))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "model"
        size, _ = write(config, checkpoint)
        started = time.process_time()
        tiny = families.export(checkpoint, Path(scratch) / "x", policy="full", context=64, logits="all")
        exported = time.process_time() - started
        model = families.load(checkpoint)
        with torch.no_grad():
            truth = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
        facts = {
            "recipe": name,
            "architecture_sha256": architecture_hash(name),
            "class": type(model).__name__,
            "layers": layers,
            "weight_bytes": size,
        }
        del model
        logits = {}
        for backend in ("torch", "ort"):
            gc.collect()
            opened = tiny.backend(backend, 1)
            logits[backend] = np.concatenate(families.feed(opened, ids, STEPS), 1)
            opened.close()
            del opened
    return {
        **facts,
        "torch_against_hf": families.relative(logits["torch"], truth),
        "onnx_against_torch": families.relative(logits["ort"], logits["torch"]),
        "export_cpu_seconds": exported,
        "seconds": time.perf_counter() - began,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def architecture_hash(name: str) -> str:
    """Hash of a recipe's architecture; a row is measured again when it changes."""
    recipe = recipes.load(name)
    assert recipe is not None
    return hashlib.sha256(json.dumps(recipe.architecture, sort_keys=True).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", metavar="NAME")
    options = parser.parse_args()
    path, rows = RESULTS / "full_width.json", dict[str, dict[str, Any]]()
    if path.is_file() and (options.resume or options.only):
        rows = {r["recipe"]: r for r in json.loads(path.read_text())["rows"]}
    rows = {n: r for n, r in rows.items() if n in recipes.names() and r["architecture_sha256"] == architecture_hash(n)}
    names = [options.only] if options.only else [n for n in recipes.names() if n not in rows]
    failures = []
    for name in names:
        row = isolated(measure, name, seconds=SECONDS)
        print(name, json.dumps(row), flush=True)
        if "failed" in row or not max(row["torch_against_hf"], row["onnx_against_torch"]) <= TOLERANCE:
            failures.append(name)
        if "failed" not in row:
            rows[name] = row
            write_results("full_width", {"steps": list(STEPS), "rows": [rows[n] for n in sorted(rows)]})
    if failures:
        print(f"failed or beyond {TOLERANCE:.0e}: {', '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
