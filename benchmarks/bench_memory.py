"""Memory of a bundle on ONNX Runtime's CPU, compared with the bytes of its weights.

Random weights of TinyLlama-1.1B's shape as f32, bf16 and fp16 checkpoints, and fp16 quantised to int8 and int4; and
of Qwen3-0.6B's shape, whose embeddings are tied, as bf16. Every bundle is opened in its own process with the session
options of the backend, and those of ``--variants`` also with each option that affects memory changed.
Resident memory is read from /proc after loading, at its peak and at the end, after two chunks of prompt and several
decode steps of four rows. It includes memory mapped from files (``mapped``), which the system can reclaim when
memory is short; ``loading_mb`` is the peak without it, sampled while the model is loaded.
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

BUDGET, CHUNK, BATCH, STEPS = "256", 128, 4, 12
#: Recipe, checkpoint dtype and quantisation by row.
ROWS = {
    "float32": ("tinyllama-1.1b", "float32", None),
    "bfloat16": ("tinyllama-1.1b", "bfloat16", None),
    "float16": ("tinyllama-1.1b", "float16", None),
    "int8": ("tinyllama-1.1b", "float16", "int8"),
    "int4": ("tinyllama-1.1b", "float16", "int4"),
    "bfloat16, tied": ("qwen3-0.6b", "bfloat16", None),
}
#: Changes to the backend: attributes of its session options, entries of their configuration, disabled optimizers,
#: or what the backend does in addition.
VARIANTS: dict[str, dict[str, Any]] = {
    "as the backend sets them": {},
    "freed memory kept": {"hand_back": False},
    "memory patterns": {"enable_mem_pattern": True},
    "arena never shrunk": {"shrink": False},
    "no arena": {"enable_cpu_mem_arena": False, "shrink": False},
    "no prepacking": {"session.disable_prepacking": "1"},
    "initializers outside the arena": {"session.use_device_allocator_for_initializers": "1"},
    "no constant folding": {"disabled": ["ConstantFolding"]},
    "no fusion of quantised products": {"session.disable_quant_qdq": "1"},
}


#: Prints the largest anonymous memory of a process in kB, from its start until its input is closed.
_SAMPLER = """
import select, sys
peak = 0
while not select.select([sys.stdin], [], [], 0.002)[0]:
    for line in open(f"/proc/{sys.argv[1]}/status"):
        if line.startswith("RssAnon:"):
            peak = max(peak, int(line.split()[1]))
print(peak)
"""


def resident(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process (this one) in MB: now, mapped from files, the rest, and at its peak."""
    names = {"VmRSS": "resident_mb", "RssFile": "mapped_mb", "RssAnon": "anonymous_mb", "VmHWM": "peak_mb"}
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {name: round(int(fields[field].split()[0]) * 1024 / 1e6, 1) for field, name in names.items()}


def child(bundle: Path, variant: str) -> None:
    """Open the bundle, feed two chunks, decode; print the figures as JSON."""
    import onnxruntime

    import less_export
    from less_export.runtime import ort

    changes = dict(VARIANTS[variant])
    load, disabled = onnxruntime.InferenceSession, changes.pop("disabled", [])
    hand_back, shrink = changes.pop("hand_back", True), changes.pop("shrink", True)
    if not hand_back:
        ort._trim_heap = lambda: None

    def session(path: str, options: Any, **rest: Any) -> Any:
        for name, value in changes.items():
            if "." in name:
                options.add_session_config_entry(name, value)
            else:
                setattr(options, name, value)
        return load(path, options, **rest, disabled_optimizers=disabled)

    onnxruntime.InferenceSession = session
    before = resident()
    command = [sys.executable, "-c", _SAMPLER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
        start = time.perf_counter()
        backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count()).backend
        seconds = time.perf_counter() - start
        peak, _ = sampler.communicate()
    loaded = {**resident(), "loading_mb": round(int(peak) * 1024 / 1e6, 1)}
    if not shrink:
        backend._shrink_arena = None
    backend.open(BATCH)
    for count in (CHUNK, CHUNK // 2):
        backend.step([[5] * count] * BATCH)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        backend.step([[5]] * BATCH)
        times.append((time.perf_counter() - start) * 1e3)
    figures = {"empty": before, "loaded": loaded, "running": resident(), "load_seconds": round(seconds, 2)}
    print(json.dumps({**figures, "decode_ms": round(statistics.median(times), 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    note = "rows to measure with other session options too (default: bfloat16 int4)"
    parser.add_argument("--variants", nargs="*", choices=ROWS, default=["bfloat16", "int4"], metavar="ROW", help=note)
    parser.add_argument("--results", default="memory", help="name of the results file (default: memory)")
    parser.add_argument("--child", nargs=2, metavar=("BUNDLE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(Path(args.child[0]), args.child[1])
    rows = [row for name in args.rows for row in measure(name, args.layers, name in args.variants)]
    write_results(args.results, {"chunk": CHUNK, "slots": int(BUDGET), "batch": BATCH, "rows": rows})


def measure(name: str, layers: int | None, variants: bool) -> list[dict[str, Any]]:
    """Export one row's bundle and open it, once for each variant if ``variants``."""
    import less_export
    from less_export.hf import recipes

    model, dtype, weights = ROWS[name]
    recipe = recipes.load(model)
    assert recipe is not None
    count = min(layers or 1 << 20, recipe.architecture["num_hidden_layers"])
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        size = random_checkpoint(folder / "checkpoint", dtype, count, architecture=recipe.architecture)
        facts = {"model": model, "layers": count, "parameters": size // (4 if dtype == "float32" else 2)}
        options: dict[str, Any] = {
            "budget": BUDGET,
            "slots": "model",
            "max_distance": "none",
            "chunk": CHUNK,
            "max_batch": BATCH,
        }
        less_export.export(str(folder / "checkpoint"), folder / "bundle", weights=weights, validate=False, **options)
        stored = sum(p.stat().st_size for p in (folder / "bundle").glob("*.safetensors"))
        for variant in VARIANTS if variants else list(VARIANTS)[:1]:
            command = [sys.executable, __file__, "--child", str(folder / "bundle"), variant]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"weights": name, **facts, "variant": variant, "weight_mb": round(stored / 1e6, 1)}
            row |= {"failed": done.stderr.strip().splitlines()[-1]} if done.returncode else json.loads(done.stdout)
            rows.append(row)
            print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
