"""Plans on this machine's GPU: the state after several steps, copies around the plugin, and tokens per second.

The engine must read each step's state where the step before wrote it. ``steps`` compares the logits and the state of a
tiny decoder, step by step, with those of its standard operators in ONNX Runtime. If the runtime swapped two buffers
under a plugin that works in place, or the engine worked on a copy, the second step would start from a stale state.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bench_common import random_checkpoint

import less_export
from less_export.contract import Contract
from less_export.exporter import onnx_op
from less_export.runtime.backend import Backend
from less_export.runtime.ort import OrtBackend
from less_export.runtime.trt import LoadedPlan, TrtBackend, load_plan
from less_export.tensorrt import engine, plugin
from tests.trt_support import Fake, contract_of, decoder, serialised

#: The kinds of plans: with the plugin, and of standard operators.
KINDS = ("plugin", "no plugin")

#: The rows of a plan that takes rows by index in which these are, of three.
PLACES = (2, 0)
#: Tokens of each row in each step: a ragged chunk, tokens, a parked row, a chunk that evicts, tokens.
STEPS = ((3, 1), (1, 1), (1, 1), (0, 1), (1, 1), (4, 2), (1, 1), (1, 1))
#: Relative and absolute error of float32 on a GPU.
TOLERANCE = 2e-3


def difference(backend: Backend, reference: Backend) -> str:
    """The first step whose logits or state differ, "" if none does."""
    random = np.random.default_rng(0)
    places = PLACES if backend.rows_by_index else (0, 1)
    backend.open(max(places) + 1)
    reference.open(2)
    for index, counts in enumerate(STEPS):
        ids = random.integers(0, backend.contract.vocab_size, (2, max(counts)))
        got, wanted = backend.step(ids, np.array(counts), places), reference.step(ids, np.array(counts))
        live = np.array(counts) > 0
        values = [("logits", got[live], wanted[live])]
        for row in range(2):
            ours, theirs = backend.read_row(places[row]).tensors, reference.read_row(row).tensors
            values += [(f"{name} of row {row}", *x) for name, x in held(backend.contract, ours, theirs).items()]
        for name, x, y in values:
            if not np.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE):
                return f"step {index}: {name} is off by {np.abs(x - y).max():.2g}"
    return ""


def held(contract: Contract, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Pairs of state tensors without what empty slots hold."""
    pairs = {}
    for name, x in ours.items():
        prefix, _, field = name.rpartition(".")
        live = theirs[f"{prefix}.position"] >= 0
        mask: Any = live if field in ("key", "value", "psi", "score") else ...
        pairs[name] = (x[mask].astype(np.float64), theirs[name][mask].astype(np.float64))
    return pairs


def copies(plan: LoadedPlan) -> list[str]:
    """Layers of a plan that copy or reformat a tensor, by name: none should do so to the state."""
    kind = plan.flavour.module.LayerInformationFormat.ONELINE
    layers = plan.engine.create_engine_inspector().get_engine_information(kind).splitlines()
    return [line.strip()[:200] for line in layers if re.search("copy|reformat", line, re.IGNORECASE)]


def on_double(
    contract: Contract,
    folder: Path,
    patch: pytest.MonkeyPatch,
    in_place: bool,
    fault: str = "",
    by_index: bool = False,
) -> Backend:
    """The backend over a double of the GPU and of the engine, which runs ``model.onnx`` of a folder.

    With the fault "copied" it updates a copy of the state, with "swapped" it reads what the last step but one wrote.
    """
    session, fields = onnxruntime.InferenceSession(str(folder / "model.onnx")), [*contract.state()]
    sides: list[dict[str, Any]] = [{}, {}]

    def graph(feed: dict[str, Any]) -> list[Any]:
        if fault == "swapped":
            feed |= sides[0]
        logits, *state = session.run(None, feed)
        sides[:] = sides[1], {f.past.name: x for f, x in zip(fields, state, strict=True)}
        return [logits, *([feed[f.past.name] for f in fields] if fault == "copied" else state)]

    return Fake(contract, folder, patch, graph, in_place, by_index).backend()


def steps(kind: str, dry_run: bool) -> dict[str, Any]:
    """Whether a plan's steps agree with ONNX Runtime's, and how many of its layers copy."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, contract = Path(name), contract_of("float32")
        model, copying = decoder(contract, folder), None
        (folder / "model.onnx").write_bytes(serialised(model))
        if dry_run:
            backend = on_double(contract, folder, patch, kind == "plugin", by_index=kind == "plugin")
        else:
            library = None
            if kind == "plugin":
                library = plugin.library()  # as it ships
                onnx_op.strip_bodies(model)
            plan = folder / "engine.plan"
            facts = engine.build_plan(serialised(model), contract, out=plan, weights_dir=folder, library=library).plugin
            copying = copies(load_plan(plan, contract, facts, trust_code=True))
            backend = TrtBackend(contract, plan, facts, trust_code=True)
        with backend:
            wrong = difference(backend, OrtBackend(contract, folder / "model.onnx", threads=1))
    outcome = {"steps": wrong or f"{len(STEPS)} steps agree", "failed": [f"{kind}: {wrong}"] if wrong else []}
    return outcome if copying is None else {**outcome, "layers that copy": len(copying), "they are": copying[:4]}


def speed(kind: str) -> str:
    """Tokens per second of two layers of TinyLlama's shape."""
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder) / "model", "float16", layers=2)
        bundle = Path(folder) / "bundle"
        options = {"target": "trt", "budget": "256", "chunk": 64, "validate": False, "plugin": kind == "plugin"}
        config = less_export.ExportConfig(**options)
        less_export.export(str(Path(folder) / "model"), bundle, config, engine_plan=True)
        model = less_export.open_bundle(bundle, backend="trt")
        model.generate([[1, 2, 3] * 100], max_new_tokens=200)
    return f"{model.timing.decode_rate:.1f} tokens/s (2 layers of TinyLlama's shape, float16)"


def measured(dry_run: bool) -> dict[str, Any]:
    """Of each kind of plan: steps, then speed; TensorRT-RTX may not support this GPU, which is told and no failure."""
    outcomes: dict[str, Any] = {"failed": []}
    for kind in KINDS:
        try:
            checked = steps(kind, dry_run)
            outcomes["failed"] += checked.pop("failed")
            outcomes[f"{kind}, steps"] = checked
            outcomes[kind] = "not timed" if dry_run else speed(kind)
        except Exception as error:  # a library that does not support this GPU may raise anything
            outcomes[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return outcomes


if __name__ == "__main__":
    print(json.dumps(measured("--dry-run" in sys.argv)))
