"""Graphs on ONNX Runtime's CUDA provider: logits and state after several steps, and tokens per second.

A tiny decoder runs on this machine's GPU in three ways: in the native operator with its decode steps captured into CUDA
graphs, in the native operator without, and as the graph's own nodes. Each is compared, step by step, with the same
nodes on the CPU. Needs ``onnxruntime-gpu``, and the operator in the cache. ``--dry-run`` compares the native operator
for CPUs with the nodes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from bench_common import random_checkpoint
from gpu_engine import difference
from ort_load import PROVIDERS

import less_export
from less_export.runtime.ort import OrtBackend
from tests.trt_support import contract_of, decoder, serialised

#: The ways to run a graph, with the options of the backend.
KINDS: dict[str, dict[str, Any]] = {
    "operator and graphs": {"operator": "native"},
    "operator": {"operator": "native", "cuda_graphs": False},
    "nodes": {"operator": "onnx"},
}
DTYPE = "float32"


def steps(options: Mapping[str, Any]) -> str:
    """The first step whose logits or state differ from those of the nodes on the CPU, "" if none does."""
    with tempfile.TemporaryDirectory() as name:
        folder, contract = Path(name), contract_of(DTYPE)
        path = folder / "model.onnx"
        path.write_bytes(serialised(decoder(contract, folder)))
        with OrtBackend(contract, path, **options) as backend:
            return difference(backend, OrtBackend(contract, path, threads=1, operator="onnx"))


def exported(folder: Path) -> Path:
    """A bundle of two layers of TinyLlama's shape."""
    random_checkpoint(folder / "model", "float16", layers=2)
    common: dict[str, Any] = {"target": "ort", "dtype": "float16", "budget": "256", "validate": False}
    less_export.export(str(folder / "model"), folder / "bundle", less_export.ExportConfig(**common))
    return folder / "bundle"


def speed(bundle: Path, options: Mapping[str, Any]) -> str:
    """Tokens per second of a bundle."""
    model = less_export.open_bundle(bundle, "ort", **options)
    model.generate([[1, 2, 3] * 100], max_new_tokens=200)
    return f"{model.timing.decode_rate:.1f} tokens/s (2 layers of TinyLlama's shape, float16)"


def measured(dry_run: bool, folder: Path) -> dict[str, Any]:
    """Of each way to run a graph: whether its steps agree, and its speed. ``folder`` is for files, and empty."""
    outcomes: dict[str, Any] = {"failed": []}
    if not dry_run and PROVIDERS[0] not in onnxruntime.get_available_providers():
        return dict.fromkeys(KINDS, "not run: ONNX Runtime has no CUDA provider here (pip install onnxruntime-gpu)")
    bundle = None if dry_run else exported(folder)
    for kind, options in KINDS.items():
        provider = {"threads": 1} if dry_run else {"provider": "cuda"}
        try:
            wrong = steps({**options, **provider})
            outcomes["failed"] += [f"{kind}: {wrong}"] if wrong else []
            outcomes[f"{kind}, steps"] = wrong or "agree"
            outcomes[kind] = "not timed" if bundle is None else speed(bundle, {**options, **provider})
        except Exception as error:
            outcomes[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            outcomes["failed"].append(f"{kind}: {outcomes[kind]}")
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured("--dry-run" in sys.argv, Path(scratch))))
