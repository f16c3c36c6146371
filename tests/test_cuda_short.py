"""Short chunks, on the host: two kernels whatever the layer, and scores that do not depend on which kernels run.

Their accuracy is compared beside that of long ones, in the other ``test_cuda`` files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from less_export.contract import LayerSpec

from . import emulation
from .emulation import DTYPES, emulated, kernel_layer, normal
from .oracle import TOKENS
from .scenarios import play, scenario
from .test_ops import empty

#: Layers, and what of the kernels of a long chunk they launch.
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("window", {}, 3),  # attend, select, place
    ("sink", {}, 4),  # absorb
    ("h2o", {}, 5),  # score
    ("tova", {"max_distance": 20}, 6),  # turn
    ("h2o", {"slot_dtype": "int8", "score_half_life": 20}, 6),  # measure
    ("h2o", {"slot_dtype": "int8", "state_bits": 16, "max_distance": 20}, 8),  # psi and turn
]


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    yield
    emulation.set_short_chunk(64)


def layer_of(policy: str, options: dict[str, Any]) -> LayerSpec:
    rank = 1 if policy == "window" else 8
    return replace(kernel_layer(policy, 12, 16, 2, rank, kv_heads=1), **options)


def launched(layer: LayerSpec, dtype: str, tokens: int) -> int:
    """Kernels launched for a chunk of so many tokens, of which one row has one and another none."""
    (step,) = scenario(layer, [(tokens, 0)], 0, normal(dtype))
    inputs = {n: x[:, :, :tokens] if n in TOKENS else x for n, x in step.inputs.items()}
    inputs["new_length"] = np.array([1, 0], np.int32)
    before = emulation.launches()
    for _ in play(emulated(layer, dtype), [replace(step, inputs=inputs)], empty(layer, DTYPES[dtype], 2)):
        pass
    return emulation.launches() - before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("policy", "options", "long"), KINDS)
def test_launches(policy: str, options: dict[str, Any], long: int, dtype: str) -> None:
    """One for a token, two for up to 64, by the size of the chunk, not by the tokens in it."""
    layer = layer_of(policy, options)
    assert [launched(layer, dtype, n) for n in (1, 2, 33, 64, 65)] == [1, 2, 2, 2, long]


def test_more_logits_than_are_kept_take_the_kernels_of_long_chunks() -> None:
    """Up to 4 MiB a row: 8 heads, 64 queries and 2,048 slots with the chunk are more."""
    h2o, tova = (kernel_layer(policy, 2048, 16, 8, 8, kv_heads=1) for policy in ("h2o", "tova"))
    assert [launched(h2o, "float16", n) for n in (32, 64)] == [2, 5]
    assert launched(tova, "float16", 64) == 2  # of the last query alone


@pytest.mark.parametrize(("policy", "options", "long"), KINDS)
def test_long_and_short_kernels_agree(policy: str, options: dict[str, Any], long: int) -> None:
    """The same chunks through both: equal but for the order of sums."""
    layer = layer_of(policy, options)
    steps = scenario(layer, [(17, 5), (1, 1), (30, 40), (0, 3)], 6, normal("float32"))
    results = []
    for limit in (64, 0):
        emulation.set_short_chunk(limit)
        results.append([got for _, _, got in play(emulated(layer), steps, empty(layer, batch=2))])
    for short, other in zip(*results, strict=True):
        live = short["position"] >= 0
        np.testing.assert_array_equal(short["position"], other["position"])
        for name in ("out", "score", "z"):
            at = live if name == "score" else ...
            np.testing.assert_allclose(short[name][at], other[name][at], rtol=1e-5, atol=1e-6)
