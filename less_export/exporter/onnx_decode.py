"""The operator's ONNX body for a chunk of one token, as in decoding: exactly one slot changes.

The results are those of the general body, from fewer nodes: no candidates are sorted, slots are not gathered anew, one
softmax serves output and scores, and the layer's sizes are constants. ONNX Runtime's graphs have it behind an ``If``.

Shapes: B rows, Hk KV heads, G query heads of each, C slots, R features, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir

from ..less import int8 as int8_rule
from ..less import state16 as state16_rule
from ..less.policies import EvictionPolicy
from .onnx_nodes import Nodes
from .onnx_slots import ages
from .onnx_state import absorb16

#: Finite stand-in for -inf: exp(HIDDEN - peak) is 0 for every real peak.
HIDDEN = -1.0e30


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer; ``distances`` and ``rotated`` channels of its table of angles: 0 without one."""

    kv_heads: int
    slots: int
    head_dim: int
    rank: int
    distances: int = 0
    rotated: int = 0

    @classmethod
    def of(cls, inputs: Mapping[str, ir.Value | None]) -> Sizes | None:
        """From the shapes of a node's inputs by name; None if they are not known."""
        axes = [*(("past_key", axis) for axis in (1, 2, 3)), ("past_psi", 3)]
        axes += [("rotary", 0), ("rotary", 1)] if "rotary" in inputs else []
        sizes = []
        for name, axis in axes:
            value = inputs[name]
            size = None if value is None or value.shape is None else value.shape[axis]
            if not isinstance(size, int):
                return None
            sizes.append(size)
        return cls(*sizes)

    def __str__(self) -> str:
        table = [self.distances, self.rotated] if self.rotated else []
        return "x".join(map(str, (self.kv_heads, self.slots, self.head_dim, self.rank, *table)))


@dataclass(frozen=True)
class _Step:
    """What the parts of the body share: the tape, the node's inputs ``x``, what a layer has, and masks over rows
    ``valid`` [B,1,1] and ``valid4`` [B,1,1,1] and over slots ``held`` [B,Hk,C]."""

    op: Nodes
    x: SimpleNamespace
    sizes: Sizes
    int8: bool
    state16: bool
    now: ir.Value
    valid: ir.Value
    valid4: ir.Value
    held: ir.Value


def one_token(
    op: Nodes, x: SimpleNamespace, sizes: Sizes, policy: EvictionPolicy, *, absorbs: bool, fades: bool, int8: bool,
    state16: bool, distance: bool,
) -> dict[str, ir.Value]:  # fmt: skip
    """Outputs of the operator by name, without ``present_``, from its inputs ``x`` with T = 1."""
    rows3, rows4 = op.ints(1, 2), op.ints(1, 2, 3)
    valid = op.Greater(x.new_length, op.i32(0))
    now, held = op.Unsqueeze(x.past_length, rows3), op.GreaterOrEqual(x.past_position, op.i32(0))
    s = _Step(op, x, sizes, int8, state16, now, op.Unsqueeze(valid, rows3), op.Unsqueeze(valid, rows4), held)

    q = op.Reshape(op.to_f32(x.q), op.ints(0, sizes.kv_heads, -1, sizes.head_dim))  # [B,Hk,G,D]
    k, v = op.to_f32(x.k), op.to_f32(x.v)  # [B,Hk,1,D]
    keys, values, value_scale = _slots(s)
    if distance:
        keys = _rotated(s, keys)
    visible = held
    if not policy.evicts and not policy.keeps_all:  # a window
        visible = op.And(held, op.Greater(x.past_position, op.Sub(now, op.attribute("window"))))
    scale = op.attribute("scale")
    logits = op.Mul(op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2])), scale)
    logits = op.Where(op.Unsqueeze(visible, op.ints(2)), logits, op.f32(HIDDEN))
    own = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
    logits = op.Concat(logits, own, axis=-1)  # [B,Hk,G,C+1]
    share = op.Softmax(logits, axis=-1)
    in_slots, in_chunk = op.Split(share, op.ints(sizes.slots, 1), axis=-1, _outputs=2)
    weight = in_slots if value_scale is None else op.Mul(in_slots, op.Unsqueeze(value_scale, op.ints(2)))
    out = op.Add(op.MatMul(weight, values), op.Mul(in_chunk, v))
    means = _means(s) if absorbs else None
    if means is not None:
        out = _with_state(s, logits, share, out, means)
    out = op.Where(s.valid4, op.Reshape(out, op.Shape(x.q)), op.f32(0.0))

    scores, own_score = _scores(s, policy.scoring, fades, in_slots, in_chunk)
    end = op.Add(now, op.Unsqueeze(x.new_length, rows3))
    candidates = SimpleNamespace(live=held, position=x.past_position, score=scores, end=end)
    ticks = op.Constant(value=ir.tensor(np.arange(sizes.slots)))
    slot = policy.taken_onnx(op, candidates, op.attribute("heavy"), op.attribute("recent"), ticks)  # i64 [B,Hk,1]
    after = _stored(s, slot, ticks, scores, own_score, k, v, value_scale, means)
    return {"out": op.CastLike(out, x.q), **after}


