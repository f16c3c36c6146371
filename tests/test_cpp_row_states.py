"""Saved rows of state: the C++ runtime reads Python's files and the reverse, and both refuse the same damage."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.contract import Contract, SlotDtype, StateBits
from less_export.errors import BackendError
from less_export.runtime.backend import RowState

from .cpp_support import bundle, call
from .trt_decoder import contract_of

pytest_plugins = ["tests.cpp_support"]
pytestmark = pytest.mark.slow


#: Smallest int8 of a state, -127 elsewhere.
LEAST_CODE = {"psi": 0, "h": -128}


def state_of(contract: Contract) -> RowState:
    random = np.random.default_rng(0)

    def values(spec: Any) -> Any:
        if spec.field.name == "position":
            return random.integers(-1, 1234567, spec.row_shape, np.int32)
        if spec.dtype == "int8":
            return random.integers(LEAST_CODE.get(spec.field.name, -127), 128, spec.row_shape, np.int8)
        finite = random.random(spec.row_shape, np.float32) + 1
        return (
            (finite.view(np.uint32) >> 16).astype(np.uint16) if spec.dtype == "bfloat16" else finite.astype(spec.dtype)
        )

    return RowState(1234567, {s.past.name: values(s) for s in contract.state()}, "a" * 64)


@pytest.mark.parametrize(
    ("dtype", "slots", "bits"),
    [
        *((d, s, 32) for d in ("float32", "float16", "bfloat16") for s in ("model", "int8")),
        ("float16", "int8", 16),
    ],
)
def test_saved_rows_go_both_ways(dtype: str, slots: SlotDtype, bits: StateBits, tools: Path, tmp_path: Path) -> None:
    contract = contract_of(dtype, slots=slots, state_bits=bits)
    path = bundle(tmp_path / "x.plan", contract)
    state = state_of(contract)
    state.save(tmp_path / "python")
    done = call(tools / "less_runtime_probe", "state", path, tmp_path / "python", tmp_path / "cpp")
    assert done.code == 0, done.err
    back = RowState.load(tmp_path / "cpp")
    back.check(contract, "a" * 64)
    assert (back.length, back.identity) == (state.length, state.identity)
    for name, x in state.tensors.items():
        assert back.tensors[name].tobytes() == x.tobytes(), name
    sums = [metadata(tmp_path / name)["sha256"] for name in ("python", "cpp")]
    assert sums[0] == sums[1]
    for index, foreign in enumerate(
        (contract_of(dtype, capacity=8).with_slots(slots), contract.with_slots("int8" if slots == "model" else "model"))
    ):
        other = bundle(tmp_path / f"{index}.plan", foreign)
        done = call(tools / "less_runtime_probe", "state", other, tmp_path / "python", tmp_path / "cpp")
        assert done.code == 1
        assert "this state belongs to another export (past.0." in done.err


def test_scales_of_empty_slots_go_both_ways_as_they_are(tools: Path, tmp_path: Path) -> None:
    """NaN among them."""
    contract = contract_of("float16").with_slots("int8")
    state = state_of(contract)
    for layer in range(2):
        empty = state.tensors[f"past.{layer}.position"] < 0
        empty[:, 0] = True
        state.tensors[f"past.{layer}.position"][empty] = -1
        for name, bits in (("key_scale", 0x7FC01234), ("value_scale", 0xFF800000)):
            state.tensors[f"past.{layer}.{name}"].view(np.uint32)[empty] = bits
        state.tensors[f"past.{layer}.key"][empty] = -128
    state.save(tmp_path / "python")
    path = bundle(tmp_path / "x.plan", contract)
    done = call(tools / "less_runtime_probe", "state", path, tmp_path / "python", tmp_path / "cpp")
    assert done.code == 0, done.err
    back = RowState.load(tmp_path / "cpp")
    back.check(contract)
    for name, x in state.tensors.items():
        assert back.tensors[name].tobytes() == x.tobytes(), name


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file."""
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def metadata(file: Path) -> dict[str, str]:
    return dict(split(file.read_bytes())[0]["__metadata__"])


