"""A low-rank state of 16 bits: the rounding rule, and the operator in torch and ONNX against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from less_export import testing
from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.errors import UsageError
from less_export.less import operators, state16
from less_export.less.feature_maps import state_for
from less_export.plan import AttentionLayer, plan_layers
from less_export.training.options import TrainConfig

from .oracle import Arrays
from .oracle_rounding import LARGEST, dither, rounded_means, rounded_psi
from .scenarios import Normal, Run, Step, follow, play, scenario
from .test_int8 import centring
from .test_ops import (
    EDGES,
    F32,
    HEADS,
    MIXED,
    VARIANTS,
    empty,
    moved,
    onnx_run,
    ordinary,
    shaped,
    torch_run,
)

#: What float32 may change: now and then a code, which later steps remember.
CODES = 4 * state16.ONE_CODE

SMALL: dict[str, Any] = {"slot_dtype": "int8", "state_bits": 16}
STATE16_VARIANTS = {
    f"{name} 16": replace(VARIANTS[name], **SMALL) for name in ("h2o", "h2o fading", "tova", "sink sliding")
}
STATE16_VARIANTS |= {f"{name} 16": replace(layer, **SMALL) for name, layer in EDGES.items() if layer.absorb}
STATE16_VARIANTS["h2o distance 16"] = replace(STATE16_VARIANTS["h2o 16"], max_distance=6)


def check(run: Run, steps: list[Step], state: list[np.ndarray]) -> None:
    """Everything is exact or within float32 rounding, but for single codes of the means."""
    errors = follow(run, steps, state)
    assert max(errors["score"], errors["z"]) < F32, errors
    assert max(errors["out"], errors["h"]) < CODES, errors


# ------------------------------------------------------------------------------------------- the rounding rule


def test_psi_sums_to_one_again() -> None:
    rng = np.random.default_rng(0)
    psi = rng.exponential(size=(200, 8)) ** 4
    psi = (psi / psi.sum(-1, keepdims=True)).astype(np.float32)
    code = state16.psi_codes(torch.from_numpy(psi))
    read = state16.psi_of(code)
    for row, c, x in zip(psi, code.numpy(), read.numpy(), strict=True):
        want, stands_for = rounded_psi(row)
        np.testing.assert_array_equal(c, want)
        np.testing.assert_allclose(x, stands_for, rtol=1e-6)
    np.testing.assert_allclose(read.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(read, psi, atol=8 / 127)


def test_psi_of_nothing_stays_nothing() -> None:
    assert not state16.rounded_psi(torch.zeros(1, 1, 2, 4)).any()


def test_dither_is_a_fraction_that_spreads_evenly() -> None:
    """Of 16,384 positions, every hundredth of [0, 1) gets its share, for each channel; it repeats after them."""
    position = torch.arange(state16.PERIOD, dtype=torch.int32)
    walk = state16.dither(position, 2, 3)[:, 0]
    for p in (0, 1, 777, state16.PERIOD - 1):
        want = [[dither(p, r, d) for d in range(3)] for r in range(2)]
        np.testing.assert_array_equal(walk[p].numpy(), np.array(want, np.float32))
    share = torch.histc(walk[:, 1, 2], 100, 0, 1) / state16.PERIOD
    np.testing.assert_allclose(share, 0.01, atol=1e-3)
    assert torch.equal(state16.dither(position + state16.PERIOD, 2, 3)[:, 0], walk)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2.0**-112, 1.0, 1e30])
def test_one_step_from_nothing(largest: float) -> None:
    """The mean of one token is its value, to a code; values too small for a normal scale become zeros."""
    value = torch.tensor([[[[largest, -largest / 2, largest / 65, 0.0]]]])
    planes, scale, z = state16.absorb(
        torch.zeros(1, 1, 1, 8, dtype=torch.int8), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1), value, torch.tensor([5], dtype=torch.int32),
    )  # fmt: skip
    want, want_scale = rounded_means(value[0, 0, 0].double().numpy(), 5, 0)
    high, low = planes[0, 0, 0].long().chunk(2)
    assert (256 * high + low).tolist() == want.tolist()
    assert scale.item() == pytest.approx(want_scale)
    assert z.item() == 1
    torch.testing.assert_close(state16.means(planes, scale), value, rtol=0, atol=max(largest / LARGEST, 2.0**-111))


def test_a_feature_without_mass_keeps_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(-128, 128, (1, 2, 3, 16), generator=generator).to(torch.int8)
    scale, z = torch.rand(1, 2, 3, generator=generator), torch.rand(1, 2, 3, generator=generator)
    mass = torch.tensor([[[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]]])
    total = mass[..., None] * torch.randn(1, 2, 3, 8, generator=generator)
    planes, new_scale, _ = state16.absorb(code, scale, z, mass, total, torch.tensor([9], dtype=torch.int32))
    still = mass == 0
    assert torch.equal(planes[still], code[still])
    assert torch.equal(new_scale[still], scale[still])
    assert not torch.equal(planes[~still], code[~still])


def test_means_follow_thousands_of_small_steps() -> None:
    """The mean of 20,000 values, each of which moves it by a fraction of a code; the nearest code would stand still."""
    generator = torch.Generator().manual_seed(0)
    total, rank, width = 20_000, 2, 8
    planes = torch.zeros(1, 1, rank, 2 * width, dtype=torch.int8)
    scale = z = torch.zeros(1, 1, rank)
    values = torch.randn(total, rank, width, generator=generator) * 0.1 + torch.linspace(-1, 1, width)
    values[total // 2 :] += 0.02  # what the nearest code cannot follow
    share = torch.rand(total, rank, generator=generator)
    for i in range(total):
        mass, position = share[i][None, None], torch.tensor([i], dtype=torch.int32)
        planes, scale, z = state16.absorb(planes, scale, z, mass, mass[..., None] * values[i], position)
    want = (share[..., None].double() * values).sum(0) / share.double().sum(0)[:, None]
    error = (state16.means(planes, scale)[0, 0] - want).abs().max() / want.abs().max()
    assert error < 2e-3


# ------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("make", [torch_run, onnx_run])
@pytest.mark.parametrize("name", STATE16_VARIANTS)
def test_equals_brute_force(name: str, make: Callable[[LayerSpec], Run], decode: bool) -> None:
    layer = STATE16_VARIANTS[name]
    check(make(layer), ordinary(layer, decode), empty(layer))


@pytest.mark.parametrize("make", [torch_run, onnx_run])
@pytest.mark.parametrize("heads", ["MHA", "MQA"])
def test_heads(heads: str, make: Callable[[LayerSpec], Run]) -> None:
    layer = shaped(STATE16_VARIANTS["h2o 16"], HEADS[heads])
    check(make(layer), ordinary(layer, False), empty(layer))


@pytest.mark.parametrize("make", [torch_run, onnx_run])
def test_positions_beyond_2_to_the_24(make: Callable[[LayerSpec], Run]) -> None:
    """2^30 is a multiple of the dither's period."""
    layer = STATE16_VARIANTS["h2o 16"]
    check(make(layer), list(moved(ordinary(layer, False), 2**30)), empty(layer))


