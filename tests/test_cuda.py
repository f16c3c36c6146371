"""The CUDA kernels, on the host, against the float64 oracle and next to the torch reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export import testing
from less_export.contract import LayerSpec, SlotDtype, StateBits

from . import emulation, test_ops
from .emulation import DTYPES, ORDERS, emulated, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import TOKENS, centring_of, layer_of
from .scenarios import DIFFERENT, IN_SLOTS, Normal, Step, codes_of, compare, follow, play, scenario
from .test_ops import EDGES, VARIANTS, empty, moved, ordinary, shaped, tie_steps, tied, torch_run
from .test_state16 import CODES

#: Allowance for float32 rounding on top of twice the reference's error, as for the ONNX bodies.
FLOOR = 5e-7
#: Prefill past the budget, decode, a parked row, a second chunk, an end in mid-chunk; chunks are long.
CHUNKS = [(70, 9), (1, 1), (1, 0), (1, 1), (30, 66), (0, 1), (1, 1)]
#: The same with short chunks, of at most 64 tokens.
SHORT_CHUNKS = [(50, 9), (1, 1), (1, 0), (60, 33), (0, 1), (1, 1)]
#: Decode with the slots of a head split over blocks, and in one, each with chunks of one kind.
CUTS = [(512, CHUNKS), (1, SHORT_CHUNKS)]

POLICIES = ("h2o", "sink", "tova", "window", "full")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16, 71)
RANKS = (1, 8, 16, 32)
#: Every head_dim, group, rank, dtype and policy at least twice.
CHOSEN = [
    ("float16", "h2o", 64, 1, 8),
    ("float16", "tova", 80, 4, 16),
    ("float16", "sink", 128, 4, 32),
    ("float16", "window", 256, 3, 1),
    ("float16", "full", 96, 2, 1),
    ("float16", "h2o", 128, 8, 1),
    ("float16", "tova", 64, 16, 8),
    ("bfloat16", "h2o", 256, 4, 8),
    ("bfloat16", "h2o", 128, 16, 16),
    ("bfloat16", "sink", 80, 7, 16),
    ("bfloat16", "tova", 128, 1, 8),
    ("bfloat16", "window", 64, 8, 1),
    ("bfloat16", "full", 128, 7, 1),
    ("bfloat16", "h2o", 64, 71, 8),
    ("float32", "h2o", 128, 3, 16),
    ("float32", "tova", 256, 2, 32),
    ("float32", "sink", 96, 1, 8),
    ("float32", "h2o", 64, 71, 32),
    ("float32", "window", 80, 2, 1),
]


@pytest.fixture(autouse=True)
def upwards() -> Iterator[None]:
    """Restore the usual thread order after a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    emulation.set_order(0)
    emulation.set_blocks(512)
    emulation.set_short_chunk(64)


def allowed(layer: LayerSpec, reference: dict[str, float]) -> dict[str, float]:
    """Largest errors of a layer whose reference has these: twice as much, and single codes of means."""
    floors = dict.fromkeys(reference, FLOOR) | (dict.fromkeys(("out", "h"), CODES) if layer.state16 else {})
    return {name: 2 * error + floors[name] for name, error in reference.items()}


def check_accuracy(layer: LayerSpec, steps: list[Step], dtype: str = "float32", in_place: bool = True) -> None:
    """Slots are exact, and errors at most twice those of the torch reference at the same precision."""
    fresh = empty(layer, DTYPES[dtype], len(steps[0].inputs["new_length"]))
    reference = follow(torch_run(layer, dtype=DTYPES[dtype]), steps, fresh)
    limits = allowed(layer, reference)
    for name, error in follow(emulated(layer, dtype, in_place), steps, fresh).items():
        assert error <= limits[name], (name, error, reference[name])


