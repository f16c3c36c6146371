"""What a cache costs in a decode step on ONNX Runtime's CPU: float32 slots, int8 slots, and the defaults of an export.

A random Llama of TinyLlama-1.1B's shape with all its layers, float32, random kernels of the size of trained ones, batch
1. Every cache is compared with the first, both in one process, their steps timed in turn. The last cache is that of the
defaults in a graph that has no way of its own for single tokens. The result is
``benchmarks/results/slots_decode.json``.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from bench_common import TINYLLAMA, kernels, random_checkpoint, write_results
from bench_decode import filled, timed

import less_export
from less_export.exporter import onnx_op

#: Options by cache; the first is what the others are compared with.
CACHES: dict[str, dict[str, Any]] = {
    "float32 slots, absolute positions": {"slots": "model", "max_distance": "none"},
    "int8 slots, absolute positions": {"state": 32, "max_distance": "none"},
    "int8 slots, state of 16 bits": {"max_distance": "none"},
    "defaults: the same, limited distances": {},
    "defaults, the general way": {},
}
GENERAL = "defaults, the general way"


def compared(bundles: dict[str, Path], slots: int, steps: int) -> list[float]:
    """Medians of a decode step of two bundles in milliseconds, timed in turn."""
    backends = [less_export.open_bundle(b, "ort", threads=os.cpu_count() or 1).backend for b in bundles.values()]
    times: list[list[float]] = [[] for _ in backends]
    for backend in backends:
        backend.write_row(0, filled(backend, 2 * slots))
    for count in range(steps + 3):
        for mine, backend in zip(times, backends, strict=True):
            milliseconds = timed(lambda backend=backend: backend.step([[5]]))
            if count >= 3:  # the first steps warm up
                mine.append(milliseconds)
    return [round(statistics.median(x), 2) for x in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    general = functools.partial(onnx_op.add_bodies, decoding=False)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        random_checkpoint(folder / "checkpoint", "float32", args.layers, context=1 << 16)
        kernels(args.layers, 8, 128).save(folder / "kernels.safetensors")
        for number, (cache, options) in enumerate(CACHES.items()):
            with mock.patch.object(onnx_op, "add_bodies", general if cache == GENERAL else onnx_op.add_bodies):
                less_export.export(
                    str(folder / "checkpoint"),
                    folder / str(number),
                    kernels=folder / "kernels.safetensors",
                    policy="h2o",
                    budget=str(args.slots),
                    validate=False,
                    max_batch=1,
                    **options,
                )
        first, *others = CACHES
        rows = {}
        for number, cache in enumerate(others, 1):
            rows[cache] = compared({first: folder / "0", cache: folder / str(number)}, args.slots, args.steps)
            print(cache, rows[cache])
        facts = {"layers": args.layers, "slots": args.slots, "threads": os.cpu_count(), "steps": args.steps}
        write_results("slots_decode", {**facts, "first": first, "milliseconds": rows})


if __name__ == "__main__":
    main()
