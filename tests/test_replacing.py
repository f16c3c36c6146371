"""Exports into a folder that is in use: what the old manifest lists is replaced, everything else stays as it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from less_export.bundle import files
from less_export.bundle.artifact import MANIFEST, Bundle, Layout, foreign_files

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused
from .test_mid_export import fails_at, stopped

pytest_plugins = ["tests.bundles"]

#: What users save into a bundle's folder.
THEIRS = ("prefix.safetensors", "my-kernels.safetensors", "kernels.safetensors", "notes.txt", "states/row.safetensors")


@pytest.fixture
def used(place: Path) -> Path:
    """A bundle folder into which a user has put files; the export did not write kernels."""
    for name in THEIRS:
        file = place / "out" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"the user's {name}")
    return place / "out"


def theirs(folder: Path) -> dict[str, str]:
    return {n: (folder / n).read_text() for n in THEIRS}


def test_what_the_user_saved_stays(used: Path, run: Run, source: Path, quick: None) -> None:
    before, state = theirs(used), (used / "states").stat()
    result = run(source, "--out", used, *QUICK_OPTIONS, "--target", "trt")
    assert result.code == 0, result.err
    assert theirs(used) == before
    assert (used / "states").stat().st_ino == state.st_ino
    bundle = Bundle.open(used, full=True)
    assert sorted(bundle.manifest.files()) == ["model.safetensors", "model.trt.onnx", "tokenizer.json"]
    assert not (used / "model.onnx").exists(), "the old bundle's graph"
    names = {*bundle.manifest.files(), MANIFEST, *(n.split("/")[0] for n in THEIRS)}
    assert {p.name for p in used.iterdir()} == names
    assert [p.name for p in used.parent.iterdir()] == ["out"]


def test_files_in_the_way(used: Path, run: Run, source: Path, kernel_file: Path, quick: None) -> None:
    """A name that is taken by the user's own file: refused before the work, or another name for weights."""
    before = bundles.snapshot(used)
    refused(
        run(source, "--out", used, *QUICK_OPTIONS, "--kernels", kernel_file), "would replace", "kernels.safetensors"
    )
    (used / "model.trt.onnx").write_text("mine")
    refused(run(source, "--out", used, *QUICK_OPTIONS, "--target", "both"), "would replace", "model.trt.onnx")
    (used / "model.trt.onnx").unlink()
    assert bundles.snapshot(used) == before
    (used / "quantised.safetensors").write_text("mine")
    result = run(source, "--out", used, *QUICK_OPTIONS, "--weights", "int8")
    assert result.err.splitlines()[-1].startswith("less-export: error: the export would replace")
    assert (used / "quantised.safetensors").read_text() == "mine"
    (used / "quantised.safetensors").unlink()
    assert bundles.snapshot(used) == before


def test_weights_of_the_user(place: Path, run: Run, source: Path, quick: None) -> None:
    """A bundle with quantised weights, beside which the user put a model.safetensors of his own."""
    out = place / "new"
    assert run(source, "--out", out, *QUICK_OPTIONS, "--weights", "int8").code == 0
    (out / "model.safetensors").write_text("mine")
    assert run(source, "--out", out, *QUICK_OPTIONS).code == 0
    assert (out / "model.safetensors").read_text() == "mine"
    assert [w.file for w in Bundle.open(out, full=True).manifest.weights] == ["model-2.safetensors"]
    assert not (out / "quantised.safetensors").exists()


def test_every_rename_may_fail(
    used: Path, run: Run, source: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the old bundle and the user's files are as they were."""
    before = bundles.snapshot(used.parent)
    for call in range(1, 30):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", fails_at(os.replace, call))
            result = run(source, "--out", used, *QUICK_OPTIONS, "--target", "trt")
        if result.code == 0:
            break
        stopped(result, f"cannot write {used}: No space left on device")
        assert bundles.snapshot(used.parent) == before
    assert call > 8
    Bundle.open(used, full=True)


def test_companions_of_another_file(place: Path, run: Run, source: Path, quick: None) -> None:
    """``x.tokenizer.json`` that no manifest lists is not an export's to replace."""
    (place / "x.tokenizer.json").write_text("mine")
    refused(run(source, "--out", place / "x.onnx", *QUICK_OPTIONS), "would replace", "x.tokenizer.json")
    assert (place / "x.tokenizer.json").read_text() == "mine"
    (place / "x.tokenizer.json").unlink()
    for _ in range(2):
        assert run(source, "--out", place / "x.onnx", *QUICK_OPTIONS).code == 0


def test_a_manifest_that_cannot_be_read(place: Path, run: Run, source: Path, quick: None) -> None:
    """It lists the fixed names; weights under names of their own stay."""
    out = place / "out"
    (out / MANIFEST).write_text('{"manifest_sha256": ')
    (out / "prefix.safetensors").write_text("mine")
    assert foreign_files(Layout.of(out)) == ["model.safetensors", "prefix.safetensors"]
    assert run(source, "--out", out, *QUICK_OPTIONS).code == 0
    assert (out / "prefix.safetensors").read_text() == "mine"
    Bundle.open(out, full=True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_bundles_have_the_permissions_that_the_umask_allows(
    umask: int, place: Path, run: Run, source: Path, kernel_file: Path, quick: None
) -> None:
    """Of files that are copied, written and renamed; links have the checkpoint's."""
    before = os.umask(umask)
    try:
        arguments = (*QUICK_OPTIONS, "--kernels", kernel_file)
        for out in ("new", "x.onnx"):
            assert run(source, "--out", place / out, *arguments, "--weights", "int8").code == 0
        (place / "new" / "mine").mkdir()
        assert run(source, "--out", place / "new", *arguments, "--weights", "int8").code == 0  # file by file
    finally:
        os.umask(before)
    created = [place / "new", *(place / "new").iterdir(), *place.glob("x.*")]
    assert len(created) == 12
    for path in created:
        if path.name != "mine":
            wanted = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
