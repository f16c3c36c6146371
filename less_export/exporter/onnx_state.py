"""The low-rank state in the operator's ONNX bodies, in 32 bits or in 16 (``less.state16``)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import onnx_ir as ir

from ..less import int8 as int8_slots
from ..less import state16 as rule
from .onnx_nodes import Nodes
from .onnx_slots import quantised

#: Axis of the elements of a mean.
_LAST = -1


@dataclass(frozen=True)
class LowRank:
    """psi of [slots, chunk] in f32 [B,Hk,N,R], the pair (past, new) that fills the slots, and the mean of what each
    feature absorbed, f32 [B,Hk,R,D]; of features without mass it is not read."""

    psi: ir.Value
    fill: tuple[ir.Value, ir.Value]
    mean: ir.Value | None


def low_rank(op: Nodes, x: SimpleNamespace, absorb: bool, state16: bool) -> LowRank:
    """What a node's inputs ``x`` hold."""
    if state16:
        code, new, _ = quantised(op, op.to_f32(x.psi_k))
        codes = op.Concat(op.to_f32(x.past_psi), code, axis=2)
        count = op.Max(op.ReduceSum(codes, op.ints(_LAST), keepdims=1), op.f32(1.0))
        return LowRank(op.Div(codes, count), (x.past_psi, new), _means(op, x))
    psi = op.to_f32(op.Concat(x.past_psi, x.psi_k, axis=2))
    filled = op.Where(op.Greater(x.past_z, op.f32(0.0)), x.past_z, op.f32(1.0))
    mean = op.Div(x.past_h, op.Unsqueeze(filled, op.ints(_LAST))) if absorb else None
    return LowRank(psi, (x.past_psi, x.psi_k), mean)


def _means(op: Nodes, x: SimpleNamespace) -> ir.Value:
    """Means [B,Hk,R,D] of two planes and a scale."""
    high, low = op.Split(op.to_f32(x.past_h), num_outputs=2, axis=_LAST, _outputs=2)
    return op.Mul(op.Add(op.Mul(high, op.f32(256.0)), low), op.Unsqueeze(x.past_h_scale, op.ints(_LAST)))


def absorb(
    op: Nodes, x: SimpleNamespace, state: LowRank, leaving: ir.Value, values: ir.Value, state16: bool
) -> dict[str, ir.Value]:
    """The state after the chunk by name, from psi [B,Hk,N,R] of the tokens that leave (0 of others) and values
    [B,Hk,N,D]."""
    total = op.MatMul(op.Transpose(leaving, perm=[0, 1, 3, 2]), values)
    mass = op.ReduceSum(leaving, op.ints(2), keepdims=0)
    if not state16:
        return {"h": op.Add(x.past_h, total), "z": op.Add(x.past_z, mass)}
    assert state.mean is not None
    mean = op.rows(op.Greater(x.past_z, op.f32(0.0)), state.mean)
    return absorb16(op, x, mean, mass, total, _offsets(op, mean))


def absorb16(
    op: Nodes, x: SimpleNamespace, mean: ir.Value, mass: ir.Value, total: ir.Value, offsets: ir.Value
) -> dict[str, ir.Value]:
    """A state of 16 bits after a chunk by name (``state16.absorb``).

    Args:
        mean: before it, f32 [B,Hk,R,D], 0 for features without mass. mass, total: sums over the tokens that leave of
            psi [B,Hk,R] and of psi times value [B,Hk,R,D]. offsets: of the dither, i32 [R,D].
    """
    last, zero, one = op.ints(_LAST), op.f32(0.0), op.f32(1.0)
    z = op.Add(x.past_z, mass)
    divisor = op.Unsqueeze(op.Where(op.Greater(z, zero), z, one), last)
    mean = op.Add(mean, op.Div(op.Sub(total, op.Mul(op.Unsqueeze(mass, last), mean)), divisor))
    largest = float(rule.LARGEST)
    scale = op.Div(op.ReduceMax(op.Abs(mean), last, keepdims=0), op.f32(largest))
    usable = op.GreaterOrEqual(scale, op.f32(int8_slots.SMALLEST_SCALE))
    scale = op.Where(usable, scale, zero)
    quotient = op.Div(mean, op.Unsqueeze(op.Where(usable, scale, one), last))
    # The quotient is at least -32,639 to rounding, and is rounded down after the dither: only the top needs a bound.
    whole = op.Min(op.Floor(op.Add(quotient, _dither(op, x, offsets))), op.f32(largest))
    whole = op.rows(usable, whole)
    high = op.Floor(op.Mul(op.Add(whole, op.f32(128.0)), op.f32(1 / 256)))
    planes = op.Concat(high, op.Sub(whole, op.Mul(high, op.f32(256.0))), axis=_LAST)
    grows = op.Greater(mass, zero)
    return {
        "h": op.where_codes(op.Unsqueeze(grows, last), planes, x.past_h),
        "z": z,
        "h_scale": op.Where(grows, scale, x.past_h_scale),
    }


def _offsets(op: Nodes, mean: ir.Value) -> ir.Value:
    """The dither of features and channels for ``mean`` [B,Hk,R,D], in 1/65,536: i32 [R,D]."""

    def steps(axis: int, step: int) -> ir.Value:
        count = op.Squeeze(op.dim(mean, axis), op.ints(0))
        ticks = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        return op.Mul(op.Cast(ticks, to=ir.DataType.INT32), op.i32(step))

    return op.Add(op.Unsqueeze(steps(2, rule.FEATURE_STEP), op.ints(1)), steps(3, rule.CHANNEL_STEP))


def _dither(op: Nodes, x: SimpleNamespace, offsets: ir.Value) -> ir.Value:
    """``state16.dither``: f32 [B,1,R,D]."""
    begin = op.Mul(op.Mod(x.past_length, op.i32(rule.PERIOD)), op.i32(rule.STEP))
    walk = op.Mod(op.Add(op.Unsqueeze(begin, op.ints(1, 2, 3)), offsets), op.i32(1 << 16))
    return op.Mul(op.to_f32(walk), op.f32(2.0**-16))
