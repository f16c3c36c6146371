"""A row's result does not depend on the batch, nor on how many blocks share a head: bit for bit, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from less_export import testing
from less_export.contract import LayerSpec

from . import emulation
from .emulation import DTYPES, emulated, kernel_layer, normal
from .oracle import TOKENS, centring_of, table_of
from .test_ops import torch_run

BATCHES = (1, 7, 64)
#: Of the kernels, for up to 2,048 slots.
SLOTS_PER_SPLIT = 64


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Restore the usual number of blocks after a test."""
    yield
    emulation.set_blocks(512)


def full_state(
    layer: LayerSpec, dtype: str, batch: int, rng: np.random.Generator, cancelling: bool
) -> list[np.ndarray]:
    """Rows with a token in every slot; where values of splits cancel, 16 bits show in which order they are added."""
    state = []
    for field, empty in zip(layer.state_fields, testing.empty_state(layer, batch), strict=True):
        shape = tuple(empty.shape)
        if field.name == "position":
            state.append(rng.permuted(np.broadcast_to(np.arange(layer.capacity), shape), axis=-1).astype(np.int32))
        elif not empty.is_floating_point():
            state.append(rng.integers(0 if field.name == "psi" else -127, 128, shape).astype(np.int8))
        elif field.name in ("key", "value"):
            x = rng.standard_normal(shape)
            if cancelling:
                splits = np.where(np.arange(layer.capacity) // SLOTS_PER_SPLIT % 2, -1000, 1000)
                x = x + splits[:, None] if field.name == "value" else x / 100
            state.append(emulation.rounded(dtype)(x))
        else:  # scores, masses and scales
            state.append(emulation.rounded(dtype)(rng.random(shape)) / (100 if "scale" in field.name else 1))
    return [x if x.dtype != np.float64 else x.astype(np.float32) for x in state]


def results(
    layer: LayerSpec, dtype: str, batch: int, most: int, path: Path | None, cancelling: bool
) -> list[list[np.ndarray]]:
    """Outputs and state of the first ``batch`` of ``most`` rows after every step: decode and a ragged chunk."""
    rng, run = np.random.default_rng(4), emulated(layer, dtype, path=path)
    state = [x[:batch] for x in full_state(layer, dtype, most, rng, cancelling)]
    past = np.full(most, layer.capacity, np.int32)
    constants = (*(centring_of(layer) if layer.int8 else ()), *([table_of(layer)] if layer.max_distance else ()))
    steps = []
    for chunk in (1, 1, 3, 1):
        count = rng.integers(0, chunk + 1, most, np.int32) if chunk > 1 else np.ones(most, np.int32)
        tokens = normal(dtype)(rng, layer, past[:, None] + np.arange(chunk)[None])
        lengths = [past[:batch].copy(), count[:batch]]
        got = run([*(tokens[n][:batch] for n in TOKENS), *state, *lengths, *constants])
        steps.append(got)
        state, past = got[1:], past + count
    return steps


def check_rows(
    layer: LayerSpec,
    dtype: str,
    batches: Sequence[int] = BATCHES,
    path: Path | None = None,
    cancelling: bool = False,
) -> None:
    """Compare the rows that batches of these sizes have in common; larger batches leave fewer blocks to a head."""
    most = max(batches)
    emulation.set_blocks(most * layer.kv_heads, path)
    wanted = results(layer, dtype, most, most, path, cancelling)
    for batch in batches[:-1]:
        for step, (got, all_) in enumerate(
            zip(results(layer, dtype, batch, most, path, cancelling), wanted, strict=True)
        ):
            for index, (x, y) in enumerate(zip(got, all_, strict=True)):
                assert x.tobytes() == y[:batch].tobytes(), (batch, step, index)


def check_many_slots(dtype: str, path: Path | None = None) -> None:
    """Compare a step with the reference where a split takes a block more than one pass: its peak may rise in each."""
    layer = kernel_layer("h2o", 4200, 64, 2, 8, kv_heads=1)
    rng, past = np.random.default_rng(2), np.full(1, layer.capacity, np.int32)
    state, tokens = full_state(layer, dtype, 1, rng, False), normal(dtype)(rng, layer, past[:, None])
    inputs = [*(tokens[n] for n in TOKENS), *state, past, np.ones(1, np.int32)]
    want, got = torch_run(layer, dtype=DTYPES[dtype])(inputs), emulated(layer, dtype, path=path)(inputs)
    np.testing.assert_array_equal(got[5], want[5])
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2 * torch.finfo(DTYPES[dtype]).eps)
    np.testing.assert_allclose(got[4], want[4], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_more_slots_than_one_pass() -> None:
    check_many_slots("float16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "dtype", "group", "options"),
    [
        ("h2o", "float16", 2, {}),
        ("tova", "bfloat16", 3, {"max_distance": 30}),
        ("sink", "float32", 1, {}),
        ("h2o", "float16", 1, {"slot_dtype": "int8", "state_bits": 16}),
    ],
)
def test_a_row_does_not_depend_on_its_batch(policy: str, dtype: str, group: int, options: dict[str, Any]) -> None:
    check_rows(replace(kernel_layer(policy, 140, 16, group, 4, kv_heads=1), **options), dtype)
