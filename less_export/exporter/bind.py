"""Graphs whose initializers point into safetensors files: no weight is copied.

An initializer stored in another dtype than the graph's gets a Cast, a quantised one a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..dtypes import from_safetensors, onnx_dtype
from ..hf.weights import SCALES, QuantisedTensor, Stored, StoredTensor

#: Operators that only move the values of their first input, a weight.
_MOVES = ("Gather", "Transpose")


def bind(model: ir.Model, tensors: Mapping[str, Stored], names: Mapping[Path, str], folder: Path) -> None:
    """Point the initializers named in ``tensors`` at their bytes.

    ``names`` gives each weight file's name inside ``folder``, where the graph will be saved. An initializer
    stored in another dtype than the graph's gets a Cast, which ONNX Runtime and TensorRT fold when they load it. Where
    the Cast widens the weight it comes after the operators that only move values: a matrix is transposed while it is
    small, and only the rows that are looked up in an embedding are cast, so that the table keeps its dtype.
    """
    graph = model.graph

    def external(name: str, stored: StoredTensor, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        place = (names[stored.file], stored.offset, stored.length, dtype)
        tensor = ir.ExternalTensor(*place, name=name, shape=ir.Shape(shape), base_dir=folder)
        graph.initializers[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor
        )
        return graph.initializers[name]

    for name, value in list(graph.initializers.items()):
        stored, wanted = tensors.get(name), value.dtype
        if stored is None:
            continue
        assert wanted is not None
        if isinstance(stored, QuantisedTensor):
            del graph.initializers[name]
            dtype = ir.DataType.INT4 if stored.packed else ir.DataType.INT8
            codes = external(f"{name}.codes", stored.codes, dtype, stored.matrix)
            scales = external(f"{name}{SCALES}", stored.scales, ir.DataType.FLOAT, stored.scales.shape)
            _dequantise(graph, value, stored, codes, scales)
            continue
        dtype = onnx_dtype(str(from_safetensors(stored.dtype)))
        if dtype == wanted:
            value.const_value = external(name, stored, dtype, stored.shape).const_value
            graph.initializers[name] = value
            continue
        del graph.initializers[name]
        raw = external(f"{name}.stored", stored, dtype, stored.shape)
        users = [node for node, _ in value.uses()]
        movers = [node for node in users if node.op_type in _MOVES]
        if dtype.itemsize >= wanted.itemsize and {node.op_type for node in users} != {"Gather"}:
            movers = []  # nothing gained, and TensorRT would keep the table of tied embeddings twice
        for node in movers:
            node.replace_input_with(0, raw)
            moved = node.outputs[0]
            moved.type = ir.TensorType(dtype)
            cast = _cast(moved, wanted, f"{node.name}.cast")
            ir.convenience.replace_all_uses_with(moved, cast.outputs[0])
            cast.replace_input_with(0, moved)
            graph.insert_after(node, cast)
        if value.uses():
            cast = _cast(raw, wanted, f"{name}.cast")
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.outputs[0].name = name
            graph.insert_before(graph[0], cast)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """A node that casts ``value``, not yet in the graph."""
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{name}.out", value.shape, ir.TensorType(dtype)
    return node


def _dequantise(graph: ir.Graph, value: ir.Value, stored: QuantisedTensor, codes: ir.Value, scales: ir.Value) -> None:
    """Replace ``value``, or its transpose, by codes * scales in ``value``'s dtype."""
    turned = [node for node, _ in value.uses()] if stored.transposed else []
    for node in turned:
        if node.op_type != "Transpose":
            raise RuntimeError(f"{value.name} was quantised for its Transpose, but {node.op_type} takes it too")
    nodes = []
    if value.dtype != scales.dtype:
        assert value.dtype is not None
        nodes.append(_cast(scales, value.dtype, f"{scales.name}.cast"))
        scales = nodes[0].outputs[0]
    attributes = {"axis": 0, "block_size": stored.block}
    nodes.append(ir.node("DequantizeLinear", [codes, scales], attributes=attributes, name=f"{value.name}.dequantise"))
    matrix = nodes[-1].outputs[0]
    matrix.name, matrix.shape, matrix.type = f"{value.name}.matrix", codes.shape, scales.type
    for before in [node.outputs[0] for node in turned] or [value]:
        ir.convenience.replace_all_uses_with(before, matrix)
    graph.remove(turned, safe=True)
    graph.insert_before(graph[0], nodes)
