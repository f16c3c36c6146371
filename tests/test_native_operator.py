"""The operator for ONNX Runtime's CPU provider: held to the torch reference like the ONNX body, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_export.cli import main as cli
from less_export.contract import LayerSpec
from less_export.errors import EngineError, UsageError
from less_export.less.policies import by_name
from less_export.native import cache, compiler, ort_operator
from less_export.progress import Spoken
from less_export.runtime.ort import OrtBackend

from .oracle import CENTRING, TOKENS, Arrays, layer_of
from .scenarios import Normal, Run, follow, scenario
from .test_distance import VARIANTS as DISTANCE_VARIANTS
from .test_ops import (
    DECODE,
    EDGES,
    HEADS,
    INT8_VARIANTS,
    MIXED,
    VARIANTS,
    empty,
    moved,
    onnx_run,
    ordinary,
    session_of,
    shaped,
    tie_steps,
    tied,
    torch_run,
)
from .test_state16 import CODES, STATE16_VARIANTS
from .tiny_decoder import CONTRACT, onnx_decoder

ALL = {
    **VARIANTS, **EDGES, **INT8_VARIANTS, **STATE16_VARIANTS,
    **{f"{name}, distance": layer for name, layer in DISTANCE_VARIANTS.items()},
}  # fmt: skip

#: Inputs that are the same for all rows.
SHARED = (*CENTRING, "rotary")

#: The kernel of a layer, in ``threads`` threads.
Native = Callable[..., Run]


@pytest.fixture(scope="session")
def native(operator_library: Path) -> Native:
    return lambda layer, threads=1: onnx_run(layer, library=operator_library, threads=threads)


def arguments(inputs: Arrays, state: list[np.ndarray]) -> list[np.ndarray]:
    """Everything in the operator's order."""
    rest = [inputs[n] for n in ("past_length", "new_length", *SHARED) if n in inputs]
    return [*(inputs[n] for n in TOKENS), *state, *rest]


def check(native: Native, layer: LayerSpec, steps: list[Any], floor: float = 5e-7) -> None:
    """The kernel's errors are at most twice those of the torch reference on the same data."""
    reference = follow(torch_run(layer), steps, empty(layer))
    for name, error in follow(native(layer), steps, empty(layer)).items():
        codes = CODES if layer.state16 and name in ("out", "h") else 0
        assert error <= 2 * reference[name] + max(floor, codes), (name, error, reference[name])


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", ALL)
def test_kernel_equals_torch(native: Native, name: str, decode: bool) -> None:
    for heads in HEADS.values() if name in VARIANTS else [HEADS["GQA"]]:
        layer = shaped(ALL[name], heads)
        check(native, layer, ordinary(layer, decode))


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.startswith(("h2o", "tova"))])
def test_kernel_keeps_the_lower_index_of_ties(native: Native, name: str) -> None:
    layer = tied(VARIANTS[name])
    check(native, layer, tie_steps(layer, 0))


@pytest.mark.parametrize("name", ["sink", "sink sliding", "window", "full"])
def test_kernel_at_logits_of_200(native: Native, name: str) -> None:
    layer = VARIANTS[name]
    check(native, layer, scenario(layer, MIXED, 1, Normal(logit=80, log_phi=(-60, 60))))


@pytest.mark.parametrize("name", ["h2o", "tova sliding", "window"])
def test_positions_beyond_2_to_the_24(native: Native, name: str) -> None:
    layer = VARIANTS[name]
    check(native, layer, moved(ordinary(layer, False), 2**30 + 1))