def check_shape(dtype: str, policy: str, head_dim: int, group: int, rank: int) -> None:
    kv_heads = 1 if group > 8 else 2
    capacity = 150 if policy == "full" else 100  # several tiles, and several blocks a head in decode
    layer = kernel_layer(policy, capacity, head_dim, group, rank, kv_heads)
    crowded = [(512, [(7, 3), (1, 1), (1, 0), (1, 1), (4, 100)]), (1, [(4, 50), (1, 1), (3, 60), (1, 1)])]
    for blocks, lengths in crowded if group > 8 else CUTS:
        emulation.set_blocks(blocks)
        check_accuracy(layer, scenario(layer, lengths, 3, normal(dtype)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "policy", "head_dim", "group", "rank"), CHOSEN)
def test_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int) -> None:
    check_shape(dtype, policy, head_dim, group, rank)


ALL_SHAPES = [
    shape
    for shape in itertools.product(DTYPES, POLICIES, HEAD_DIMS, GROUPS, RANKS)
    if shape[1] not in ("window", "full") or shape[4] == 1  # these absorb nothing and have no rank
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "policy", "head_dim", "group", "rank"), ALL_SHAPES)
def test_all_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int) -> None:
    check_shape(dtype, policy, head_dim, group, rank)


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", exhaustive_but(test_ops.HEADS, "GQA"))
@pytest.mark.parametrize("name", [*VARIANTS, *EDGES])
def test_every_rule(name: str, heads: str, decode: bool) -> None:
    """Policies, windows, absorb; ragged, parked and reset rows; empty, partial and full caches; NaN poison."""
    layer = shaped({**VARIANTS, **EDGES}[name], test_ops.HEADS[heads])
    if emulation.why_unsupported(layer):
        assert layer.window == 1
        assert layer.policy.name != "window"
        return
    check_accuracy(layer, ordinary(layer, decode))


@pytest.mark.parametrize("name", ["h2o", "h2o fading sparse sliding", "tova sliding", "sink sliding", "tova one slot"])
def test_kernels_of_long_chunks_on_short_ones(name: str) -> None:
    """Rules that long chunks of the other tests do not reach."""
    emulation.set_short_chunk(0)
    layer = {**VARIANTS, **EDGES}[name]
    check_accuracy(layer, ordinary(layer, False))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_in_place_and_elsewhere(dtype: str, in_place: bool) -> None:
    layer = kernel_layer("h2o", 20, 16, 2, 8)
    check_accuracy(layer, scenario(layer, CHUNKS, 4, normal(dtype)), dtype, in_place)


@pytest.mark.parametrize(
    ("name", "seed"), [(n, s) for n in VARIANTS for s in range(3) if n.startswith(("h2o", "tova"))]
)
def test_ties_keep_the_lower_index(name: str, seed: int) -> None:
    layer = tied(VARIANTS[name])
    check_accuracy(layer, tie_steps(layer, seed))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("policy", "logit", "log_phi"), [("sink", 80, 60), ("sink", 1.5, 120), ("window", 80, 60)])
def test_logits_of_200_and_low_rank_masses_of_e120(policy: str, logit: float, log_phi: float, dtype: str) -> None:
    layer = kernel_layer(policy, 100, 64, 2, 8)
    lengths = [(30, 9), (1, 1), (40, 3), (1, 1)]
    check_accuracy(layer, scenario(layer, lengths, 1, normal(dtype, logit, (-60, log_phi))), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["window", "h2o", "sink"])
def test_chunks_longer_than_the_window(policy: str, dtype: str) -> None:
    """Whole tiles of slots and of the chunk are invisible to later rows."""
    layer = kernel_layer(policy, 20, 64, 2, 8)
    layer = replace(layer, window=layer.window or 30)
    check_accuracy(layer, scenario(layer, [(150, 70), (1, 1), (200, 131), (1, 1)], 6, normal(dtype)), dtype)


@pytest.mark.parametrize("name", ["h2o", "tova sliding", "window"])
def test_positions_beyond_2_to_the_24(name: str) -> None:
    layer = VARIANTS[name]
    for step, before, got in play(emulated(layer), moved(ordinary(layer, False), 2**30 + 1), empty(layer)):
        assert max(compare(step, before, got).values()) < test_ops.F32


