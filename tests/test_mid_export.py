"""Failures during an export: full disks, failing renames, interrupts; and source files that stay unchanged."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import MixtralConfig, MixtralForCausalLM

from less_export.bundle import files
from less_export.bundle.artifact import MANIFEST, Bundle
from less_export.cli.ending import INTERRUPTED
from less_export.errors import LessExportError
from less_export.exporter import build
from less_export.hf import checkpoint
from less_export.less import feature_maps

from . import bundles
from .bundles import QUICK_OPTIONS, Result, Run

pytest_plugins = ["tests.bundles"]

WEIGHTS = "model.safetensors"


def full_disk(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_at(function: Callable[..., Any], call: int = 1, name: str = "") -> Callable[..., Any]:
    """``function``, whose given call fails with a full disk; calls count if their first argument contains ``name``."""
    left = [call]

    def instead(first: Any, *rest: Any, **options: Any) -> Any:
        left[0] -= name in str(first)
        return full_disk() if left[0] == 0 and name in str(first) else function(first, *rest, **options)

    return instead


def stopped(result: Result, says: str, code: int = 1) -> None:
    """Assert that the export failed with exactly one error line, the last."""
    *before, last = result.err.splitlines()
    assert result.code == code
    assert last.startswith(f"less-export: error: {says}"), result.err
    assert last.endswith("nothing was left behind")
    assert all(line.startswith("less-export: ") and "error" not in line for line in before), result.err
    assert result.out == ""


DISKS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "graph": lambda m: m.setattr(build.ir, "save", full_disk),
    "kernels": lambda m: m.setattr(feature_maps, "write_atomically", full_disk),
    "second graph": lambda m: m.setattr(build.ir, "save", fails_at(build.ir.save, 2)),
    "tokenizer": lambda m: m.setattr(Path, "write_text", fails_at(Path.write_text, name="tokenizer.json")),
    "manifest": lambda m: m.setattr(Path, "write_bytes", fails_at(Path.write_bytes, name=MANIFEST)),
    "first folder": lambda m: m.setattr(files.tempfile, "mkdtemp", full_disk),
    "second folder": lambda m: m.setattr(files.tempfile, "mkdtemp", second_folder()),
    "copy": lambda m: (m.setattr(files.os, "link", full_disk), m.setattr(files.shutil, "copyfile", full_disk)),
}


def second_folder() -> Callable[..., Any]:
    results: list[str] = []
    original = files.tempfile.mkdtemp

    def mkdtemp(**options: Any) -> str:
        results.append(full_disk() if results else original(**options))
        return results[-1]

    return mkdtemp


@pytest.mark.parametrize("where", DISKS)
def test_full_disk(
    where: str, run: Run, source: Path, kernel_file: Path, kernelled: Path, place: Path, quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = bundles.snapshot(place)
    for out in ("out", "new", "deep/er/new"):
        with monkeypatch.context() as patch:
            DISKS[where](patch)
            result = run(source, "--out", place / out, *QUICK_OPTIONS, "--kernels", kernel_file, "--target", "both")
        stopped(result, f"cannot write {place / out}: No space left on device")
        assert bundles.snapshot(place) == before


@pytest.mark.parametrize("out", ["out", "new", "x.onnx", "y.onnx"])
def test_every_rename_may_fail(
    out: str, run: Run, source: Path, single: Path, place: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Existing ``out`` and x.onnx are restored, whichever rename fails; new ones leave nothing."""
    for file in single.parent.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    before = bundles.snapshot(place)
    arguments = (*QUICK_OPTIONS, "--policy", "full", "--context", "32", "--num-hidden-layers", "1")
    for call in range(1, 20):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", fails_at(os.replace, call))
            result = run(source, "--out", place / out, *arguments)
        if result.code == 0:
            break
        stopped(result, f"cannot write {place / out}: No space left on device")
        assert bundles.snapshot(place) == before
    assert call - 1 == {"out": 2, "new": 1, "x.onnx": 8, "y.onnx": 4}[out]
    assert Bundle.open(place / out, full=True).manifest.settings["policy"] == "full"
    assert not [n for n in bundles.snapshot(place) if Path(n).name.startswith(".")]


def test_renaming_back_may_fail_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replaced files then stay in their temporary place: they are the only copy."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    original, final = os.replace, tmp_path / "old"
    monkeypatch.setattr(files.os, "replace", lambda a, b: full_disk() if b == final else original(a, b))
    with pytest.raises(OSError, match="No space"):
        files.publish([(tmp_path / "new", final)])
    assert [p.read_text() for p in tmp_path.glob(".old.replaced-*/old/what")] == ["old"]


