"""``less::LessAttention`` in ONNX: the translation of the torch op, and its body in standard operators.

The body is one function per policy, with and without the low-rank term (in 32 or 16 bits), scores that fade, int8
slots and a largest distance; a node selects its own through ``overload``. ONNX Runtime and TensorRT inline it; a
TensorRT plugin replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from ..contract import OP_DOMAIN, OP_NAME, OP_VERSION, LayerSpec, state_fields
from ..dtypes import COMPUTE_DTYPES, onnx_type
from ..less import operators
from ..less.policies import EvictionPolicy, by_code
from .onnx_decode import HIDDEN, Sizes, one_token
from .onnx_nodes import ATTRIBUTES, MAX_DISTANCE, SLOT_BITS, STATE_BITS, Nodes
from .onnx_slots import in_slots, turned
from .onnx_state import absorb, low_rank

OPSET = 23

_TOKENS = {"q": "T", "k": "T", "v": "T", "log_phi_q": "float32", "psi_k": "T"}
_LENGTHS = dict.fromkeys(("past_length", "new_length"), "int32")
_CENTRING = dict.fromkeys(("key_mean", "key_std"), "float32")
_ROTARY = {"rotary": "float32"}
#: What a low-rank state of 32 bits holds.
_STATE32 = {"P": "T", "H": "float32"}


@dataclass(frozen=True)
class Form:
    """What decides the inputs, outputs and optional attributes of a node."""

    int8: bool = False
    state16: bool = False
    distance: bool = False

    def _state(self, prefix: str) -> dict[str, str]:
        return {f"{prefix}_{f.name}": f.dtype for f in state_fields(self.int8, self.state16)}

    def inputs(self) -> dict[str, str]:
        """Names and dtypes, those of state as in :class:`~less_export.contract.StateField`."""
        constants = (_CENTRING if self.int8 else {}) | (_ROTARY if self.distance else {})
        return {**_TOKENS, **self._state("past"), **_LENGTHS, **constants}

    def outputs(self) -> dict[str, str]:
        return {"out": "T", **self._state("present")}

    def dtypes(self) -> dict[str, str]:
        """The dtype of each kind of state."""
        return {"S": "int8" if self.int8 else "T", **({"P": "int8", "H": "int8"} if self.state16 else _STATE32)}

    def types(self) -> dict[str, ir.AttributeType]:
        """The attributes of a node and their types."""
        return ATTRIBUTES | dict.fromkeys(self.optional(1), ir.AttributeType.INT)

    def optional(self, max_distance: int) -> dict[str, int]:
        """Attributes that a node has only where they mean something."""
        values = {SLOT_BITS: 8 * self.int8, STATE_BITS: 16 * self.state16, MAX_DISTANCE: max_distance * self.distance}
        return {n: v for n, v in values.items() if v}


@dataclass(frozen=True)
class Body:
    """What selects a node's body."""

    policy: EvictionPolicy
    absorb: bool
    fades: bool
    form: Form
    decoding: Sizes | None = None

    @classmethod
    def of(cls, node: ir.Node, decoding: bool = False) -> Body:
        """``decoding``: with a way of its own for chunks of one token, where there is one."""
        facts = node.attributes
        absorb, fades = bool(facts["absorb"].as_int()), facts["decay"].as_float() != 1
        form = Form(*(name in facts for name in (SLOT_BITS, STATE_BITS, MAX_DISTANCE)))
        policy = by_code(facts["policy"].as_int())
        inputs = dict(zip(form.inputs(), node.inputs, strict=True))
        decoding &= policy.takes_one_slot and not (policy.evicts and facts["window"].as_int() > 0)
        return cls(policy, absorb, fades, form, Sizes.of(inputs) if decoding else None)

    @property
    def overload(self) -> str:
        """The overload that names the body."""
        kinds = {"fading": self.fades, **asdict(self.form), "lowrank": self.absorb}
        sizes = [] if self.decoding is None else [str(self.decoding)]
        return "_".join([self.policy.name, *(kind for kind, chosen in kinds.items() if chosen), *sizes])


def node_attributes(layer: LayerSpec) -> dict[str, int | float]:
    """Attributes of a layer's LessAttention node."""
    form = Form(layer.int8, layer.state16, layer.max_distance is not None)
    return {**layer.attributes(), **form.optional(layer.max_distance or 0)}


# ------------------------------------------------------------------ torch.ops.less.attention -> one node


