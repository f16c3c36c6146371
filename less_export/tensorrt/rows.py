"""Rows of the state by index: what the graph of an engine with the plugin gets beside that of the bundle.

Each LessAttention node takes one more input, ``rows`` [batch] i32, and its state has a number of rows of its own: row b
of a step is row ``rows[b]`` of the state. So a step runs any rows, which are bound once and never move.
"""

from __future__ import annotations

from typing import Any

from ..contract import BATCH, INPUT_IDS, OP_NAME, ROWS, STATE_ROWS, Contract
from ..errors import EngineError

#: The node's attribute that announces the input.
ATTRIBUTE = "rows_by_index"


def by_index(model: bytes, contract: Contract) -> bytes:
    """The serialised graph of ``contract`` with bare LessAttention nodes, which now take rows by index.

    Raises:
        EngineError: not an ONNX model, or the graph uses the name of the input already.
    """
    import onnx  # plans are loaded without it

    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's DecodeError has no public name
        raise EngineError(f"the graph is no ONNX model ({error}): export the bundle again") from error
    graph = proto.graph
    taken = (o for n in graph.node for o in n.output), (t.name for t in (*graph.initializer, *graph.input))
    if any(ROWS in names for names in taken):
        raise EngineError(f"the graph has a tensor called {ROWS}: export the bundle again")
    state = {x.name for s in contract.state() for x in (s.past, s.present)}
    for node in graph.node:
        if node.op_type == OP_NAME:
            node.input.append(ROWS)
            node.attribute.append(onnx.helper.make_attribute(ATTRIBUTE, 1))
        elif node.op_type == "Shape" and node.input[0] in state:
            _measure_tokens(node)
    for tensor in (*graph.input, *graph.output):
        if tensor.name in state and tensor.type.tensor_type.shape.dim:
            tensor.type.tensor_type.shape.dim[0].dim_param = STATE_ROWS
    graph.input.append(onnx.helper.make_tensor_value_info(ROWS, onnx.TensorProto.INT32, [BATCH]))
    return bytes(proto.SerializeToString())


def _measure_tokens(node: Any) -> None:
    """The rows of a step, which exports may take from the shape of a state: take them from the tokens."""
    span = {a.name: a.i for a in node.attribute}
    if span.get("start", 0) != 0:
        return
    if span.get("end") != 1:
        raise EngineError(f"the graph takes more than the rows from the shape of {node.input[0]}: export it again")
    node.input[0] = INPUT_IDS