def _slots(s: _Step) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Keys and values of the slots in f32 [B,Hk,C,D], without what empty slots hold, and what multiplies values of
    int8 slots [B,Hk,C]."""
    op, x = s.op, s.x
    if not s.int8:
        return op.rows(s.held, op.to_f32(x.past_key)), op.rows(s.held, op.to_f32(x.past_value)), None
    key_scale, value_scale = (op.Where(s.held, t, op.f32(0.0)) for t in (x.past_key_scale, x.past_value_scale))
    mean, std = (op.Unsqueeze(t, op.ints(1)) for t in (x.key_mean, x.key_std))
    keys = op.Mul(op.to_f32(x.past_key), op.Unsqueeze(key_scale, op.ints(-1)))
    return op.Add(op.Mul(keys, std), mean), op.to_f32(x.past_value), value_scale


def _rotated(s: _Step, keys: ir.Value) -> ir.Value:
    """Keys of the slots [B,Hk,C,D], turned back by their distances."""
    op, x, sizes = s.op, s.x, s.sizes
    table = x.rotary
    if sizes.slots > sizes.distances:  # ONNX Runtime (1.32) refuses more tokens than the table has rows
        table = op.Pad(table, op.ints(0, 0, sizes.slots - sizes.distances, 0))
    cos, sin = op.Split(table, num_outputs=2, axis=-1, _outputs=2)  # constants, as is the negative sine
    turned = op.RotaryEmbedding(
        op.Reshape(keys, op.ints(-1, 1, sizes.slots, sizes.head_dim)), cos, op.Neg(sin),
        op.Cast(op.Reshape(ages(op, x), op.ints(-1, sizes.slots)), to=ir.DataType.INT64),
        rotary_embedding_dim=sizes.rotated,
    )  # fmt: skip
    return op.Reshape(turned, op.ints(-1, sizes.kv_heads, sizes.slots, sizes.head_dim))


def _means(s: _Step) -> ir.Value:
    """Means [B,Hk,R,D] of the state; of features without mass, zeros."""
    op, x = s.op, s.x
    filled = op.Greater(x.past_z, op.f32(0.0))
    if not s.state16:
        z = op.Where(filled, x.past_z, op.f32(1.0))
        return op.rows(filled, op.Div(x.past_h, op.Unsqueeze(z, op.ints(-1))))
    scale = op.Unsqueeze(op.Where(filled, x.past_h_scale, op.f32(0.0)), op.ints(-1))
    high, low = op.Split(op.to_f32(x.past_h), num_outputs=2, axis=-1, _outputs=2)
    return op.Mul(op.Add(op.Mul(high, op.f32(256.0)), low), scale)


def _with_state(s: _Step, logits: ir.Value, share: ir.Value, out: ir.Value, means: ir.Value) -> ir.Value:
    """``out`` [B,Hk,G,D] over slots and chunk, weighed with the means of the state.

    The largest share is exp(peak - total), which gives the log-sum-exp ``total`` without another pass.
    """
    op, x, last = s.op, s.x, s.op.ints(-1)
    total = op.Sub(op.ReduceMax(logits, last, keepdims=1), op.Log(op.ReduceMax(share, last, keepdims=1)))
    log_z = op.Max(op.Log(x.past_z), op.f32(HIDDEN))  # log 0 is -inf
    mass = op.Reshape(op.to_f32(x.log_phi_q), op.ints(0, s.sizes.kv_heads, -1, s.sizes.rank))
    mass = op.Max(op.Add(mass, op.Unsqueeze(log_z, op.ints(2))), op.f32(HIDDEN))
    weights = op.Softmax(op.Concat(total, mass, axis=-1), axis=-1)
    exact, low = op.Split(weights, op.ints(1, s.sizes.rank), axis=-1, _outputs=2)
    return op.Add(op.Mul(exact, out), op.MatMul(low, means))


def _scores(s: _Step, scoring: str, fades: bool, in_slots: ir.Value, in_chunk: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Scores of the slots [B,Hk,C] and of the new token [B,Hk,1] after the step; parked rows keep theirs."""
    op, x = s.op, s.x
    if scoring == "none":
        return op.Mul(op.Cast(s.held, to=ir.DataType.FLOAT), op.f32(0.0)), op.f32(0.0)
    past = op.Where(s.held, x.past_score, op.f32(0.0))
    gained, own = (op.ReduceSum(t, op.ints(2), keepdims=0) for t in (in_slots, in_chunk))
    if scoring == "accumulate":
        gained = op.Add(op.Mul(past, op.attribute("decay")) if fades else past, gained)
    return op.Where(s.valid, gained, past), own