def _schema(form: Form) -> onnx.defs.OpSchema:
    kinds = form.dtypes()
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute

    def parameters(tensors: dict[str, str]) -> list[onnx.defs.OpSchema.FormalParameter]:
        stored = {name: kinds.get(kind, kind) for name, kind in tensors.items()}
        return [parameter(name, kind if kind == "T" else onnx_type(kind)) for name, kind in stored.items()]

    attribute_kinds = {ir.AttributeType.FLOAT: onnx.defs.OpSchema.AttrType.FLOAT}
    return onnx.defs.OpSchema(
        OP_NAME,
        OP_DOMAIN,
        OP_VERSION,
        "LESS attention (arXiv 2402.09398): sparse slots, chunk and low-rank state in one softmax.",
        inputs=parameters(form.inputs()),
        outputs=parameters(form.outputs()),
        type_constraints=[("T", [onnx_type(d) for d in COMPUTE_DTYPES], "compute dtype")],
        attributes=[
            attribute(n, attribute_kinds.get(t, onnx.defs.OpSchema.AttrType.INT), "", required=True)
            for n, t in form.types().items()
        ],
    )


def _translation(form: Form) -> Callable[..., Any]:
    """What makes one LessAttention node of the eager arguments of a torch operator."""
    names = [*form.inputs(), *ATTRIBUTES, MAX_DISTANCE, *_ROTARY]

    def translate(*args: Any, **named: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | named
        max_distance = arguments.get(MAX_DISTANCE, 0)
        own = replace(form, distance=max_distance > 0)
        opset = onnxscript.values.Opset(OP_DOMAIN, OP_VERSION)
        operator = onnxscript.values.Op(opset, OP_NAME, _schema(own))
        attributes = {n: arguments[n] for n in ATTRIBUTES} | own.optional(max_distance)
        return operator(*(arguments[n] for n in own.inputs()), **attributes)

    return translate


def translation_table() -> dict[Any, Any]:
    """``custom_translation_table`` for ``torch.onnx.export``."""
    assert operators.attention is not None  # importing it registers the operators
    ops = torch.ops.less
    return {
        ops.attention.default: _translation(Form()),
        ops.attention_int8.default: _translation(Form(int8=True)),
        ops.attention_state16.default: _translation(Form(int8=True, state16=True)),
    }


# ------------------------------------------------------------------ the body


def _attend(op: Nodes, x: SimpleNamespace, s: SimpleNamespace, mean: ir.Value | None) -> ir.Value:
    """out [B,Hq,T,D]; leaves the probabilities over slots and chunk in ``s.probability`` [B,Hk,G,T,N].

    ``mean`` is that of a layer that absorbs, see :class:`~.onnx_state.LowRank`.
    """
    flat = op.shape(s.heads, op.ints(-1))  # [B,Hk,G*T, ...]
    probability = op.Softmax(s.logits, axis=-1)
    s.probability = op.Reshape(probability, s.shape5)
    values = s.values
    if mean is not None:
        filled = op.Greater(x.past_z, op.f32(0.0))
        z = op.Where(filled, x.past_z, op.f32(1.0))
        log_phi = op.Reshape(op.to_f32(x.log_phi_q), op.shape(flat, op.dim(x.log_phi_q, 3)))
        mass = op.Add(log_phi, op.Unsqueeze(op.Log(z), op.ints(2)))
        mass = op.Where(op.Unsqueeze(filled, op.ints(2)), mass, op.f32(HIDDEN))
        probability = op.Softmax(op.Concat(s.logits, mass, axis=-1), axis=-1)
        values = op.Concat(values, op.rows(filled, mean), axis=2)
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
    form = body.form
    inputs = [ir.Value(name=n) for n in form.inputs()]
    x = SimpleNamespace(**{str(value.name): value for value in inputs})
    op, present = _general(body, x)
    if body.decoding is not None:
        op, present = _divided(body, x, op, present)
    else:
        _name(op, body.overload)
    outputs = [present[name] for name in form.outputs()]
    for name, value in zip(form.outputs(), outputs, strict=True):
        value.name = name
    return ir.Function(
        OP_DOMAIN,
        OP_NAME,
        body.overload,
        graph=_graph(inputs, outputs, op),
        attributes=[ir.Attr(n, t, None) for n, t in form.types().items()],
    )


def _graph(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], op: Nodes) -> ir.Graph:
    return ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": OPSET}, name=OP_NAME)


def _name(op: Nodes, prefix: str) -> None:
    """Unique names: TensorRT's parser (RTX 1.7.1) gives a Constant of the main graph the value of a Constant of the
    same name in a function called earlier."""
    for number, value in enumerate(v for node in op.nodes for v in node.outputs):
        value.name = f"{prefix}.{number}"


def _divided(
    body: Body, x: SimpleNamespace, general: Nodes, present: dict[str, ir.Value]
) -> tuple[Nodes, dict[str, ir.Value]]:
    """The body that takes a way of its own for chunks of one token."""
    names = list(body.form.outputs())
    one, own = Nodes(), Nodes()
    assert body.decoding is not None
    after = one_token(one, x, body.decoding, body.policy, absorbs=body.absorb, fades=body.fades, **asdict(body.form))
    after = {"out": after.pop("out"), **{f"present_{name}": value for name, value in after.items()}}
    branches = {}
    for branch, op, values in (("then_branch", one, after), ("else_branch", general, present)):
        _name(op, f"{body.overload}.{branch}")
        branches[branch] = _graph([], [values[name] for name in names], op)
    decodes = own.Equal(own.dim(x.k, 2), own.ints(1))
    _name(own, body.overload)
    results = own.op_multi_out("If", [decodes], branches, num_outputs=len(names))
    return own, dict(zip(names, results, strict=True))


