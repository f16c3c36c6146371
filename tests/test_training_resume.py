"""Resuming a training whose finished work is damaged, in use, or of another model."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from less_export.bundle import files, temporary
from less_export.errors import LessExportError, UsageError
from less_export.less import feature_maps
from less_export.training import collect, end_to_end, fit, work

from .bundles import edit_json
from .test_training_resources import RecordedProgress
from .training_support import model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]

OPTIONS: dict[str, Any] = {"steps": 3, "layer_budgets": "auto", "end_to_end": True, "tune_steps": 3}


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Every step end to end is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "Tuning", functools.partial(end_to_end.Tuning, save=1, spread=8))
        yield


def interrupt_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    true, calls = getattr(module, name), []

    def instead(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return true(*args, **options)

    patch.setattr(module, name, instead)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The kernels of a training that nothing disturbs."""
    out, _ = trained(model_folder(tmp_path_factory.mktemp("whole") / "model"), text, **OPTIONS)
    return load_file(out)


def interrupted(text: Path, folder: Path, module: Any, name: str, call: int) -> Path:
    """A training that was interrupted at a call of a function; returns its folder, with the model beside it."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, module, name, call)
        with pytest.raises(KeyboardInterrupt):
            trained(model_folder(folder / "model"), text, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def while_fitting(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0 is finished; the activations are those of layer 1."""
    return interrupted(text, tmp_path_factory.mktemp("fitting"), fit, "fit", 2)


