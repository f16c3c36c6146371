"""Bytes of a layer's state, and what they would hold instead."""

from __future__ import annotations

import math

from ..contract import LayerSpec
from ..dtypes import item_bytes


def layer_bytes(spec: LayerSpec, dtype: str, tokens: int | None = None) -> int:
    """State bytes of one layer for one sequence; ``tokens`` replaces its capacity.

    psi, H and z count only in layers that absorb; in others they are placeholders of rank 1.
    """
    total = 0
    for field in spec.state_fields:
        if field.name in ("psi", "h", "z") and not spec.absorb:
            continue
        sizes = {d: getattr(spec, d) for d in field.dims}
        if tokens is not None and "capacity" in sizes:
            sizes["capacity"] = tokens
        total += math.prod(sizes.values()) * item_bytes(field.dtype_in(spec, dtype))
    return total


def extra_tokens(spec: LayerSpec, dtype: str) -> int:
    """Tokens that would fit in the bytes of the low-rank state, rounded up."""
    without = spec.without_state()
    added = layer_bytes(spec, dtype) - layer_bytes(without, dtype)
    token = layer_bytes(without, dtype, spec.capacity + 1) - layer_bytes(without, dtype)
    return -(-added // token)