def _general(body: Body, x: SimpleNamespace) -> tuple[Nodes, dict[str, ir.Value]]:
    """The body for chunks of any length: its nodes and outputs."""
    op, policy, form = Nodes(), body.policy, body.form
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

    slots, state = in_slots(op, x, form.int8), low_rank(op, x, body.absorb, form.state16)
    q, keys = turned(op, x, s, slots.keys) if form.distance else (op.to_f32(x.q), slots.keys)
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
    logits = op.Where(visible, op.Reshape(logits, s.shape5), op.f32(HIDDEN))
    s.logits = op.Reshape(logits, op.shape(grouped, tokens))

    out = _attend(op, x, s, state.mean)
    score = _score(op, x, s, policy.scoring, body.fades)

    end = op.Add(s.past_length, s.new_length)
    end = op.Unsqueeze(end, op.ints(2))  # [B,1,1]
    oldest = policy.oldest_onnx(op, end, window)
    live = op.And(s.held, op.Or(unlimited, op.GreaterOrEqual(s.position, oldest)))
    candidates = SimpleNamespace(live=live, position=s.position, score=score, end=end)
    kept = policy.keep_onnx(op, candidates, op.attribute("heavy"), op.attribute("recent"), s.slots)

    source = _place(op, s, kept)
    index = op.Max(source, op.ints(0))
    # Rows of all heads one after another: ONNX Runtime's CUDA provider has Gather for int8, and no GatherND.
    count = op.Squeeze(op.Mul(op.dim(x.past_key, 0), op.dim(x.past_key, 1)), op.ints(0))
    heads = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    begin = op.Reshape(op.Mul(heads, tokens), op.shape(s.heads, op.ints(1)))
    rows = op.Add(index, begin)

    def filled(past: ir.Value, new: ir.Value) -> ir.Value:
        held = op.Concat(past, new, axis=2)
        return op.Gather(op.Reshape(held, op.shape(op.ints(-1), op.dim(held, 3))), rows, axis=0)

    position = op.GatherElements(s.position, index, axis=2)
    position = op.Where(op.GreaterOrEqual(source, op.ints(0)), position, op.i32(-1))
    if body.absorb:
        leaving = op.rows(op.And(s.held, op.Not(kept)), state.psi)
        absorbed = op.rows(s.held, slots.absorbed) if form.int8 else s.values
        after = absorb(op, x, state, leaving, absorbed, form.state16)
    else:
        after = {"h": op.Identity(x.past_h), "z": op.Identity(x.past_z)}

    after |= {
        "score": op.GatherElements(score, index, axis=2),
        "position": position,
        "psi": filled(*state.fill),
        **{name: filled(*slots.fills[name]) for name in ("key", "value")},
    }
    if form.int8:
        scales = {name: op.Concat(*slots.fills[name], axis=2) for name in ("key_scale", "value_scale")}
        after |= {name: op.GatherElements(scale, index, axis=2) for name, scale in scales.items()}
    return op, {"out": out, **{f"present_{name}": value for name, value in after.items()}}


# ------------------------------------------------------------------ bodies in and out of a model


def less_nodes(model: ir.Model) -> list[ir.Node]:
    """The LessAttention nodes of a model, in graph order."""
    return [n for n in model.graph if n.domain == OP_DOMAIN and n.op_type == OP_NAME]


def add_bodies(model: ir.Model, decoding: bool = True) -> None:
    """Give every LessAttention node the body of its policy (after optimisation, which would inline it).

    ``decoding``: with a way of its own for chunks of one token, for ONNX Runtime.
    """
    for node in less_nodes(model):
        body = Body.of(node, decoding)
        node.overload = body.overload
        key = (OP_DOMAIN, OP_NAME, node.overload)
        if key not in model.functions:
            model.functions[key] = function_body(body)
    model.graph.opset_imports[OP_DOMAIN] = OP_VERSION


def with_own_names(model: ir.Model) -> onnx.ModelProto:
    """The model with an operator of its own name for each body.

    TensorRT's parser (RTX 1.7.1) does not tell overloads apart: it takes the first body for all nodes of a name.
    """
    proto = ir.to_proto(model)
    for function in proto.functions:
        function.name, function.overload = "_".join(filter(None, (function.name, function.overload))), ""
    for node in proto.graph.node:
        node.op_type, node.overload = "_".join(filter(None, (node.op_type, node.overload))), ""
    return proto


def strip_bodies(model: ir.Model) -> None:
    """Leave bare LessAttention nodes, for TensorRT's plugin (a local function would win over it)."""
    for node in less_nodes(model):
        node.overload = ""
    for key in [k for k in model.functions if k[:2] == (OP_DOMAIN, OP_NAME)]:
        del model.functions[key]