@pytest.fixture(scope="module")
def while_tuning(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layers are finished, and a step of the last stage."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        save, saved = work.save, []

        def save_and_stop(file: Path, data: bytes) -> None:
            save(file, data)
            saved.append(file.name)
            if saved.count("end_to_end.pt") == 2:
                raise KeyboardInterrupt

        patch.setattr(work, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            trained(model_folder(folder / "model"), text, **OPTIONS)
    return folder


def zeroed(content: bytes) -> bytes:
    """Some bytes in the last quarter are zero, as after a power cut."""
    begin = 3 * len(content) // 4
    found = next(i for i in range(begin, len(content)) if content[i])
    return content[:found] + bytes(len(content[found : found + 16])) + content[found + 16 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "cut": lambda c: c[: len(c) // 2],
    "last byte": lambda c: c[:-1],
    "zeroed": zeroed,
    "zeros": lambda c: bytes(len(c)),
    "no hash": lambda c: b"[]",
    "other": lambda c: b"x" * len(c),
}


def resumed(folder: Path, name: str, damage: Callable[[bytes], bytes] | None, text: Path) -> RecordedProgress:
    """Train again after a damage (None deletes the file); returns what was said."""
    (left,) = (p for p in folder.iterdir() if p.name.startswith(".model.safetensors."))
    (file,) = left.rglob(name)
    if damage is None:
        file.unlink()
    else:
        assert damage(file.read_bytes()) != file.read_bytes()
        file.write_bytes(damage(file.read_bytes()))
    progress = RecordedProgress()
    trained(folder / "model", text, **OPTIONS, progress=progress)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "model.safetensors", "model.safetensors.md"]
    said = [line for line in progress.lines if "is damaged: its work is done again" in line]
    assert said == ([f"{file} is damaged: its work is done again"] if damage and name != "collected.json" else [])
    return progress


def same(folder: Path, whole: dict[str, torch.Tensor]) -> bool:
    got = load_file(folder / "model.safetensors")
    return got.keys() == whole.keys() and all(torch.equal(x, whole[n]) for n, x in got.items())


@pytest.mark.parametrize("damage", [*DAMAGES, None])
@pytest.mark.parametrize("name", ["eviction_costs.json", "layer_0.safetensors"])
def test_damaged_while_layers_are_fitted(
    name: str, damage: str | None, while_fitting: Path, text: Path, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    folder = shutil.copytree(while_fitting, tmp_path / "copy")
    resumed(folder, name, DAMAGES.get(damage or ""), text)
    assert same(folder, whole)


@pytest.mark.parametrize("damage", [*DAMAGES, None])
@pytest.mark.parametrize("name", ["collected.json", "layer_1.bin", "hidden_1.bin"])
def test_damaged_activations_are_collected_again(
    name: str, damage: str | None, while_fitting: Path, text: Path, tmp_path: Path, whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = shutil.copytree(while_fitting, tmp_path / "copy")
    collected, true = [], collect.collect
    monkeypatch.setattr(collect, "collect", lambda *args: collected.append(args[3]) or true(*args))
    monkeypatch.setattr(work, "_report", lambda *_: None)
    (left,) = folder.glob(".model.safetensors.*")
    (file,) = left.rglob(name)
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(DAMAGES[damage](content))
    trained(folder / "model", text, **OPTIONS)
    assert collected == [1]
    assert same(folder, whole)


def test_whole_activations_are_not_collected_again(
    while_fitting: Path, text: Path, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(while_fitting, tmp_path / "copy")
    collected, true = [], collect.collect
    monkeypatch.setattr(collect, "collect", lambda *args: collected.append(args[3]) or true(*args))
    trained(folder / "model", text, **OPTIONS)
    assert collected == []
    assert same(folder, whole)


@pytest.mark.parametrize("damage", [*DAMAGES, None])
@pytest.mark.parametrize("name", ["end_to_end.pt", "layer_1.safetensors", "eviction_costs_with_kernels.json"])
def test_damaged_in_the_last_stage(
    name: str, damage: str | None, while_tuning: Path, text: Path, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    folder = shutil.copytree(while_tuning, tmp_path / "copy")
    resumed(folder, name, DAMAGES.get(damage or ""), text)
    assert same(folder, whole)


def test_a_layers_file_of_another_layer(while_tuning: Path, tmp_path: Path) -> None:
    (left,) = while_tuning.glob(".model.safetensors.*")
    assert work.load_layer(left / "layer_0.safetensors", 0) is not None
    assert work.load_layer(left / "layer_0.safetensors", 1) is None
    content = (left / "layer_0.safetensors").read_bytes()
    (tmp_path / "facts").write_bytes(content.replace(b'\\"used\\": true', b'\\"used\\": null'))
    assert (tmp_path / "facts").read_bytes() != content
    assert work.load_layer(tmp_path / "facts", 0) is None


@pytest.mark.parametrize("name", ["eviction_costs.json", "layer_0.safetensors", "collected.json"])
def test_a_file_that_cannot_be_read_is_named(name: str, while_fitting: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(while_fitting, tmp_path / "copy")
    (left,) = folder.glob(".model.safetensors.*")
    (file,) = left.rglob(name)
    file.unlink()
    file.mkdir()
    says = rf"cannot read {file} of an interrupted training \(Is a directory\): delete .* to train from the beginning"
    with pytest.raises(LessExportError, match=says):
        trained(folder / "model", text, **OPTIONS)
    shutil.rmtree(left)
    trained(folder / "model", text, **OPTIONS)


def test_work_of_another_model_is_not_used(while_tuning: Path, text: Path, tmp_path: Path) -> None:
    """Not even where only the configuration is another: the same weights compute something else."""
    folder = shutil.copytree(while_tuning, tmp_path / "copy")
    edit_json(folder / "model" / "config.json", rms_norm_eps=0.5)
    with pytest.warns(UserWarning, match="unfinished trainings"):
        trained(folder / "model", text, **OPTIONS)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copytree(folder / "model", fresh / "model")
    trained(fresh / "model", text, **OPTIONS)
    assert same(folder, load_file(fresh / "model.safetensors"))


_AT_WORK = """
import sys
from pathlib import Path
from less_export.training import work
with work.alone(Path(sys.argv[1])):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_two_trainings_at_once(while_tuning: Path, text: Path, tmp_path: Path, recwarn: Any) -> None:
    folder = shutil.copytree(while_tuning, tmp_path / "copy")
    (left,) = folder.glob(".model.safetensors.*")
    before = {p: p.read_bytes() for p in left.rglob("*") if p.is_file()}
    argv = [sys.executable, "-c", _AT_WORK, str(left)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        with pytest.raises(LessExportError, match=f"another training with the same options is at work in {left}: wait"):
            trained(folder / "model", text, **OPTIONS)
        assert {p: p.read_bytes() for p in left.rglob("*") if p.is_file()} == before
        trained(folder / "model", text, **OPTIONS, seed=1)
        assert not [w for w in recwarn if "unfinished" in str(w.message)], "that one is running"
        process.stdin.close()
    trained(folder / "model", text, **OPTIONS)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "model.safetensors", "model.safetensors.md"]


def test_a_folder_that_another_training_has_just_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = temporary.lock, []

    def late(handle: int, **options: bool) -> bool | None:
        if not calls:
            (tmp_path / "work").rmdir()
        calls.append(1)
        return lock(handle, **options)

    monkeypatch.setattr(temporary, "lock", late)
    with work.alone(tmp_path / "work"):
        assert (tmp_path / "work").is_dir()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "name",
    [
        "eviction_costs.json",
        "collected.json",
        "layer_1.safetensors",
        "eviction_costs_with_kernels.json",
        "end_to_end.pt",
    ],
)
def test_a_disk_that_is_full_while_work_is_saved(
    name: str, text: Path, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished before stays for the next run."""
    folder, write = model_folder(tmp_path / "model"), files.write_atomically

    def full(path: Path, data: bytes) -> None:
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(work, "write_atomically", full)
        patch.setattr(feature_maps, "write_atomically", full)
        with pytest.raises(LessExportError, match=r"cannot write .* or beside it: No space left"):
            trained(folder, text, **OPTIONS)
    fitted, true = [], fit.fit
    monkeypatch.setattr(fit, "fit", lambda *args: fitted.append(args[0].layer) or true(*args))
    trained(folder, text, **OPTIONS)
    assert len(fitted) == {"eviction_costs.json": 2, "collected.json": 2, "layer_1.safetensors": 1}.get(name, 0)
    assert same(tmp_path, whole)


def test_a_device_is_no_kernel_file(text: Path, tmp_path: Path) -> None:
    from less_export.training import job

    with pytest.raises(UsageError, match=r"--out /dev/full is a device or a pipe: give the name of a \.safetensors"):
        job.train(str(tmp_path), "/dev/full", [str(text)])


def test_costs_are_saved_as_they_were_measured(while_tuning: Path) -> None:
    (left,) = while_tuning.glob(".model.safetensors.*")
    costs, again = (
        json.loads(work.load(left / f"{name}.json") or b"")
        for name in ("eviction_costs", "eviction_costs_with_kernels")
    )
    assert {(i, slots) for i, slots, _ in costs} == {(i, slots) for i in (0, 1) for slots in (4, 8, 24)}
    assert {i for i, _, _ in again} == {0, 1}
    assert again != costs