def test_body_in_float16() -> None:
    layer = STATE16_VARIANTS["h2o 16"]
    steps = scenario(layer, MIXED, 3, Normal(rounded=lambda x: x.astype(np.float16).astype(np.float32)))
    errors = follow(onnx_run(layer, half=True), steps, empty(layer, torch.float16))
    assert errors.pop("out") < torch.finfo(torch.float16).eps / 2 + CODES
    assert max(errors.values()) < CODES, errors


def test_values_of_features_without_mass_are_not_read() -> None:
    """Scales of a fresh row may be anything."""
    layer = STATE16_VARIANTS["sink sliding 16"]
    steps = ordinary(layer, False)
    state = empty(layer)
    state[-1][:] = np.nan
    for run in (torch_run(layer), onnx_run(layer)):
        _, _, got = next(play(run, steps, state))
        assert np.isfinite(got["out"]).all()


def test_operator_is_well_formed() -> None:
    layer = STATE16_VARIANTS["h2o 16"]
    chunk = ordinary(layer, False)[0].inputs
    tokens = [torch.from_numpy(chunk[n]).nan_to_num() for n in ("q", "k", "v", "log_phi_q", "psi_k")]
    lengths = [torch.from_numpy(chunk[n]) for n in ("past_length", "new_length")]
    args = (*tokens, *testing.empty_state(layer, 3), *lengths, *centring(layer), *layer.attributes().values())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.less.attention_state16.default, args, test_utils=tests)
    state = testing.empty_state(layer, 3)
    opaque, plain = (operators.run(layer, tokens, state, lengths, centring(layer), None, x) for x in (True, False))
    for a, b in zip(opaque, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_psi_that_does_not_sum_to_one_counts_as_one() -> None:
    layer = STATE16_VARIANTS["h2o 16"]

    def draw(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        drawn = Normal()(rng, layer, positions)
        return {**drawn, "psi_k": drawn["psi_k"] * np.float32(4)}

    check(torch_run(layer), scenario(layer, MIXED, 1, draw), empty(layer))


@pytest.mark.parametrize("change", [{"slot_dtype": "model"}, {"absorb": False, "rank": 1}, {"state_bits": 8}])
def test_impossible_layers(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="state"):
        replace(STATE16_VARIANTS["h2o 16"], **change)


# ------------------------------------------------------------------------------------------------ which layers get it

LAYER = AttentionLayer(4, 2, 8, 0.5, 0)


@pytest.mark.parametrize(
    ("options", "ranks", "bits"),
    [
        ({}, {0: 3}, 16),
        ({"state": 32}, {0: 3}, 32),
        ({"slots": "model"}, {0: 3}, 32),
        ({"policy": "full", "slots": "int8"}, {0: 3}, 32),
        ({}, {}, 32),
    ],
)
def test_int8_layers_with_kernels_have_it_by_default(options: dict[str, Any], ranks: dict[int, int], bits: int) -> None:
    (layer,) = plan_layers([LAYER], ExportConfig(**options), 64, ranks)
    assert layer.state_bits == bits


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"state": 16, "slots": "model"}, "--state 16 goes with int8 slots: drop --slots model"),
        ({"state": 16, "policy": "full"}, "policy full has with --slots int8 only"),
        ({"state": 8}, "--state must be 16 or 32 bits, not 8"),
    ],
)
def test_impossible_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_layers([LAYER], ExportConfig(**options), 64, {0: 3})


def test_a_recipes_state_gives_way_to_other_slots() -> None:
    config = ExportConfig(slots="model").with_defaults({"state": 16, "slots": "int8"})
    assert config.state is None


def test_psi_that_does_not_sum_to_one_takes_32_bits() -> None:
    assert state_for(None, None) is None
    assert state_for("exp", 16) == 16
    assert state_for("paper", None) == state_for("paper", 32) == 32
    with pytest.raises(UsageError, match="psi of parametrisation paper does not sum to one"):
        state_for("paper", 16)
    assert TrainConfig(parametrisation="paper").cache().state == 32
    assert TrainConfig().cache().state is None
