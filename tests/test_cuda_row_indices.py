"""Rows of the state by index: any rows, in any order, give the bits of the same rows in order; others are untouched.

The kernels on the host, and the plugin class; the same rows in order are compared with the oracle elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from less_export.contract import LayerSpec

from . import emulation
from .emulation import emulated, kernel_layer, normal
from .oracle import TOKENS
from .plugin_host import Plugin, describe, described, harness, log, plugin_run
from .scenarios import POISON, Run, Step, follow, play, scenario
from .test_ops import empty

#: Of three rows: prefill, decode, parked rows, prefill past the budget, and a chunk that reads what was absorbed.
LENGTHS = [(70, 9, 30), (1, 1, 1), (1, 0, 1), (40, 66, 0), (1, 1, 1), (20, 30, 50), (0, 1, 1), (1, 1, 1)]
#: Rows of the state beyond those of a step.
OTHERS = 4
#: Layers that reach every kernel and every tensor of the state: (policy, group, what differs).
KINDS: list[tuple[str, int, dict[str, Any]]] = [
    ("h2o", 2, {}),
    ("tova", 3, {"max_distance": 30}),
    ("h2o", 2, {"slot_dtype": "int8", "max_distance": 30}),
    ("sink", 1, {"slot_dtype": "int8", "state_bits": 16}),
    ("window", 2, {}),
]


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Restore the usual number of blocks after a test."""
    yield
    emulation.set_blocks(512)


def layer_of(policy: str, group: int, options: dict[str, Any], slots: int = 90, kv_heads: int = 2) -> LayerSpec:
    rank = 1 if policy == "window" else 8
    return replace(kernel_layer(policy, slots, 40, group, rank, kv_heads), **options)


def unpadded(steps: Sequence[Step]) -> list[Step]:
    """Steps as wide as their longest row: a single token goes to decode."""
    widths = [max(1, int(s.inputs["new_length"].max())) for s in steps]
    assert 1 in widths
    return [
        replace(s, inputs={n: x[:, :, :width] if n in TOKENS else x for n, x in s.inputs.items()})
        for s, width in zip(steps, widths, strict=True)
    ]


def poisoned(x: np.ndarray) -> np.ndarray:
    """Rows of state that a step must neither read nor write: as many as it has, and more."""
    return np.full((len(x) + OTHERS, *x.shape[1:]), np.nan if x.dtype.kind == "f" else POISON, x.dtype)


def bits(x: np.ndarray) -> bytes:
    """All bits but those of NaNs: conversions give them others, depending on where in an array they are."""
    return np.where(np.isnan(x), np.float32(np.nan), x).tobytes() if x.dtype.kind == "f" else x.tobytes()


def scattered(run: Run, layer: LayerSpec, places: Sequence[int] | None = None) -> Run:
    """A run whose rows lie in other places of a larger state at every step, amid poison that must stay.

    The places are random unless they are given.
    """
    random = np.random.default_rng(1)
    first, end = len(TOKENS), len(TOKENS) + len(layer.state_fields)

    def moved(arrays: list[np.ndarray]) -> list[np.ndarray]:
        batch = len(arrays[0])
        rows = random.permutation(batch + OTHERS)[:batch].astype(np.int32)
        if places is not None:
            rows = np.array(places, np.int32)
        given = [*arrays]
        for i in range(first, end):
            given[i] = poisoned(arrays[i])
            given[i][rows] = arrays[i]
        out, *state = run([*given, rows])
        others = np.setdiff1d(np.arange(batch + OTHERS), rows)
        for x, before in zip(state, given[first:end], strict=True):
            assert bits(x[others]) == bits(before[others]), "a row that is not listed has changed"
        return [out, *(x[rows] for x in state)]

    return moved


