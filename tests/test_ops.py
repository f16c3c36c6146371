"""``less::attention``, in torch and as the ONNX function body, against the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from less_export import testing
from less_export.contract import LayerSpec
from less_export.errors import BackendError
from less_export.less import int8, operators

from .oracle import OUTPUTS, TOKENS, Arrays, layer_of, table_of
from .scenarios import Normal, OneHot, Run, Step, compare, follow, play, scenario

#: Error relative to the largest value that float32 may make: logits around 5, or around 200.
F32, F32_EXTREME = 2e-6, 1e-5

#: Policy, absorb and window; "sliding" is what --compress-sliding makes of a sliding layer.
VARIANTS = {
    "h2o": layer_of("h2o", 4, 3),
    "h2o sparse": layer_of("h2o", 4, 3, absorb=False),
    "h2o sliding": layer_of("h2o", 3, 3, window=11),
    "h2o sparse sliding": layer_of("h2o", 3, 3, window=11, absorb=False),
    "h2o fading": layer_of("h2o", 4, 3, half_life=5),
    "h2o fading sparse sliding": layer_of("h2o", 3, 3, window=11, absorb=False, half_life=2),
    "tova": layer_of("tova", 6, 1),
    "tova sparse": layer_of("tova", 6, 1, absorb=False),
    "tova sliding": layer_of("tova", 6, 1, window=9),
    "tova sparse sliding": layer_of("tova", 6, 1, window=9, absorb=False),
    "sink": layer_of("sink", 2, 5),
    "sink sparse": layer_of("sink", 2, 5, absorb=False),
    "sink sliding": layer_of("sink", 2, 5, window=10),
    "sink sparse sliding": layer_of("sink", 2, 5, window=10, absorb=False),
    "window": layer_of("window", 0, 7, window=7),
    "full": layer_of("full", 0, 90),
}
#: Layers whose slots are int8.
INT8_VARIANTS = {
    f"{name} int8": replace(VARIANTS[name], slot_dtype="int8")
    for name in ("h2o", "h2o sparse sliding", "h2o fading", "tova", "sink", "sink sparse sliding", "window", "full")
}
EDGES = {
    "h2o recent only": layer_of("h2o", 0, 4),
    "h2o heavy most": layer_of("h2o", 6, 1, rank=1),
    "tova one slot": layer_of("tova", 0, 1),
    "sink no sinks": layer_of("sink", 0, 3),
    "sink one newest": layer_of("sink", 5, 1),
    "window one": layer_of("window", 0, 1, window=1),
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}

#: New tokens per step and row: chunks longer than the capacity, decode, parked rows, late and early ends.
MIXED = [(5, 3, 0), (1, 1, 1), (1, 0, 1), (17, 2, 9), (0, 6, 1), (0, 0, 0), (1, 1, 1), (3, 16, 8), (1, 0, 1)]
DECODE = [(1, 1, 0), (1, 1, 1), (1, 0, 1)] * 6 + [(1, 1, 1)] * 6
#: Row 1 is reset and gets a chunk; later row 2 is reset while it is parked.
RESETS = {4: (1,), 5: (2,)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine, torch's threads wait ten times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shaped(layer: LayerSpec, heads: tuple[int, int]) -> LayerSpec:
    """The layer with other query and KV heads."""
    return replace(layer, query_heads=heads[0], kv_heads=heads[1])


@functools.cache
def ordinary(layer: LayerSpec, decode: bool, seed: int = 0) -> list[Step]:
    """Gaussian tokens through both kinds of steps."""
    return scenario(layer, DECODE if decode else MIXED, seed, reset={} if decode else RESETS)


def empty(layer: LayerSpec, dtype: torch.dtype = torch.float32, batch: int = 3) -> list[np.ndarray]:
    """Fresh rows with NaN in the empty slots; 16-bit tensors are stored as float32."""
    state = testing.empty_state(layer, batch, dtype, poison=True)
    return [x.float().numpy() if x.dtype == dtype else x.numpy() for x in state]


def torch_run(layer: LayerSpec, opaque: bool = False, dtype: torch.dtype = torch.float32) -> Run:
    """Run the torch operator on arrays; q, k, v, psi and slots that are not int8 have ``dtype``."""
    rounded = [0, 1, 2, 4, 7, *([] if layer.int8 else [5, 6])]  # q, k, v, psi_k, past_psi, past_key, past_value
    end = 5 + len(layer.state_fields)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(a) for a in arrays]
        for i in rounded:
            tensors[i] = tensors[i].to(dtype)
        tokens, state, lengths = tensors[:5], tensors[5:end], tensors[end : end + 2]
        centring = int8.Centring(*tensors[end + 2 : end + 4]) if layer.int8 else None
        rotary = tensors[-1] if layer.max_distance else None
        outputs = operators.run(layer, tokens, state, lengths, centring, rotary, opaque)
        assert [t.dtype for t in outputs] == [dtype, *(t.dtype for t in tensors[5:end])]
        return [t.float().numpy() if t.is_floating_point() else t.numpy() for t in outputs]

    return run


def model_of(layer: LayerSpec, half: bool = False) -> bytes:
    """The operator's ONNX model."""
    table = table_of(layer).shape if layer.max_distance else (0, 0)
    return testing.operator_model(layer, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, table)