def _stored(
    s: _Step, slot: ir.Value, ticks: ir.Value, scores: ir.Value, own_score: ir.Value, k: ir.Value, v: ir.Value,
    value_scale: ir.Value | None, means: ir.Value | None,
) -> dict[str, ir.Value]:  # fmt: skip
    """The state after the step: the new token is in ``slot`` [B,Hk,1], and who was there is absorbed."""
    op, x, last = s.op, s.x, s.op.ints(-1)
    mine = op.And(op.Equal(slot, ticks), s.valid)  # [B,Hk,C]
    at = op.Unsqueeze(slot, last)

    def put(past: ir.Value, new: ir.Value, width: int, codes: bool) -> tuple[ir.Value, ir.Value]:
        """Rows [B,Hk,C,width] with the new one in its slot, and the one that was there, [B,Hk,1,width]; maybe codes."""
        where = op.Expand(at, op.ints(1, 1, 1, width))
        before = op.GatherElements(past, where, axis=2)
        row = (op.where_codes if codes else op.Where)(s.valid4, new, before)
        return op.ScatterElements(past, where, row, axis=2), before

    after = {"position": op.Where(mine, s.now, x.past_position), "score": op.Where(mine, own_score, scores)}
    new = {"key": x.k, "value": x.v, "psi": x.psi_k}
    if s.int8:
        mean, std = (op.Unsqueeze(t, op.ints(1)) for t in (x.key_mean, x.key_std))
        both = op.Concat(op.Div(op.Sub(k, mean), std), v, axis=2)
        codes, scales = _codes(s, op.Abs(both), both)
        new["key"], new["value"] = op.Split(codes, num_outputs=2, axis=2, _outputs=2)
        key_scale, own_scale = op.Split(op.Squeeze(scales, last), num_outputs=2, axis=2, _outputs=2)
        after["key_scale"] = op.Where(mine, key_scale, x.past_key_scale)
        after["value_scale"] = op.Where(mine, own_scale, x.past_value_scale)
    if s.state16:
        psi = op.to_f32(x.psi_k)
        new["psi"], _ = _codes(s, psi, psi)
    after["key"], _ = put(x.past_key, new["key"], s.sizes.head_dim, s.int8)
    after["value"], value = put(x.past_value, new["value"], s.sizes.head_dim, s.int8)
    after["psi"], psi = put(x.past_psi, new["psi"], s.sizes.rank, s.state16)
    if means is None:
        return {**after, "h": op.Identity(x.past_h), "z": op.Identity(x.past_z)}
    leaves = op.GreaterOrEqual(op.GatherElements(x.past_position, slot, axis=2), op.i32(0))
    leaves = op.Unsqueeze(op.And(leaves, s.valid), last)  # [B,Hk,1,1]
    value, psi = op.to_f32(value), op.to_f32(psi)
    if value_scale is not None:
        value = op.Mul(value, op.Unsqueeze(op.GatherElements(value_scale, slot, axis=2), last))
    if s.state16:
        psi = op.Div(psi, op.Max(op.ReduceSum(psi, last, keepdims=1), op.f32(1.0)))
    psi, value = (op.Where(leaves, t, op.f32(0.0)) for t in (psi, value))
    psi = op.Reshape(psi, op.ints(0, 0, s.sizes.rank, 1))
    return {**after, **(_absorbed16(s, psi, value, means) if s.state16 else _absorbed(s, psi, value))}


def _codes(s: _Step, magnitude: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """int8 codes of ``x`` [...,E] and their scales [...,1], by the rule of ``less.int8``."""
    op = s.op
    scale = op.Div(op.ReduceMax(magnitude, op.ints(-1), keepdims=1), op.f32(float(int8_rule.LARGEST)))
    usable = op.GreaterOrEqual(scale, op.f32(int8_rule.SMALLEST_SCALE))
    code = op.Round(op.Div(x, op.Where(usable, scale, op.f32(np.inf))))  # at most 127: the quotient is, to rounding
    return op.codes(code), op.Where(usable, scale, op.f32(0.0))


def _absorbed(s: _Step, psi: ir.Value, value: ir.Value) -> dict[str, ir.Value]:
    """H and z after psi [B,Hk,R,1] and value [B,Hk,1,D] of what leaves."""
    op, x = s.op, s.x
    return {"h": op.Add(x.past_h, op.Mul(psi, value)), "z": op.Add(x.past_z, op.Squeeze(psi, op.ints(-1)))}


def _absorbed16(s: _Step, psi: ir.Value, value: ir.Value, means: ir.Value) -> dict[str, ir.Value]:
    """:func:`_absorbed` of a state of 16 bits."""
    feature, channel = np.arange(s.sizes.rank)[:, None], np.arange(s.sizes.head_dim)
    offsets = (feature * state16_rule.FEATURE_STEP + channel * state16_rule.CHANNEL_STEP).astype(np.int32)
    mass, total = s.op.Squeeze(psi, s.op.ints(-1)), s.op.Mul(psi, value)
    return absorb16(s.op, s.x, means, mass, total, s.op.Constant(value=ir.tensor(offsets)))