@pytest.mark.slow
@pytest.mark.parametrize("policy", exhaustive_but(["h2o", "sink"], "h2o"))
def test_200_steps_do_not_drift(policy: str) -> None:
    """Slots and state after a chunk and 200 tokens equal those of the float64 oracle."""
    layer = kernel_layer(policy, 24, 16, 2, 8)
    check_accuracy(layer, scenario(layer, [(40, 11), *[(1, 1)] * 200], 8, normal("bfloat16")), "bfloat16")


def check_thread_order(layer: LayerSpec, dtype: str, blocks: int, order: int) -> None:
    """Results are bitwise those of the usual order, and right."""
    emulation.set_blocks(blocks)
    steps = scenario(layer, [(60, 9), (1, 1), (1, 0), (20, 66), (33, 5), (1, 1)], 6, normal(dtype))
    fresh = empty(layer, DTYPES[dtype], 2)
    emulation.set_order(0)
    usual = [got for _, _, got in play(emulated(layer, dtype), steps, fresh)]
    emulation.set_order(order)
    for (step, before, got), other in zip(play(emulated(layer, dtype), steps, fresh), usual, strict=True):
        compare(step, before, got)
        live = got["position"] >= 0
        for name, x in got.items():
            mask = live if name in IN_SLOTS else ...
            assert x[mask].tobytes() == other[name][mask].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("order", exhaustive_but(ORDERS, 1, 4, 6))
@pytest.mark.parametrize(("policy", "blocks"), [("h2o", 1), ("h2o", 512), ("tova", 512), ("sink", 1), ("window", 512)])
def test_thread_orders(policy: str, blocks: int, order: int) -> None:
    check_thread_order(kernel_layer(policy, 70, 64, 4, 8), "float16", blocks, order)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o", "tova", "sink"])
