"""Try every causal language model of transformers in a tiny size: supported, refused (and why), or not a decoder.

Each model type of transformers' mapping gets a small config and goes through LESS's own discovery. If it passes, it is
built with large random weights, saved, exported with policy ``full``, run on ONNX Runtime in chunks and token by token,
past its sliding window, and compared with eager Hugging Face. Every model runs in its own process, so that none can
crash or stall the benchmark.

``python benchmarks/zoo.py`` writes ``benchmarks/results/zoo.json``; with model types as arguments, it updates only
their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from bench_common import RESULTS, write_results
from isolated import isolated, one_line
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo_configs import tiny_config

from less_export.errors import UnsupportedModelError
from less_export.exporter.check import TOLERANCE
from less_export.hf import weights
from less_export.hf.surgery import discover
from tests import families

#: Time limit per model; one that takes longer counts as failed.
SECONDS = 300
#: A model with more parameters is not tiny: its config has a size key that zoo_configs does not know.
MAX_PARAMETERS = 100_000_000
STEPS = (16, 9, 1, 1, 16, 1, 1, 1)


def visit(model_type: str) -> dict[str, Any]:
    """The result for one model type, or for its text part if the whole has no tiny config."""
    result, part = attempt(model_type), f"{model_type}_text"
    if result["outcome"] == "no tiny config" and part in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        part_result = attempt(part)
        if part_result["outcome"] != "no tiny config":
            return part_result
    return result


def attempt(model_type: str) -> dict[str, Any]:
    """A dict with ``outcome`` and either ``reason`` or ``layers`` and ``error``."""
    try:
        config = tiny_config(model_type)
    except Exception as error:  # a config's own checks may raise anything
        return {"outcome": "no tiny config", "reason": one_line(error)}
    try:
        bare = weights.bare_model(config, torch.float32)
    except Exception as error:  # a model's constructor may raise anything
        if config.is_encoder_decoder:
            reason = "an encoder-decoder: transformers builds no decoder from its whole configuration"
            return {"outcome": "not a decoder", "reason": reason}
        return {"outcome": "no tiny config", "reason": one_line(error)}
    refused = "not a decoder" if config.is_encoder_decoder else "refused"
    try:
        layers = discover(bare)
    except UnsupportedModelError as refusal:
        cross_attention = "attends to the encoder" in str(refusal)
        return {"outcome": "not a decoder" if cross_attention else refused, "reason": str(refusal)}
    count = sum(p.numel() for p in bare.parameters())
    if count > MAX_PARAMETERS:
        return {"outcome": "no tiny config", "reason": f"{count / 1e6:,.0f} million parameters"}
    try:
        error = difference(config)
    except UnsupportedModelError as refusal:
        return {"outcome": refused, "reason": str(refusal)}
    except Exception as reason:  # raised by the exporter, torch or ONNX Runtime: the row records the failure
        return {"outcome": "failed", "reason": one_line(reason)}
    facts = {"layers": [[x.query_heads, x.kv_heads, x.head_dim, x.window] for x in layers], "error": error}
    if not error <= TOLERANCE:
        return {"outcome": "failed", "reason": f"differs from Hugging Face by {error:.1e}", **facts}
    return {"outcome": "supported", **facts}


def difference(config: Any) -> float:
    """Largest difference between the exported logits and eager Hugging Face's, relative to the largest logit."""
    model = families.build(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    )
    ids = families.text(2, sum(STEPS))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        tiny = families.export(Path(folder) / "model", Path(folder) / "x", policy="full", context=64, logits="all")
        logits = np.concatenate(families.feed(tiny.backend("ort", 2), ids, STEPS), 1)
    return families.relative(logits, expected)


def row(model_type: str) -> dict[str, Any]:
    """The row of one model type, measured in a process that may crash or hang."""
    result = isolated(visit, model_type, seconds=SECONDS)
    if "failed" in result:
        result = {"outcome": "failed", "reason": result["failed"]}
    return {"model_type": model_type, "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    model_types, path = parser.parse_args().model_types, RESULTS / "zoo.json"
    rows: dict[str, dict[str, Any]] = {}
    if model_types and path.is_file():
        rows = {r["model_type"]: r for r in json.loads(path.read_text())["rows"]}
    for model_type in model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows[model_type] = result = row(model_type)
        detail = result.get("reason") or f"{result['error']:.1e} {result['layers']}"
        print(f"{model_type}: {result['outcome']}: {detail}", flush=True)
    write_results("zoo", {"steps": list(STEPS), "rows": [rows[n] for n in sorted(rows)]})


if __name__ == "__main__":
    main()