@given(data=st.data())
def test_sizes_that_fill_no_vector(native: Native, data: st.DataObject) -> None:
    """Any head_dim, slots, features and chunk: nothing beyond them is read, which NaN would show, or written."""
    policy = by_name(data.draw(st.sampled_from(["h2o", "tova", "sink"])))
    heavy, recent = policy.split(data.draw(st.integers(2, 40)))
    layer = layer_of(
        policy.name, heavy, recent, head_dim=2 * data.draw(st.integers(1, 45)), rank=data.draw(st.integers(1, 9)),
        slot_dtype=data.draw(st.sampled_from(["model", "int8"])),
        max_distance=data.draw(st.sampled_from([None, 7])),
    )  # fmt: skip
    layer = shaped(layer, data.draw(st.sampled_from([(1, 1), (6, 2), (9, 1)])))
    lengths = [(data.draw(st.integers(1, 50)), 3), (1, 1), (0, 1), (data.draw(st.integers(1, 5)), 0), (1, 1)]
    steps = scenario(layer, lengths, data.draw(st.integers(0, 100)))
    reference = follow(torch_run(layer), steps, empty(layer, batch=2))
    for name, error in follow(native(layer), steps, empty(layer, batch=2)).items():
        assert error <= 2 * reference[name] + 1e-6, (name, error, reference[name])


@pytest.mark.parametrize("name", ["h2o", "tova", "h2o distance 16"])
@pytest.mark.parametrize("heads", ["MQA", "GQA"])
def test_neither_threads_nor_other_rows_change_a_bit(native: Native, name: str, heads: str) -> None:
    """A chunk of 60 tokens of one row and KV head is shared by threads, and so are heads and rows."""
    layer = shaped(ALL[name], HEADS[heads])
    steps = scenario(layer, [(60, 3, 1), (1, 1, 1), (33, 0, 2), (1, 1, 1)], 2)
    one, three, first = native(layer), native(layer, 3), native(layer)
    state, own = empty(layer), empty(layer, batch=1)
    for step in steps:
        a, b = (run(arguments(step.inputs, state)) for run in (one, three))
        alone = first(arguments({n: x if n in SHARED else x[:1] for n, x in step.inputs.items()}, own))
        for x, y, z in zip(a, b, alone, strict=True):
            assert x.tobytes() == y.tobytes()
            assert x[:1].tobytes() == z.tobytes()
        state, own = a[1:], alone[1:]


# ----------------------------------------------------------------------------------------------------- in place


def bound(session: onnxruntime.InferenceSession, arrays: Arrays, in_place: bool) -> Arrays:
    """The outputs of a step whose present state is written over its past one, or elsewhere."""
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for n, x in arrays.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    out = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(arrays["q"]))
    outputs = {"out": out}
    for name, value in values.items():
        if name.startswith("past_") and name != "past_length":
            elsewhere = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(value.numpy()))
            outputs[name.replace("past", "present")] = value if in_place else elsewhere
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    session.run_with_iobinding(binding)
    return {n: value.numpy().copy() for n, value in outputs.items()}


@pytest.mark.parametrize("name", ["h2o", "h2o int8", "h2o distance 16", "window", "sink sliding"])
def test_in_place_is_the_same(operator_library: Path, name: str) -> None:
    layer = ALL[name]
    session = session_of(layer, library=operator_library)
    state = empty(layer)
    for step in scenario(layer, [*MIXED, *DECODE[:4]], 3):
        arrays = inputs_of(session, step.inputs, state)
        here, elsewhere = (bound(session, arrays, in_place) for in_place in (True, False))
        for output, x in here.items():
            assert x.tobytes() == elsewhere[output].tobytes(), output
        state = [here[f"present_{f.name}"] for f in layer.state_fields]


def inputs_of(session: onnxruntime.InferenceSession, tokens: Arrays, state: list[np.ndarray]) -> Arrays:
    """All inputs of a model by name."""
    names = [node.name for node in session.get_inputs()]
    past = [n for n in names if n.startswith("past_") and n != "past_length"]
    return {n: tokens[n] for n in names if n in tokens} | dict(zip(past, state, strict=True))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("in_place", [True, False])
def test_more_tokens_than_slots_under_policy_full(operator_library: Path, in_place: bool) -> None:
    """Nothing is written beyond the slots."""
    layer = layer_of("full", 0, 8)
    session = session_of(layer, library=operator_library)
    (step,) = scenario(layer_of("full", 0, 9), [(9, 3)], 0)
    arrays = inputs_of(session, step.inputs, empty(layer, batch=2))
    with pytest.raises(Exception, match="more tokens than slots under policy full"):
        bound(session, arrays, in_place)


