"""The kernel that chooses tokens, on the host, with the interface that Python calls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from less_export.native import sampler
from less_export.runtime.sampling import SamplingParams

from . import emulation
from .emulation import PLUGIN
from .sharing import once

#: Beside what a kernel may touch.
MARGIN = 64


def compile_to(out: Path, folder: Path = PLUGIN / "sampler", *flags: str) -> None:
    """The kernel of ``folder`` for the host; ``host_sample.cpp`` includes it."""
    emulation.compile_source(PLUGIN / "emulation/host_sample.cpp", out, f"-I{folder}", *flags)


@functools.cache
def library() -> Path:
    """The unchanged kernel."""
    return once(emulation.compiled("sampler") / "libless_sampled.so", compile_to)


def set_order(order: int, path: Path | None = None) -> None:
    """Set the thread order of later launches."""
    ctypes.CDLL(str(path or library())).less_host_set_order(order)


def row_of(params: SamplingParams, uniform: float, logits: int, history: int = -1) -> np.ndarray[Any, Any]:
    """One LessSampleRow."""
    cuts = (uniform, params.temperature, params.top_p, params.min_p, min(params.top_k, 2**31 - 1))
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return np.array((*cuts, logits, history, *penalties), sampler.ROW)


def picks(
    logits: np.ndarray,
    rows: Sequence[np.ndarray[Any, Any]],
    histories: np.ndarray | None = None,
    path: Path | None = None,
) -> list[int]:
    """The tokens of ``rows`` by ``logits`` [*, V] f32; ``histories`` [*, V] u32 are updated.

    What lies beside and between must be neither read nor written: it is NaN, and compared.
    """
    asked, vocab = np.stack(rows), logits.shape[1]
    around = np.full(logits.size + 2 * MARGIN, np.nan, np.float32)
    around[MARGIN:-MARGIN] = logits.ravel()
    unasked = np.setdiff1d(np.arange(len(logits)), asked["logits"])
    around[MARGIN:-MARGIN].reshape(logits.shape)[unasked] = np.nan
    counted = np.full((0 if histories is None else histories.size) + 2 * MARGIN, 0x7FFFFFFF, np.uint32)
    if histories is not None:
        counted[MARGIN:-MARGIN] = histories.ravel()
    chosen = np.full(len(rows) + 2 * MARGIN, -7, np.int32)
    before, kept = around.copy(), asked.copy()
    error = sampler.load(path or library())(
        around[MARGIN:].ctypes.data, vocab, asked.ctypes.data, len(rows), counted[MARGIN:].ctypes.data,
        chosen[MARGIN:].ctypes.data, 0,
    )  # fmt: skip
    assert error == 0
    assert np.array_equal(before, around, equal_nan=True)
    assert kept.tobytes() == asked.tobytes()
    for array, filled in ((counted, 0x7FFFFFFF), (chosen, -7)):
        assert (array[:MARGIN] == filled).all()
        assert (array[-MARGIN:] == filled).all()
    if histories is not None:
        histories.ravel()[:] = counted[MARGIN:-MARGIN]
    return chosen[MARGIN:-MARGIN].tolist()
