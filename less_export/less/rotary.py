"""Distances inside the operator: q and k arrive before the rotary embedding, and a table turns them.

Rotary embeddings (RoPE, arXiv 2104.09864) let a score depend on the distance of query and key alone. A layer with
``max_distance`` N keeps keys unrotated. At every step a slot's key is turned back by its age, ``past_length -
position`` but at most N, and the tokens of the chunk are turned by their offset in it: the query at offset t sees a
slot at the distance t + age. So no distance exceeds what the model was trained for, absolute positions do not matter,
and nothing grows with the sequence.

Channels are in half-split order, the rotated ones first: channel i is paired with channel i + D_rot / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """A kind of rotary embedding and the ``layers`` that have it.

    order: a head's channels in half-split order, the rotated ones first; None if the model has them in that order.
    angles: a :func:`table`.
    """

    layers: tuple[int, ...]
    order: tuple[int, ...] | None
    angles: Tensor

    def arranged(self, x: Tensor) -> Tensor:
        """``x`` [..., D] with its channels in half-split order."""
        return x if self.order is None else x[..., list(self.order)]


def table_of(tables: Sequence[RotaryTable], layer: int) -> RotaryTable | None:
    """The table of a layer."""
    return next((t for t in tables if layer in t.layers), None)


def table(frequencies: Tensor, length: int) -> Tensor:
    """Angles of the distances 0 to ``length`` - 1: f32 [length, D_rot], cosines, then sines.

    ``frequencies`` [D_rot / 2], in radians per token.
    """
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def table_length(max_distance: int, chunk: int) -> int:
    """Rows that a layer's table needs: slots turn by up to ``max_distance``, tokens of a chunk by up to its offsets."""
    return max(max_distance + 1, chunk)


def rotate(x: Tensor, angles: Tensor, distance: Tensor) -> Tensor:
    """``x`` [..., N, D] turned by ``distance`` [..., N] tokens, in float32; negative distances turn it back.

    ``angles`` is a :func:`table`. Channels from D_rot on stay as they are.
    """
    x, (cos, sin) = x.float(), angles[distance.abs().long()].chunk(2, -1)
    sin = sin * distance.sign()[..., None]
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