def damaged(data: bytes) -> Iterator[bytes]:
    """A file with one thing changed: its bytes, its header, its values without their checksum."""
    header, body = split(data)
    start = len(data) - len(body)
    for at in (*range(0, start, 3), *range(start, len(data), 29)):
        for bit in (1, 16):
            yield data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    for size in (0, 7, 8, 9, start - 1, start, len(data) - 1):
        yield data[:size]
    yield data + b"\0"
    facts = header["__metadata__"]
    bare = {**header, "__metadata__": {k: v for k, v in facts.items() if k != "sha256"}}
    yield join(bare, body)
    for length in (
        "",
        "-1",
        "+1",
        " 1",
        "1.0",
        "1e3",
        "0x1",
        "1_0",
        "\u0661",
        "2147483647",
        "2147483648",
        "9" * 30,
        1,
        None,
    ):
        yield join({**bare, "__metadata__": {**bare["__metadata__"], "length": length}}, body)
    yield join({**header, "__metadata__": {**facts, "length": "0001234567"}}, body)
    for key, value in (
        ("identity", 1),
        ("identity", None),
        ("sha256", facts["sha256"].upper()),
        ("more", "x"),
        ("more", []),
    ):
        yield join({**header, "__metadata__": {**facts, key: value}}, body)
    for name in (
        *("past.0.key", "past.1.position", "past.0.z", "past.1.key", "past.1.value_scale"),
        *("past.0.psi", "past.0.h", "past.0.h_scale"),
    ):
        if name not in bare:
            continue
        entry = bare[name]
        first, last = entry["data_offsets"]
        yield join({k: v for k, v in bare.items() if k != name}, body)
        yield join({**{k: v for k, v in bare.items() if k != name}, "past.9.key": entry}, body)
        for change in (
            {"shape": [1, *entry["shape"]]}, {"shape": entry["shape"][::-1]}, {"dtype": "I64"}, {"dtype": "BF16"},
            {"dtype": "I8"} if entry["dtype"] != "I8" else {"dtype": "U8"},
            {"shape": None}, {"shape": "x"}, {"data_offsets": [first + 4, last + 4]}, {"data_offsets": [first]},
            {"data_offsets": [first, last - 4]}, {"data_offsets": [last, first]}, {"data_offsets": [-1, last]},
        ):  # fmt: skip
            yield join({**bare, name: {**entry, **change}}, body)
        for bits in (b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\x7c\0\x7c", b"\x80\x7f\x80\x7f", b"\0\0\0\x80"):
            yield join(bare, body[:first] + bits + body[first + 4 :])
    yield join(b"[]", body)
    yield join(b"{}", body)
    yield join(json.dumps(bare)[:-1].encode(), body)


def python_verdict(file: Path, contract: Contract) -> str:
    try:
        RowState.load(file).check(contract)
    except BackendError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_refuse_the_same_damage(dtype: str, tools: Path, tmp_path: Path) -> None:
    """With bfloat16, the first layer has a state of 16 bits; with float16, the second one has int8 slots."""
    contract = contract_of(dtype)
    first, second = contract.layers
    if dtype == "bfloat16":
        first = dataclasses.replace(first, slot_dtype="int8", state_bits=16)
    else:
        second = dataclasses.replace(second, slot_dtype="int8")
    contract = dataclasses.replace(contract, layers=(first, second))
    path = bundle(tmp_path / "x.plan", contract)
    state_of(contract).save(tmp_path / "good")
    files = []
    for index, data in enumerate(damaged((tmp_path / "good").read_bytes())):
        files.append(tmp_path / str(index))
        files[-1].write_bytes(data)
    done = call(tools / "less_runtime_probe", "state-verdicts", path, feed="".join(f"{f}\n" for f in files))
    assert done.code == 0, done.err
    verdicts = done.out.splitlines()
    disagreements = [
        f"{file.name}: Python: {python}; C++: {cpp}; {re.sub(rb'[^ -~]', b'?', file.read_bytes()[:200])!r}"
        for file, cpp in zip(files, verdicts, strict=True)
        if ((python := python_verdict(file, contract)) == "accepted") != (cpp == "accepted")
    ]
    assert not disagreements, "\n".join(disagreements)
    assert 5 < verdicts.count("accepted") < len(files) / 4
    assert all(v.isprintable() for v in verdicts)
