"""Keys and values in the operator's ONNX bodies: int8 slots (``less.int8``) and distances (``less.rotary``)."""

from __future__ import annotations

from types import SimpleNamespace

import onnx_ir as ir

from ..less import int8 as int8_slots
from .onnx_nodes import MAX_DISTANCE, Nodes


def quantised(op: Nodes, tensor: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes of f32 ``tensor`` [...,E] in f32 and in int8, and their scales [...]; the rule is that of ``less.int8``."""
    last, largest = op.ints(-1), float(int8_slots.LARGEST)
    scale = op.Div(op.ReduceMax(op.Abs(tensor), last, keepdims=0), op.f32(largest))
    usable = op.GreaterOrEqual(scale, op.f32(int8_slots.SMALLEST_SCALE))
    scale = op.Where(usable, scale, op.f32(0.0))
    divisor = op.Where(usable, scale, op.f32(1.0))
    code = op.Round(op.Div(tensor, op.Unsqueeze(divisor, last)))  # rounds half to even
    code = op.Min(op.Max(code, op.f32(-largest)), op.f32(largest))
    code = op.rows(usable, code)
    return code, op.codes(code), scale


def in_slots(op: Nodes, x: SimpleNamespace, int8: bool) -> SimpleNamespace:
    """What slots and chunk hold, in f32: the pair of their keys [B,Hk,C,D] and [B,Hk,T,D], the values [B,Hk,N,D] of
    both as queries see them and as the state absorbs them, and the pairs (past, new) of tensors that fill the slots."""
    new_key, new_value = op.to_f32(x.k), op.to_f32(x.v)
    if not int8:
        keys = op.to_f32(x.past_key), new_key
        values = op.Concat(op.to_f32(x.past_value), new_value, axis=2)
        fills = {"key": (x.past_key, x.k), "value": (x.past_value, x.v)}
        return SimpleNamespace(keys=keys, values=values, absorbed=values, fills=fills)

    def read(code: ir.Value, scale: ir.Value) -> ir.Value:
        return op.Mul(op.to_f32(code), op.Unsqueeze(scale, op.ints(-1)))

    mean, std = (op.Unsqueeze(t, op.ints(1)) for t in (x.key_mean, x.key_std))
    _, key_code, key_scale = quantised(op, op.Div(op.Sub(new_key, mean), std))
    value, value_code, value_scale = quantised(op, new_value)
    past_keys = op.Add(op.Mul(read(x.past_key, x.past_key_scale), std), mean)
    past_values = read(x.past_value, x.past_value_scale)
    return SimpleNamespace(
        keys=(past_keys, new_key),
        values=op.Concat(past_values, new_value, axis=2),
        absorbed=op.Concat(past_values, read(value, value_scale), axis=2),
        fills={
            "key": (x.past_key, key_code),
            "value": (x.past_value, value_code),
            "key_scale": (x.past_key_scale, key_scale),
            "value_scale": (x.past_value_scale, value_scale),
        },
    )


def turned(
    op: Nodes, x: SimpleNamespace, s: SimpleNamespace, keys: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    """Queries [B,Hq,T,D] and the pair of keys in f32, turned by ``less.rotary``."""
    past, new = keys
    half = op.Div(op.dim(x.rotary, 1), op.ints(2))
    offsets = op.Slice(x.rotary, op.ints(0), s.chunk, op.ints(0))
    new = _rotate(op, new, offsets, half)
    past = _rotate(op, past, op.Gather(x.rotary, ages(op, x)), half, back=True)
    return _rotate(op, op.to_f32(x.q), offsets, half), (past, new)


def ages(op: Nodes, x: SimpleNamespace) -> ir.Value:
    """The distances [B,Hk,C] that the first query of a chunk sees the slots at; 0 for empty ones."""
    age = op.Sub(op.Unsqueeze(x.past_length, op.ints(1, 2)), x.past_position)
    return op.Max(op.Min(age, op.attribute(MAX_DISTANCE)), op.i32(0))


def _rotate(op: Nodes, tensor: ir.Value, angles: ir.Value, half: ir.Value, back: bool = False) -> ir.Value:
    """f32 ``tensor`` [B,H,N,D] turned by ``angles`` [...,N,D_rot], the cosines and sines of N distances."""
    axis, end = op.ints(-1), op.Add(half, half)
    cos, sin = op.Split(angles, num_outputs=2, axis=-1, _outputs=2)
    first, second = op.Slice(tensor, op.ints(0), half, axis), op.Slice(tensor, half, end, axis)
    rest = op.Slice(tensor, end, op.dim(tensor, 3), axis)
    sin = op.Neg(sin) if back else sin
    turned_first = op.Sub(op.Mul(first, cos), op.Mul(second, sin))
    turned_second = op.Add(op.Mul(second, cos), op.Mul(first, sin))
    return op.Concat(turned_first, turned_second, rest, axis=-1)
