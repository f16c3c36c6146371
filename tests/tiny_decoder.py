"""A tiny random decoder around LessAttention, twice: as an ONNX file and as a torch reference backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper

from less_export.contract import OP_DOMAIN, OP_NAME, OP_VERSION, Contract, LayerSpec, Policy, TensorSpec
from less_export.exporter import onnx_op
from less_export.less import operators
from less_export.less.int8 import Centring
from less_export.runtime.backend import Array, Backend, State, empty

LAYERS = (
    LayerSpec(4, 2, 8, 0.35, Policy.H2O, 3, 4, 0, True, 7, 3),
    LayerSpec(4, 2, 8, 0.35, Policy.WINDOW, 0, 6, 6, False, 6, 1),
    LayerSpec(4, 1, 8, 0.35, Policy.SINK, 2, 5, 0, True, 7, 2),
)
CONTRACT = Contract(LAYERS, vocab_size=50, dtype="float32", chunk=5, max_batch=3)
#: The same with int8 slots in the first layer, whose keys and values are exact in any library.
INT8 = replace(CONTRACT, layers=(replace(LAYERS[0], slot_dtype="int8"), *LAYERS[1:]))
_KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
}


def weights(contract: Contract, seed: int = 0) -> dict[str, Array]:
    """Random weights by name, in the contract's dtype; the log phi map and the centring of keys stay float32."""
    rng = np.random.default_rng(seed)
    width = contract.layers[0].query_heads * contract.layers[0].head_dim
    shapes = {"embed": (contract.vocab_size, width), "head": (width, contract.vocab_size)}
    for i, s in enumerate(contract.layers):
        shapes |= {
            f"q.{i}": (width, s.query_heads * s.head_dim),
            f"k.{i}": (width, s.kv_heads * s.head_dim),
            f"v.{i}": (width, s.kv_heads * s.head_dim),
            f"o.{i}": (s.query_heads * s.head_dim, width),
            f"phi.{i}": (s.head_dim, s.rank),
            f"psi.{i}": (s.head_dim, s.rank),
        }
    values = {n: rng.standard_normal(s) / np.sqrt(s[0]) * (3 if n == "embed" else 1) for n, s in shapes.items()}
    for i, s in enumerate(contract.layers):
        if s.int8:
            for name in ("embed", f"k.{i}", f"v.{i}"):  # few bits: products and their sums are exact, and so are codes
                values[name] = np.round(values[name] * 16) / 16
            values[f"mean.{i}"] = rng.standard_normal((s.kv_heads, s.head_dim))
            values[f"std.{i}"] = rng.random((s.kv_heads, s.head_dim)) + 0.5
    single = ("phi.", "mean.", "std.")
    return {n: v.astype("float32" if n.startswith(single) else contract.dtype) for n, v in values.items()}


def onnx_decoder(contract: Contract, path: Path, seed: int = 0) -> Path:
    """Write the decoder with its function bodies."""
    initializers = [numpy_helper.from_array(w, n) for n, w in weights(contract, seed).items()]
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
        name = out or f"n{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(*values: int) -> str:
        name = f"c{len(initializers)}"
        initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    x = op("Gather", "embed", "input_ids")
    for i, s in enumerate(contract.layers):

        def heads(w: str, n: int, x: str = x, s: LayerSpec = s) -> str:
            split = op("Reshape", op("MatMul", x, w), const(0, 0, n, s.head_dim))
            return op("Transpose", split, perm=[0, 2, 1, 3])

        q, k, v = heads(f"q.{i}", s.query_heads), heads(f"k.{i}", s.kv_heads), heads(f"v.{i}", s.kv_heads)
        log_phi = op("MatMul", op("Cast", q, to=TensorProto.FLOAT), f"phi.{i}")
        psi = op("Softmax", op("MatMul", k, f"psi.{i}"), axis=-1)
        if not s.absorb:
            psi = op("Sub", psi, psi)
        past = [f"past.{i}.{f.name}" for f in s.state_fields]
        present = [f"present.{i}.{f.name}" for f in s.state_fields]
        centring = [f"mean.{i}", f"std.{i}"] if s.int8 else []
        nodes.append(
            helper.make_node(
                OP_NAME,
                [q, k, v, log_phi, psi, *past, "past_length", "new_length", *centring],
                [f"attn.{i}", *present],
                domain=OP_DOMAIN,
                **onnx_op.node_attributes(s),
            )
        )
        merged = op("Reshape", op("Transpose", f"attn.{i}", perm=[0, 2, 1, 3]), const(0, 0, -1))
        x = op("Add", x, op("MatMul", merged, f"o.{i}"))
    if contract.logits == "last":
        last = op("Max", op("Sub", op("Cast", "new_length", to=TensorProto.INT64), const(1)), const(0))
        x = op("GatherND", x, op("Unsqueeze", last, const(1, 2)), batch_dims=1)
    op("Cast", op("MatMul", x, "head"), out="logits", to=TensorProto.FLOAT)

    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, _KINDS[spec.dtype], spec.shape)

    inputs, outputs = [info(s) for s in contract.inputs()], [info(s) for s in contract.outputs()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", onnx_op.OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    onnx_op.add_bodies(model)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


class ReferenceBackend(Backend):
    """The same decoder in torch around ``operators.run``."""

    name = "reference"

    def __init__(self, contract: Contract, seed: int = 0) -> None:
        super().__init__(contract)
        self.weights = {n: torch.from_numpy(w) for n, w in weights(contract, seed).items()}
        self.state: dict[str, torch.Tensor] = {}

    def _open(self, batch: int) -> None:
        self.state = {s.past.name: torch.from_numpy(empty(s, batch)) for s in self.contract.state()}

    def _close(self) -> None:
        self.state = {}

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, rows: Array) -> np.ndarray:
        w, new = self.weights, torch.from_numpy(new_length)
        x = w["embed"][torch.from_numpy(input_ids)]
        for i, s in enumerate(self.contract.layers):
            q, k, v = (
                (x @ w[f"{n}.{i}"]).unflatten(-1, (heads, s.head_dim)).transpose(1, 2)
                for n, heads in (("q", s.query_heads), ("k", s.kv_heads), ("v", s.kv_heads))
            )
            psi = torch.softmax(k @ w[f"psi.{i}"], -1) * float(s.absorb)
            names = [f"past.{i}.{f.name}" for f in s.state_fields]
            past = [self.state[n][rows] for n in names]
            tokens, lengths = (q, k, v, q.float() @ w[f"phi.{i}"], psi), (torch.from_numpy(past_length), new)
            centring = Centring(w[f"mean.{i}"], w[f"std.{i}"]) if s.int8 else None
            out, *present = operators.run(s, tokens, past, lengths, centring)
            for name, x_new in zip(names, present, strict=True):
                self.state[name][rows] = x_new
            x = x + out.transpose(1, 2).flatten(2) @ w[f"o.{i}"]
        if self.contract.logits == "last":
            x = x[torch.arange(len(x)), (new.long() - 1).clamp(min=0)][:, None]
        return (x @ w["head"]).float().numpy()

    def _read_row(self, row: int) -> State:
        return {n: x[row].numpy().copy() for n, x in self.state.items()}

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        for name, x in self.state.items():
            x[row] = torch.from_numpy(tensors[name])
