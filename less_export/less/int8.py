"""Slots in int8: how keys and values are rounded when they take a slot, and what is read from it.

A token of a head keeps one float32 scale and D integers. Values are rounded as they are; keys are first centred and
scaled per channel, k' = (k - mean) / std, because a few channels of real keys lie far from zero and would take the
range of all others. ``mean`` and ``std`` are constants of a layer, measured by ``calibrate`` and ``train``.

The rule, in float32 with IEEE rounding of every operation, so that all implementations store the same integers:
scale = max |x| / 127; code = x / scale, rounded half to even, at most 127 in magnitude. A token whose scale is below
the smallest normal number is stored as zeros with scale 0.

Shapes: B rows, Hk KV heads, N tokens, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Largest magnitude of a code.
LARGEST = 127
#: The step from one code to the next, as a share of a token's largest element: what one differing last bit may change.
ONE_CODE = 1 / LARGEST
#: Smallest scale: below it, float32 loses digits, and some devices flush to zero.
SMALLEST_SCALE = 2.0**-126


class Centring(NamedTuple):
    """The constants of a layer's keys: ``mean`` and ``std``, f32 [Hk,D], ``std`` positive."""

    mean: Tensor
    std: Tensor

    @classmethod
    def none(cls, kv_heads: int, head_dim: int) -> Centring:
        """Keys as they are: mean 0, std 1."""
        return cls(torch.zeros(kv_heads, head_dim), torch.ones(kv_heads, head_dim))

    def named(self) -> dict[str, Tensor]:
        """Both tensors by name."""
        return {"mean": self.mean, "std": self.std}

    def to(self, device: torch.device | str) -> Centring:
        """The same constants on ``device``."""
        return Centring(self.mean.to(device), self.std.to(device))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 ``x`` [B,Hk,N,D] -> int8 codes [B,Hk,N,D] and their f32 scales [B,Hk,N]."""
    scale = x.abs().amax(-1) / LARGEST
    scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
    divisor = torch.where(scale == 0, 1.0, scale)
    code = torch.round(x / divisor[..., None]).clamp(-LARGEST, LARGEST)  # torch.round rounds half to even
    return torch.where(scale[..., None] == 0, 0.0, code).to(torch.int8), scale


def dequantise(code: Tensor, scale: Tensor) -> Tensor:
    """What int8 ``code`` [B,Hk,N,D] with ``scale`` [B,Hk,N] stands for: f32 [B,Hk,N,D]."""
    return code.float() * scale[..., None]


def quantise_keys(k: Tensor, centring: Centring) -> tuple[Tensor, Tensor]:
    """:func:`quantise` of centred keys; ``k`` [B,Hk,N,D] in any floating dtype."""
    return quantise((k.float() - centring.mean[:, None]) / centring.std[:, None])


def dequantise_keys(code: Tensor, scale: Tensor, centring: Centring) -> Tensor:
    """The keys that codes and scales stand for: f32 [B,Hk,N,D]."""
    return dequantise(code, scale) * centring.std[:, None] + centring.mean[:, None]


def rounded_keys(k: Tensor, centring: Centring) -> Tensor:
    """Keys after a stay in a slot: f32 [B,Hk,N,D]."""
    return dequantise_keys(*quantise_keys(k, centring), centring)


def rounded_values(v: Tensor) -> Tensor:
    """Values after a stay in a slot: f32 [B,Hk,N,D]."""
    return dequantise(*quantise(v.float()))
