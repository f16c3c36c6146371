"""Building blocks for tests and self-checks: empty states, and the operator as a one-node ONNX model."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .contract import OP_DOMAIN, OP_NAME, OP_VERSION, LayerSpec
from .dtypes import from_torch, onnx_dtype, torch_dtype
from .exporter import onnx_op


def empty_state(layer: LayerSpec, batch: int, dtype: torch.dtype = torch.float32, poison: bool = False) -> list[Tensor]:
    """State of ``batch`` fresh rows, in the op's order; ``poison`` fills empty slots with NaN, or a large integer."""
    state = []
    for field in layer.state_fields:
        shape = (batch, *(getattr(layer, d) for d in field.dims))
        kind = torch_dtype(field.dtype_in(layer, from_torch(dtype)))
        fill: float = field.empty
        if poison and "capacity" in field.dims and field.name != "position":
            fill = math.nan if kind.is_floating_point else 77
        state.append(torch.full(shape, fill, dtype=kind))
    return state


def operator_model(
    layer: LayerSpec,
    dtype: ir.DataType = ir.DataType.FLOAT,
    table: tuple[int | str, int | str] = ("P", "D_rot"),
    decoding: bool = True,
) -> bytes:
    """Serialised ONNX model of one LessAttention node with its body; B and T are dynamic.

    Args:
        table: shape of the layer's table of angles: distances, and channels that it turns; by default unknown.
        decoding: with a way of its own for one token, if the sizes are known.
    """
    sizes: dict[str, int | str] = {"B": "B", "T": "T", "D": layer.head_dim, "R": layer.rank}
    sizes |= {"Hq": layer.query_heads, "Hk": layer.kv_heads}
    tokens = {"q": "B Hq T D", "k": "B Hk T D", "v": "B Hk T D", "log_phi_q": "B Hq T R", "psi_k": "B Hk T R"}

    def value(name: str, shape: list[int | str], kind: str) -> ir.Value:
        return ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype if kind == "T" else onnx_dtype(kind))
        )

    def state(prefix: str) -> list[ir.Value]:
        return [
            value(f"{prefix}_{f.name}", ["B", *(getattr(layer, d) for d in f.dims)], f.dtype_in(layer, "T"))
            for f in layer.state_fields
        ]

    inputs = [
        value(n, [sizes[d] for d in dims.split()], "float32" if n == "log_phi_q" else "T") for n, dims in tokens.items()
    ]
    inputs += [*state("past"), value("past_length", ["B"], "int32"), value("new_length", ["B"], "int32")]
    if layer.int8:
        inputs += [value(n, [layer.kv_heads, layer.head_dim], "float32") for n in ("key_mean", "key_std")]
    if layer.max_distance is not None:
        inputs.append(value("rotary", [*table], "float32"))
    outputs = [value("out", ["B", layer.query_heads, "T", layer.head_dim], "T"), *state("present")]
    node = ir.Node(
        OP_DOMAIN,
        OP_NAME,
        inputs,
        attributes=ir.convenience.convert_attributes(onnx_op.node_attributes(layer)),
        outputs=outputs,
    )
    graph = ir.Graph(inputs, outputs, nodes=[node], name="op", opset_imports={"": onnx_op.OPSET, OP_DOMAIN: OP_VERSION})
    model = ir.Model(graph, ir_version=10)
    onnx_op.add_bodies(model, decoding)
    return ir.to_proto(model).SerializeToString()


def feed(*groups: list[Tensor]) -> list[np.ndarray]:
    """Tensors as numpy arrays, in order."""
    return [t.numpy() for group in groups for t in group]
