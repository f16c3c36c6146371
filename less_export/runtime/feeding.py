"""A step over pieces of sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .backend import Backend
from .sampler import KeptLogits


def feed(
    backend: Backend, pieces: Sequence[Sequence[int]], rows: slice | Sequence[int] | None = None
) -> npt.NDArray[np.float32] | KeptLogits:
    """Feed a piece to each of ``rows``, default all; a row whose piece is empty is parked.

    Returns:
        logits [B, V] f32 after the last token of each piece, valid until the next step; those of a parked row are
        meaningless.
    """
    contract, new = backend.contract, [len(p) for p in pieces]
    width = max(new)
    if backend.fixed_chunk and width > 1:
        width = contract.chunk
    ids = np.zeros((len(pieces), width), np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return backend.step_last(ids, np.array(new), rows)
