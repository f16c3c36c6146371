"""Where a decode step on ONNX Runtime's CPU spends its time, by part of the model and operator, from its profiler.

A bundle of TinyLlama's shape (fewer layers) with random weights and kernels, 256 int8 slots that are full, one row.
Times of a node are medians over the steps. The profiler slows nodes down: the time of a step without it is in the
result too.
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

from less_export.exporter.onnx_op import OP_NAME
from less_export.training.options import DEFAULT_RANK

LAYERS, SLOTS, HIDDEN = 4, 256, 128
#: Position of the step's token: the slots hold what is left of as many tokens.
POSITION = 5000
FORMATS: dict[str, list[str]] = {"f32": [], "int4": ["--weights", "int4"]}
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


def seconds(session: ort.InferenceSession, inputs: dict[str, Any], steps: int) -> float:
    """The median time of a step."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def profile(bundle: Path, scratch: Path, threads: int, steps: int) -> dict[str, Any]:
    """Microseconds and numbers of nodes by part and operator, of all layers together."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = scratch / "optimised.onnx"
    plain = ort.InferenceSession(bundle / "model.onnx", options)
    options.optimized_model_filepath = str(graph)
    options.log_severity_level = 3
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
    profiled = ort.InferenceSession(bundle / "model.onnx", options)
    inputs = feed(plain)
    whole = seconds(plain, inputs, steps)
    seconds(profiled, inputs, steps)
    times = collections.defaultdict(list)
    for event in json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"].removesuffix("_kernel_time")].append(event["dur"])
    outside = {(n.op_type, n.name) for n in onnx.load(graph, load_external_data=False).graph.node}
    parts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    nodes: collections.Counter[str] = collections.Counter()
    for (kind, name), durations in times.items():
        if kind == "If":  # its time is that of the nodes in it
            continue
        part = "cache" if (kind, name) not in outside else "weights" if kind in WEIGHTS else "rest"
        parts[part][kind] += statistics.median(durations)
        nodes[part] += 1
    return {
        "step_us": round(1e6 * whole),
        "parts": {part: {"us": round(sum(by.values())), "nodes": nodes[part]} for part, by in sorted(parts.items())},
        "cache": dict(parts["cache"].most_common()),
    }


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
            rows.append({"weights": name, **profile(scratch / name, scratch, args.threads, args.steps)})
    facts = {"layers": LAYERS, "slots": SLOTS, "operator": OP_NAME, "threads": args.threads, "rows": rows}
    write_results("step", facts)


if __name__ == "__main__":
    main()
