"""Timings for gpu_check: CUDA events, medians of 100 replays of a captured graph.

A graph runs one step on each of several sets of state, together at least four times the L2 cache, so that no step
reads its slots from the cache. Both sides of a comparison run in this process, one after the other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_kernels import Step, decode_bytes, total_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from less_export.contract import LayerSpec
from less_export.less import reference
from tests.emulation import kernel_layer

REPLAYS = 100
HEAD_START = 200_000  # cycles, about 0.1 ms
DTYPE = "float16"
HEAD_DIM, GROUP, RANK = 128, 4, 16


def replayed(runs: Sequence[Callable[[], object]], device: str, replays: int = REPLAYS) -> float:
    """Median microseconds per call of ``runs``, captured one after another in a CUDA graph."""
    if device == "cpu":
        started = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - started) / len(runs) * 1e6
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the tensors are still being filled
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    return timed(graph.replay, replays, ahead=HEAD_START) / len(runs)


def timed(run: Callable[[], object], repeats: int, ahead: int = 0) -> float:
    """Median microseconds of a call between two events on the current stream.

    ``ahead`` keeps the GPU busy for that many cycles first, so that the span contains no launch time of the CPU.
    """
    for _ in range(3):
        run()
    spans = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(ahead)
        begin.record()
        run()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(spans)


def sets_for(size: int, device: str) -> int:
    """Number of sets of ``size`` bytes that exceed four times the L2 cache."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(512, -(-4 * cache // size)))


def current_stream(device: str) -> int:
    return 0 if device == "cpu" else int(torch.cuda.current_stream().cuda_stream)


def launches(layer: LayerSpec, batch: int, chunk: int, device: str) -> list[Callable[[], object]]:
    """Launches on enough sets of state to exceed the cache, one for each."""
    first = Step(layer, DTYPE, batch, chunk, device)
    more = sets_for(total_bytes(first.results[1:]), device) - 1
    steps = [first, *(Step(layer, DTYPE, batch, chunk, device, seed + 1) for seed in range(more))]
    return [lambda s=s: s.launch(current_stream(device)) for s in steps]


def bandwidth(device: str, dry: bool) -> dict[str, Any]:
    """A device-to-device copy: bytes read and written per second."""
    size = 2**16 if dry else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    micros = replayed([lambda: target.copy_(source)], device)
    return {"bytes": 2 * size, "gb_per_s": round(2 * size / micros / 1e3, 1)}


def kinds(layer: LayerSpec) -> list[LayerSpec]:
    """The layer with each kind of slots and of state."""
    int8 = replace(layer, slot_dtype="int8")
    return [layer, int8, replace(int8, state_bits=16)]


def decode(device: str, dry: bool) -> list[dict[str, Any]]:
    """Decode steps of policy h2o."""
    rows = []
    for batch in (1, 16, 64):
        for slots in (128, 256, 1024):
            for heads in (8, 32):
                if dry and (batch, slots, heads) != (1, 128, 8):
                    continue
                group = GROUP if heads == 8 else 1
                layer = kernel_layer("h2o", slots, 64 if dry else HEAD_DIM, group, RANK, heads)
                for one in kinds(layer):
                    micros, moved = replayed(launches(one, batch, 1, device), device), decode_bytes(one, DTYPE, batch)
                    row = {"batch": batch, "slots": slots, "kv_heads": heads, "query_heads": group * heads}
                    row |= {
                        "slot_dtype": one.slot_dtype,
                        "state_bits": one.state_bits,
                        "us": round(micros, 2),
                        "bytes": moved,
                    }
                    rows.append({**row, "gb_per_s": round(moved / micros / 1e3, 1)})
    return rows


def prefill(device: str, dry: bool) -> list[dict[str, Any]]:
    """Chunks of prefill; only the operations of attention count (two products per visible pair)."""
    rows = []
    for policy in ("h2o", "sink"):
        for batch, chunk in itertools.product((1, 8), (32, 256, 1024)):
            if dry and (policy, batch, chunk) != ("h2o", 1, 256):
                continue
            slots, heads, tokens = 256, 1 if dry else 8, 8 if dry else chunk
            layer = kernel_layer(policy, slots, 64 if dry else HEAD_DIM, GROUP, RANK, heads)
            pairs = sum(slots + t + 1 for t in range(tokens))
            work = 4 * batch * layer.query_heads * layer.head_dim * pairs
            for one in kinds(layer):
                micros = replayed(launches(one, batch, tokens, device), device)
                row = {"policy": policy, "batch": batch, "chunk": tokens, "slots": slots, "kv_heads": heads}
                row |= {"slot_dtype": one.slot_dtype, "state_bits": one.state_bits, "us": round(micros, 1)}
                rows.append({**row, "tflop_per_s": round(work / micros / 1e6, 1)})
    return rows