def test_more_slots_and_tokens_than_tensorrt_could_sort(policy: str) -> None:
    """4,200 slots are filled, and a chunk evicts 300 tokens; compared with the torch reference."""
    layer = kernel_layer(policy, 4200, 8, 1, 8, kv_heads=1)
    rng, draw = np.random.default_rng(0), Normal()
    state = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in testing.empty_state(layer, 1)]
    runs = {"torch": torch_run(layer), "cuda": emulated(layer)}
    past, previous = 0, dict.fromkeys(runs, state)
    for count in (4150, 350, 1):
        tokens = draw(rng, layer, past + np.arange(count)[None])
        lengths = [np.array([past], np.int32), np.array([count], np.int32)]
        inputs = [tokens[n] for n in ("q", "k", "v", "log_phi_q", "psi_k")]
        if count == 4150:  # the first chunk only fills slots: use the reference's state for both
            outputs = runs["torch"]([*inputs, *state, *lengths])
            previous = {n: [x.copy() for x in outputs[1:]] for n in runs}
        else:
            got = {n: run([*inputs, *previous[n], *lengths]) for n, run in runs.items()}
            np.testing.assert_array_equal(got["cuda"][5], got["torch"][5])
            for ours, theirs in zip(got["cuda"], got["torch"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
            previous = {n: outputs[1:] for n, outputs in got.items()}
        past += count


def test_more_tokens_than_slots_of_policy_full_stay_inside_memory() -> None:
    """The runtime refuses them; if the kernels get them, they keep the old tokens."""
    layer = kernel_layer("full", 12, 16, 2, 1)
    roomy = kernel_layer("full", 40, 16, 2, 1)
    steps = scenario(roomy, [(10, 12), (9, 1), (1, 1)], 0)
    positions = [got["position"] for _, _, got in play(emulated(layer), steps, empty(layer, batch=2))]
    assert (np.sort(positions[-1], -1) == np.arange(12)).all()


def test_layers_that_cannot_run_are_named() -> None:
    fine = kernel_layer("h2o", 10, 64, 2, 8)
    assert emulation.why_unsupported(fine) == ""
    for layer, reason in (
        (kernel_layer("h2o", 10, 20, 2, 8), "head_dim must be a multiple of 8"),
        (kernel_layer("h2o", 10, 264, 2, 8), "head_dim must be a multiple of 8 up to 256"),
        (kernel_layer("h2o", 10, 64, 2, 65), "rank must be 1 to 64"),
        (kernel_layer("h2o", 10, 64, 129, 8), "more than 128 query heads"),
        (layer_of("h2o", 2, 2, window=1), "a window of at least 2"),
    ):
        assert reason in emulation.why_unsupported(layer)


def test_chosen_shapes_cover_every_value() -> None:
    for values, column in zip((DTYPES, POLICIES, HEAD_DIMS, GROUPS, RANKS), zip(*CHOSEN, strict=True), strict=True):
        assert set(column) == set(values)


def compare_on_scattered_states(
    dtype: str, path: Path | None = None, slots: SlotDtype = "model", state_bits: StateBits = 32
) -> None:
    """States that no sequence of steps creates (holes, distant positions, several evictions at once)."""
    rng = np.random.default_rng(5)
    for policy, absorb in itertools.product(("h2o", "sink", "tova"), (True, False) if state_bits == 32 else (True,)):
        heavy = 10 if policy == "tova" else 5
        layer = layer_of(policy, heavy, 11 - heavy, absorb=absorb, head_dim=16, rank=4, slot_dtype=slots)
        layer = replace(layer, state_bits=state_bits)
        for chunk in (1, 1, 9):
            tokens = normal(dtype)(rng, layer, 40 + np.arange(chunk)[None])
            state = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in testing.empty_state(layer, 1)]
            for h in range(2):
                held = rng.permutation(11)[: rng.integers(3, 12)]
                state[4][0, h, held] = rng.permutation(40)[: len(held)]
            live = state[4] >= 0
            for i, width in ((0, 16), (1, 16), (2, layer.rank)):
                if state[i].dtype == np.int8:
                    state[i][:] = rng.integers(0 if i == 2 else -127, 128, state[i].shape)
                    continue
                state[i][:] = emulation.rounded(dtype)(rng.random((*live.shape, width)))
                state[i][~live] = np.nan
            for scale in state[7:9]:  # of int8 slots
                scale[:] = np.where(live, rng.random(live.shape) / 127, np.nan)
            state[3][:] = np.where(live, rng.random(live.shape) if policy != "sink" else 0, np.nan)
            if absorb:
                state[6][:] = 5 + rng.random(state[6].shape)
            if layer.state16:
                state[5][:] = rng.integers(-127, 128, state[5].shape)
                state[9][:] = rng.random(state[9].shape) / 32639
            elif absorb:
                state[5][:] = rng.random(state[5].shape) * 5
            lengths = [np.array([40], np.int32), np.array([chunk], np.int32)]
            inputs = [*(tokens[n] for n in TOKENS), *state, *lengths, *(centring_of(layer) if layer.int8 else ())]
            want = torch_run(layer, dtype=DTYPES[dtype])(inputs)
            got = emulated(layer, dtype, path=path)(inputs)
            np.testing.assert_array_equal(got[5], want[5])
            if layer.state16:
                np.testing.assert_allclose(codes_of(got[6]), codes_of(want[6]), rtol=0, atol=1)
                assert np.mean(got[6] != want[6]) < DIFFERENT
            for i in {*range(len(want))} - ({5, 6} if layer.state16 else {5}):
                mask = want[5] >= 0 if i in (1, 2, 3, 4, 8, 9) else ...
                near = 2 * torch.finfo(DTYPES[dtype]).eps if i == 0 else 1e-6
                np.testing.assert_allclose(got[i][mask], want[i][mask], rtol=2e-5, atol=near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_states(dtype: str) -> None:
    compare_on_scattered_states(dtype)