def test_converted_weights_on_a_full_disk(
    tmp_path: Path, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has its own exception for a write that fails."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")

    def save_file(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    before = bundles.snapshot(place)
    stopped(
        run(tmp_path / "mixtral", "--out", place / "out", *QUICK_OPTIONS), f"cannot write {place / 'out'}: I/O error"
    )
    assert bundles.snapshot(place) == before


# ------------------------------------------------------------------ interrupts


def interrupt(*_: object) -> Any:
    raise KeyboardInterrupt


def terminate(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    raise AssertionError("SIGTERM changed nothing")


@pytest.mark.parametrize("how", [interrupt, terminate])
@pytest.mark.parametrize("where", ["graphs.trace", "build.resolve", "build.package.place_tokenizer"])
def test_interrupted(
    how: Callable[..., Any], where: str, run: Run, source: Path, place: Path, quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"less_export.exporter.{where}", how)
    before = bundles.snapshot(place)
    for out in ("out", "new", "x.onnx"):
        stopped(run(source, "--out", place / out, *QUICK_OPTIONS), "interrupted", INTERRUPTED)
        assert bundles.snapshot(place) == before


@pytest.mark.slow
def test_control_c_while_tracing(source: Path, place: Path) -> None:
    """A real process and a real signal."""
    before = bundles.snapshot(place)
    arguments = [sys.executable, "-m", "less_export.cli.main", str(source), "--out", str(place / "out"), *QUICK_OPTIONS]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "tracing" in line:
                break
        time.sleep(0.3)
        assert [p for p in place.iterdir() if p.name.startswith(".out.")], "it is at work"
        process.send_signal(signal.SIGINT)
        seen.append(process.stderr.read())
        out = process.stdout.read()
    stopped(Result(process.returncode, out, "".join(seen)), "interrupted", INTERRUPTED)
    assert bundles.snapshot(place) == before


# ------------------------------------------------------------------ the source is only lent


def test_source_is_not_touched(run: Run, source: Path, place: Path, tmp_path: Path, quick: None) -> None:
    """A read-only checkpoint is unchanged: links point to its weights, and nothing is written there."""
    lent = bundles.copy(source, tmp_path / "lent")
    for file in lent.iterdir():
        file.chmod(0o444)
    lent.chmod(0o555)

    def facts() -> list[tuple[str, int, int, int]]:
        return [(p.name, p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_size) for p in (lent, *lent.iterdir())]

    before, contents = facts(), bundles.snapshot(lent)
    for _ in range(2):  # the second replaces the first
        assert run(lent, "--out", place / "out", *QUICK_OPTIONS).code == 0
        assert os.path.samefile(lent / WEIGHTS, place / "out" / WEIGHTS)
    assert facts() == before
    assert bundles.snapshot(lent) == contents
    lent.chmod(0o755)


def test_links_are_impossible(
    run: Run, source: Path, place: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(files.os, "link", link)
    result = run(source, "--out", place / "new", *QUICK_OPTIONS)
    assert result.code == 0
    assert f"less-export: warning: hard links are not possible here: copied {WEIGHTS}\n" in result.err
    copied = place / "new" / WEIGHTS
    assert not os.path.samefile(source / WEIGHTS, copied)
    assert copied.read_bytes() == (source / WEIGHTS).read_bytes()
    assert run("check", place / "new", "--full").code == 0


def test_links_of_a_hub_snapshot_are_followed(run: Run, source: Path, tmp_path: Path, quick: None) -> None:
    """A snapshot's files are links into a store of blobs; a bundle that linked to links would leave its folder."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    bundles.copy(source, blobs)
    for index, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(f"../blobs/{index}")
        file.rename(blobs / str(index))
    assert run(snapshot, "--out", tmp_path / "new", *QUICK_OPTIONS).code == 0
    linked = tmp_path / "new" / WEIGHTS
    assert not linked.is_symlink()
    assert os.path.samefile(linked, snapshot / WEIGHTS)
    assert run("check", tmp_path / "new", "--tokens", "20").code == 0


def test_errors_are_one_family() -> None:
    from less_export import errors

    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(own) >= 9
    assert all(issubclass(e, LessExportError) for e in own)
