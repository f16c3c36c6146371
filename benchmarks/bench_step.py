"""Where a decode step on ONNX Runtime's CPU spends its time, by part of the model and operator, from its profiler.

A bundle of TinyLlama's shape (fewer layers) with random weights and kernels, 256 int8 slots that are full, one row. The
native operator and the graph's own nodes run in turns, in one process. Times of a node are medians over the steps. The
profiler slows nodes down: the time of a step without it is in the result too.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from bench_common import kernels, random_checkpoint, write_results

from less_export.contract import OP_NAME
from less_export.native import ort_operator
from less_export.training.options import DEFAULT_RANK

LAYERS, SLOTS, HIDDEN = 4, 256, 128
#: Position of the step's token: the slots hold what is left of as many tokens.
POSITION = 5000
FORMATS: dict[str, list[str]] = {"f32": [], "int4": ["--weights", "int4"]}
OPERATORS = ("native", "onnx")
WEIGHTS = {"Gemm", "MatMul", "MatMulNBits"}
#: Dtypes of the graph's inputs.
DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(int8)": np.int8}


def feed(session: ort.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    """A token after many: every slot is full."""
    rng, values = np.random.default_rng(0), {}
    for node in session.get_inputs():
        shape = [n if isinstance(n, int) else 1 for n in node.shape]
        name, dtype = node.name, DTYPES[node.type]
        if name.endswith((".key", ".value", ".psi", ".h")):
            value = rng.integers(1, 100, shape)
        elif name.endswith(".position"):
            value = np.broadcast_to(np.arange(SLOTS), shape)
        elif name == "past_length":
            value = np.full(shape, POSITION)
        else:
            value = np.full(shape, 1) if dtype != np.float32 else rng.random(shape) * 0.01 + 0.01
        values[name] = value.astype(dtype)
    return values


def session(bundle: Path, threads: int, operator: str, **options: Any) -> ort.InferenceSession:
    """A session with the native operator, or with the graph's own nodes; ``options`` are those of the session."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    if operator == "native":
        settings.register_custom_ops_library(str(ort_operator.library()))
    for name, value in options.items():
        setattr(settings, name, value)
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    return ort.InferenceSession(bundle / "model.onnx", settings)


def seconds(sessions: dict[str, ort.InferenceSession], inputs: dict[str, Any], steps: int) -> dict[str, float]:
    """The median time of a step in each session; they take turns of ten steps, of which the first five warm up."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(max(1, steps // 5)):
        for name, one in sessions.items():
            for step in range(10):
                begin = time.perf_counter()
                one.run(None, inputs)
                times[name] += [time.perf_counter() - begin] if step >= 5 else []
    return {name: statistics.median(t) for name, t in times.items()}


def profile(bundle: Path, scratch: Path, threads: int, operator: str, steps: int) -> dict[str, Any]:
    """Microseconds and numbers of nodes by part, of all layers together."""
    graph = scratch / f"optimised.{operator}.onnx"
    profiled = session(
        bundle, threads, operator, optimized_model_filepath=str(graph), enable_profiling=True,
        profile_file_prefix=str(scratch / "profile"),
    )  # fmt: skip
    seconds({operator: profiled}, feed(profiled), steps)
    times = collections.defaultdict(list)
    for event in json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"].removesuffix("_kernel_time")].append(event["dur"])
    outside = {(n.op_type, n.name) for n in onnx.load(graph, load_external_data=False).graph.node}
    parts: dict[str, dict[str, float]] = {part: {"us": 0, "nodes": 0} for part in ("cache", "weights", "rest")}
    for (kind, name), durations in times.items():
        if kind == "If":  # its time is that of the nodes in it
            continue
        inside = kind == OP_NAME or (kind, name) not in outside
        part = parts["cache" if inside else "weights" if kind in WEIGHTS else "rest"]
        part["us"] += statistics.median(durations)
        part["nodes"] += 1
    return {part: {"us": round(x["us"]), "nodes": x["nodes"]} for part, x in parts.items()}


def measured(bundle: Path, scratch: Path, threads: int, steps: int) -> list[dict[str, Any]]:
    """The rows of a bundle: one for each operator."""
    parts = {operator: profile(bundle, scratch, threads, operator, steps) for operator in OPERATORS}
    sessions = {operator: session(bundle, threads, operator) for operator in OPERATORS}
    times = seconds(sessions, feed(sessions["onnx"]), steps)
    return [{"operator": o, "step_us": round(1e6 * times[o]), "parts": parts[o]} for o in OPERATORS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of ONNX Runtime (default: 2)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of each run (default: 100)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        random_checkpoint(scratch / "checkpoint", "float16", LAYERS)
        kernels(LAYERS, DEFAULT_RANK, HIDDEN).save(scratch / "kernels.safetensors")
        for name, extra in FORMATS.items():
            command = [sys.executable, "-m", "less_export", str(scratch / "checkpoint"), "--out", str(scratch / name)]
            command += ["--budget", str(SLOTS), "--kernels", str(scratch / "kernels.safetensors"), "--max-batch", "1"]
            subprocess.run([*command, "--no-validate", *extra], check=True)
            rows += [{"weights": name, **row} for row in measured(scratch / name, scratch, args.threads, args.steps)]
    facts = {"layers": LAYERS, "slots": SLOTS, "threads": args.threads, "rows": rows}
    write_results("step", facts)


if __name__ == "__main__":
    main()
