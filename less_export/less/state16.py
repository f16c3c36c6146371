"""The low-rank state in 16 bits: the means of what each feature absorbed, and psi of the slots in 8 bits.

A feature r keeps its mass z_r in float32 and, instead of H_r in float32, the mean H_r / z_r, which attention reads
anyway, as D integers of 16 bits with one float32 scale. An integer is stored as two int8 planes, high and low, side by
side (TensorRT has no int16): code = 256 high + low.

psi of a token is stored as R integers from 0 to 127, rounded by the rule of :mod:`.int8` without the scale: psi sums to
one over R, so a feature's psi is its integer divided by the sum of the integers.

The rule of a step, in float32, for the tokens j that leave, with their psi and values as slots give them back:

    mass = sum_j psi_j;  z' = z + mass;  mean' = mean + (sum_j psi_j v_j - mass mean) / z'
    scale = max_d |mean'_d| / 32,639;  code_d = floor(mean'_d / scale + dither), at most 32,639 in magnitude

A feature without mass in a step keeps its integers and scale bit for bit. Rounding to the nearest integer would lose
every step smaller than half an integer, so that means stop after a few thousand tokens; ``dither``, a fraction that
walks through [0, 1) with the position, makes these errors cancel. Measured over 1e6 tokens: docs/results/int8.md.

Shapes: B rows, Hk KV heads, N tokens, R features, D head_dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import int8

Array = npt.NDArray[Any]

#: Largest magnitude of a code: its planes are at most 127.
LARGEST = 127 * 256 + 127
#: One code as a share of a feature's largest mean.
ONE_CODE = 1 / LARGEST
#: Positions after which the dither repeats, so that its products stay below 2^31.
PERIOD = 1 << 14
#: Steps of the dither in 1/65,536: per token, channel and feature. Odd, and far from simple ratios.
STEP, CHANNEL_STEP, FEATURE_STEP = 40503, 49471, 37345


def psi_codes(psi: Tensor) -> Tensor:
    """psi [B,Hk,N,R], non-negative -> int8 codes [B,Hk,N,R]."""
    return int8.quantise(psi.float())[0]


def psi_of(code: Tensor) -> Tensor:
    """What :func:`psi_codes` stand for: f32 [B,Hk,N,R] that sums to one over R, or zeros."""
    code = code.float()
    return code / code.sum(-1, keepdim=True).clamp(min=1)


def rounded_psi(psi: Tensor) -> Tensor:
    """psi after a stay in a slot: f32 [B,Hk,N,R]."""
    return psi_of(psi_codes(psi))


def means(code: Tensor, scale: Tensor) -> Tensor:
    """Planes int8 [B,Hk,R,2D] and scales f32 [B,Hk,R] -> means f32 [B,Hk,R,D]."""
    high, low = code.float().chunk(2, -1)
    return (high * 256 + low) * scale[..., None]


def absorbed(code: Array, scale: Array, z: Array) -> Array:
    """:func:`means` of arrays, 0 for features without mass."""
    return np.where(z[..., None] > 0, means(torch.from_numpy(code), torch.from_numpy(scale)).numpy(), np.float32(0))


def dither(position: Tensor, rank: int, head_dim: int) -> Tensor:
    """The fractions of a step that begins at ``position`` [B] i32: f32 [B,1,R,D] in [0, 1)."""
    device = position.device
    feature = torch.arange(rank, dtype=torch.int32, device=device)[:, None] * FEATURE_STEP
    channel = torch.arange(head_dim, dtype=torch.int32, device=device) * CHANNEL_STEP
    walk = (position % PERIOD * STEP)[:, None, None, None] + (feature + channel)
    return (walk % 65536).float() / 65536


def absorb(
    code: Tensor, scale: Tensor, z: Tensor, mass: Tensor, total: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state after a step: planes, scales and mass.

    Args:
        code: int8 [B,Hk,R,2D]. scale, z: f32 [B,Hk,R]. mass: sum of psi over the tokens that leave, f32 [B,Hk,R].
        total: sum of psi times value, f32 [B,Hk,R,D]. position: [B] i32, where the step begins.
    """
    after = z + mass
    mean = means(code, torch.where(z > 0, scale, 0.0))
    change = (total - mass[..., None] * mean) / torch.where(after > 0, after, 1.0)[..., None]
    mean = mean + change
    new_scale = mean.abs().amax(-1) / LARGEST
    new_scale = torch.where(new_scale < int8.SMALLEST_SCALE, 0.0, new_scale)
    quotient = mean / torch.where(new_scale == 0, 1.0, new_scale)[..., None]
    whole = torch.floor(quotient + dither(position, *mean.shape[2:])).clamp(-LARGEST, LARGEST)
    whole = torch.where(new_scale[..., None] == 0, 0.0, whole)
    high = torch.floor((whole + 128) / 256)
    planes = torch.cat([high, whole - 256 * high], -1).to(torch.int8)
    grows = mass > 0
    return torch.where(grows[..., None], planes, code), torch.where(grows, new_scale, scale), after
