"""Sizes of a layer's kernels, for memory figures without torch (see ``feature_maps``)."""

from __future__ import annotations

import math

from ..contract import Heads
from ..dtypes import item_bytes

#: Dtype in which kernels are trained and stored.
DTYPE = "float32"


def exp_shapes(heads: Heads, rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of the default parametrisation by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for side, n in (("q", heads.query_heads), ("k", heads.kv_heads)):
        shapes[f"{side}_in"] = (n, heads.head_dim, hidden)
        shapes[f"{side}_out"] = (n, hidden, rank)
        shapes[f"{side}_skip"] = (n, heads.head_dim, rank)
        shapes[f"{side}_bias"] = (n, 1, rank)
    return shapes


def kernel_bytes(heads: Heads, rank: int, hidden: int) -> int:
    """Bytes of one layer's kernels, which all sequences share."""
    return sum(math.prod(s) for s in exp_shapes(heads, rank, hidden).values()) * item_bytes(DTYPE)