def eager(device: str, dry: bool) -> list[dict[str, Any]]:
    """The same decode step in torch on the same state: eager, as users run it, and captured in a graph."""
    rows = []
    for batch in (1, 16, 64):
        if dry and batch > 1:
            continue
        layer = kernel_layer("h2o", 256, 64 if dry else HEAD_DIM, GROUP, RANK, 8)
        ours = replayed(launches(layer, batch, 1, device), device)
        step = Step(layer, DTYPE, batch, 1, device)

        def run(step: Step = step) -> object:
            return reference.less_attention(*step.inputs, **step.layer.attributes())

        captured = replayed([run], device)
        theirs = captured if dry else timed(run, REPLAYS)
        row = {"batch": batch, "slots": 256, "kv_heads": 8, "plugin_us": round(ours, 2), "eager_us": round(theirs, 2)}
        row["eager_graph_us"] = round(captured, 2)
        rows.append({**row, "ratio": round(theirs / ours, 2)})
    return rows


def full_cache(device: str, dry: bool) -> list[dict[str, Any]]:
    """scaled_dot_product_attention of one query over a full cache, against a decode step with 256 slots."""
    rows = []
    heads = 8
    for batch in (1, 16, 64):
        layer = kernel_layer("h2o", 256, 64 if dry else HEAD_DIM, GROUP, RANK, heads)
        if dry and batch > 1:
            continue
        ours = replayed(launches(layer, batch, 1, device), device)
        for context in (64,) if dry else (1024, 4096, 16384, 65536):
            size = 2 * batch * heads * context * HEAD_DIM * 2
            if not dry and 2 * size > 0.8 * torch.cuda.get_device_properties(0).total_memory:
                continue
            shape = (batch, heads, context, HEAD_DIM)
            caches = [
                tuple(torch.randn(shape, device=device, dtype=torch.float16) for _ in range(2))
                for _ in range(sets_for(size, device))
            ]
            q = torch.randn(batch, heads * GROUP, 1, HEAD_DIM, device=device, dtype=torch.float16)
            theirs, backend = sdpa(q, caches, device)
            row = {"batch": batch, "context": context, "slots": 256, "kv_heads": heads, "sdpa": backend}
            row |= {"plugin_us": round(ours, 2), "sdpa_us": round(theirs, 2), "ratio": round(theirs / ours, 2)}
            rows.append(row)
            del caches
    return rows


def sdpa(q: torch.Tensor, caches: Sequence[tuple[torch.Tensor, ...]], device: str) -> tuple[float, str]:
    """The fastest of SDPA's fused implementations over full caches: microseconds and its name."""
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        runs = [lambda c=c: scaled_dot_product_attention(q, *c, enable_gqa=True) for c in caches]
        try:
            with sdpa_kernel([SDPBackend.MATH] if device == "cpu" else backend):
                times[backend.name] = replayed(runs, device)
        except RuntimeError:  # this implementation does not support these shapes
            continue
    name = min(times, key=lambda n: times[n])
    return times[name], name.lower()


BENCHMARKS: dict[str, Callable[[str, bool], Any]] = {
    "bandwidth": bandwidth,
    "decode": decode,
    "eager": eager,
    "full_cache": full_cache,
    "prefill": prefill,
}


def summary(data: dict[str, Any]) -> str:
    """The main figures in a few lines."""
    lines = []
    copy = data.get("bandwidth", {}).get("gb_per_s")
    for r in data.get("decode", []):
        share = f"{100 * r['gb_per_s'] / copy:5.1f}% of a copy" if copy else ""
        kind = f"Hk{r['kv_heads']:<3} {r.get('slot_dtype', 'model'):5}"
        lines.append(f"decode  B{r['batch']:<3} C{r['slots']:<5} {kind} {r['us']:9.2f} us  {share}")
    for r in data.get("full_cache", []):
        lines.append(f"SDPA    B{r['batch']:<3} context {r['context']:<6} {r['sdpa_us']:9.2f} us  {r['ratio']:.1f}x")
    for r in data.get("eager", []):
        lines.append(f"eager   B{r['batch']:<3} {r['eager_us']:9.2f} us  {r['ratio']:.1f}x")
    for r in data.get("prefill", []):
        kind = f"{r['policy']:5} {r.get('slot_dtype', 'model'):5}"
        lines.append(f"prefill B{r['batch']:<3} T{r['chunk']:<5} {kind} {r['tflop_per_s']:7.1f} TFLOP/s")
    return "\n".join(lines)
