"""Damaged files are refused with one line, or still hold the same values.

Two kinds of damage: to bytes, as by disks and transfers, and to the values of a JSON header, which passes the
first check and far into the code that reads it.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from less_export.bundle.artifact import (
    MANIFEST,
    Artifact,
    Bundle,
    KernelFacts,
    Manifest,
    TokenizerFacts,
    WeightFile,
    _digest,
    header_sha256,
)
from less_export.bundle.files import sha256
from less_export.contract import Contract, LayerSpec, Policy
from less_export.hf.weights import DTYPES, StoredTensor, read_header, stored_tensors
from less_export.less.feature_maps import Heads, Kernels, random_kernels
from less_export.runtime.backend import RowState, empty

from .refusal import refused_or

CONTRACT = Contract((LayerSpec(4, 2, 8, 0.35, Policy.H2O, 2, 2, 0, True, 4, 3),), 20, "float32", 4, 2)

# ------------------------------------------------------------------ damage

#: Any value of JSON, odd numbers and deep nesting included.
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 70),
        st.sampled_from([-(2**63), 2**63, 2**31, 1e300]),
        st.floats(allow_nan=False, allow_infinity=False, width=16),
        st.sampled_from(["", "a", "float32", "F32", "\n", "../x", "\0"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes, reach: int | None = None) -> bytes:
    """``whole`` with some of its first ``reach`` bytes changed, truncated, deleted, duplicated or inserted."""
    reach = reach or len(whole)
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, reach)), draw(st.integers(1, 9))
        other = draw(
            st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b'"', b"}", b"[", b"9", b"-", b"\0"]))
        )
        data = {
            "change": data[:at] + other + data[at + len(other) :],
            "flip": data[:at] + bytes(b ^ (1 << size % 8) for b in data[at : at + 1]) + data[at + 1 :],
            "cut": data[:at],
            "lose": data[:at] + data[at + size :],
            "double": data[: at + size] + data[at:],
            "put in": data[:at] + other + data[at:],
        }[draw(st.sampled_from(["change", "flip", "cut", "lose", "double", "put in"]))]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, whole: Any) -> Any:
    """``whole`` with a value or two replaced, removed, renamed, added, or turned into text."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "remove", "rename", "add", "text"]))
        if kind == "replace":
            owner[path[-1]] = draw(JSON)
        elif kind == "text":
            owner[path[-1]] = json.dumps(owner[path[-1]])
        elif kind == "remove":
            del owner[path[-1]]
        elif isinstance(owner, list):
            owner.append(draw(JSON))
        else:
            owner[draw(st.sampled_from(["a", "format_version", "0", "__metadata__"]))] = (
                owner.pop(path[-1]) if kind == "rename" else draw(JSON)
            )
    return value


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def safetensors_header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def damaged_safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """Damage to the bytes, of the header mostly, or to the values in the header."""
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    return st.one_of(
        damaged_bytes(whole, header),
        damaged_bytes(whole),
        damaged_json(safetensors_header(whole)).map(lambda h: with_header(whole, h)),
    )


# ------------------------------------------------------------------ weights

WEIGHTS = save_tensors(
    {
        "a.weight": torch.arange(6.0).view(2, 3),
        "b.weight.codes": torch.arange(8, dtype=torch.int8).view(4, 2),
        "b.weight.scales": torch.ones(2, 2),
        "c": torch.ones(4, dtype=torch.bfloat16),
        "none": torch.ones(0, 3),
    },
    {"format": "pt"},
)


def nested(depth: int) -> bytes:
    text = b"[" * depth
    return struct.pack("<Q", len(text)) + text


