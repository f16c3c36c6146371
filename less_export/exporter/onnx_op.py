"""``less::LessAttention`` in ONNX: the translation of the torch op, and its body in standard operators.

The body is one function per policy, with and without the low-rank term, scores that fade, int8 slots and a largest
distance; a node selects its own through ``overload``. ONNX Runtime and TensorRT inline it; a TensorRT plugin replaces
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from ..contract import OP_DOMAIN, OP_NAME, OP_VERSION, SCALE_FIELDS, STATE_FIELDS, LayerSpec
from ..dtypes import COMPUTE_DTYPES, onnx_type
from ..less import reference
from ..less.policies import EvictionPolicy, by_code
from .onnx_nodes import ATTRIBUTES, MAX_DISTANCE, SLOT_BITS, Nodes
from .onnx_slots import in_slots, turned

OPSET = 23

_TOKENS = {"q": "T", "k": "T", "v": "T", "log_phi_q": "float32", "psi_k": "T"}
_LENGTHS = dict.fromkeys(("past_length", "new_length"), "int32")
_CENTRING = dict.fromkeys(("key_mean", "key_std"), "float32")
_ROTARY = {"rotary": "float32"}


def _state(prefix: str, int8: bool) -> dict[str, str]:
    """Names and dtypes of the state tensors; "S" is the dtype of the slots."""
    return {f"{prefix}_{f.name}": f.dtype for f in STATE_FIELDS + (SCALE_FIELDS if int8 else ())}


def _inputs(int8: bool, distance: bool) -> dict[str, str]:
    constants = (_CENTRING if int8 else {}) | (_ROTARY if distance else {})
    return {**_TOKENS, **_state("past", int8), **_LENGTHS, **constants}


def _outputs(int8: bool) -> dict[str, str]:
    return {"out": "T", **_state("present", int8)}


@dataclass(frozen=True)
class Body:
    """What selects a node's body."""

    policy: EvictionPolicy
    absorb: bool
    fades: bool = False
    int8: bool = False
    distance: bool = False

    @classmethod
    def of(cls, node: ir.Node) -> Body:
        facts = node.attributes
        absorb, fades = bool(facts["absorb"].as_int()), facts["decay"].as_float() != 1
        return cls(by_code(facts["policy"].as_int()), absorb, fades, SLOT_BITS in facts, MAX_DISTANCE in facts)

    @property
    def overload(self) -> str:
        """The overload that names the body."""
        kinds = {"fading": self.fades, "int8": self.int8, "distance": self.distance, "lowrank": self.absorb}
        return "_".join([self.policy.name, *(kind for kind, chosen in kinds.items() if chosen)])


def node_attributes(layer: LayerSpec) -> dict[str, int | float]:
    """Attributes of a layer's LessAttention node."""
    return {**layer.attributes(), **_optional(8 * layer.int8, layer.max_distance or 0)}


def _optional(slot_bits: int, max_distance: int) -> dict[str, int]:
    """Attributes that a node has only where they mean something."""
    return {n: v for n, v in ((SLOT_BITS, slot_bits), (MAX_DISTANCE, max_distance)) if v}


def _types(int8: bool, distance: bool) -> dict[str, ir.AttributeType]:
    """The attributes of a node and their types."""
    return ATTRIBUTES | dict.fromkeys(_optional(int(int8), int(distance)), ir.AttributeType.INT)


# ------------------------------------------------------------------ torch.ops.less.attention -> one node


def _schema(int8: bool, distance: bool) -> onnx.defs.OpSchema:
    tensor = {"T": "T", "S": onnx_type("int8") if int8 else "T", **{n: onnx_type(n) for n in ("float32", "int32")}}
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = {ir.AttributeType.FLOAT: onnx.defs.OpSchema.AttrType.FLOAT}
    attributes = _types(int8, distance)
    return onnx.defs.OpSchema(
        OP_NAME,
        OP_DOMAIN,
        OP_VERSION,
        "LESS attention (arXiv 2402.09398): sparse slots, chunk and low-rank state in one softmax.",
        inputs=[parameter(n, tensor[t]) for n, t in _inputs(int8, distance).items()],
        outputs=[parameter(n, tensor[t]) for n, t in _outputs(int8).items()],
        type_constraints=[("T", [onnx_type(d) for d in COMPUTE_DTYPES], "compute dtype")],
        attributes=[
            attribute(n, kinds.get(t, onnx.defs.OpSchema.AttrType.INT), "", required=True)
            for n, t in attributes.items()
        ],
    )


