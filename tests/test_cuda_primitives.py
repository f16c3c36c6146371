"""Host versions of the tensor core, of matrix loads and of asynchronous copies, against plain products.

``scripts/gpu_check`` runs the same source on a GPU, so that host version and hardware must give the same result.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pytest
import torch

from . import emulation
from .emulation import DTYPES, ORDERS, PLUGIN
from .sharing import once

pytestmark = pytest.mark.slow


@functools.cache
def primitives() -> ctypes.CDLL:
    library = emulation.compiled("primitives") / "libless_primitives.so"
    return ctypes.CDLL(str(once(library, lambda path: emulation.compile_source(PLUGIN / "tests/primitives.cu", path))))


def check(call: Callable[..., int], dtype: str, seed: int, device: str = "cpu") -> None:
    """Scores and products of random matrices whose invalid rows are NaN; exact up to f32's order of summation."""
    kind, generator = DTYPES[dtype], torch.Generator().manual_seed(seed)
    a, keys, values = (torch.randn(16, 16, generator=generator).to(kind) for _ in range(3))
    valid = (torch.rand(16, generator=generator) < 0.8).int()
    want = [a.double() @ torch.where(valid[:, None] > 0, x.double(), 0.0) for x in (keys, values)]
    want[0] = a.double() @ torch.where(valid[:, None] > 0, keys.double(), 0.0).T
    want[1] = 1 + want[1]
    for x in (keys, values):
        x[valid == 0] = torch.nan
    given = [x.to(device) for x in (a, keys, values, valid)]
    got = [torch.full((16, 16), torch.nan, device=device) for _ in range(2)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*given, *got)]
    assert call(int(dtype == "bfloat16"), *pointers) == 0
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_twins_multiply(dtype: str, order: int) -> None:
    emulation.set_order(order)
    try:
        check(primitives().less_primitives, dtype, order)
    finally:
        emulation.set_order(0)
