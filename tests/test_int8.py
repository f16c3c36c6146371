"""Slots in int8: the rounding rule, and the operator with int8 slots in torch and ONNX against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from less_export import testing
from less_export.contract import LayerSpec
from less_export.less import int8, operators

from .oracle import SCALES, Arrays, centring_of
from .oracle_rounding import rounded_to_int8
from .scenarios import Normal, Run, Step, compare, follow, play, scenario
from .test_ops import (
    DECODE,
    EDGES,
    F32,
    HEADS,
    INT8_VARIANTS,
    MIXED,
    check_accuracy,
    empty,
    moved,
    onnx_run,
    ordinary,
    shaped,
    tie_steps,
    tied,
    torch_run,
)

INT8_EDGES = {f"{name} int8": replace(layer, slot_dtype="int8") for name, layer in EDGES.items()}


def centring(layer: LayerSpec) -> int8.Centring:
    return int8.Centring(*map(torch.from_numpy, centring_of(layer)))


# ------------------------------------------------------------------------------------------- the rounding rule


def test_codes_and_scales_follow_the_rule() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 16)) * 10.0 ** rng.integers(-30, 30, (500, 1))).astype(np.float32)
    code, scale = int8.quantise(torch.from_numpy(x))
    for row, c, s in zip(x, code.numpy(), scale.numpy(), strict=True):
        want_code, want_scale = rounded_to_int8(row)
        np.testing.assert_array_equal(c, want_code)
        assert s.tobytes() == want_scale.tobytes()
        assert np.abs(c).max() == 127


def test_halves_go_to_the_even_code() -> None:
    """The scale is 1, so that elements are quotients."""
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    code, scale = int8.quantise(x)
    assert scale.item() == 1
    assert code.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("largest", [0.0, 1e-45, 127 * 2.0**-127, 127 * 2.0**-126, 3e38])
def test_extreme_tokens(largest: float) -> None:
    """Tokens too small for a normal scale become zeros; no token makes NaN or inf."""
    x = torch.tensor([largest, -largest / 2, 0.0], dtype=torch.float32)
    code, scale = int8.quantise(x)
    read = int8.dequantise(code, scale)
    assert read.isfinite().all()
    if largest < 127 * 2.0**-126:
        assert scale.item() == 0
        assert not code.any()
    else:
        assert code.tolist() == [127, -64, 0]
        torch.testing.assert_close(read, x, rtol=0, atol=largest / 254 * 1.001)


def test_rounding_what_was_read_changes_nothing() -> None:
    """Rounding is idempotent up to float32's own rounding of the scale."""
    x = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    once = int8.rounded_values(x)
    code, again = int8.quantise(x)[0], int8.quantise(once)[0]
    assert torch.equal(code, again)


def test_centring_takes_outlier_channels_out() -> None:
    """A channel at 50 with noise of 1 ruins the codes of the others unless it is centred."""
    k = torch.randn(1, 1, 200, 32, generator=torch.Generator().manual_seed(0))
    k[..., 3] += 50
    mean, std = k.mean(2)[0], k.std(2)[0]
    naive = (int8.rounded_keys(k, int8.Centring.none(1, 32)) - k).square().mean()
    centred = (int8.rounded_keys(k, int8.Centring(mean, std)) - k).square().mean()
    assert centred < naive / 100


