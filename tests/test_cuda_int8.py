"""The CUDA kernels with int8 slots, on the host, against the float64 oracle and next to the torch reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from less_export.contract import LayerSpec

from . import emulation
from .emulation import DTYPES, ORDERS, emulated, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import SCALES, Arrays, layer_of
from .scenarios import OneHot, play, scenario
from .test_cuda import CHUNKS, CUTS, HEAD_DIMS, check_accuracy, check_thread_order, compare_on_scattered_states, upwards
from .test_int8 import INT8_EDGES, far
from .test_ops import DECODE, INT8_VARIANTS, MIXED, empty, ordinary, tie_steps, tied

__all__ = ["upwards"]  # a fixture that is used here too

RULES = {**INT8_VARIANTS, **INT8_EDGES}
#: dtype, policy, head_dim, group, rank: every dtype with every width of a tile, and with each way to merge heads.
SHAPES = [
    ("float16", "h2o", 64, 2, 8),
    ("float16", "tova", 256, 4, 16),
    ("float16", "sink", 96, 1, 8),
    ("float16", "window", 128, 8, 1),
    ("bfloat16", "h2o", 256, 4, 8),
    ("bfloat16", "tova", 80, 1, 16),
    ("bfloat16", "full", 128, 2, 1),
    ("bfloat16", "sink", 64, 12, 8),
    ("float32", "h2o", 128, 4, 8),
    ("float32", "tova", 256, 2, 8),
    ("float32", "window", 96, 1, 1),
    ("float32", "sink", 40, 3, 9),
]


def int8(layer: LayerSpec) -> LayerSpec:
    return replace(layer, slot_dtype="int8")


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "name", exhaustive_but(RULES, "h2o fading int8", "tova one slot int8", "sink sparse sliding int8")
)
def test_every_rule(name: str, decode: bool) -> None:
    """Codes and scales are exact; ragged, parked and reset rows; empty slots hold NaN scales."""
    check_accuracy(RULES[name], ordinary(RULES[name], decode))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "policy", "head_dim", "group", "rank"), exhaustive_but(SHAPES, SHAPES[0], SHAPES[4], SHAPES[8])
)
def test_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int) -> None:
    """Prefill past the budget and decode, with the slots of a head in one block and split over several."""
    layer = int8(kernel_layer(policy, 150 if policy == "full" else 100, head_dim, group, rank, kv_heads=1))
    for blocks, lengths in CUTS:
        emulation.set_blocks(blocks)
        check_accuracy(layer, scenario(layer, lengths, 3, normal(dtype)), dtype)


@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "bfloat16"))
def test_state_elsewhere(dtype: str) -> None:
    layer = int8(kernel_layer("h2o", 20, 16, 2, 8))
    check_accuracy(layer, scenario(layer, CHUNKS, 4, normal(dtype)), dtype, in_place=False)


@pytest.mark.parametrize("name", exhaustive_but(("h2o int8", "tova int8"), "tova int8"))
def test_ties_keep_the_lower_index(name: str) -> None:
    layer = int8(tied(INT8_VARIANTS[name]))
    check_accuracy(layer, tie_steps(layer, 0))


def halves(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Values of scale 1 whose other elements all lie between two codes."""
    drawn = OneHot(layer.recent)(rng, layer, positions)
    drawn["v"] = (rng.integers(-30, 30, drawn["v"].shape) + 0.5).astype(np.float32)
    drawn["v"][..., 5] = 127
    return drawn


def test_halves_go_to_the_even_code() -> None:
    """In decode, in prefill, and in what the state absorbs of tokens that get no slot."""
    layer = layer_of("sink", 1, 2, head_dim=64, rank=2, slot_dtype="int8")
    steps = scenario(layer, [*MIXED, *DECODE[:6]], 0, halves)
    check_accuracy(layer, steps)
    got = [got for _, _, got in play(emulated(layer), steps, empty(layer))][-1]
    live = got["position"] >= 0
    assert (got["value_scale"][live] == 1).all()
    assert not (got["value"][live][:, np.arange(64) != 5] % 2).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", exhaustive_but(("h2o int8", "sink int8", "window int8"), "sink int8"))
def test_keys_far_from_zero_and_tokens_of_zeros(name: str, dtype: str) -> None:
    """One 16-bit number a key would lose the differences between them: tensor cores get the sum of several."""

    def rounded(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        drawn = far(rng, layer, positions)
        return {n: x if n == "log_phi_q" else emulation.rounded(dtype)(x) for n, x in drawn.items()}

    layer = INT8_VARIANTS[name]
    check_accuracy(layer, scenario(layer, [*MIXED, *DECODE[:3]], 2, rounded), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "bfloat16"))
@pytest.mark.parametrize("policy", exhaustive_but(("sink", "window"), "window"))
def test_logits_of_200(policy: str, dtype: str) -> None:
    layer = int8(kernel_layer(policy, 100, 64, 2, 8))
    steps = scenario(layer, [(30, 9), (1, 1), (40, 3), (1, 1)], 1, normal(dtype, 80, (-60, 60)))
    check_accuracy(layer, steps, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("order", exhaustive_but(ORDERS, 1))
@pytest.mark.parametrize(("policy", "dtype", "blocks"), [("h2o", "bfloat16", 512), ("tova", "float32", 1)])
def test_thread_orders(policy: str, dtype: str, blocks: int, order: int) -> None:
    check_thread_order(int8(kernel_layer(policy, 70, 40, 2, 8, kv_heads=1)), dtype, blocks, order)


def test_slots_that_stay_keep_every_bit() -> None:
    """Over 60 single tokens, a slot that keeps its token keeps its codes and scales."""
    layer = int8(kernel_layer("h2o", 12, 16, 1, 4, kv_heads=1))
    steps = scenario(layer, [(20,), *[(1,)] * 60], 8, normal("bfloat16"))
    kept = 0
    for _, before, got in play(emulated(layer, "bfloat16"), steps, empty(layer, DTYPES["bfloat16"], 1)):
        same = (got["position"] == before["position"]) & (got["position"] >= 0)
        kept += same.sum()
        for name in ("key", "value", *SCALES):
            assert got[name][same].tobytes() == before[name][same].tobytes(), name
    assert kept > 500
    check_accuracy(layer, steps, "bfloat16")


@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "float16"))
def test_scattered_states(dtype: str) -> None:
    compare_on_scattered_states(dtype, slots="int8")


def test_shapes_cover_every_value() -> None:
    dtypes, policies, head_dims, *_ = zip(*SHAPES, strict=True)
    assert set(dtypes) == set(DTYPES)
    assert set(policies) == {"h2o", "tova", "sink", "window", "full"}
    assert set(HEAD_DIMS) <= set(head_dims)
