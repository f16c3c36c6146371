"""Distances inside the operator: the table and the rotation, and the operator in torch and ONNX against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from less_export import testing
from less_export.contract import LayerSpec
from less_export.errors import UsageError
from less_export.less import rotary

from .oracle import Arrays, frequencies_of, layer_of, table_of
from .scenarios import Normal, OneHot, Run, Step, follow, play, scenario
from .test_int8 import centring
from .test_ops import F32, F32_EXTREME, HEADS, MIXED, empty, onnx_run, ordinary, shaped, torch_run

#: Clamps that the scenarios of ``test_ops`` pass often; a chunk of them has up to 17 tokens.
VARIANTS = {
    "h2o": layer_of("h2o", 4, 3, max_distance=9),
    "h2o fading sparse sliding": layer_of("h2o", 3, 3, window=11, absorb=False, half_life=2, max_distance=6),
    "tova": layer_of("tova", 6, 1, max_distance=1),
    "sink": layer_of("sink", 2, 5, max_distance=12),
    "sink sparse": layer_of("sink", 2, 5, absorb=False, max_distance=5),
    "window": layer_of("window", 0, 7, window=7, max_distance=4),
    "full": layer_of("full", 0, 90, max_distance=20),
    "narrow": layer_of("h2o", 4, 3, head_dim=2, max_distance=8),
    "h2o int8": layer_of("h2o", 4, 3, slot_dtype="int8", max_distance=9),
    "sink sparse int8": layer_of("sink", 2, 5, absorb=False, slot_dtype="int8", max_distance=5),
    "full int8": layer_of("full", 0, 90, slot_dtype="int8", max_distance=20),
}
#: Implementations of the operator for a layer.
IMPLEMENTATIONS: dict[str, Callable[[LayerSpec], Run]] = {"torch": torch_run, "onnx": onnx_run}


# ------------------------------------------------------------------------------------ the table, the rotation


def test_table_and_rotation_are_products_of_complex_numbers() -> None:
    frequencies = torch.tensor([1.0, 0.3, 1e-4])
    table = rotary.table(frequencies, 5000)
    assert table.shape == (5000, 6)
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.tensor([0, 1, -7, 4999], dtype=torch.int32)
    angles = distance[:, None].double() * frequencies.double()
    pairs = torch.complex(x[..., :3].double(), x[..., 3:6].double()) * torch.exp(1j * angles)
    want = torch.cat([pairs.real, pairs.imag, x[..., 6:].double()], -1)
    torch.testing.assert_close(rotary.rotate(x, table, distance), want.float(), rtol=0, atol=1e-6)


def test_length_of_the_table() -> None:
    assert rotary.table_length(7, 3) == 8
    assert rotary.table_length(7, 20) == 20


def test_a_distance_is_at_least_one_token() -> None:
    with pytest.raises(UsageError, match="the largest distance is at least 1 token"):
        layer_of("h2o", 4, 3, max_distance=0)


# ------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", VARIANTS)
def test_torch_equals_brute_force(name: str, decode: bool) -> None:
    layer = VARIANTS[name]
    errors = follow(torch_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads: str) -> None:
    layer = shaped(VARIANTS["h2o"], HEADS[heads])
    errors = follow(torch_run(layer), ordinary(layer, False), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", VARIANTS)
def test_onnx_equals_brute_force(name: str, decode: bool) -> None:
    layer = VARIANTS[name]
    errors = follow(onnx_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


def test_large_logits() -> None:
    """Attention on one token at a time, whose score is chosen by its direction."""
    layer = layer_of("h2o", 4, 3, head_dim=64, max_distance=9)
    steps = scenario(layer, MIXED, 0, OneHot(reach=6, blind=0.1))
    for implementation in IMPLEMENTATIONS.values():
        errors = follow(implementation(layer), steps, empty(layer))
        assert max(errors.values()) < F32_EXTREME, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["h2o", "h2o int8"])
def test_sixteen_bit_inputs_round_only_the_output(name: str, dtype: torch.dtype) -> None:
    layer = VARIANTS[name]
    steps = scenario(layer, MIXED, 3, Normal(rounded=lambda x: torch.from_numpy(x).to(dtype).float().numpy()))
    errors = follow(torch_run(layer, dtype=dtype), steps, empty(layer, dtype))
    assert errors.pop("out") < torch.finfo(dtype).eps / 2 + F32
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("name", VARIANTS)
def test_operator_is_the_function(name: str) -> None:
    layer = VARIANTS[name]
    steps = ordinary(layer, False)
    opaque = play(torch_run(layer, opaque=True), steps, empty(layer))
    for (_, _, got), (_, _, again) in zip(play(torch_run(layer), steps, empty(layer)), opaque, strict=True):
        for output in ("out", "position", "h", "z"):
            assert again[output].tobytes() == got[output].tobytes(), output


@pytest.mark.parametrize("name", ["h2o", "h2o int8"])
def test_operator_is_well_formed(name: str) -> None:
    layer = VARIANTS[name]
    chunk = ordinary(layer, False)[0].inputs
    tokens = [torch.from_numpy(chunk[n]).nan_to_num() for n in ("q", "k", "v", "log_phi_q", "psi_k")]
    lengths = [torch.from_numpy(chunk[n]) for n in ("past_length", "new_length")]
    constants = centring(layer) if layer.int8 else ()
    args = (*tokens, *testing.empty_state(layer, 3), *lengths, *constants, *layer.attributes().values())
    operator = torch.ops.less.attention_int8 if layer.int8 else torch.ops.less.attention
    rest = (layer.max_distance, torch.from_numpy(table_of(layer)))
    torch.library.opcheck(operator.default, (*args, *rest), test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------ what it is all for


def outputs(run: Run, steps: list[Step], layer: LayerSpec) -> list[Arrays]:
    return [got for _, _, got in play(run, steps, empty(layer))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["h2o", "tova", "sink", "window", "h2o int8"])
def test_absolute_positions_do_not_matter(name: str, implementation: str) -> None:
    """Rows that begin at 1, 1,000 or near 2^30 instead of 0 give the same bits. ``sink`` keeps the first positions, so
    its rows keep none."""
    layer = VARIANTS[name]
    if name == "sink":
        layer = replace(layer, heavy=0, recent=7)
    run, steps = IMPLEMENTATIONS[implementation](layer), scenario(layer, MIXED, 0)
    first = outputs(run, steps, layer)
    for offset in (1, 1000, 2**30):
        moved = [Step(s.reset, {**s.inputs, "past_length": s.inputs["past_length"] + np.int32(offset)}, s.expected)
                 for s in steps]  # fmt: skip
        for want, got in zip(first, outputs(run, moved, layer), strict=True):
            live = want["position"] >= 0
            np.testing.assert_array_equal(got["position"][live], want["position"][live] + offset)
            for output in ("out", "h", "z"):
                assert got[output].tobytes() == want[output].tobytes(), output


def pairs_rotated(x: np.ndarray, layer: LayerSpec, position: np.ndarray) -> np.ndarray:
    """RoPE by absolute positions: ``x`` [B,H,T,D], ``position`` [B,T]."""
    frequencies = frequencies_of(layer)
    half = len(frequencies)
    pairs = x[..., :half] + 1j * x[..., half : 2 * half]
    pairs = pairs * np.exp(1j * position[:, None, :, None] * frequencies)
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1).astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["h2o", "sink sparse", "full"])
def test_below_the_clamp_distances_are_absolute_positions(name: str, implementation: str) -> None:
    """No sequence here is longer than the clamp: the operator without distances, fed with rotated q and k, agrees."""
    layer = replace(VARIANTS[name], max_distance=63)
    plain = replace(layer, max_distance=None)
    steps, rotated = scenario(layer, MIXED, 0), []
    for s in steps:
        position = s.inputs["past_length"][:, None] + np.arange(s.inputs["q"].shape[2])
        turned = {n: pairs_rotated(s.inputs[n], layer, position) for n in ("q", "k")}
        rotated.append(Step(s.reset, {n: x for n, x in (s.inputs | turned).items() if n != "rotary"}, s.expected))
    mine = outputs(IMPLEMENTATIONS[implementation](layer), steps, layer)
    theirs = outputs(torch_run(plain), rotated, plain)
    for want, got in zip(theirs, mine, strict=True):
        np.testing.assert_array_equal(got["position"], want["position"])
        np.testing.assert_allclose(got["out"], want["out"], rtol=0, atol=2e-6 * np.abs(want["out"]).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_clamp_is_exact(implementation: str) -> None:
    """A token at the largest distance and one far beyond it weigh alike; one token nearer, they differ."""
    layer = layer_of("full", 0, 40, heads=(1, 1), max_distance=30)
    run, rng = IMPLEMENTATIONS[implementation](layer), np.random.default_rng(0)
    k, v, q = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(3))
    zero = {"log_phi_q": np.zeros((1, 1, 1, 1), np.float32), "psi_k": np.zeros((1, 1, 1, 1), np.float32)}

    def attended(age: int) -> np.ndarray:
        """The output of a query that sees itself and a token ``age`` positions back."""
        tokens = [q, k, v, zero["log_phi_q"], zero["psi_k"]]
        lengths = [np.array([5], np.int32), np.array([1], np.int32), table_of(layer)]
        _, *state = run([*tokens, *empty(layer, batch=1), *lengths])
        lengths[0] = np.array([5 + age], np.int32)
        return run([q, -k, -v, zero["log_phi_q"], zero["psi_k"], *state, *lengths])[0]

    assert attended(30).tobytes() == attended(31).tobytes() == attended(10_000).tobytes()
    assert np.abs(attended(29) - attended(30)).max() > 1e-3


def test_long_after_the_clamp() -> None:
    """One token at a time."""
    layer = replace(VARIANTS["h2o"], max_distance=17)
    errors = follow(torch_run(layer), scenario(layer, [(1, 1, 0), (1, 1, 1)] * 60, 3), empty(layer))
    assert max(errors.values()) < F32, errors
