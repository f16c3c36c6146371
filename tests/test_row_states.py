"""Saved states: their contents, refusals before a byte of a row changes, and the messages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from less_export.bundle.files import copy, write_atomically
from less_export.errors import BackendError, LessExportError, UsageError
from less_export.runtime.backend import Backend, RowState
from less_export.runtime.row_state import MAX_LENGTH

from .tiny_decoder import CONTRACT, INT8, ReferenceBackend

PROMPT = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]


@pytest.fixture(scope="module")
def shared() -> ReferenceBackend:
    return ReferenceBackend(CONTRACT)


@pytest.fixture
def backend(shared: ReferenceBackend) -> ReferenceBackend:
    shared.open(2)
    for ids in PROMPT:
        shared.step([ids, ids[::-1]])
    return shared


@pytest.fixture
def state(backend: ReferenceBackend) -> RowState:
    return backend.read_row(0)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable(), text
    return text


def contents(backend: Backend) -> list[tuple[int, dict[str, bytes]]]:
    rows = [backend.read_row(r) for r in range(backend.batch)]
    return [(r.length, {n: x.tobytes() for n, x in r.tensors.items()}) for r in rows]


# ------------------------------------------------------------------ before a byte of the row changes


def with_tensor(state: RowState, name: str, change: Callable[[Any], Any]) -> RowState:
    return RowState(state.length, {**state.tensors, name: change(state.tensors[name])}, state.identity)


BAD_STATES: dict[str, tuple[Callable[[RowState], RowState], str]] = {
    "length 2^31": (lambda s: RowState(2**31, s.tensors), r"damaged \(length 2147483648\): prefill again"),
    "length 10^30": (lambda s: RowState(10**30, s.tensors), "damaged"),
    "negative length": (lambda s: RowState(-1, s.tensors), r"damaged \(length -1\)"),
    "length of another type": (lambda s: RowState(3.5, s.tensors), "damaged"),  # type: ignore[arg-type]
    "last tensor's shape": (lambda s: with_tensor(s, "past.2.z", lambda x: x[:, :1]), r"past\.2\.z differs"),
    "last tensor's dtype": (lambda s: with_tensor(s, "past.2.z", lambda x: x.astype(np.float64)), r"past\.2\.z"),
    "byte order": (lambda s: with_tensor(s, "past.2.h", lambda x: x.astype(">f4")), r"past\.2\.h"),
    "not an array": (lambda s: with_tensor(s, "past.1.key", lambda x: x.tolist()), r"past\.1\.key"),
    "a tensor less": (lambda s: RowState(s.length, dict(list(s.tensors.items())[:-1])), r"past\.2\.z"),
    "a tensor more": (lambda s: RowState(s.length, {**s.tensors, "past.3.z": s.tensors["past.2.z"]}), r"past\.3\.z"),
    "another bundle": (lambda s: RowState(s.length, s.tensors, "b" * 64), "model or kernels differ"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_refused_state_changes_nothing(name: str, backend: ReferenceBackend, state: RowState) -> None:
    damage, match = BAD_STATES[name]
    backend.identity = "a" * 64
    try:
        before = contents(backend)
        with pytest.raises(BackendError, match=match) as caught:
            backend.write_row(1, damage(state))
        one_line(caught.value)
        assert contents(backend) == before
        backend.write_row(1, state)
        assert contents(backend)[1] == contents(backend)[0]
    finally:
        backend.identity = ""


def test_rows_that_do_not_exist(backend: ReferenceBackend, state: RowState) -> None:
    for row in (-1, 2, 0.5, None, "0"):
        with pytest.raises(BackendError, match=rf"row {row} is outside 0\.\.1"):
            backend.write_row(row, state)  # type: ignore[arg-type]
    backend.write_row(np.int64(1), state)  # type: ignore[arg-type]
    backend.close()
    with pytest.raises(BackendError, match=r"not open: call open\(batch\) first"):
        backend.read_row(0)


def test_a_sequence_ends_at_the_largest_int32(backend: ReferenceBackend, state: RowState) -> None:
    backend.write_row(0, RowState(MAX_LENGTH - 1, state.tensors))
    before = contents(backend)
    with pytest.raises(BackendError, match=r"sequences of at most 2147483647 tokens, not 2147483648: shorten the text"):
        backend.step([[1, 2], [3, 4]])
    assert contents(backend) == before
    backend.step([[1, 2], [3, 4]], [1, 2])
    assert backend.past_length.tolist() == [MAX_LENGTH, state.length + 2]
    assert backend.past_length.dtype == np.int32
    with pytest.raises(BackendError, match="2147483648"):
        backend.step([[1], [3]], np.array([1, 0], np.uint64))
    assert backend.step([[1], [3]], np.array([0, 1], np.uint64)).shape[0] == 2


@pytest.mark.parametrize(
    "ids", [[[1], [2, 3]], [[10**30], [1]], [["a"], ["b"]], [[1.0], [2.0]], None, [[True], [False]]]
)
def test_odd_inputs_of_a_step(ids: Any, backend: ReferenceBackend) -> None:
    with pytest.raises(BackendError, match="input_ids must be") as caught:
        backend.step(ids)
    one_line(caught.value)


# ------------------------------------------------------------------ the file


def test_the_file_is_what_the_docstring_says(state: RowState, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    RowState(state.length, state.tensors, "é").save(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        names = sorted(file.keys(), key=lambda n: n.encode())
        dtypes = {n: file.get_slice(n).get_dtype() for n in names}
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    body = data[8 + int.from_bytes(data[:8], "little") :]
    digest = hashlib.sha256(b"12\0" + "é".encode() + b"\0")
    for name in names:
        begin, end = header[name]["data_offsets"]
        digest.update(name.encode() + b"\0" + body[begin:end])
    assert metadata == {"format": "less-state", "length": "12", "identity": "é", "sha256": digest.hexdigest()}
    assert set(names) == {s.past.name for s in CONTRACT.state()}
    assert dtypes == {n: "I32" if n.endswith("position") else "F32" for n in names}
    loaded = RowState.load(path)
    loaded.check(CONTRACT)
    assert (loaded.length, loaded.identity) == (12, "é")
    for name, x in state.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], x)


def rewrite(path: Path, state: RowState, **metadata: str | None) -> Path:
    """A file without checksum, so that its values are checked."""
    tags = {"format": "less-state", "length": str(state.length), "identity": ""} | metadata
    tensors = {n: np.ascontiguousarray(x) for n, x in state.tensors.items()}
    save_file(tensors, path, {k: v for k, v in tags.items() if v is not None})
    return path


def test_a_file_without_checksum_still_loads(state: RowState, tmp_path: Path) -> None:
    loaded = RowState.load(rewrite(tmp_path / "old", state, identity=None))
    loaded.check(CONTRACT)
    assert (loaded.length, loaded.identity) == (state.length, "")


def test_any_changed_byte_is_noticed(state: RowState, tmp_path: Path) -> None:
    path = tmp_path / "state"
    state.save(path)
    data = path.read_bytes()
    start, rng = 8 + int.from_bytes(data[:8], "little"), np.random.default_rng(0)
    for at in [start, len(data) - 1, *rng.integers(start, len(data), 30).tolist()]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :])
        with pytest.raises(BackendError, match=r"it is damaged .its hash differs"):
            RowState.load(path)
    path.write_bytes(data.replace(b'"length":"12"', b'"length":"13"'))
    with pytest.raises(BackendError, match="its hash differs"):
        RowState.load(path)


def slot(state: RowState, layer: int, held: bool) -> tuple[int, int]:
    """A slot of ``layer`` that holds a token, or an empty one."""
    at = np.argwhere((state.tensors[f"past.{layer}.position"] >= 0) == held)
    return int(at[0][0]), int(at[0][1])


def put(state: RowState, name: str, where: Any, value: Any) -> RowState:
    changed = state.tensors[name].copy()
    changed[where] = value
    return RowState(state.length, {**state.tensors, name: changed})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float, state: RowState, tmp_path: Path) -> None:
    for layer in range(3):
        for field in ("key", "value", "psi", "score"):
            bad = put(state, f"past.{layer}.{field}", slot(state, layer, True), value)
            with pytest.raises(BackendError, match=rf"past\.{layer}\.{field} holds NaN or infinity"):
                RowState.load(rewrite(tmp_path / "bad", bad))
        for field in ("h", "z"):
            bad = put(state, f"past.{layer}.{field}", 0, value)
            with pytest.raises(BackendError, match=rf"past\.{layer}\.{field} holds NaN or infinity"):
                RowState.load(rewrite(tmp_path / "bad", bad))
            bad.save(tmp_path / "bad")  # its hash is correct
            with pytest.raises(BackendError, match="NaN"):
                RowState.load(tmp_path / "bad")


def test_empty_slots_may_hold_anything(shared: ReferenceBackend, tmp_path: Path) -> None:
    shared.open(1)
    shared.step([[1, 2]])
    state = shared.read_row(0)
    for field in ("key", "value", "psi", "score"):
        state = put(state, f"past.0.{field}", slot(state, 0, False), np.nan)
    RowState.load(rewrite(tmp_path / "state", state)).check(CONTRACT)


@pytest.mark.parametrize("value", [-2, 12, 2**31 - 1, -(2**31)])
def test_positions_outside_of_the_sequence(value: int, state: RowState, tmp_path: Path) -> None:
    bad = put(state, "past.1.position", (0, 0), value)
    with pytest.raises(BackendError, match=r"past\.1\.position has positions outside of -1\.\.11") as caught:
        RowState.load(rewrite(tmp_path / "bad", bad))
    one_line(caught.value)


def test_negative_mass(state: RowState, tmp_path: Path) -> None:
    bad = put(state, "past.2.z", (0, 1), -1e-3)
    with pytest.raises(BackendError, match=r"past\.2\.z is negative"):
        RowState.load(rewrite(tmp_path / "bad", bad))


def test_bfloat16_travels_as_its_bits(state: RowState, tmp_path: Path) -> None:
    contract = dataclasses.replace(CONTRACT, dtype="bfloat16")
    half = {"key", "value", "psi"}
    bits = {
        n: torch.from_numpy(x).bfloat16().view(torch.uint16).numpy() if n.rpartition(".")[2] in half else x
        for n, x in state.tensors.items()
    }
    good = RowState(state.length, bits)
    good.save(tmp_path / "good")
    loaded = RowState.load(tmp_path / "good")
    loaded.check(contract)
    with pytest.raises(BackendError, match="belongs to another export"):
        loaded.check(CONTRACT)
    for value in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):
        bad = put(good, "past.0.key", slot(good, 0, True), value)
        with pytest.raises(BackendError, match=r"past\.0\.key holds NaN or infinity"):
            RowState.load(rewrite(tmp_path / "bad", bad))
    RowState.load(rewrite(tmp_path / "most", put(good, "past.0.key", slot(good, 0, True), 0x7F7F)))  # finite


@pytest.fixture
def int8_state() -> RowState:
    backend = ReferenceBackend(INT8)
    backend.open(1)
    for ids in PROMPT:
        backend.step([ids])
    return backend.read_row(0)


def test_int8_slots_come_back_as_they_are(int8_state: RowState, tmp_path: Path) -> None:
    int8_state.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "np") as file:
        dtypes = {n: file.get_slice(n).get_dtype() for n in file.keys()}  # noqa: SIM118
    assert {n for n, dtype in dtypes.items() if dtype == "I8"} == {"past.0.key", "past.0.value"}
    loaded = RowState.load(tmp_path / "state")
    loaded.check(INT8)
    assert np.abs(loaded.tensors["past.0.key"].astype(int)).max() == 127
    for name, x in int8_state.tensors.items():
        assert loaded.tensors[name].tobytes() == x.tobytes(), name
    with pytest.raises(BackendError, match=r"another export \(past\.0\.key_scale differs"):
        loaded.check(CONTRACT)


def test_a_restored_int8_row_goes_on_as_the_row_itself(int8_state: RowState, tmp_path: Path) -> None:
    """Codes and scales are bits of the state: nothing is rounded again."""
    int8_state.save(tmp_path / "state")
    backend = ReferenceBackend(INT8)
    backend.open(2)
    backend.write_row(0, int8_state)
    backend.write_row(1, RowState.load(tmp_path / "state"))
    for ids in ([13, 14, 15], [16], [17]):
        backend.step([ids, ids])
    rows = contents(backend)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("field", ["key_scale", "value_scale"])
@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (-1e-30, "is negative"), (0, None)]
)
def test_scales_are_finite_and_not_negative(
    field: str, value: float, says: str | None, int8_state: RowState, tmp_path: Path
) -> None:
    changed = put(int8_state, f"past.0.{field}", slot(int8_state, 0, True), value)
    if says is None:
        RowState.load(rewrite(tmp_path / "state", changed)).check(INT8)
        return
    with pytest.raises(BackendError, match=rf"past\.0\.{field} .*{says}"):
        RowState.load(rewrite(tmp_path / "bad", changed))


@pytest.mark.parametrize("field", ["key", "value"])
def test_no_code_is_below_minus_127(field: str, int8_state: RowState, tmp_path: Path) -> None:
    at = slot(int8_state, 0, True)
    RowState.load(rewrite(tmp_path / "least", put(int8_state, f"past.0.{field}", at, -127))).check(INT8)
    with pytest.raises(BackendError, match=rf"past\.0\.{field} holds a code of -128"):
        RowState.load(rewrite(tmp_path / "bad", put(int8_state, f"past.0.{field}", at, -128)))


def test_empty_int8_slots_may_hold_anything(tmp_path: Path) -> None:
    """Poison in them changes nothing that follows."""
    results = []
    for poison in ({}, {"key_scale": np.nan, "value_scale": -np.inf, "key": -128, "psi": np.nan}):
        backend = ReferenceBackend(INT8)
        backend.open(1)
        backend.step([[1, 2]])
        state = backend.read_row(0)
        empty = state.tensors["past.0.position"] < 0
        assert empty.any()
        for field, value in poison.items():
            state = put(state, f"past.0.{field}", empty, value)
        backend.write_row(0, RowState.load(rewrite(tmp_path / "state", state)))
        results.append(([backend.step([ids]).tobytes() for ids in PROMPT], contents(backend)))
        assert np.isfinite(np.frombuffer(results[-1][0][-1], np.float32)).all()
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.float64, torch.int64])
def test_dtypes_that_states_do_not_have(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    save_torch({"past.0.key": torch.zeros(2, 2, dtype=dtype)}, path, {"format": "less-state", "length": "1"})
    with pytest.raises(BackendError, match=r"past\.0\.key has dtype .*, which states do not have") as caught:
        RowState.load(path)
    one_line(caught.value)


@pytest.mark.parametrize(
    "length", ["", "-1", "1.0", " 1", "1_0", "\u0661", "2147483648", "9" * 5000, "1\n2", "\x1b[31m"]
)
def test_lengths_that_are_no_length(length: str, state: RowState, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"its length is not a whole number in 0\.\.2147483647") as caught:
        RowState.load(rewrite(tmp_path / "bad", state, length=length))
    assert len(one_line(caught.value)) < 400


def test_what_is_no_state(state: RowState, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    for data in (b"", b"no state", b"x" * 100, b"\2\0\0\0\0\0\0\0{}", bytes(7) + b"\x7f", b"PK" * 50):
        path.write_bytes(data)
        with pytest.raises(BackendError, match=r"not a safetensors file|is not a saved state") as caught:
            RowState.load(path)
        one_line(caught.value)
    for tag in ("", "less-kernels"):
        with pytest.raises(BackendError, match="is not a saved state"):
            RowState.load(rewrite(path, state, format=tag))
    state.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BackendError, match="not a safetensors file, or damaged"):
        RowState.load(path)
    for missing in (tmp_path / "absent", tmp_path):
        with pytest.raises(BackendError, match=r"cannot read the saved state .*: no such file"):
            RowState.load(missing)
    with pytest.raises(UsageError, match=r"cannot write .*: No such file or directory"):
        state.save(tmp_path / "absent" / "state")


def test_odd_tensors_are_left_to_the_check(tmp_path: Path) -> None:
    """Loading has no contract: names and shapes of another export are reported when the state is used."""
    odd = {"x": np.array([np.nan], np.float32), "past.0.key": np.full((1, 3, 2), np.nan, np.float32)}
    odd |= {"past.0.position": np.zeros((1, 2), np.int32), "past.1.z": np.zeros(0, np.float32)}
    RowState(1, odd).save(tmp_path / "odd")
    with pytest.raises(LessExportError, match="belongs to another export"):
        RowState.load(tmp_path / "odd").check(CONTRACT)


# ------------------------------------------------------------------ permissions


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda value: os.umask(value) and None
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_files_honour_the_umask(
    mask: int, mode: int, state: RowState, umask: Callable[[int], None], tmp_path: Path
) -> None:
    umask(mask)
    state.save(tmp_path / "state")
    write_atomically(tmp_path / "written", b"x")
    copy(tmp_path / "written", tmp_path / "copied")
    for name in ("state", "written", "copied"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name
    assert os.umask(mask) == mask
