"""What int8 slots cost in a decode step on ONNX Runtime's CPU: the same model with slots in float32 and in int8.

A random Llama of TinyLlama-1.1B's shape with all its layers, float32, random kernels of the size of trained ones, batch
1, both in one process, their steps timed in turn. The result is ``benchmarks/results/slots_decode.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from bench_common import TINYLLAMA, kernels, random_checkpoint, write_results
from bench_decode import filled, timed

import less_export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        random_checkpoint(folder / "checkpoint", "float32", args.layers, context=1 << 16)
        kernels(args.layers, 8, 128).save(folder / "kernels.safetensors")
        backends = {}
        for slots in ("model", "int8"):
            less_export.export(
                str(folder / "checkpoint"),
                folder / slots,
                kernels=folder / "kernels.safetensors",
                policy="h2o",
                budget=str(args.slots),
                slots=slots,
                max_distance="none",
                validate=False,
                max_batch=1,
            )
            opened = less_export.open_bundle(folder / slots, "ort", threads=os.cpu_count() or 1).backend
            opened.write_row(0, filled(opened, 2 * args.slots))
            backends[slots] = opened
        times: dict[str, list[float]] = {slots: [] for slots in backends}
        for count in range(args.steps + 3):
            for slots, backend in backends.items():
                milliseconds = timed(lambda backend=backend: backend.step([[5]]))
                if count >= 3:  # the first steps warm up
                    times[slots].append(milliseconds)
        medians = {slots: round(statistics.median(x), 2) for slots, x in times.items()}
        write_results(
            "slots_decode",
            {
                "layers": args.layers,
                "slots": args.slots,
                "threads": os.cpu_count(),
                "steps": args.steps,
                "milliseconds": medians,
                "ratio": round(medians["int8"] / medians["model"], 3),
            },
        )
        print(medians)


if __name__ == "__main__":
    main()
