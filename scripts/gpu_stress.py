"""What an emulation cannot settle: blocks that merge their splits, launch after launch, and batches of any size.

Rows must have the same bits whatever their batch is. A batch of 64 rows leaves one block to a KV head, which reads its
splits one after another; a row alone has a block for each split, and the last one merges. So the two agree only if the
merge never reads a split that is not there yet, takes them in order, and leaves its counter as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_kernels import Step

from less_export.contract import LayerSpec
from tests.emulation import kernel_layer
from tests.test_state16 import SMALL

BATCHES = (1, 7, 64)
LAUNCHES = 100_000
#: Launches of a CUDA graph.
GRAPH = 100


def different(step: Step, other: Step) -> list[str]:
    """Names of outputs and state of which the rows that both have in common differ in a bit."""
    names = ["out", *(f.name for f in step.layer.state_fields)]
    count = min(len(step.results[0]), len(other.results[0]))
    pairs = zip(names, step.results, other.results, strict=True)
    return [n for n, x, y in pairs if not torch.equal(bits(x[:count]), bits(y[:count]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def layers(quick: bool) -> list[tuple[LayerSpec, str]]:
    """Layers of every dtype, kind of slots and state, and of groups in one tile of heads and in several."""
    slots, kinds = (140, 16) if quick else (1000, 128), [("h2o", "float16", 4, {}), ("sink", "bfloat16", 1, SMALL)]
    if not quick:
        kinds += [("tova", "float32", 2, {}), ("h2o", "bfloat16", 12, {"slot_dtype": "int8"})]
        kinds += [("h2o", "float16", 4, {"max_distance": 100})]
    size = {"kv_heads": 1 if quick else 8}
    return [(replace(kernel_layer(p, *slots, g, 8, **size), **options), dtype) for p, dtype, g, options in kinds]


def rows(device: str, quick: bool) -> dict[str, Any]:
    """Decode and prefill at B = 1, 7 and 64: the rows that they have in common, bit for bit."""
    failed, count = [], 0
    for layer, dtype in layers(quick):
        for chunk in (1, 3 if quick else 70):
            whole = Step(layer, dtype, BATCHES[-1] if not quick else 9, chunk, device)
            for batch in BATCHES[:-1]:
                step, all_ = whole.part(batch), whole.part(len(whole.results[0]))
                for one in (step, all_):
                    for _ in range(2):
                        one.launch()
                count += 1
                if wrong := different(step, all_):
                    failed.append(f"{layer.policy.name} {dtype} chunk {chunk}, {batch} rows: {', '.join(wrong)} differ")
    return {"cases": count, "failed": failed}


def many(steps: Sequence[Step], launches: int, device: str) -> None:
    """Launch all steps that often, each on a stream of its own, as replays of a CUDA graph."""
    if device == "cpu":
        for step in steps:
            for _ in range(launches):
                step.launch()
        return
    graphs = []
    for step in steps:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH):
                step.launch(torch.cuda.current_stream().cuda_stream)
        graphs.append((graph, stream))
    for _ in range(launches // GRAPH):
        for graph, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()


def stress(device: str, quick: bool) -> dict[str, Any]:
    """Two rows alone, on two streams, against the same rows in a batch whose heads have a block each."""
    failed, count = [], 0
    for slots in (128, 256, 1024, 2048) if not quick else (128, 200):  # 2 to 32 splits
        head_dim, group, kv_heads, batch, launches = (16, 2, 1, 3, 2) if quick else (64, 4, 8, 64, LAUNCHES // 4)
        layer = kernel_layer("h2o", slots, head_dim, group, 8, kv_heads)
        whole = Step(layer, "float16", batch, 1, device)
        alone = [whole.part(1), whole.part(1)]
        many([whole], launches, device)
        many(alone, launches, device)
        count += 1
        for index, step in enumerate(alone):
            if wrong := different(step, whole):
                failed.append(f"{slots} slots, stream {index}: {', '.join(wrong)} differ after {launches} launches")
    return {"cases": count, "launches": count * launches, "failed": failed}