def check_scattered(layer: LayerSpec, dtype: str, path: Path | None = None, in_place: bool = True) -> None:
    """Compare all bits of all steps with those of rows in order."""
    steps = unpadded(scenario(layer, LENGTHS, 6, normal(dtype)))
    fresh = empty(layer, emulation.DTYPES[dtype], len(LENGTHS[0]))
    for blocks in (512, 1):  # decode with the slots of a head split over blocks, and in one
        emulation.set_blocks(blocks, path)
        plain = play(emulated(layer, dtype, path=path), steps, fresh)
        other = scattered(emulated(layer, dtype, in_place, path, by_index=True), layer)
        for (_, _, want), (_, _, got) in zip(plain, play(other, steps, fresh), strict=True):
            for name in want:
                assert bits(got[name]) == bits(want[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("policy", "group", "options"), KINDS)
def test_any_rows_give_the_same_bits(policy: str, group: int, options: dict[str, Any], dtype: str) -> None:
    check_scattered(layer_of(policy, group, options), dtype)


def test_rows_by_index_quickly() -> None:
    layer = layer_of("h2o", 2, {}, slots=12)
    check_scattered(layer, "float16")
    check_scattered(layer, "float16", in_place=False)  # copies all rows, also those that are not listed


def padded(run: Run, layer: LayerSpec) -> Run:
    """A run whose steps have parked rows behind the others; what these have is poison, and stays as it is.

    Any indices: of rows of their own, of a row that runs, and out of range.
    """
    first, end = len(TOKENS), len(TOKENS) + len(layer.state_fields)
    lengths = range(end, end + len(emulation.LENGTHS))

    def parked(arrays: list[np.ndarray]) -> list[np.ndarray]:
        batch = len(arrays[0])
        given = [*arrays]
        for i in range(end):
            given[i] = poisoned(arrays[i])
            given[i][:batch] = arrays[i]
        for i in lengths:
            given[i] = np.append(arrays[i], np.zeros(OTHERS, np.int32))
        rows = np.array([*range(batch), batch + 1, 0, batch + OTHERS, -1], np.int32)
        out, *state = run([*given, rows])
        assert not out[batch:].any()
        for x, before in zip(state, given[first:end], strict=True):
            assert bits(x[batch:]) == bits(before[batch:]), "a parked row has changed"
        return [out[:batch], *(x[:batch] for x in state)]

    return parked


def check_padded(layer: LayerSpec, dtype: str, lengths: Sequence[tuple[int, ...]], path: Path | None = None) -> None:
    """Compare all bits of all steps with those without parked rows."""
    steps = unpadded(scenario(layer, lengths, 6, normal(dtype)))
    fresh = empty(layer, emulation.DTYPES[dtype], len(lengths[0]))
    for blocks in (512, 1):
        emulation.set_blocks(blocks, path)
        plain = play(emulated(layer, dtype, path=path), steps, fresh)
        other = padded(emulated(layer, dtype, path=path, by_index=True), layer)
        for (_, _, want), (_, _, got) in zip(plain, play(other, steps, fresh), strict=True):
            for name in want:
                assert bits(got[name]) == bits(want[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("policy", "group", "options"), KINDS)
def test_parked_rows_are_neither_read_nor_written(policy: str, group: int, options: dict[str, Any], dtype: str) -> None:
    check_padded(layer_of(policy, group, options), dtype, LENGTHS)


def test_parked_rows_quickly() -> None:
    check_padded(layer_of("h2o", 2, {}, slots=12), "float16", [(9, 4), (1, 1), (1, 1), (3, 5)])


def test_a_row_does_not_depend_on_its_place_or_on_the_batch() -> None:
    layer = layer_of("h2o", 2, {}, slots=12)
    steps = scenario(layer, [(9,), (1,), (1,)], 2, normal("float16"))
    fresh = empty(layer, torch.float16, 1)
    wanted = [got for _, _, got in play(emulated(layer, "float16"), steps, fresh)]
    run = emulated(layer, "float16", by_index=True)
    for row in range(1 + OTHERS):
        alone = scattered(run, layer, [row])
        for want, (_, _, got) in zip(wanted, play(alone, steps, fresh), strict=True):
            assert all(bits(got[n]) == bits(want[n]) for n in want), row


def test_indices_out_of_range_stay_within_the_state() -> None:
    """TensorRT times plugins on inputs of any content: an index out of range counts as the last row."""
    layer = layer_of("h2o", 2, {}, slots=12)
    for chunk in (1, 5):
        (step,) = scenario(layer, [(chunk,)], 2, normal("float16"))
        state = [np.repeat(x, 7, 0) for x in empty(layer, torch.float16, 1)]
        tokens = [step.inputs[n] for n in TOKENS]
        lengths = [step.inputs[n] for n in emulation.LENGTHS]
        run = emulated(layer, "float16", by_index=True)
        want = run([*tokens, *state, *lengths, np.array([6], np.int32)])
        for row in (7, 2**31 - 1, -1, -(2**31)):
            got = run([*tokens, *state, *lengths, np.array([row], np.int32)])
            assert all(bits(x) == bits(y) for x, y in zip(got, want, strict=True)), row


# ------------------------------------------------------------------ the plugin class


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "group", "options"), KINDS)
def test_the_plugin_takes_rows(policy: str, group: int, options: dict[str, Any]) -> None:
    layer = layer_of(policy, group, options)
    plugin = Plugin.of(layer, by_index=True).round_trip()
    steps = scenario(layer, LENGTHS, 6, normal("float16"))
    fresh = empty(layer, torch.float16, len(LENGTHS[0]))
    run = scattered(plugin_run(plugin, layer, "float16", by_index=True), layer)
    assert follow(run, steps, fresh) == follow(emulated(layer, "float16"), steps, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["configure", "shape_change"])
def test_tensors_of_rows_by_index_that_are_refused(method: str) -> None:
    layer = replace(layer_of("h2o", 2, {}), slot_dtype="int8", state_bits=16, max_distance=100)
    plugin, good = Plugin.of(layer, by_index=True), described(layer, torch.float16, 3, 5, rows=8)
    assert plugin.tensors(method, good) == 0, log()
    assert plugin.tensors(method, described(layer, torch.float16, 3, 5, rows=3)) == 0, log()

    def refused(tensors: list[Any], says: str) -> None:
        assert plugin.tensors(method, tensors) != 0
        message = log()
        assert says in message
        assert message.count("\n") == 1

    count = len(emulation.input_names(layer, by_index=True))
    refused(described(layer, torch.float16, 3, 5), f"takes {count} inputs")
    refused(described(layer, torch.float16, 3, 5, rows=2), "a step has 3 rows, but the state 2")
    rows, past_z = count - 1, emulation.input_names(layer).index("z")
    for index, dtype, shape, says in (
        (rows, torch.int64, [3], "rows is int64, but must be int32"),
        (rows, torch.int32, [8], "rows has shape [8], but dimension 0 must be 3"),
        (rows, torch.int32, [3, 1], "rows has shape [3,1], but must have 1 dimensions"),
        (past_z, torch.float32, [3, 2, 8], "past_z has shape [3,2,8], but dimension 0 must be 8"),
    ):
        changed = [*good]
        changed[index] = describe(dtype, shape)
        refused(changed, says)
    assert harness().harness_allocations() == 0