def shorter(name: str, axis: int) -> Callable[[Arrays], Arrays]:
    return lambda x: {**x, name: np.delete(x[name], 0, axis)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shorter("k", 2), "an input has another shape"),
        (shorter("log_phi_q", 2), "an input has another shape"),
        (shorter("past_length", 0), "an input has another shape"),
        (shorter("past_position", 0), "an input has another shape"),
        (shorter("past_h_scale", 0), "an input has another shape"),
        (lambda x: {**x, "new_length": x["new_length"] - 9}, "a length is out of range"),
        (lambda x: {**x, "new_length": x["new_length"] + 9}, "a length is out of range"),
        (lambda x: {**x, "past_length": x["past_length"] - 1}, "a length is out of range"),
        (lambda x: {**x, "past_length": x["past_length"] + (2**31 - 1)}, "a length is out of range"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    operator_library: Path, change: Callable[[Arrays], Arrays], reason: str
) -> None:
    """ONNX Runtime compares inputs with fixed sizes only: the kernel reads nothing outside its tensors."""
    layer = replace(STATE16_VARIANTS["h2o distance 16"], max_distance=9)
    session = session_of(layer, library=operator_library)
    (step,) = scenario(layer, [(5, 3, 1)], 0)
    arrays = change(inputs_of(session, step.inputs, empty(layer)))
    with pytest.raises(Exception, match=f"LessAttention: {reason}"):
        session.run(None, arrays)


def test_no_rows(operator_library: Path) -> None:
    layer = STATE16_VARIANTS["h2o distance 16"]
    session = session_of(layer, library=operator_library)
    (step,) = scenario(layer, [(5, 3, 1)], 0)
    arrays = inputs_of(session, step.inputs, empty(layer))
    out, *state = session.run(None, {n: x if n in SHARED else x[:0] for n, x in arrays.items()})
    assert [len(x) for x in (out, *state)] == [0] * (1 + len(layer.state_fields))


@pytest.mark.parametrize("tensor", ["k", "v", "psi_k"])
@pytest.mark.parametrize("name", ["h2o int8", "h2o distance 16"])
def test_nan_in_what_is_stored_stays_visible(native: Native, name: str, tensor: str) -> None:
    """The token's scale is NaN, or the feature's, as in the reference; its codes are integers like any other."""
    layer = shaped(ALL[name], HEADS["MHA"])
    (step,) = scenario(layer, [(20, 3, 1)], 0)
    inputs = {**step.inputs, tensor: step.inputs[tensor].copy()}
    inputs[tensor][0, 0, :20] = np.nan
    wanted, got = (run(arguments(inputs, empty(layer)))[1:] for run in (torch_run(layer), native(layer)))
    for field, a, b in zip(layer.state_fields, wanted, got, strict=True):
        if field.name in ("z", "h_scale", "key_scale", "value_scale") or (field.name == "h" and not layer.state16):
            np.testing.assert_array_equal(np.isnan(a[0, 0]), np.isnan(b[0, 0]), err_msg=field.name)
        if a.dtype.kind == "f" and field.name in ("h", "z"):
            assert np.isfinite(b[0, 1]).all()


@pytest.mark.parametrize("decode", [False, True])
def test_nan_stays_nan(native: Native, decode: bool) -> None:
    """Of the row and head that has it; whatever its scores then are, slots keep their tokens."""
    layer = shaped(VARIANTS["h2o"], HEADS["MHA"])
    (step,) = scenario(layer, [(1, 1, 1) if decode else (20, 3, 1)], 0)
    q = step.inputs["q"].copy()
    q[0, 0, 0] = np.nan
    arrays = {**step.inputs, "q": q}
    out, *state = native(layer)(arguments(arrays, empty(layer)))
    assert np.isnan(out[0, 0, 0]).all()
    assert np.isfinite(out[0, 1]).all()
    position = state[4]
    valid = (position >= -1) & (position < arrays["new_length"][:, None, None])
    assert valid.all()