def _translation(int8: bool) -> Callable[..., Any]:
    """What makes one LessAttention node of the eager arguments of a torch operator."""
    names = [*_inputs(int8, False), *ATTRIBUTES, MAX_DISTANCE, *_ROTARY]

    def translate(*args: Any, **named: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | named
        max_distance = arguments.get(MAX_DISTANCE, 0)
        opset = onnxscript.values.Opset(OP_DOMAIN, OP_VERSION)
        operator = onnxscript.values.Op(opset, OP_NAME, _schema(int8, max_distance > 0))
        attributes = {n: arguments[n] for n in ATTRIBUTES} | _optional(8 * int8, max_distance)
        return operator(*(arguments[n] for n in _inputs(int8, max_distance > 0)), **attributes)

    return translate


def translation_table() -> dict[Any, Any]:
    """``custom_translation_table`` for ``torch.onnx.export``."""
    assert reference.attention is not None  # importing it registers the operators
    operators = torch.ops.less
    return {operators.attention.default: _translation(False), operators.attention_int8.default: _translation(True)}


# ------------------------------------------------------------------ the body


#: Finite stand-in for -inf: exp(_HIDDEN - peak) is 0 for every real peak.
_HIDDEN = -1.0e30


def _attend(op: Nodes, x: SimpleNamespace, s: SimpleNamespace, absorb: bool) -> ir.Value:
    """out [B,Hq,T,D]; leaves the probabilities over slots and chunk in ``s.probability`` [B,Hk,G,T,N]."""
    flat = op.shape(s.heads, op.ints(-1))  # [B,Hk,G*T, ...]
    probability = op.Softmax(s.logits, axis=-1)
    s.probability = op.Reshape(probability, s.shape5)
    values = s.values
    if absorb:
        filled = op.Greater(x.past_z, op.f32(0.0))
        z = op.Where(filled, x.past_z, op.f32(1.0))
        log_phi = op.Reshape(op.to_f32(x.log_phi_q), op.shape(flat, op.dim(x.log_phi_q, 3)))
        mass = op.Add(log_phi, op.Unsqueeze(op.Log(z), op.ints(2)))
        mass = op.Where(op.Unsqueeze(filled, op.ints(2)), mass, op.f32(_HIDDEN))
        mean = op.rows(filled, op.Div(x.past_h, op.Unsqueeze(z, op.ints(-1))))
        probability = op.Softmax(op.Concat(s.logits, mass, axis=-1), axis=-1)
        values = op.Concat(values, mean, axis=2)
    out = op.Reshape(op.MatMul(probability, values), op.Shape(x.q))
    out = op.Where(op.Unsqueeze(s.query_valid, op.ints(1, 3)), out, op.f32(0.0))
    return op.CastLike(out, x.q)


def _score(op: Nodes, x: SimpleNamespace, s: SimpleNamespace, scoring: str, fades: bool) -> ir.Value:
    """Scores [B,Hk,N] after the chunk."""
    fresh = op.Expand(op.f32(0.0), op.shape(s.heads, s.chunk))
    if scoring == "none":
        return op.Expand(op.f32(0.0), op.Shape(s.position))
    past = op.Where(s.held, op.Concat(x.past_score, fresh, axis=2), op.f32(0.0))
    counts = s.query_valid
    if scoring == "last":
        counts = op.Equal(s.step, op.Sub(s.new_length, op.i32(1)))
    seen = op.Where(op.Unsqueeze(counts, op.ints(1, 2, 4)), s.probability, op.f32(0.0))
    if fades:  # see ``reference.fading``
        decay, age = op.attribute("decay"), op.Sub(op.Sub(s.new_length, op.i32(1)), s.step)
        weight = op.Pow(decay, op.to_f32(op.Max(age, op.i32(0))))
        seen = op.Mul(seen, op.Unsqueeze(weight, op.ints(1, 2, 4)))
        past = op.Mul(past, op.Unsqueeze(op.Pow(decay, op.to_f32(s.new_length)), op.ints(2)))
    seen = op.ReduceSum(seen, op.ints(2, 3), keepdims=0)
    if scoring == "accumulate":
        return op.Add(past, seen)
    return op.Where(op.Unsqueeze(op.Greater(s.new_length, op.i32(0)), op.ints(2)), seen, past)


def _place(op: Nodes, s: SimpleNamespace, kept: ir.Value) -> ir.Value:
    """Source of every slot, i64 [B,Hk,C] into [slots, chunk]; -1 leaves it empty (see ``reference.place``)."""
    axis, zero = op.ints(2), op.ints(0)
    kept_slot = op.Slice(kept, zero, s.slots, axis)
    kept_new = op.Slice(kept, s.slots, op.Add(s.slots, s.chunk), axis)

    def running(mask: ir.Value) -> ir.Value:
        count = op.CumSum(op.to_f32(mask), op.Constant(value_int=2))
        return op.Cast(count, to=ir.DataType.INT64)

    # arrivals[j] = index of the j-th kept new token; tokens that are not kept go to the spare last place.
    index = op.Expand(op.Cast(s.step, to=ir.DataType.INT64), op.Shape(kept_new))
    turn_new = op.Where(kept_new, op.Sub(running(kept_new), op.ints(1)), s.chunk)
    spare = op.Expand(op.ints(0), op.shape(s.heads, op.Add(s.chunk, op.ints(1))))
    arrivals = op.ScatterElements(spare, turn_new, index, axis=2)
    free = op.Not(kept_slot)
    turn = op.Sub(running(free), op.ints(1))
    arriving = op.ReduceSum(op.Cast(kept_new, to=ir.DataType.INT64), axis, keepdims=1)
    fills = op.And(free, op.Less(turn, arriving))
    turn = op.Max(op.Min(turn, s.chunk), op.ints(0))
    arrival = op.Add(op.GatherElements(arrivals, turn, axis=2), s.slots)
    own = op.Range(op.Constant(value_int=0), op.Squeeze(s.slots, zero), op.Constant(value_int=1))
    return op.Where(kept_slot, own, op.Where(fills, arrival, op.ints(-1)))


def function_body(body: Body) -> ir.Function:
    """The operator as an ONNX function, opset 23, same inputs, outputs and attributes as the node."""
    op, policy, absorb = Nodes(), body.policy, body.absorb
    inputs = [ir.Value(name=n) for n in _inputs(body.int8, body.distance)]
    x = SimpleNamespace(**{str(value.name): value for value in inputs})

    s = SimpleNamespace()
    s.heads = op.dim(x.past_key, 0, 2)  # [B,Hk]
    s.slots, s.chunk = op.dim(x.past_key, 2), op.dim(x.k, 2)
    ticks = op.Range(op.Constant(value_int=0), op.Squeeze(s.chunk, op.ints(0)), op.Constant(value_int=1))
    s.step = op.Cast(ticks, to=ir.DataType.INT32)  # [T]
    s.past_length = op.Unsqueeze(x.past_length, op.ints(1))
    s.new_length = op.Unsqueeze(x.new_length, op.ints(1))
    query_position = op.Add(s.past_length, s.step)  # [B,T]
    s.query_valid = op.Less(s.step, s.new_length)
    new_position = op.Unsqueeze(op.Where(s.query_valid, query_position, op.i32(-1)), op.ints(1))
    s.position = op.Concat(x.past_position, op.Expand(new_position, op.shape(s.heads, s.chunk)), axis=2)
    s.held = op.GreaterOrEqual(s.position, op.i32(0))

    slots = in_slots(op, x, body.int8)
    q, keys = turned(op, x, s, slots.keys) if body.distance else (op.to_f32(x.q), slots.keys)
    all_keys, s.values = op.rows(s.held, op.Concat(*keys, axis=2)), op.rows(s.held, slots.values)
    tokens = op.dim(s.position, 2)
    grouped = op.shape(s.heads, op.ints(-1))
    q = op.Reshape(q, op.shape(grouped, op.dim(x.q, 3)))
    s.shape5 = op.shape(grouped, s.chunk, tokens)
    logits = op.Mul(op.MatMul(q, op.Transpose(all_keys, perm=[0, 1, 3, 2])), op.attribute("scale"))

    at = op.Unsqueeze(s.position, op.ints(2, 3))  # [B,Hk,1,1,N]
    now = op.Unsqueeze(query_position, op.ints(1, 2, 4))  # [B,1,1,T,1]
    visible = op.And(op.Unsqueeze(s.held, op.ints(2, 3)), op.LessOrEqual(at, now))
    window = op.attribute("window")
    unlimited = op.LessOrEqual(window, op.i32(0))
    visible = op.And(visible, op.Or(unlimited, op.Greater(at, op.Sub(now, window))))
    logits = op.Where(visible, op.Reshape(logits, s.shape5), op.f32(_HIDDEN))
    s.logits = op.Reshape(logits, op.shape(grouped, tokens))

    out = _attend(op, x, s, absorb)
    score = _score(op, x, s, policy.scoring, body.fades)

    end = op.Add(s.past_length, s.new_length)
    end = op.Unsqueeze(end, op.ints(2))  # [B,1,1]
    oldest = policy.oldest_onnx(op, end, window)
    live = op.And(s.held, op.Or(unlimited, op.GreaterOrEqual(s.position, oldest)))
    candidates = SimpleNamespace(live=live, position=s.position, score=score, end=end)
    kept = policy.keep_onnx(op, candidates, op.attribute("heavy"), op.attribute("recent"), s.slots)

    source = _place(op, s, kept)
    index = op.Max(source, op.ints(0))
    rows = op.Unsqueeze(index, op.ints(-1))

    def filled(past: ir.Value, new: ir.Value) -> ir.Value:
        return op.GatherND(op.Concat(past, new, axis=2), rows, batch_dims=2)

    both_psi = op.Concat(x.past_psi, x.psi_k, axis=2)
    position = op.GatherElements(s.position, index, axis=2)
    position = op.Where(op.GreaterOrEqual(source, op.ints(0)), position, op.i32(-1))
    if absorb:
        leaving = op.rows(op.And(s.held, op.Not(kept)), op.to_f32(both_psi))
        absorbed = op.rows(s.held, slots.absorbed) if body.int8 else s.values
        h = op.Add(x.past_h, op.MatMul(op.Transpose(leaving, perm=[0, 1, 3, 2]), absorbed))
        z = op.Add(x.past_z, op.ReduceSum(leaving, op.ints(2), keepdims=0))
    else:
        h, z = op.Identity(x.past_h), op.Identity(x.past_z)

    after = {
        "out": out,
        "present_psi": op.GatherND(both_psi, rows, batch_dims=2),
        "present_score": op.GatherElements(score, index, axis=2),
        "present_position": position,
        "present_h": h,
        "present_z": z,
        **{f"present_{name}": filled(*pair) for name, pair in slots.fills.items()},
    }
    # Unique names: TensorRT's parser (RTX 1.7.1) gives a Constant of the main graph the value of a Constant of the
    # same name in a function called earlier.
    for number, value in enumerate(v for node in op.nodes for v in node.outputs):
        value.name = f"{body.overload}.{number}"
    outputs = [after[name] for name in _outputs(body.int8)]
    for name, value in zip(_outputs(body.int8), outputs, strict=True):
        value.name = name
    attributes = _types(body.int8, body.distance)
    return ir.Function(
        OP_DOMAIN,
        OP_NAME,
        body.overload,
        graph=ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": OPSET}, name=OP_NAME),
        attributes=[ir.Attr(n, t, None) for n, t in attributes.items()],
    )


# ------------------------------------------------------------------ bodies in and out of a model


def less_nodes(model: ir.Model) -> list[ir.Node]:
    """The LessAttention nodes of a model, in graph order."""
    return [n for n in model.graph if n.domain == OP_DOMAIN and n.op_type == OP_NAME]


def add_bodies(model: ir.Model) -> None:
    """Give every LessAttention node the body of its policy (after optimisation, which would inline it)."""
    for node in less_nodes(model):
        body = Body.of(node)
        node.overload = body.overload
        key = (OP_DOMAIN, OP_NAME, node.overload)
        if key not in model.functions:
            model.functions[key] = function_body(body)
    model.graph.opset_imports[OP_DOMAIN] = OP_VERSION


def strip_bodies(model: ir.Model) -> None:
    """Leave bare LessAttention nodes, for TensorRT's plugin (a local function would win over it)."""
    for node in less_nodes(model):
        node.overload = ""
    for key in [k for k in model.functions if k[:2] == (OP_DOMAIN, OP_NAME)]:
        del model.functions[key]
