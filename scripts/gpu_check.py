"""Check and time the plugin's kernels on this machine's GPU; prints a summary and writes gpu.json.

``--dry-run`` runs everything with the emulated kernels and tiny sizes, on a machine without a GPU: its times are
meaningless and not written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_bench
import gpu_engine
import gpu_kernels
import gpu_ort
import gpu_sample
import gpu_stress
import torch
from bench_common import RESULTS

from less_export.native import nvcc, ort_cuda
from less_export.tensorrt import plugin
from tests import test_cuda, test_cuda_distance, test_cuda_int8, test_cuda_primitives, test_cuda_state16, test_ops
from tests.emulation import DTYPES, kernel_layer, normal
from tests.plugin_host import Plugin, plugin_run
from tests.scenarios import follow, scenario
from tests.test_cuda_row_indices import scattered
from tests.test_state16 import SMALL, STATE16_VARIANTS

TOOLS = ("memcheck", "racecheck", "synccheck")


def parity(device: str, quick: bool) -> dict[str, Any]:
    """Every case of tests/test_cuda*.py through the plugin's interface: the largest ratio of an error to its limit.

    With rows of the state in order, and by index, in other places at every step.
    """
    worst, failed, count = 0.0, [], 0

    def check(name: str, layer: Any, steps: Any, dtype: str) -> None:
        nonlocal worst, count
        count += 1
        fresh = test_ops.empty(layer, DTYPES[dtype], len(steps[0].inputs["new_length"]))
        reference = follow(test_ops.torch_run(layer, dtype=DTYPES[dtype]), steps, fresh)
        for by_index in (False, True):
            kind = f"{name}, rows by index" if by_index else name
            attached = Plugin.of(layer, by_index=by_index).attach()
            run = plugin_run(attached, layer, dtype, device=device, by_index=by_index)
            try:
                errors = follow(scattered(run, layer) if by_index else run, steps, fresh)
            except Exception as error:  # a difference, or a CUDA error
                failed.append(f"{kind}: {' '.join(str(error).split())[:160]}")
                if device == "cuda":
                    torch.cuda.synchronize()  # raises if nothing more can run in this process
                return
            limits = test_cuda.allowed(layer, reference)
            ratio = max(e / limits[n] for n, e in errors.items())
            worst = max(worst, ratio)
            if ratio > 1:
                failed.append(f"{kind}: {ratio:.2f} times the limit")

    shapes = [(*x, "model", None, 32) for x in test_cuda.CHOSEN[: 1 if quick else None]]
    shapes += [(*x, "int8", None, 32) for x in test_cuda_int8.SHAPES[: 1 if quick else None]]
    shapes += [(*x, test_cuda_distance.FARTHEST, 32) for x in test_cuda_distance.SHAPES[: 1 if quick else None]]
    shapes += [(*x, "int8", None, 16) for x in test_cuda_state16.SHAPES[: 1 if quick else None]]
    for dtype, policy, head_dim, group, rank, slots, farthest, bits in shapes:
        capacity = 150 if policy == "full" else 100
        layer = kernel_layer(policy, capacity, head_dim, group, rank, 1 if group > 8 else 2)
        layer = replace(layer, slot_dtype=slots, max_distance=farthest, state_bits=bits)
        name = f"{dtype} {policy} D{head_dim} G{group} R{rank} {slots} distance {farthest} state {bits}"
        for kind, lengths in (("long", test_cuda.CHUNKS), ("short", test_cuda.SHORT_CHUNKS)):
            check(f"{name}, {kind} chunks", layer, scenario(layer, lengths, 3, normal(dtype)), dtype)
    rules = [*{**test_ops.VARIANTS, **test_ops.EDGES}.items()][: 1 if quick else None]
    rules += [*test_cuda_int8.RULES.items()][: 1 if quick else None]
    rules += [*STATE16_VARIANTS.items()][: 1 if quick else None]
    rules += [(f"{n} distance", x) for n, x in [*test_cuda_distance.RULES.items()][: 1 if quick else None]]
    for name, layer in rules:
        for decode in (False, True):
            if not (layer.window == 1 and layer.policy.name != "window"):
                check(name, layer, test_ops.ordinary(layer, decode), "float32")
        if name.startswith(("h2o", "tova")) and name in test_ops.VARIANTS:
            tied = test_ops.tied(layer)
            check(f"{name}, ties", tied, test_ops.tie_steps(tied, 0), "float32")
    layer = kernel_layer("h2o", 24, 16, 2, 8)
    steps = scenario(layer, [(40, 11), *[(1, 1)] * (5 if quick else 500)], 8, normal("bfloat16"))
    check("500 steps", layer, steps, "bfloat16")
    return {"cases": count, "failed": failed, "largest_error_of_allowed": round(worst, 3)}


def primitives(lib: Any, device: str) -> dict[str, Any]:
    """Tensor core primitives against plain products; tests/ checks their host versions in the same way."""
    failed = []
    for dtype in ("float16", "bfloat16"):
        for seed in range(8):
            try:
                test_cuda_primitives.check(lib.less_primitives, dtype, seed, device)
            except AssertionError as error:
                failed.append(f"{dtype} {seed}: {' '.join(str(error).split())[:160]}")
    return {"cases": 16, "failed": failed}


def sanitize(library: Path) -> dict[str, Any]:
    """compute-sanitizer over decode and prefill steps, one process per tool, without torch's caching allocator."""
    outcomes: dict[str, Any] = {"failed": []}
    if shutil.which("compute-sanitizer") is None:
        return {**dict.fromkeys(TOOLS, "compute-sanitizer is not installed"), "failed": []}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += [sys.executable, __file__, "--exercise", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
        except subprocess.TimeoutExpired:
            outcomes[tool] = "timed out"
            outcomes["failed"].append(f"{tool}: timed out")
            continue
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        outcomes[tool] = lines[-1].strip("= ") if lines else f"exit code {done.returncode}"
        if done.returncode:
            outcomes["failed"].append(f"{tool}: {done.stdout[-1500:]} {done.stderr[-500:]}")
    return outcomes


def exercise(library: Path) -> None:
    """Steps to run under compute-sanitizer: every kernel, slots in one block and in several, narrow and wide heads."""
    gpu_kernels.use(library)
    kinds = [
        ("h2o", "float16", 1, 100, 128, 4),
        ("h2o", "bfloat16", 40, 100, 128, 4),
        ("tova", "float32", 1, 100, 128, 4),
        ("sink", "float16", 2, 100, 80, 1),
        ("h2o", "bfloat16", 2, 100, 256, 12),
        ("h2o", "float16", 70, 1100, 64, 4),
    ]
    for policy, dtype, batch, slots, head_dim, group in kinds:
        for chunk in (1, 9, 70):
            layer = kernel_layer(policy, slots, head_dim, group, 8, kv_heads=8)
            for one in (layer, replace(layer, slot_dtype="int8"), replace(layer, **SMALL)):
                for farthest in (None, test_cuda_distance.FARTHEST):
                    step = gpu_kernels.Step(replace(one, max_distance=farthest), dtype, batch, chunk, "cuda")
                    step.launch()
    torch.cuda.synchronize()


def in_process(script: str, kinds: Sequence[str], dry_run: bool) -> dict[str, Any]:
    """What a script in its own process prints, or of each kind why the process ended."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *["--dry-run"] * dry_run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return dict.fromkeys(kinds, f"exit code {done.returncode}: {done.stderr[-200:]}")
    return dict(json.loads(lines[-1]))


def engine(dry_run: bool) -> dict[str, Any]:
    """Plans on TensorRT-RTX, which may abort on a GPU that it does not support: that is told, and no failure."""
    return in_process("gpu_engine.py", gpu_engine.KINDS, dry_run)


def onnx_runtime(dry_run: bool) -> dict[str, Any]:
    """Graphs on ONNX Runtime's CUDA provider, with the native operator for this GPU."""
    if not dry_run and (arch := nvcc.gpu_arch()):
        ort_cuda.library((arch,))
    outcomes = in_process("gpu_ort.py", list(gpu_ort.KINDS), dry_run)
    ended = [f"{kind}: {x}" for kind, x in outcomes.items() if str(x).startswith("exit code")]
    return {"failed": ended, **outcomes}


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.splitlines()
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else "unknown"
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "driver": driver.strip(),
        "nvcc": next((line.strip() for line in nvcc if "release" in line), ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json (default: benchmarks/results)")
    parser.add_argument("--only", choices=("check", "time"), help="run only the checks, or only the timings")
    parser.add_argument("--dry-run", action="store_true", help="emulated kernels, tiny sizes, nothing written")
    parser.add_argument("--library", type=Path, help="the plugin to check (default: built for all architectures)")
    parser.add_argument("--exercise", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.exercise:
        exercise(args.exercise)
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_check: no GPU found; --dry-run runs without one", file=sys.stderr)
        return 1
    device = "cpu" if args.dry_run else "cuda"
    folder = Path(tempfile.mkdtemp(prefix="less-gpu-"))
    library = None if args.dry_run else gpu_kernels.build(folder, args.library or plugin.library())
    lib = gpu_kernels.use(library)
    path = args.out / "gpu.json"
    data: dict[str, Any] = {}
    if not args.dry_run:  # checks and timings may run separately
        data = {**(json.loads(path.read_text()) if path.is_file() else {}), "machine": machine()}
    # Parts that may crash the process or run out of time come last.
    parts: dict[str, Callable[[], Any]] = {}
    if args.only != "time":
        parts |= {"primitives": lambda: primitives(lib, device), "parity": lambda: parity(device, args.dry_run)}
        parts |= {"rows": lambda: gpu_stress.rows(device, args.dry_run)}
        parts |= {"picks": lambda: gpu_sample.check(device, args.dry_run)}
        parts |= {"stress": lambda: gpu_stress.stress(device, args.dry_run)}
    if args.only != "check":
        parts |= {n: lambda f=f: f(device, args.dry_run) for n, f in gpu_bench.BENCHMARKS.items()}
        parts |= {"sampling": lambda: gpu_sample.timing(device, args.dry_run)}
    if args.only != "time" and library is not None:
        parts |= {"sanitizers": lambda: sanitize(library)}
    if args.only != "time":
        parts |= {"engine": lambda: engine(args.dry_run), "onnxruntime": lambda: onnx_runtime(args.dry_run)}
    for name, run in parts.items():
        try:
            data[name] = run()
        except Exception as error:
            data[name] = {"failed": [f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]}
        print(f"{name}: {json.dumps(data[name])[:400]}", flush=True)
        if not args.dry_run:  # after every part: the machine may be taken away
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    failed = [f for n in parts if isinstance(data[n], dict) for f in data[n].get("failed", [])]
    print(gpu_bench.summary({n: x for n, x in data.items() if not (isinstance(x, dict) and x.get("failed"))}))
    print("\n".join(failed) or "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as for users; no module may load during a capture
    sys.exit(main())
