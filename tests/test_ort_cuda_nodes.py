"""Graphs for ONNX Runtime's CUDA provider: that it has a kernel for every node, and the script that asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from .test_cuda_operator import VARIANTS
from .test_ops import model_of

ROOT = Path(__file__).parents[1]
#: Lines of the log of onnxruntime-gpu 1.31.1 while it loads a graph with an ArgMin.
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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import ort_cuda_nodes

    return ort_cuda_nodes


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_kernels_are_known_for_every_node(script: Any, name: str, half: bool) -> None:
    """A node without one would move the state of its layer to the host and back in every step.

    Where this fails, ask ONNX Runtime: ``scripts/ort_cuda_nodes.py``.
    """
    known = set(json.loads((ROOT / "benchmarks/results/ort_cuda.json").read_text())["known"])
    used = script.typed_operators(onnx.load_from_string(model_of(VARIANTS[name], half)))
    assert len(used) > 30
    assert sorted(used - known) == []


def test_types_of_operators_in_branches(script: Any) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 23]>
        agraph (bool c, float[2] x, int8[2] y) => (float[2] z) {
            z = If (c) <then_branch = a () => (float[2] p) { p = Where (c, x, x) },
                        else_branch = b () => (float[2] q) { r = Add (y, y) q = Cast <to = 1> (r) }>
        }""")
    assert script.typed_operators(model) == {"If(bool)", "Where(bool,float,float)", "Add(int8,int8)", "Cast(int8)"}


def test_placement_from_a_log(script: Any) -> None:
    assert script.placement(LOG) == {"cuda": 1, "cpu": 2, "no_cuda_kernel": {"ArgMin": 1}, "copies": 1}


def test_placement_of_all_nodes(script: Any) -> None:
    line = "VerifyEachNodeIsAssignedToAnEp]  All nodes placed on [CUDAExecutionProvider]. Number of nodes: 3"
    assert script.placement(line) == {"cuda": 3, "cpu": 0, "no_cuda_kernel": {}, "copies": 0}


def test_a_log_without_nodes_is_an_error(script: Any) -> None:
    with pytest.raises(SystemExit, match="no nodes in ONNX Runtime's log"):
        script.placement("Failed to load library")
