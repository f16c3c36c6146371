"""Rewrites of ONNX Runtime's graph: what they find, what they leave, and that values stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from less_export.exporter.fuse import fuse
from tests import bundles

pytest_plugins = ["tests.bundles"]

WIDTH = 8
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, WIDTH)).astype(np.float32)


def model(text: str, **constants: np.ndarray) -> ir.Model:
    """A graph from x [b,t,8] to y in ONNX's text form, with float32 or int64 constants."""
    graph = f'<ir_version: 10, opset_import: ["" : 23]> g (float[b,t,{WIDTH}] x) => (float[b,t,k] y) {{ {text} }}'
    proto = onnx.parser.parse_model(graph)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(graph: ir.Model) -> np.ndarray:
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def fused(graph: ir.Model) -> Counter[str]:
    """The operators after the rewrites, which must not change the values."""
    before = run(graph)
    fuse(graph)
    np.testing.assert_allclose(run(graph), before, rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in graph.graph)


NORM = """
    square = Pow(x, two)  mean = ReduceMean(square, axis)  shifted = Add(mean, epsilon)  root = Sqrt(shifted)
    inverse = Reciprocal(root)  scaled = Mul(x, inverse)  norm = Mul(weight, scaled)  y = Abs(norm)
"""


def norm_constants(axis: int = -1, exponent: float = 2.0, weight: tuple[int, ...] = (WIDTH,)) -> dict[str, np.ndarray]:
    values = {"two": np.float32(exponent), "epsilon": np.float32(0.1), "axis": np.array([axis])}
    return {n: np.asarray(v) for n, v in values.items()} | {"weight": RNG.standard_normal(weight).astype(np.float32)}


def test_a_norm_is_one_node() -> None:
    assert fused(model(NORM, **norm_constants())) == {"RMSNormalization": 1, "Abs": 1}


@pytest.mark.parametrize(
    "constants",
    [norm_constants(axis=1), norm_constants(exponent=4.0), norm_constants(weight=(1,)), norm_constants(weight=(3, 1))],
    ids=["another axis", "another exponent", "one weight", "weights of rows"],
)
def test_what_is_no_norm_stays(constants: dict[str, np.ndarray]) -> None:
    assert fused(model(NORM, **constants))["Reciprocal"] == 1


def rotation(cos: np.ndarray, sin: np.ndarray) -> ir.Model:
    text = "turned = Neg(x)  a = Mul(x, cos)  b = Mul(turned, sin)  sum = Add(a, b)  y = Abs(sum)"
    return model(text, cos=cos, sin=sin)


def test_a_rotation_by_no_angle_disappears() -> None:
    ones, zeros = np.ones((1, 1, WIDTH), np.float32), np.zeros((1, 1, WIDTH), np.float32)
    assert fused(rotation(ones, zeros)) == {"Abs": 1}
    assert fused(rotation(2 * ones, zeros)) == {"Mul": 1, "Abs": 1}  # the attention scaling of some models
    assert fused(rotation(ones, ones))["Add"] == 1
    assert (
        fused(model("a = Mul(x, ones)  y = Abs(a)", ones=np.ones((2, 1, 1, 1), np.float32)))["Mul"] == 1
    )  # broadcasts


def test_an_export_is_rewritten_for_onnx_runtime_only(kernelled: Path) -> None:
    ours, theirs = (
        Counter(node.op_type for node in onnx.load(kernelled / name, load_external_data=False).graph.node)
        for name in ("model.onnx", "model.trt.onnx")
    )
    assert (ours["RMSNormalization"], ours["Reciprocal"]) == (5, 0)
    assert (theirs["RMSNormalization"], theirs["Reciprocal"]) == (0, 5)


def test_an_export_whose_operator_rotates_has_no_rotations(source: Path, tmp_path: Path) -> None:
    out = bundles.bundle(source, tmp_path / "out", slots="int8", max_distance=32)
    operators = Counter(node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node)
    assert operators["LessAttention"] == 2
    assert not operators.keys() & {"Cos", "Sin", "Neg"}