# -------------------------------------------------------------------------------------------- library and choice


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, empty."""
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_library_is_compiled_once(own_folder: Path) -> None:
    texts: list[str] = []
    said = Spoken(texts.append)
    path = ort_operator.library(progress=said)
    assert path.is_relative_to(own_folder)
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    assert ort_operator.library(progress=said) == path
    assert len(texts) == 1
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(path.read_bytes() + b"x")
    damaged.replace(path)  # not as it was stored; the one that is loaded stays as it is
    assert ort_operator.library(progress=said) == path
    assert len(texts) == 2
    assert cache.stored(path)


def test_without_a_compiler(own_folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"LessAttention runs as ONNX nodes, which is slower: .*install g\+\+"):
        assert OrtBackend(CONTRACT, model, threads=1).operator == "onnx"
    with pytest.raises(EngineError, match=r"install g\+\+"):
        OrtBackend(CONTRACT, model, threads=1, operator="native")
    assert not own_folder.exists()


def test_a_compiler_that_fails(own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and nothing half written in the cache."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no room' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "find", lambda: str(broken))
    with pytest.raises(EngineError, match=r"^the operator cannot be compiled \(\w+\.cpp\): x.cpp:1: error: no room$"):
        ort_operator.library()
    assert not [p for p in own_folder.rglob("*") if p.is_file()]


def test_a_library_of_another_compiler_needs_none(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ort_operator.library()
    monkeypatch.setattr(compiler, "find", lambda: None)
    assert ort_operator.library() == path
    assert path.is_relative_to(own_folder)


def test_folders_are_private_whatever_the_umask(own_folder: Path) -> None:
    before = os.umask(0o002)
    try:
        path = ort_operator.library()
        assert ort_operator.library() == path
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (own_folder, *path.parents[:2])} == {0o700}


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes run, and a warning says why."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="runs as ONNX nodes, which is slower: cannot .*LESS_EXPORT_CACHE"):
        assert OrtBackend(CONTRACT, model, threads=1).operator == "onnx"


def test_a_library_that_does_not_load(own_folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(out: Path, host: str) -> None:
        out.write_text("no library")

    monkeypatch.setattr(ort_operator, "compile_library", broken)
    with pytest.warns(RuntimeWarning, match=r"cannot load the operator .*libless_ort\.so"):
        assert OrtBackend(CONTRACT, model, threads=1).operator == "onnx"
    with pytest.raises(EngineError, match="cannot load the operator"):
        OrtBackend(CONTRACT, model, threads=1, operator="native")
    assert own_folder.exists()


def test_choosing(model: Path, tmp_path: Path) -> None:
    assert OrtBackend(CONTRACT, model, threads=1).operator == "native"
    assert OrtBackend(CONTRACT, model, threads=1, operator="onnx").operator == "onnx"
    with pytest.raises(UsageError, match="unknown operator 'cuda': choose native or onnx"):
        OrtBackend(CONTRACT, model, operator="cuda")
    half = replace(CONTRACT, dtype="float16")
    path = onnx_decoder(half, tmp_path / "half.onnx")
    assert OrtBackend(half, path, threads=1).operator == "onnx"
    with pytest.raises(UsageError, match="it computes in float32, not float16"):
        OrtBackend(half, path, operator="native")


def test_both_operators_give_the_same_answers(model: Path) -> None:
    native, onnx = (OrtBackend(CONTRACT, model, threads=1, operator=o) for o in ("native", "onnx"))
    rng = np.random.default_rng(0)
    for backend in (native, onnx):
        backend.open(2)
    for width in (5, 1, 1, 3, 1):
        ids = rng.integers(0, CONTRACT.vocab_size, (2, width))
        np.testing.assert_allclose(native.step(ids), onnx.step(ids), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_decoder(CONTRACT, tmp_path_factory.mktemp("graph") / "model.onnx")


def test_command(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "libless_ort.so"
    assert cli.main(["build-operator", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == ort_operator.library().read_bytes()
    assert cli.main(["build-operator"]) == 0
    assert capsys.readouterr().out == f"{ort_operator.library()}\n"
