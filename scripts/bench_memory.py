"""What a bundle holds in memory on ONNX Runtime's CPU, against the bytes of its weights.

A random Llama of TinyLlama-1.1B's shape as f32, bf16 and fp16 checkpoint, and fp16 quantised to int8 and
int4. Every bundle is opened in a process of its own with the session options of the backend, and with each
of the options that might save memory changed; resident memory is read from /proc after loading, at its peak
and at the end, after a chunk of prompt and some steps of decoding. What is mapped from files (``mapped``)
is part of it, and goes back to the system when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_common import random_checkpoint, write_results

BUDGET, CHUNK, STEPS = "256", 128, 12
#: Checkpoint dtype and quantisation by row.
ROWS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "int8": ("float16", "int8"),
    "int4": ("float16", "int4"),
}
#: What is changed against the backend's options: attributes, or entries of the session's configuration.
VARIANTS: dict[str, dict[str, Any]] = {
    "as the backend sets them": {},
    "no prepacking": {"session.disable_prepacking": "1"},
    "no arena": {"enable_cpu_mem_arena": False},
    "freed memory kept": {"hand_back": False},
    "initializers outside the arena": {"session.use_device_allocator_for_initializers": "1"},
    "no constant folding": {"disabled": ["ConstantFolding"]},
    "no fusion of quantised products": {"session.disable_quant_qdq": "1"},
}


def resident() -> dict[str, float]:
    """Resident memory of this process in MB: now, mapped from files, and at most so far."""
    names = {"VmRSS": "resident_mb", "RssFile": "mapped_mb", "VmHWM": "peak_mb"}
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {ours: round(int(fields[theirs].split()[0]) * 1024 / 1e6, 1) for theirs, ours in names.items()}


def child(bundle: Path, variant: str) -> None:
    """Open, feed a chunk, decode; print the figures as JSON."""
    import onnxruntime

    import less_export
    from less_export.runtime import ort_backend

    changes = dict(VARIANTS[variant])
    load, options = onnxruntime.InferenceSession, onnxruntime.SessionOptions
    disabled = changes.pop("disabled", [])
    if not changes.pop("hand_back", True):
        ort_backend._hand_back = lambda: None

    def changed() -> Any:
        made = options()
        for name, value in changes.items():
            if "." in name:
                made.add_session_config_entry(name, value)
            else:
                setattr(made, name, value)
        return made

    onnxruntime.SessionOptions = changed
    onnxruntime.InferenceSession = lambda *args, **kwargs: load(*args, **kwargs, disabled_optimizers=disabled)
    before = resident()
    start = time.perf_counter()
    backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count()).backend
    seconds = time.perf_counter() - start
    loaded = resident()
    if changes.get("enable_cpu_mem_arena") is False:
        backend._shrink = None  # there is no arena to shrink
    backend.open(1)
    backend.step([[5] * CHUNK])
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        backend.step([[5]])
        times.append((time.perf_counter() - start) * 1e3)
    figures = {"empty": before, "loaded": loaded, "running": resident(), "load_seconds": round(seconds, 2)}
    print(json.dumps({**figures, "decode_ms": round(statistics.median(times), 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--child", nargs=2, metavar=("BUNDLE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(Path(args.child[0]), args.child[1])
    import less_export

    rows: list[dict[str, Any]] = []
    for name in args.rows:
        dtype, weights = ROWS[name]
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            folder = Path(scratch)
            parameters = random_checkpoint(folder / "checkpoint", dtype, args.layers) // (
                4 if dtype == "float32" else 2
            )
            options: dict[str, Any] = {"budget": BUDGET, "chunk": CHUNK, "max_batch": 1, "validate": False}
            less_export.export(str(folder / "checkpoint"), folder / "bundle", weights=weights, **options)
            stored = sum(p.stat().st_size for p in (folder / "bundle").glob("*.safetensors"))
            for variant in VARIANTS if args.variants else list(VARIANTS)[:1]:
                command = [sys.executable, __file__, "--child", str(folder / "bundle"), variant]
                done = subprocess.run(command, capture_output=True, text=True)
                row: dict[str, Any] = {"weights": name, "variant": variant, "weight_mb": round(stored / 1e6, 1)}
                if done.returncode:
                    row["failed"] = done.stderr.strip().splitlines()[-1]
                else:
                    row |= json.loads(done.stdout)
                rows.append(row)
                print(row, flush=True)
    what = {"model": "random Llama, TinyLlama-1.1B shape", "layers": args.layers, "parameters": parameters}
    write_results("memory", {**what, "chunk": CHUNK, "slots": int(BUDGET), "batch": 1, "rows": rows})


if __name__ == "__main__":
    main()