# ------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", INT8_VARIANTS)
def test_torch_equals_brute_force(name: str, heads: str, decode: bool) -> None:
    """Codes, scales and positions are exact; outputs, scores, H and z agree to float32 rounding."""
    layer = shaped(INT8_VARIANTS[name], HEADS[heads])
    errors = follow(torch_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", INT8_EDGES)
def test_torch_equals_brute_force_at_the_edges(name: str, decode: bool) -> None:
    """Among them a cache of one slot."""
    layer = INT8_EDGES[name]
    errors = follow(torch_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["h2o int8", "tova int8"])
def test_ties_keep_the_lower_index(name: str, seed: int) -> None:
    layer = replace(tied(INT8_VARIANTS[name]), slot_dtype="int8")
    errors = follow(torch_run(layer), tie_steps(layer, seed), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("name", INT8_VARIANTS)
def test_operator_is_the_function(name: str) -> None:
    layer = INT8_VARIANTS[name]
    steps = ordinary(layer, False)
    opaque = play(torch_run(layer, opaque=True), steps, empty(layer))
    for (_, _, got), (_, _, again) in zip(play(torch_run(layer), steps, empty(layer)), opaque, strict=True):
        live = got["position"] >= 0
        for output, x in again.items():
            mask = live if output in (*SCALES, "key", "value", "psi", "score") else ...
            assert x[mask].tobytes() == got[output][mask].tobytes(), output


def test_operator_is_well_formed() -> None:
    layer = INT8_VARIANTS["h2o int8"]
    chunk = ordinary(layer, False)[0].inputs
    tokens = [torch.from_numpy(chunk[n]).nan_to_num() for n in ("q", "k", "v", "log_phi_q", "psi_k")]
    lengths = [torch.from_numpy(chunk[n]) for n in ("past_length", "new_length")]
    args = (*tokens, *testing.empty_state(layer, 3), *lengths, *centring(layer), *layer.attributes().values())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.less.attention_int8.default, args, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_round_only_the_output(dtype: torch.dtype) -> None:
    layer = INT8_VARIANTS["h2o int8"]
    steps = scenario(layer, MIXED, 3, Normal(rounded=lambda x: torch.from_numpy(x).to(dtype).float().numpy()))
    errors = follow(torch_run(layer, dtype=dtype), steps, empty(layer, dtype))
    assert errors.pop("out") < torch.finfo(dtype).eps / 2 + F32
    assert max(errors.values()) < F32, errors


def far(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Keys of up to 1e4 in magnitude, a constant channel, and tokens that are zero throughout."""
    drawn = Normal(logit=1e-4)(rng, layer, positions)
    drawn["k"] *= np.float32(1e4)
    drawn["k"][..., 1] = 3.0
    drawn["k"][:, :, ::3] = 0
    drawn["v"][:, :, ::4] = 0
    return drawn


@pytest.mark.parametrize("make", [torch_run, onnx_run])
@pytest.mark.parametrize("name", ["h2o int8", "sink int8", "window int8"])
def test_keys_far_from_zero_and_tokens_of_zeros(make: Callable[[LayerSpec], Run], name: str) -> None:
    layer = INT8_VARIANTS[name]
    errors = follow(make(layer), scenario(layer, [*MIXED, *DECODE[:6]], 2, far), empty(layer))
    assert max(errors.values()) < 4 * F32, errors


@pytest.mark.parametrize("make", [torch_run, onnx_run])
def test_what_a_token_is_rounded_to_does_not_depend_on_the_chunks(make: Callable[[LayerSpec], Run]) -> None:
    """Slots of policy sink, codes and scales included, are bitwise the same for chunks of 1 and of 12; so, to float32
    rounding, is the state, also of tokens that never took a slot."""
    layer, total = INT8_VARIANTS["sink int8"], 48
    whole = scenario(layer, [(total,)], 4)[0].inputs
    ends: list[Arrays] = []
    for size in (1, 12):
        steps = []
        for begin in range(0, total, size):
            piece = {n: x[:, :, begin : begin + size] for n, x in whole.items() if x.ndim == 4}
            lengths = {"past_length": np.array([begin], np.int32), "new_length": np.array([size], np.int32)}
            steps.append(Step((), {**whole, **piece, **lengths}, {}))
        *_, (_, _, last) = play(make(layer), steps, empty(layer, batch=1))
        ends.append(last)
    order = [np.argsort(end["position"], -1) for end in ends]
    for name in ("position", "key_scale", "value_scale"):
        a, b = (np.take_along_axis(end[name], o, -1) for end, o in zip(ends, order, strict=True))
        np.testing.assert_array_equal(a, b)
    for name in ("key", "value"):
        a, b = (np.take_along_axis(end[name], o[..., None], -2) for end, o in zip(ends, order, strict=True))
        np.testing.assert_array_equal(a, b)
    for name in ("h", "z"):
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-5)


def test_the_state_absorbs_the_rounded_value() -> None:
    """psi of one feature is 1, so that H is the sum of the values that left."""
    layer = replace(INT8_VARIANTS["sink int8"], heavy=0, recent=1, capacity=1, rank=1, kv_heads=1, query_heads=1)

    def draw(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        drawn = Normal()(rng, layer, positions)
        return {**drawn, "psi_k": np.ones_like(drawn["psi_k"])}

    steps = scenario(layer, [(3,), (1,), (1,)], 0, draw)
    *_, (_, _, last) = play(torch_run(layer), steps, empty(layer, batch=1))
    values = np.concatenate([s.inputs["v"][0, 0, : s.inputs["new_length"][0]] for s in steps])[:-1]
    sum_of_rounded = int8.rounded_values(torch.from_numpy(values)[None, None]).sum(2)
    np.testing.assert_allclose(last["h"][0, 0], sum_of_rounded[0], rtol=1e-6)
    assert np.abs(last["h"][0, 0] - values.sum(0)).max() > 1e-3


@pytest.mark.parametrize("make", [torch_run, onnx_run])
def test_positions_beyond_2_to_the_24(make: Callable[[LayerSpec], Run]) -> None:
    layer, shift = INT8_VARIANTS["h2o int8"], 2**30 + 1
    for step, before, got in play(make(layer), moved(ordinary(layer, False), shift), empty(layer)):
        assert max(compare(step, before, got).values()) < F32


@pytest.mark.slow
def test_slots_do_not_drift() -> None:
    """In 20,000 tokens, a slot that keeps its token keeps every bit of it, and it is the token as first rounded."""
    layer = replace(INT8_VARIANTS["h2o fading int8"], heavy=12, recent=4, capacity=16, head_dim=8, score_half_life=500)
    generator = torch.Generator().manual_seed(0)
    state, constants = testing.empty_state(layer, 1, poison=True), centring(layer)
    seen: dict[tuple[int, int], bytes] = {}
    for begin in range(0, 20_000, 8):
        q = torch.randn(1, layer.query_heads, 8, layer.head_dim, generator=generator)
        k, v = (torch.randn(1, layer.kv_heads, 8, layer.head_dim, generator=generator) for _ in range(2))
        psi = torch.softmax(torch.randn(1, layer.kv_heads, 8, layer.rank, generator=generator), -1)
        tokens = (q, k, v, torch.zeros(1, layer.query_heads, 8, layer.rank), psi)
        lengths = (torch.tensor([begin], dtype=torch.int32), torch.tensor([8], dtype=torch.int32))
        _, *state = operators.run(layer, tokens, state, lengths, constants, opaque=False)
        fields = {f.name: x[0] for f, x in zip(layer.state_fields, state, strict=True)}
        now: dict[tuple[int, int], bytes] = {}
        for head in range(layer.kv_heads):
            for slot, position in enumerate(fields["position"][head].tolist()):
                if position < 0:
                    continue
                parts = [fields[n][head, slot].numpy().tobytes() for n in ("key", "key_scale", "value", "value_scale")]
                now[head, position] = b"".join(parts)
                if position >= begin:
                    code, scale = int8.quantise(v[0, head, position - begin])
                    assert parts[2:] == [code.numpy().tobytes(), scale.numpy().tobytes()]
                else:
                    assert now[head, position] == seen[head, position]
        seen = now
    assert max(p for _, p in seen) == 19_999
    assert math.isfinite(float(state[5].abs().sum()))


# ------------------------------------------------------------------------------------------------ the ONNX body


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", {**INT8_VARIANTS, **INT8_EDGES})
def test_body_equals_torch(name: str, decode: bool) -> None:
    layer = {**INT8_VARIANTS, **INT8_EDGES}[name]
    check_accuracy(layer, ordinary(layer, decode))


def test_body_in_float16() -> None:
    layer = INT8_VARIANTS["h2o int8"]
    steps = scenario(layer, MIXED, 3, Normal(rounded=lambda x: x.astype(np.float16).astype(np.float32)))
    errors = follow(onnx_run(layer, half=True), steps, empty(layer, torch.float16))
    assert errors.pop("out") < torch.finfo(torch.float16).eps / 2 + F32
    assert max(errors.values()) < F32, errors
