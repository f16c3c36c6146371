"""How the operator rounds, written from the specification: int8 slots, psi in 8 bits, means in 16 bits."""

from __future__ import annotations

import math

import numpy as np


def rounded_to_int8(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """One token's codes and scale, in float32 arithmetic: halves go to the even neighbour."""
    x = x.astype(np.float32)
    scale = np.float32(np.abs(x).max()) / np.float32(127)
    if scale < np.float32(2.0**-126):
        return np.zeros(x.shape, np.int8), np.float32(0)
    quotient = x / scale
    below = np.floor(quotient)
    rest = quotient - below  # exact
    up = (rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))
    return np.clip(below + up, -127, 127).astype(np.int8), scale


def rounded_psi(psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token's codes of psi, and the psi that they stand for."""
    code = rounded_to_int8(psi)[0]
    return code, code / max(int(code.sum()), 1)


#: Largest code of a mean in 16 bits.
LARGEST = 32639


def dither(position: int, feature: int, channel: int) -> float:
    """The fraction of a code that is added before rounding down, in a step that begins at ``position``."""
    return (position % 16384 * 40503 + feature * 37345 + channel * 49471) % 65536 / 65536


def rounded_means(mean: np.ndarray, position: int, feature: int) -> tuple[np.ndarray, np.float32]:
    """One feature's codes and scale, from its means [D] after a step that began at ``position``."""
    scale = np.float32(np.abs(mean).max() / LARGEST)
    if scale < np.float32(2.0**-126):
        return np.zeros(len(mean), int), np.float32(0)
    codes = [math.floor(x / float(scale) + dither(position, feature, d)) for d, x in enumerate(mean)]
    return np.clip(codes, -LARGEST, LARGEST), scale
