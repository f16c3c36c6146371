"""Bundles whose slots are int8: exported, checked, run and saved."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export import open_bundle
from less_export.bundle.artifact import Bundle
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.less.int8 import Centring
from less_export.runtime.row_state import RowState

from . import bundles
from .sharing import once

pytest_plugins = ["tests.bundles"]


def kernel_file(path: Path, std: float = 0.7) -> Path:
    """Random kernels, and constants far from 0 and 1; half of the channels have ``std``."""
    heads = bundles.HEADS[0]
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(heads.kv_heads, heads.head_dim, generator=generator)
    stds = torch.full_like(mean, 0.5)
    stds[:, ::2] = std  # the scale of a token cancels a common factor
    centring = Centring(mean, stds)
    maps = random_kernels(bundles.HEADS, [0, 1], 3, 6)
    copies = {i: Centring(*(x.clone() for x in centring)) for i in range(2)}
    Kernels(maps.layers, maps.provenance, copies).save(path)
    return path


@pytest.fixture(scope="module")
def bundle(source: Path, shared: Path) -> Path:
    """With kernels and centring, self-checked by the export."""
    file = once(shared / "int8.safetensors", kernel_file)
    return once(shared / "int8", lambda out: bundles.bundle(source, out, slots="int8", kernels=file, validate=True))


def logits(path: Path, backend: str, count: int = 60, chunk: int = 7) -> np.ndarray:
    """Logits of every step of a sequence that evicts."""
    engine = open_bundle(path, backend=backend).backend
    ids = np.random.default_rng(0).integers(2, 300, count)
    engine.open(1)
    steps = [ids[i : i + chunk] for i in range(0, count, chunk)]
    return np.concatenate([engine.step(s[None], np.array([len(s)], np.int32))[:, 0] for s in steps])


def test_backends_agree(bundle: Path) -> None:
    mine, theirs = logits(bundle, "ort"), logits(bundle, "torch")
    assert np.abs(mine - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_the_constants_are_those_of_the_kernel_file(bundle: Path, source: Path, shared: Path) -> None:
    """Other constants give other roundings, and both backends read them from the bundle."""
    file = once(shared / "int8_wide.safetensors", lambda path: kernel_file(path, std=40.0))
    other = once(shared / "int8_wide", lambda out: bundles.bundle(source, out, slots="int8", kernels=file))
    a, b = logits(bundle, "ort"), logits(other, "ort")
    unit = np.abs(a).max()
    assert np.abs(a[0] - b[0]).max() < 2e-5 * unit  # nothing has been rounded yet
    assert np.abs(a[1:] - b[1:]).max(-1).min() > 2e-5 * unit


def test_check_passes(run: bundles.Run, bundle: Path) -> None:
    """Of a state of 16 bits the means are compared."""
    result = run("check", bundle)
    assert result.code == 0, result.out
    assert result.out.startswith("passed: ")
    assert "low-rank term off" not in result.out


def test_a_state_of_32_bits(bundle: Path, source: Path, shared: Path) -> None:
    """Its state takes more bytes, and what it computes differs by roundings alone."""
    file = once(shared / "int8.safetensors", kernel_file)
    other = once(shared / "int8_32", lambda out: bundles.bundle(source, out, slots="int8", state=32, kernels=file))
    small, large = (Bundle.open(b).manifest.artifacts[0].contract for b in (bundle, other))
    assert [s.state_bits for s in small.layers] == [16, 16]
    assert large == small.with_state(32)
    assert large.state_bytes() > small.state_bytes()
    a, b = logits(bundle, "ort"), logits(other, "ort")
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(b).max()


def test_int8_stays_close_to_the_compute_dtype(bundle: Path, kernelled: Path) -> None:
    """Both have the same kernels; only slots differ."""
    a, b = logits(bundle, "ort", 12, 4), logits(kernelled, "ort", 12, 4)
    assert 0 < np.abs(a[1:] - b[1:]).max() < 0.05 * np.abs(b).max()


def test_state_of_the_bundle(bundle: Path) -> None:
    contract = Bundle.open(bundle).manifest.artifacts[0].contract
    names = {s.past.name.split(".")[-1]: (s.dtype, s.row_shape) for s in contract.state()}
    slots = contract.layers[0].capacity
    assert names["key"] == names["value"] == ("int8", (2, slots, 8))
    assert names["key_scale"] == names["value_scale"] == ("float32", (2, slots))


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_a_saved_row_continues_elsewhere(name: str, bundle: Path, tmp_path: Path) -> None:
    """Prefilled on ONNX Runtime, saved, and continued in another row of another session."""
    ids, new = np.random.default_rng(1).integers(2, 300, (1, 16)), np.array([16], np.int32)
    first = open_bundle(bundle, backend="ort").backend
    first.open(1)
    first.step(ids, new)
    first.read_row(0).save(tmp_path / "row")
    second = open_bundle(bundle, backend=name).backend
    second.open(2)
    second.write_row(1, RowState.load(tmp_path / "row"))
    want = first.step(ids[:, :4], np.array([4], np.int32))
    got = second.step(ids[[0, 0], :4], np.array([0, 4], np.int32))
    assert np.abs(got[1] - want[0]).max() < 2e-5 * np.abs(want).max()


def test_without_constants(tmp_path: Path) -> None:
    """Without a tokenizer nothing can be measured; keys are rounded as they are: mean 0, std 1."""
    model = bundles.checkpoint(tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="int8 slots are not calibrated, which costs quality: the model has no token"):
        out = bundles.bundle(model, tmp_path / "b", slots="int8")
    assert not (out / "kernels.safetensors").exists()
    mine, theirs = logits(out, "ort"), logits(out, "torch")
    assert np.abs(mine - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_a_file_of_constants_alone_is_named(source: Path, tmp_path: Path, run: bundles.Run) -> None:
    file = tmp_path / "constants.safetensors"
    Kernels({}, {}, Kernels.load(kernel_file(tmp_path / "k.safetensors")).centring).save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = bundles.bundle(source, tmp_path / "b", slots="int8", kernels=file)
    shown = run("info", out)
    assert shown.code == 0
    assert "constants of int8 slots" in shown.out
