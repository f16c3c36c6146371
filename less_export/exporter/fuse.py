"""Rewrites of the graph for ONNX Runtime: the same values from fewer nodes, all of them standard operators.

ONNX Runtime's optimiser makes none of these on a CPU; TensorRT's graph stays as traced. An addition and an
RMSNormalization take no longer than ONNX Runtime's own SkipSimplifiedLayerNormalization, so that one is not used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common


def fuse(model: ir.Model) -> None:
    """Rewrite a graph whose weights are bound to their files."""
    remove_idle_rotations(model)
    fuse_norms(model)
    common.RemoveUnusedNodesPass()(model)


# ------------------------------------------------------------------ rotations by no angle


def remove_idle_rotations(model: ir.Model) -> None:
    """Remove ``x * cos + y * sin`` at the angle 0, which is left of a model whose rotary embedding the operator has."""
    for node in list(model.graph):
        same = _unchanged(node)
        if same is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], same)


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The input that a product with ones, or a sum with a product with zeros, has as its value."""
    if node.op_type not in ("Add", "Mul") or node.outputs[0].is_graph_output():
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        if value is None or not _same_shape(value, node.outputs[0]):
            continue
        if node.op_type == "Mul" and _filled(other, 1):
            return value
        product = _producer(other, "Mul")
        if node.op_type == "Add" and product is not None and any(_filled(x, 0) for x in product.inputs):
            return value
    return None


# ------------------------------------------------------------------ norms


def fuse_norms(model: ir.Model) -> None:
    """Make ``w * (x / sqrt(mean(x^2) + eps))`` one RMSNormalization, in float32 and over the last axis."""
    for node in list(model.graph):
        found = _root_mean_square(node)
        scaled = _only_user(node.outputs[0], "Mul")
        if found is None or scaled is None or found[0] not in scaled.inputs:
            continue
        x, epsilon = found
        weighed = _only_user(scaled.outputs[0], "Mul")
        weight = None if weighed is None else next((w for w in weighed.inputs if w is not scaled.outputs[0]), None)
        if weighed is None or weight is None or weighed.outputs[0].is_graph_output() or not _is_scale(weight, x):
            continue
        norm = ir.node("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon}, name=f"{weighed.name}.norm")
        was, now = weighed.outputs[0], norm.outputs[0]
        now.name, now.shape, now.type = f"{was.name}.norm", was.shape, was.type
        model.graph.insert_before(weighed, norm)
        ir.convenience.replace_all_uses_with(was, now)


def _root_mean_square(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and eps where ``node`` takes the reciprocal of sqrt(mean(x^2) + eps)."""
    root = _producer(node.inputs[0], "Sqrt") if node.op_type == "Reciprocal" else None
    shifted = root and _producer(root.inputs[0], "Add")
    mean = shifted and _producer(shifted.inputs[0], "ReduceMean")
    square = mean and _producer(mean.inputs[0], "Pow")
    if shifted is None or mean is None or square is None:
        return None
    x, epsilon = square.inputs[0], _constant(shifted.inputs[1])
    over_last = len(mean.inputs) == 2 and _filled(mean.inputs[1], -1) and mean.attributes.get_int("keepdims", 1) == 1
    if x is None or x.dtype != ir.DataType.FLOAT or not over_last or not _filled(square.inputs[1], 2):
        return None
    return (x, float(epsilon.item())) if epsilon is not None and epsilon.size == 1 else None


def _is_scale(weight: ir.Value, x: ir.Value) -> bool:
    """Whether ``weight`` has one number for each channel of ``x``."""
    if weight.shape is None or x.shape is None or weight.dtype != ir.DataType.FLOAT:
        return False
    return len(weight.shape) == 1 and weight.shape[0] == x.shape[-1]


# ------------------------------------------------------------------ what nodes are


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether both have the same known shape."""
    if a.shape is None or b.shape is None or a.shape != b.shape:
        return False
    return all(isinstance(d, int) or d.value is not None for d in a.shape)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of that type that makes ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that takes ``value``, if it is of that type."""
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """A constant of the graph itself; None for weights, whose values are in files."""
    tensor = None if value is None or not value.is_initializer() else value.const_value
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def _filled(value: ir.Value | None, number: float) -> bool:
    """Whether ``value`` is a constant whose elements are all ``number``."""
    constant = _constant(value)
    return constant is not None and constant.size > 0 and bool((constant == number).all())
