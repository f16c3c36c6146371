"""For TensorRT's tests: a tiny decoder with its weights in a separate file, and what backends that run it are asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from less_export.contract import OP_DOMAIN, OP_NAME, OP_VERSION, Contract, LayerSpec, Policy, SlotDtype, StateBits
from less_export.exporter import onnx_nodes, onnx_op
from less_export.runtime.backend import Backend

from .oracle import table_of

NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
    "int64": np.int64,
    "int8": np.int8,
}


def contract_of(
    dtype: str, chunk: int = 4, max_batch: int = 3, capacity: int = 6, slots: SlotDtype = "model",
    max_distance: int | None = None, state_bits: StateBits = 32,
) -> Contract:  # fmt: skip
    """A layer of h2o, with a state of ``state_bits``, and one of window; ``slots`` is what they hold."""
    heavy = capacity // 2
    h2o = LayerSpec(4, 2, 8, 0.35, Policy.H2O, heavy, capacity - heavy, 0, True, capacity, 4)
    window = LayerSpec(4, 2, 8, 0.35, Policy.WINDOW, 0, 5, 5, False, 5, 1)
    h2o, window = (replace(s, slot_dtype=slots, max_distance=max_distance) for s in (h2o, window))
    return Contract(
        (replace(h2o, state_bits=state_bits), window), vocab_size=32, dtype=dtype, chunk=chunk, max_batch=max_batch
    )


def decoder(contract: Contract, folder: Path) -> ir.Model:
    """Embedding, attention layers, head; the weights in ``folder``/weights.bin."""
    kinds = {n: ir.DataType.from_numpy(np.dtype(t)) for n, t in NUMPY.items()}
    op, random, blob = onnx_nodes.Nodes(), np.random.default_rng(0), bytearray()
    initializers: list[ir.Value] = []

    def constant(data: np.ndarray) -> ir.Value:
        name, kind, shape = f"w{len(initializers)}", ir.DataType.from_numpy(data.dtype), data.shape
        where = {"location": "weights.bin", "offset": len(blob), "length": data.nbytes}
        tensor = ir.ExternalTensor(**where, dtype=kind, shape=ir.Shape(shape), name=name, base_dir=folder)
        blob.extend(data.tobytes())
        initializers.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(kind)))
        return initializers[-1]

    def weight(*shape: int, scale: float = 1.0) -> ir.Value:
        data = random.standard_normal(shape) * scale / math.sqrt(shape[0])
        return constant(data.astype(NUMPY[contract.dtype]))

    def values(specs: Any) -> list[ir.Value]:
        return [ir.Value(name=s.name, shape=ir.Shape(s.shape), type=ir.TensorType(kinds[s.dtype])) for s in specs]

    inputs = values(contract.inputs())
    ids, *lengths = inputs[:3]
    past, presents = iter(inputs[3:]), []
    width = contract.layers[0].query_heads * contract.layers[0].head_dim
    x = op.Gather(weight(contract.vocab_size, width, scale=5.0), ids)
    for layer in contract.layers:

        def heads(count: int, x: ir.Value = x, layer: LayerSpec = layer) -> ir.Value:
            flat = op.MatMul(x, weight(width, count * layer.head_dim))
            return op.Transpose(op.Reshape(flat, op.ints(0, 0, count, layer.head_dim)), perm=[0, 2, 1, 3])

        q, k, v = heads(layer.query_heads), heads(layer.kv_heads), heads(layer.kv_heads)
        log_phi = op.to_f32(op.MatMul(q, weight(layer.head_dim, layer.rank)))
        psi = op.MatMul(k, weight(layer.head_dim, layer.rank, scale=float(layer.absorb)))
        psi = op.Softmax(psi, axis=-1) if layer.absorb else psi
        fields, size, centring = len(layer.state_fields), (layer.kv_heads, layer.head_dim), []
        if layer.int8:
            centring = [constant(np.full(size, x, np.float32)) for x in (0.1, 0.7)]
        turning = [] if layer.max_distance is None else [constant(table_of(layer))]  # of some channels
        out, *present = op.op_multi_out(
            OP_NAME,
            [q, k, v, log_phi, psi, *itertools.islice(past, fields), *lengths, *centring, *turning],
            onnx_op.node_attributes(layer),
            num_outputs=1 + fields,
            domain=OP_DOMAIN,
        )
        presents += present
        out = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.ints(0, 0, width))
        x = op.Add(x, op.MatMul(out, weight(width, width)))
    last = op.Max(op.Sub(op.Cast(lengths[1], to=ir.DataType.INT64), op.ints(1)), op.ints(0))
    x = op.GatherND(x, op.Reshape(last, op.ints(-1, 1, 1)), batch_dims=1)
    outputs = [op.to_f32(op.MatMul(x, weight(width, contract.vocab_size))), *presents]
    for value, declared in zip(outputs, values(contract.outputs()), strict=True):
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=op.nodes,
        initializers=initializers,
        name="decoder",
        opset_imports={"": onnx_op.OPSET, OP_DOMAIN: OP_VERSION},
    )
    (folder / "weights.bin").write_bytes(blob)
    model = ir.Model(graph, ir_version=10)
    onnx_op.add_bodies(model, decoding=False)
    return model


def serialised(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def play(backend: Backend) -> Iterator[tuple[str, np.ndarray]]:
    """Results of ragged prefill, decode, parked, reset and copied rows, and reopening."""
    random = np.random.default_rng(1)
    with backend:
        for rows in (3, 2):
            backend.open(rows)
            for step in range(12):
                chunk = 1 if step % 3 == 2 else int(random.integers(1, 5))
                if step == 5:
                    backend.reset_rows([1])
                if step == 7:
                    backend.copy_row(1, 0)
                new = random.integers(0, chunk + 1, rows)
                logits = backend.step(random.integers(0, 32, (rows, chunk)), new)
                yield f"logits {step}", logits[new > 0]
                for row in range(rows):
                    yield from ((f"{n} {step}", x) for n, x in backend.read_row(row).tensors.items())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An empty folder for a graph's weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder
