"""How large the kernels of a layer are, for memory figures that need no torch (see ``feature_maps``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Kernels are trained and stored in float32.
ITEM_BYTES = 4


@dataclass(frozen=True)
class Heads:
    """The facts of an attention layer that its kernels must match."""

    query_heads: int
    kv_heads: int
    head_dim: int


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
    return sum(math.prod(s) for s in exp_shapes(heads, rank, hidden).values()) * ITEM_BYTES
