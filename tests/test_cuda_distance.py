"""The CUDA kernels with distances inside the operator, on the host, against the oracle and next to the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from less_export.contract import LayerSpec, SlotDtype

from . import emulation, test_distance
from .emulation import DTYPES, ORDERS, emulated, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import ROTATED, Arrays
from .scenarios import Step, play, scenario
from .test_cuda import CHUNKS, CUTS, check_accuracy, check_thread_order, upwards
from .test_ops import empty, ordinary

__all__ = ["upwards"]  # a fixture that is used here too

#: The layers of test_distance.py that the kernels run: their head_dim is a multiple of 8.
RULES = {n: x for n, x in test_distance.VARIANTS.items() if n != "narrow"}
#: Largest distance of the shapes below; their sequences are longer.
FARTHEST = 40
#: Every dtype with every width of a tile and both kinds of slots, with all channels rotated and with some.
SHAPES: list[tuple[str, str, int, int, int, SlotDtype]] = [
    ("float16", "h2o", 64, 2, 8, "model"),
    ("float16", "tova", 256, 1, 8, "int8"),
    ("float16", "sink", 96, 1, 8, "int8"),
    ("float16", "h2o", 128, 8, 1, "model"),
    ("float16", "h2o", 80, 3, 8, "int8"),
    ("bfloat16", "h2o", 256, 4, 8, "model"),
    ("bfloat16", "tova", 80, 1, 16, "model"),
    ("bfloat16", "full", 128, 2, 1, "int8"),
    ("bfloat16", "h2o", 64, 12, 8, "int8"),
    ("bfloat16", "window", 96, 6, 1, "model"),
    ("float32", "h2o", 128, 4, 8, "int8"),
    ("float32", "tova", 256, 2, 8, "model"),
    ("float32", "window", 96, 1, 1, "int8"),
    ("float32", "sink", 40, 3, 9, "model"),
    ("float32", "h2o", 64, 2, 9, "model"),
]


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", exhaustive_but(RULES, "h2o", "h2o fading sparse sliding", "tova", "sink sparse int8"))
def test_every_rule(name: str, decode: bool) -> None:
    """Policies, windows, the clamp; ragged, parked and reset rows; empty, partial and full caches; NaN poison."""
    check_accuracy(RULES[name], ordinary(RULES[name], decode))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "policy", "head_dim", "group", "rank", "slots"),
    exhaustive_but(SHAPES, SHAPES[1], SHAPES[4], SHAPES[6], SHAPES[9], SHAPES[13]),
)
def test_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int, slots: SlotDtype) -> None:
    """Prefill past the budget and decode, with the slots of a head in one block and split over several."""
    layer = kernel_layer(policy, 150 if policy == "full" else 100, head_dim, group, rank, kv_heads=1)
    layer = replace(layer, slot_dtype=slots, max_distance=FARTHEST)
    for blocks, lengths in CUTS:
        emulation.set_blocks(blocks)
        check_accuracy(layer, scenario(layer, lengths, 3, normal(dtype)), dtype)


@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "bfloat16"))
def test_state_elsewhere(dtype: str) -> None:
    layer = replace(kernel_layer("h2o", 20, 16, 2, 8), max_distance=15)
    check_accuracy(layer, scenario(layer, CHUNKS, 4, normal(dtype)), dtype, in_place=False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as an implementation of test_distance.py."""
    monkeypatch.setitem(test_distance.IMPLEMENTATIONS, "cuda", emulated)
    return "cuda"


@pytest.mark.parametrize("name", exhaustive_but(("h2o", "tova", "sink", "window", "h2o int8"), "tova", "h2o int8"))
def test_absolute_positions_do_not_matter(name: str, cuda: str) -> None:
    test_distance.test_absolute_positions_do_not_matter(name, cuda)


@pytest.mark.parametrize("name", exhaustive_but(("h2o", "full"), "h2o"))
def test_below_the_clamp_distances_are_absolute_positions(name: str, cuda: str) -> None:
    test_distance.test_below_the_clamp_distances_are_absolute_positions(name, cuda)


def test_the_clamp_is_exact(cuda: str) -> None:
    test_distance.test_the_clamp_is_exact(cuda)


@pytest.mark.parametrize("slots", exhaustive_but(("model", "int8"), "model"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_matter_below_the_clamp(dtype: str, slots: SlotDtype) -> None:
    """One chunk of 48 tokens, three of 16 and single tokens. Int8 slots round what a later chunk sees of a key."""
    layer = replace(kernel_layer("full", 48, 64, 2, 1, kv_heads=1), slot_dtype=slots, max_distance=60)
    whole = scenario(layer, [(48,)], 0, normal(dtype))[0]

    def run(size: int) -> np.ndarray:
        def part(at: int) -> Step:
            tokens = {n: x[:, :, at : at + size] for n, x in whole.inputs.items() if x.ndim == 4}
            counts = {"past_length": np.array([at], np.int32), "new_length": np.array([size], np.int32)}
            return Step((), whole.inputs | tokens | counts, {})

        steps = [part(at) for at in range(0, 48, size)]
        return np.concatenate([got["out"] for _, _, got in play(emulated(layer, dtype), steps, fresh)], 2)

    fresh = empty(layer, DTYPES[dtype], 1)
    want, near = run(48), 0.02 if slots == "int8" or dtype != "float32" else 1e-5
    for size in (16, 1):
        np.testing.assert_allclose(run(size), want, rtol=0, atol=near)


#: Queries and keys that float16 holds, but not the sums of two of their elements.
LARGE = replace(kernel_layer("sink", 20, 16, 1, 8, kv_heads=1), max_distance=9, scale=1e-9)


def large_elements(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    drawn = normal("float16")(rng, layer, positions)
    return drawn | {n: np.copysign(np.float32(60_000), drawn[n]) for n in ("q", "k")}


def test_elements_of_60000_in_float16() -> None:
    check_accuracy(LARGE, scenario(LARGE, [(30,), (1,)], 0, large_elements), "float16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", exhaustive_but(DTYPES, "bfloat16"))
@pytest.mark.parametrize("slots", exhaustive_but(("model", "int8"), "model"))
def test_logits_of_200(slots: SlotDtype, dtype: str) -> None:
    """One 16-bit number an element would lose the differences between them."""
    layer = replace(kernel_layer("sink", 100, 64, 2, 8), slot_dtype=slots, max_distance=30)
    steps = scenario(layer, [(30, 9), (1, 1), (40, 3), (1, 1)], 1, normal(dtype, 80, (-60, 60)))
    check_accuracy(layer, steps, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("order", exhaustive_but(ORDERS, 1))
@pytest.mark.parametrize(("policy", "dtype", "blocks"), [("h2o", "bfloat16", 512), ("tova", "float32", 1)])
def test_thread_orders(policy: str, dtype: str, blocks: int, order: int) -> None:
    check_thread_order(replace(kernel_layer(policy, 70, 40, 2, 8, kv_heads=1), max_distance=30), dtype, blocks, order)


def test_shapes_cover_every_value() -> None:
    """Also both ways to find the partners of channels: eight at a time and one by one."""
    dtypes, _, head_dims, _, _, slots = zip(*SHAPES, strict=True)
    assert set(dtypes) == set(DTYPES)
    assert set(slots) == {"model", "int8"}
    for kind in ("model", "int8"):
        rotated = {ROTATED.get(d, d - 2) for d, s in zip(head_dims, slots, strict=True) if s == kind}
        assert {r % 16 == 0 for r in rotated} == {True, False}