@given(damaged_safetensors(WEIGHTS))
@example(nested(200_000))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": ["x", "y"], "data_offsets": [0, 4]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": [], "data_offsets": [True, 5]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [4, 4]}}))
@example(with_header(WEIGHTS, {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}))
def test_weights(folder: Path, data: bytes) -> None:
    """Every listed tensor can be read, and is inside the file after its header."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    for name, tensor in (refused_or(lambda: read_header(path)) or {}).items():
        assert isinstance(name, str)
        assert 8 < tensor.offset <= tensor.offset + tensor.length <= len(data)
        if tensor.dtype in DTYPES:
            assert tensor.read().shape == tensor.shape
    for tensor in (refused_or(lambda: stored_tensors(path)) or {}).values():
        if not isinstance(tensor, StoredTensor) or tensor.dtype in DTYPES:
            assert refused_or(lambda tensor=tensor: tensor.read().shape) in (None, tensor.shape)


# ------------------------------------------------------------------ kernels

KERNELS = random_kernels([Heads(2, 1, 4)] * 2, [0, 1], 3, 5)


@given(st.data())
def test_kernels(folder: Path, data: st.DataObject) -> None:
    path = folder / "kernels.safetensors"
    KERNELS.save(path)
    whole = path.read_bytes()
    header = safetensors_header(whole)
    stated = json.loads(header["__metadata__"]["less_kernels"])
    inner = damaged_json(stated).map(
        lambda x: with_header(whole, {**header, "__metadata__": {"less_kernels": json.dumps(x)}})
    )
    path.write_bytes(data.draw(st.one_of(damaged_safetensors(whole), inner)))
    kernels = refused_or(lambda: Kernels.load(path))
    if kernels is None:
        return
    refused_or(lambda: kernels.check([Heads(2, 1, 4)] * 2))
    for layer in kernels.layers.values():
        assert all(p.isfinite().all() for p in layer.parameters())
        assert layer.psi(torch.ones(1, layer.heads.kv_heads, 2, layer.heads.head_dim)).shape[-1] == layer.rank


# ------------------------------------------------------------------ saved states

STATE = RowState(
    5,
    {s.past.name: empty(s, 1)[0] for s in CONTRACT.state()},
    "a" * 64,
)


@given(st.data())
def test_states(folder: Path, data: st.DataObject) -> None:
    """A state read with its checksum equals the saved one; without it, the state still has the contract's tensors."""
    path = folder / "state"
    STATE.save(path)
    path.write_bytes(data.draw(damaged_safetensors(path.read_bytes())))
    state = refused_or(lambda: RowState.load(path))
    if state is not None and "sha256" in safetensors_header(path.read_bytes()).get("__metadata__", {}):
        assert (state.length, state.identity) == (STATE.length, STATE.identity)
        assert {n: x.tobytes() for n, x in state.tensors.items()} == {n: x.tobytes() for n, x in STATE.tensors.items()}
    if state is None or refused_or(lambda: (state.check(CONTRACT, "a" * 64), True)[-1]) is None:
        return
    assert isinstance(state.length, int)
    assert state.length >= 0
    assert {n: (x.shape, x.dtype) for n, x in state.tensors.items()} == {
        n: (x.shape, x.dtype) for n, x in STATE.tensors.items()
    }


# ------------------------------------------------------------------ bundles


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A bundle whose files match the manifest; none of them is run."""
    path = folder / "bundle"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"graph")
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(save_arrays({"a": np.arange(6, dtype=np.float32)}))
    KERNELS.save(path / "kernels.safetensors")
    weights, kernels = path / "model.safetensors", path / "kernels.safetensors"
    manifest = Manifest(
        model={"name": "tiny", "class": "Tiny", "parameters": 6, "config": {}},
        settings={"policy": "h2o"},
        artifacts=(Artifact("ort", "model.onnx", sha256(path / "model.onnx"), CONTRACT, {"opset": 20}),),
        weights=(WeightFile(weights.name, weights.stat().st_size, header_sha256(weights), sha256(weights)),),
        tools={"torch": "2"},
        tokenizer=TokenizerFacts("tokenizer.json", sha256(path / "tokenizer.json"), 1, (2,), True, None),
        kernels=KernelFacts(kernels.name, sha256(kernels), kernels.stat().st_size, "exp", 3, 5, (0, 1)),
    )
    (path / MANIFEST).write_bytes(manifest.dump())
    Bundle.open(path, full=True)
    return path


@given(st.data(), st.booleans())
def test_files_of_a_bundle(bundle: Path, data: st.DataObject, full: bool) -> None:
    """Damage to any file is detected, except to the contents of weights, which only ``full`` reads."""
    file = bundle / data.draw(st.sampled_from(sorted(p.name for p in bundle.iterdir())))
    manifest, whole = Manifest.parse((bundle / MANIFEST).read_bytes(), "manifest"), file.read_bytes()
    damage = data.draw(damaged_bytes(whole))
    try:
        file.write_bytes(damage)
        opened = refused_or(lambda: Bundle.open(bundle, full=full))
    finally:
        file.write_bytes(whole)
    if opened is None:
        assert damage != whole
    elif damage != whole:
        assert opened.manifest == manifest
        if file.name != MANIFEST:  # the manifest's own hash ignores spaces between its values
            assert (file.name, full) == ("model.safetensors", False)
            header = 8 + struct.unpack("<Q", whole[:8])[0]
            assert (damage[:header], len(damage)) == (whole[:header], len(whole))


@given(st.data())
def test_manifests_that_were_signed_again(bundle: Path, data: st.DataObject) -> None:
    """Other values with a matching hash: a manifest that was edited or written by another program."""
    file = bundle / MANIFEST
    whole = file.read_bytes()
    values = {n: x for n, x in json.loads(whole).items() if n != "manifest_sha256"}
    changed = data.draw(damaged_json(values))
    try:
        file.write_text(json.dumps({**changed, "manifest_sha256": _digest(changed)}))
        opened = refused_or(lambda: Bundle.open(bundle, full=True))
    finally:
        file.write_bytes(whole)
    if opened is not None:
        for artifact in changed["artifacts"]:
            artifact["contract"] = {"position_limit": None, "trained_length": None, **artifact["contract"]}
            for layer in artifact["contract"]["layers"]:
                layer.setdefault("max_distance", None)
        assert json.loads(opened.manifest.dump())["artifacts"] == changed["artifacts"]
        assert len(opened.identity()) == 64
