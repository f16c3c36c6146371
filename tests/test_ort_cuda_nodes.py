"""Graphs for ONNX Runtime's CUDA provider: that it has a kernel for every node, and the script that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from less_export import testing

from .oracle import table_of
from .test_cuda_operator import VARIANTS

ROOT = Path(__file__).parents[1]
#: Nodes that ``scripts/ort_cuda_nodes.py`` found on the CPU with onnxruntime-gpu 1.31.1, whatever their inputs.
NO_KERNEL = {"ArgMin"}
#: And those with int8 inputs.
NO_INT8_KERNEL = {"GatherND", "Where"}
#: Lines of that version's log of loading a graph that had these nodes.
LOG = """\
\x1b[0;93m2026-11-28 01:29:16 [I:onnxruntime:, fallback_cpu_capability.cc:167 GetCpuPreferredNodes] ORT optimization- \
Force fallback to CPU execution for node: node_Concat_48 because the CPU execution path is deemed faster than overhead \
involved with execution on other EPs capable of executing this node\x1b[m
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp]  \
Node(s) placed on [CPUExecutionProvider]. Number of nodes: 2
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   Concat (node_Concat_48)
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   \
ArgMin (_inlfunc_LessAttention_node_ArgMin_135)
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp]  \
Node(s) placed on [CUDAExecutionProvider]. Number of nodes: 2
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   Range (node_arange)
2026-11-28 01:29:21 [V:onnxruntime:, session_state.cc:1586 VerifyEachNodeIsAssignedToAnEp]   \
MemcpyToHost (Memcpy_token_6)
"""


def nodes_of(graph: onnx.GraphProto, types: dict[str, int]) -> Iterator[tuple[str, list[int]]]:
    """Operators and the types of their inputs, those of branches too."""
    types = dict(types)
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        types[tensor.name] = tensor.data_type
    for node in graph.node:
        yield node.op_type, [types[x] for x in node.input if x in types]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g, types)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_node_has_a_cuda_kernel(name: str) -> None:
    """A node without one would move the state of its layer to the host and back in every step."""
    layer = VARIANTS[name]
    table = table_of(layer).shape if layer.max_distance else (0, 0)
    model = onnx.load_from_string(testing.operator_model(layer, ir.DataType.FLOAT16, table))
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    nodes = [*nodes_of(inlined.graph, {})]
    used = {op for op, _ in nodes}
    assert {"Where", "MatMul"} <= used
    assert not used & NO_KERNEL
    int8 = {op for op, types in nodes if onnx.TensorProto.INT8 in types}
    assert bool(int8) is (layer.slot_dtype == "int8")
    assert not int8 & NO_INT8_KERNEL


def test_placement_from_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed(monkeypatch)(LOG) == {"cuda": 1, "cpu": 2, "no_cuda_kernel": {"ArgMin": 1}, "copies": 1}


def test_a_log_without_nodes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no nodes in ONNX Runtime's log"):
        placed(monkeypatch)("Failed to load library")


def placed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ort_cuda_nodes

    return ort_cuda_nodes.placement
