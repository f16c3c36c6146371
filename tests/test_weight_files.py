"""Files of a checkpoint: no export writes to them, replaces them, or confuses them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from less_export.bundle import files
from less_export.bundle.artifact import Bundle, Layout
from less_export.exporter import package
from less_export.progress import Spoken
from less_export.tensorrt import engine

from . import bundles
from .bundles import PROMPT, QUICK_OPTIONS, Run, generated, refused

pytest_plugins = ["tests.bundles"]

WEIGHTS = "model.safetensors"


def split(source: Path, folder: Path, *names: str) -> Path:
    """A copy of the checkpoint with its tensors in several files, which an index names."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / WEIGHTS)
    where = {key: names[i % len(names)] for i, key in enumerate(sorted(tensors))}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({k: t for k, t in tensors.items() if where[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def no_link(*_: object) -> None:
    """``os.link`` as if to another file system."""
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("a/model.safetensors", "b/model.safetensors"), ("model-2", "model")),
        (("kernels.safetensors",), ("kernels-2",)),
        (("converted.safetensors", "quantised.safetensors"), ("converted-2", "quantised-2")),
        (("a/m.safetensors", "b/m.safetensors", "c/m-2.safetensors"), ("m-2-2", "m-2", "m")),
        (("weights.st",), ("weights.st-2",)),
    ],
)
def test_names_that_are_taken(
    names: tuple[str, ...], called: tuple[str, ...], links: bool, run: Run, source: Path, plain: Path,
    kernelled: Path, kernel_file: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = split(source, tmp_path / "mine", *names)
    before = bundles.snapshot(folder)
    if not links:
        monkeypatch.setattr(files.os, "link", no_link)
    for out, arguments, same in (("plain", (), plain), ("with", ("--kernels", kernel_file), kernelled)):
        result = run(folder, "--out", tmp_path / out, *QUICK_OPTIONS, *arguments)
        assert result.code == 0, result.err
        assert bundles.snapshot(folder) == before
        manifest = Bundle.open(tmp_path / out, full=True).manifest
        assert {w.file for w in manifest.weights} == {f"{n}.safetensors" for n in called}
        assert generated(run, tmp_path / out, "--prompt", PROMPT) == generated(run, same, "--prompt", PROMPT)


def test_converted_weights_beside_a_file_of_that_name(tmp_path: Path) -> None:
    made, theirs = tmp_path / "converted.safetensors", tmp_path / "mine" / "converted.safetensors"
    for layout, prefix in ((Layout.of(tmp_path / "b"), ""), (Layout.of(tmp_path / "x.onnx"), "x.")):
        assert package.weight_names([made, theirs], layout, tmp_path) == {
            made: f"{prefix}converted.safetensors", theirs: f"{prefix}converted-2.safetensors",
        }  # fmt: skip


@pytest.mark.slow
def test_converted_weights_beside_a_single_graph(run: Run, source: Path, tmp_path: Path, quick: None) -> None:
    """They are renamed after the graph: x.converted.safetensors."""
    gguf = bundles.gguf_file(tmp_path / "m.gguf", source)
    result = run(gguf, "--out", tmp_path / "out" / "x.onnx", *QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "x.converted.safetensors").is_file()
    Bundle.open(tmp_path / "out" / "x.onnx", full=True)


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "{}/other/model.safetensors", "a/../../x.st"])
def test_an_index_stays_in_its_folder(outside: str, run: Run, source: Path, tmp_path: Path) -> None:
    bundles.copy(source, tmp_path / "other")
    folder = split(source, tmp_path / "mine", "part.safetensors")
    outside = outside.format(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    bundles.edit_json(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(index, outside))
    result = run(folder, "--out", tmp_path / "b", *QUICK_OPTIONS)
    refused(result, f"model.safetensors.index.json names {outside}, which is not in its folder")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).write_text(name)
    target = tmp_path / "target"
    assert files.link(tmp_path / "mine", target)
    for place in (files.link, files.copy):
        with pytest.raises(FileExistsError):
            place(tmp_path / "other", target)
        assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "other", "target"]


# ------------------------------------------------------------------ copies


def test_copies_are_announced(
    run: Run, source: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "link", no_link)
    said: list[str] = []
    copy = files.copy
    monkeypatch.setattr(package, "copy", lambda a, b: said.append("copied") or copy(a, b))
    names = {source / WEIGHTS: WEIGHTS}
    assert package.place_weights(names, tmp_path, Spoken(said.append)) == [WEIGHTS]
    assert said == ["copying 0.00 GB of weights, because hard links are not possible here", "copied"]


def test_copies_that_do_not_fit(
    run: Run, source: Path, nothing_left: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "link", no_link)
    usage = shutil.disk_usage(nothing_left)._replace(free=(source / WEIGHTS).stat().st_size - 1)
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: usage)
    result = run(source, "--out", nothing_left / "b", *QUICK_OPTIONS)
    refused(result, f"hard links to {source} are not possible", f"{nothing_left} has 0.0 GB free: make room", after=1)


def test_a_plan_keeps_no_copy(
    run: Run, source: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_plan(model: bytes, contract: object, out: Path, weights_dir: Path, **_: object) -> engine.PlanInfo:
        assert (weights_dir / f"x.{WEIGHTS}").read_bytes() == (source / WEIGHTS).read_bytes()
        out.write_bytes(b"ftrt" + model)
        return engine.PlanInfo("tensorrt", "10.3", None, 1, 0.0, 9, 1, None)

    monkeypatch.setattr(files.os, "link", no_link)
    monkeypatch.setattr(engine, "flavour", lambda: engine.Flavour("tensorrt", engine, "10.3"))
    monkeypatch.setattr(engine, "build_plan", build_plan)
    monkeypatch.setattr(package, "tools", lambda _: {})
    result = run(source, "--out", tmp_path / "x.plan", "--no-plugin", *QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert "copying 0.00 GB" in result.err
    assert "warning: hard links" not in result.err
    assert not list(tmp_path.glob("*.safetensors"))