def session_of(
    layer: LayerSpec, half: bool = False, library: Path | None = None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """The operator's ONNX model on ONNX Runtime, with the kernel of ``library``, else with its body."""
    model = model_of(layer, half)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_run(layer: LayerSpec, half: bool = False, library: Path | None = None, threads: int = 1) -> Run:
    """Run :func:`session_of` a layer."""
    session = session_of(layer, half, library, threads)
    inputs = session.get_inputs()

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        cast = [a.astype(np.float16) if "float16" in i.type else a for a, i in zip(arrays, inputs, strict=True)]
        outputs = session.run(
            [x.name for x in session.get_outputs()],
            dict(zip([i.name for i in inputs], cast, strict=True)),
        )
        return [x.astype(np.float32) if x.dtype == np.float16 else x for x in outputs]

    return run


# --------------------------------------------------------------------------------------- torch, brute force


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", VARIANTS)
def test_torch_equals_brute_force(name: str, heads: str, decode: bool) -> None:
    """Slots are exact; outputs, scores, H and z agree to float32 rounding."""
    layer = shaped(VARIANTS[name], HEADS[heads])
    errors = follow(torch_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", EDGES)
def test_torch_equals_brute_force_at_the_edges(name: str, decode: bool) -> None:
    layer = EDGES[name]
    errors = follow(torch_run(layer), ordinary(layer, decode), empty(layer))
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("name", ["sink", "sink sliding", "window", "full"])
def test_logits_of_200_and_low_rank_masses_of_e60(name: str) -> None:
    layer = VARIANTS[name]
    draw = Normal(logit=80, log_phi=(-60, 60))
    errors = follow(torch_run(layer), scenario(layer, MIXED, 1, draw), empty(layer))
    assert max(errors.values()) < F32_EXTREME, errors


@pytest.mark.parametrize(
    ("name", "seed"), [(n, s) for n in VARIANTS for s in range(3) if n.startswith(("h2o", "tova"))]
)
def test_ties_keep_the_lower_index(name: str, seed: int) -> None:
    """Scores are small integers (or, for tova, all equal), so nearly every eviction is a tie."""
    layer = tied(VARIANTS[name])
    errors = follow(torch_run(layer), tie_steps(layer, seed), empty(layer))
    assert max(errors.values()) < F32, errors


def tied(layer: LayerSpec) -> LayerSpec:
    """The layer with a dimension per position."""
    return layer_of(
        layer.policy.name,
        layer.heavy,
        layer.recent,
        layer.window,
        layer.absorb,
        head_dim=64,
        rank=layer.rank,
    )


@functools.cache
def tie_steps(layer: LayerSpec, seed: int) -> list[Step]:
    blind = 0.5 if layer.policy.name == "tova" else 0.0
    return scenario(layer, [*MIXED, *DECODE], seed, OneHot(layer.recent, blind))


@pytest.mark.parametrize("name", ["h2o", "tova", "sink", "h2o sliding", "tova sliding", "sink sliding"])
def test_every_token_is_in_exactly_one_place(name: str) -> None:
    """Values are unit vectors and psi is exact, so that H counts how often each token was absorbed."""
    a, total = VARIANTS[name], 64
    layer = layer_of(a.policy.name, a.heavy, a.recent, a.window, head_dim=total, rank=2)

    def draw(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> dict[str, np.ndarray]:
        drawn = Normal()(rng, layer, positions)
        one = np.eye(total, dtype=np.float32)[positions % total][:, None]
        return {**drawn, "v": np.repeat(one, layer.kv_heads, 1), "psi_k": np.full_like(drawn["psi_k"], 0.5)}

    steps, seen = scenario(layer, [*MIXED, *DECODE[:9]], 5, draw), np.zeros(3, int)
    for step, _, got in play(torch_run(layer), steps, empty(layer)):
        seen += step.inputs["new_length"]
        held = got["position"]  # [B,Hk,C]
        in_slots = (held[..., None] == np.arange(total)).sum(2)
        absorbed = got["h"].sum(2)
        assert (in_slots + absorbed == (np.arange(total) < seen[:, None, None])).all()
        assert (got["z"].sum(-1) == seen[:, None] - (held >= 0).sum(-1)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_operator_is_the_function(name: str) -> None:
    layer = VARIANTS[name]
    other = torch_run(layer, opaque=True)
    for step, before, got in play(torch_run(layer), ordinary(layer, False), empty(layer)):
        inputs = [*(step.inputs[n] for n in TOKENS), *before.values()]
        again = other([*inputs, step.inputs["past_length"], step.inputs["new_length"]])
        for output, x in zip(OUTPUTS, again, strict=True):
            assert x.tobytes() == got[output].tobytes(), output


@pytest.mark.parametrize("name", ["h2o", "window"])
def test_operator_is_well_formed(name: str) -> None:
    """Schema (no output aliases an input) and shapes under fake tensors."""
    layer = VARIANTS[name]
    step = ordinary(layer, False)[0]
    tokens = [torch.from_numpy(step.inputs[n]).nan_to_num() for n in TOKENS]
    lengths = [torch.from_numpy(step.inputs[n]) for n in ("past_length", "new_length")]
    args = (*tokens, *testing.empty_state(layer, 3), *lengths, *layer.attributes().values())
    torch.library.opcheck(torch.ops.less.attention.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("chunks", [[(2, 0), (7, 1), (0, 1)], [(9, 3)]])
def test_full_overflow_is_an_error(chunks: list[tuple[int, int]]) -> None:
    """Row 0 gets one token more than its 8 slots, in one chunk or in its last one."""
    layer = layer_of("full", 0, 8)
    fits = scenario(layer, [(8, 1)] if len(chunks) == 1 else [(2, 0), (6, 1), (0, 1)], 0)
    assert max(follow(torch_run(layer), fits, empty(layer, batch=2)).values()) < F32
    roomy = scenario(layer_of("full", 0, 9), chunks, 0)
    with pytest.raises(BackendError, match=r"policy full holds 8 tokens .*--context"):
        list(play(torch_run(layer), roomy, empty(layer, batch=2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["h2o", "tova sliding", "sink", "window"])
def test_sixteen_bit_inputs_round_only_the_output(name: str, dtype: torch.dtype) -> None:
    """H, z and scores stay float32; the output is rounded to its dtype once."""
    layer = VARIANTS[name]

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(dtype).float().numpy()

    steps = scenario(layer, MIXED, 3, Normal(rounded=rounded))
    errors = follow(torch_run(layer, dtype=dtype), steps, empty(layer, dtype))
    assert errors.pop("out") < torch.finfo(dtype).eps / 2 + F32
    assert max(errors.values()) < F32, errors


@pytest.mark.parametrize("make", [torch_run, onnx_run])
@pytest.mark.parametrize("name", ["h2o", "tova sliding", "window"])
def test_positions_beyond_2_to_the_24(name: str, make: Callable[[LayerSpec], Run]) -> None:
    """Sequences that begin at position 2^30 + 1 differ only in positions."""
    layer, shift = VARIANTS[name], 2**30 + 1
    for step, before, got in play(make(layer), moved(ordinary(layer, False), shift), empty(layer)):
        assert max(compare(step, before, got).values()) < F32


def moved(steps: list[Step], by: int) -> list[Step]:
    """The same steps ``by`` positions later."""

    def later(arrays: Arrays, name: str) -> Arrays:
        x = arrays[name]
        return {**arrays, name: np.where(x < 0, x, x + by).astype(np.int32)}

    return [Step(s.reset, later(s.inputs, "past_length"), later(s.expected, "position")) for s in steps]


def test_rows_are_independent() -> None:
    """The same rows in another order, and a row alone, give the same results."""
    layer, order = VARIANTS["h2o"], [2, 0, 1]
    steps = ordinary(layer, False)
    got = [got for _, _, got in play(torch_run(layer), steps, empty(layer))]
    for rows in (order, [1]):
        picked = [
            Step(
                tuple(rows.index(r) for r in s.reset if r in rows),
                {n: x[rows] for n, x in s.inputs.items()},
                {n: x[rows] for n, x in s.expected.items()},
            )
            for s in steps
        ]
        for (step, before, other), whole in zip(
            play(torch_run(layer), picked, empty(layer, batch=len(rows))), got, strict=True
        ):
            compare(step, before, other)
            np.testing.assert_allclose(other["out"], whole["out"][rows], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(other["h"], whole["h"][rows], rtol=1e-5, atol=1e-6)


def test_a_reset_row_starts_a_new_sequence() -> None:
    """After its reset, row 0 is a fresh row, while row 1 continues."""
    layer = VARIANTS["tova"]
    lengths = [(12, 5), (1, 1), (4, 1), (1, 6)]
    steps = scenario(layer, lengths, 7, reset={2: (0,)})
    assert steps[2].inputs["past_length"].tolist() == [0, 6]
    got = [got for _, _, got in play(torch_run(layer), steps, empty(layer, batch=2))]
    alone = [Step((), {n: x[:1] for n, x in s.inputs.items()}, s.expected) for s in steps[2:]]
    for (_, _, fresh), long in zip(play(torch_run(layer), alone, empty(layer, batch=1)), got[2:], strict=True):
        np.testing.assert_array_equal(fresh["position"], long["position"][:1])
        for name in ("out", "h", "z"):
            np.testing.assert_allclose(fresh[name], long[name][:1], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- the ONNX body


def check_accuracy(layer: LayerSpec, steps: list[Step], floor: float = 5e-7) -> None:
    """The body's errors are at most twice those of the torch reference on the same data."""
    reference = follow(torch_run(layer), steps, empty(layer))
    body = follow(onnx_run(layer), steps, empty(layer))
    for name, error in body.items():
        assert error <= 2 * reference[name] + floor, (name, error, reference[name])


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", VARIANTS)
def test_body_equals_torch(name: str, decode: bool) -> None:
    for heads in HEADS.values():
        layer = shaped(VARIANTS[name], heads)
        check_accuracy(layer, ordinary(layer, decode))


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", EDGES)
def test_body_equals_torch_at_the_edges(name: str, decode: bool) -> None:
    check_accuracy(EDGES[name], ordinary(EDGES[name], decode))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("h2o", "tova"))])
def test_body_keeps_the_lower_index_of_ties(name: str) -> None:
    layer = tied(VARIANTS[name])
    check_accuracy(layer, tie_steps(layer, 0))


@pytest.mark.parametrize("name", ["sink", "sink sliding", "window", "full"])
def test_body_at_logits_of_200(name: str) -> None:
    layer = VARIANTS[name]
    check_accuracy(layer, scenario(layer, MIXED, 1, Normal(logit=80, log_phi=(-60, 60))))


@pytest.mark.parametrize("name", ["h2o", "sink sliding", "window"])
def test_body_in_float16(name: str) -> None:
    """16-bit inputs and outputs, float32 inside: one rounding of the output, none of H, z and the scores."""
    layer = VARIANTS[name]
    steps = scenario(layer, MIXED, 3, Normal(rounded=lambda x: x.astype(np.float16).astype(np.float32)))
    errors = follow(onnx_run(layer, half=True), steps, empty(layer, torch.float16))
    assert errors.pop("out") < torch.finfo(torch.float16).eps / 2 + F32
    assert max(errors.values()) < F32, errors
