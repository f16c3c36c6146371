"""The CUDA kernels with a low-rank state of 16 bits, on the host: against the oracle, next to the torch reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from less_export.contract import LayerSpec
from less_export.less import state16

from . import emulation
from .emulation import DTYPES, ORDERS, emulated, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import Arrays
from .scenarios import DIFFERENT, Normal, codes_of, compare, play, scenario
from .test_cuda import CHUNKS, CUTS, HEAD_DIMS, check_accuracy, check_thread_order, compare_on_scattered_states, upwards
from .test_ops import MIXED, empty, moved, ordinary, torch_run
from .test_state16 import CODES, SMALL, STATE16_VARIANTS

__all__ = ["upwards"]  # a fixture that is used here too

#: dtype, policy, head_dim, group, rank: every dtype with every width of a tile, and with each way to merge heads.
SHAPES = [
    ("float16", "h2o", 64, 2, 8),
    ("float16", "tova", 256, 4, 64),
    ("float16", "sink", 96, 1, 9),
    ("bfloat16", "h2o", 128, 8, 16),
    ("bfloat16", "tova", 80, 1, 5),
    ("bfloat16", "sink", 64, 12, 8),
    ("float32", "h2o", 256, 4, 8),
    ("float32", "sink", 8, 3, 33),
    ("float32", "tova", 128, 1, 8),
]


def small(layer: LayerSpec) -> LayerSpec:
    return replace(layer, **SMALL)


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "name", exhaustive_but(STATE16_VARIANTS, "h2o fading 16", "tova one slot 16", "h2o distance 16")
)
def test_every_rule(name: str, decode: bool) -> None:
    """Codes of psi are exact; ragged, parked and reset rows; empty slots hold a large psi."""
    check_accuracy(STATE16_VARIANTS[name], ordinary(STATE16_VARIANTS[name], decode))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "policy", "head_dim", "group", "rank"), exhaustive_but(SHAPES, SHAPES[1], SHAPES[3], SHAPES[7])
)
def test_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int) -> None:
    """Prefill past the budget and decode, with the slots of a head in one block and split over several."""
    layer = small(kernel_layer(policy, 100, head_dim, group, rank, kv_heads=1))
    for blocks, lengths in CUTS:
        emulation.set_blocks(blocks)
        check_accuracy(layer, scenario(layer, lengths, 3, normal(dtype)), dtype)


@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "bfloat16"))
def test_state_elsewhere(dtype: str) -> None:
    layer = small(kernel_layer("h2o", 20, 16, 2, 8))
    check_accuracy(layer, scenario(layer, CHUNKS, 4, normal(dtype)), dtype, in_place=False)


def test_psi_that_does_not_sum_to_one_counts_as_one() -> None:
    """Also psi of nothing but zeros, which absorbs nothing."""
    layer = STATE16_VARIANTS["h2o 16"]

    def draw(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        drawn = Normal()(rng, layer, positions)
        drawn["psi_k"] *= np.float32(4)
        drawn["psi_k"][:, :, ::3] = 0
        return drawn

    check_accuracy(layer, scenario(layer, MIXED, 1, draw))


def test_features_without_mass_keep_every_bit() -> None:
    """One KV head never fills its second feature, whose scale is NaN here: nothing reads it, or writes it."""
    layer, seen = STATE16_VARIANTS["sink sliding 16"], 0
    state = empty(layer)
    state[-1][:] = np.nan
    for step, before, got in play(emulated(layer), ordinary(layer, False), state):
        compare(step, before, got)  # asserts that they keep every bit
        still = (got["z"] == before["z"]) & (step.inputs["new_length"] > 0)[:, None, None]
        seen += int(still.sum())
    assert seen > 10
    assert np.isnan(got["h_scale"]).any()


@pytest.mark.parametrize("offset", [state16.PERIOD - 8, 2**30 + 1])
def test_far_positions(offset: int) -> None:
    """The dither starts anew after its period, and none of its products overflows."""
    layer, codes, different = STATE16_VARIANTS["h2o 16"], 0, 0
    steps = list(moved(ordinary(layer, False), offset))
    wanted = (got for _, _, got in play(torch_run(layer), steps, empty(layer)))
    for (_, _, got), want in zip(play(emulated(layer), steps, empty(layer)), wanted, strict=True):
        difference = np.abs(codes_of(got["h"]) - codes_of(want["h"]))
        assert difference.max() <= 2
        codes, different = codes + difference.size, different + int(np.count_nonzero(difference))
        np.testing.assert_allclose(got["out"], want["out"], rtol=0, atol=1e-4)
    assert different <= DIFFERENT * codes


@pytest.mark.slow
@pytest.mark.parametrize("order", exhaustive_but(ORDERS, 1))
@pytest.mark.parametrize(("policy", "dtype", "blocks"), [("h2o", "bfloat16", 512), ("tova", "float32", 1)])
def test_thread_orders(policy: str, dtype: str, blocks: int, order: int) -> None:
    check_thread_order(small(kernel_layer(policy, 70, 40, 2, 9, kv_heads=1)), dtype, blocks, order)


@pytest.mark.slow
def test_200_steps_do_not_drift() -> None:
    """A code that float32 moves stays moved, so that more and more differ, but each by a few."""
    layer = small(kernel_layer("sink", 24, 16, 2, 8, kv_heads=1))
    steps = scenario(layer, [(40, 11), *[(1, 1)] * 200], 8, normal("bfloat16"))
    for step, before, got in play(emulated(layer), steps, empty(layer, batch=2)):
        errors = compare(step, before, got)
        assert max(errors["out"], errors["h"]) < 4 * CODES, errors


@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "float16"))
def test_scattered_states(dtype: str) -> None:
    """Several tokens that leave at once are absorbed in one rounding, in decode too."""
    compare_on_scattered_states(dtype, slots="int8", state_bits=16)


def test_shapes_cover_every_value() -> None:
    dtypes, policies, head_dims, *_ = zip(*SHAPES, strict=True)
    assert set(dtypes) == set(DTYPES)
    assert set(policies) == {"h2o", "tova", "sink"}
    assert set(HEAD_DIMS) <= set(head_dims)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slot_bits": 0}, "a state of 16 bits goes with int8 slots"),
        ({"absorb": 0}, "layers that absorb"),
        ({"state_bits": 8}, "a state has 16 or 32 bits"),
    ],
)
def test_states_that_cannot_be(change: dict[str, int], reason: str) -> None:
    layer = STATE16_VARIANTS["h2o 16"]
    assert emulation.why_unsupported(layer) == ""
    assert reason in emulation.why_unsupported(layer, **change)
