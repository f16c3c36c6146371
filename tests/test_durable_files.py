"""Files on a disk that may lose power at any moment, and what killed processes leave behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from less_export.bundle import files, temporary
from less_export.bundle.artifact import MANIFEST, Bundle
from less_export.interrupts import deferred

from . import bundles
from .bundles import QUICK_OPTIONS, Run

pytest_plugins = ["tests.bundles"]

# ------------------------------------------------------------------ what is on the disk before and after a rename


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk, in order: ("flush", path) and ("rename", the new path)."""
    seen: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def flushed(handle: int) -> None:
        seen.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(old: str | Path, new: str | Path) -> None:
        inner = [p for p in Path(old).rglob("*") if p.is_file()] if Path(old).is_dir() else [Path(old)]
        seen.extend(("missing", str(p)) for p in inner if ("flush", str(p)) not in seen)
        seen.append(("rename", str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


def write(folder: Path) -> Path:
    files.write_atomically(folder / "file", b"x")
    return folder / "file"


def copy(folder: Path) -> Path:
    (folder / "source").write_bytes(b"x")
    files.copy(folder / "source", folder / "file")
    return folder / "file"


def publish_folder(folder: Path) -> Path:
    with files.scratch_folder(folder / "b") as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_bytes(b"x")
        files.publish([(scratch, folder / "b")])
    return folder / "b" / "deep" / "file"


def publish_files(folder: Path) -> Path:
    with files.scratch_folder(folder / "x.onnx") as scratch:
        for name in ("file", "x.json"):
            (scratch / name).write_bytes(b"x")
        files.publish([(scratch / n, folder / n) for n in ("file", "x.json")])
    return folder / "file"


@pytest.mark.parametrize("make", [write, copy, publish_folder, publish_files])
def test_files_are_on_the_disk_before_they_are_renamed(
    make: Callable[[Path], Path], tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    assert make(tmp_path).read_bytes() == b"x"
    assert not [path for what, path in events if what == "missing"]
    last = max(i for i, (what, _) in enumerate(events) if what == "rename")
    assert ("flush", str(tmp_path)) in events[last + 1 :], "the folder's new names"


def test_a_whole_export_is_on_the_disk(
    run: Run, source: Path, quick: None, tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    out = tmp_path / "b"
    assert run(source, "--out", out, *QUICK_OPTIONS).code == 0
    assert not [path for what, path in events if what == "missing"]
    assert events[-1] == ("flush", str(tmp_path))
    assert [path for what, path in events if what == "rename"][-1] == str(out)


def test_a_disk_that_fails_while_flushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def fail(number: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.write_atomically(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))  # a file system that cannot
    files.write_atomically(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"


# ------------------------------------------------------------------ devices, pipes and links


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.refuse_unwritable(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    files.write_atomically(pipe, b"figures")
    reader.join()
    assert read == [b"figures"]
    assert pipe.is_fifo()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(full, b"x" * 100)
    assert full.is_char_device()


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/file")
    for content in (b"new", b"again"):
        files.write_atomically(link, content)
        assert link.is_symlink()
        assert (tmp_path / "folder" / "file").read_bytes() == content
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "link"]


# ------------------------------------------------------------------ processes that were killed

_WORK = """
import sys, time
from pathlib import Path
from less_export.bundle import files, temporary
with {context} as path:
    print(path, flush=True)
    time.sleep(600)
"""


@contextmanager
def at_work(context: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has entered a context, and the path that it works on."""
    argv = [sys.executable, "-c", _WORK.format(context=context)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["files.scratch_folder", "temporary.file"])
def test_what_a_killed_process_left_is_removed(name: str, tmp_path: Path) -> None:
    for other in (".b.settings", ".b.XXXXXXXX", ".bb.less-export-abcdefgh"):
        (tmp_path / other).mkdir()
    (tmp_path / ".b.less-export-notes").write_text("mine")
    theirs = set(tmp_path.iterdir())
    context = f"{name}(Path({str(tmp_path / 'b')!r}))"
    with at_work(context) as (killed, left), at_work(context) as (_, living):
        assert set(tmp_path.iterdir()) == {*theirs, left, living}
        if left.is_dir():
            (left / "big").write_text("x")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with files.scratch_folder(tmp_path / "b") as scratch:
            assert set(tmp_path.iterdir()) == {*theirs, living, scratch}
    files.write_atomically(tmp_path / "b", b"x")
    assert set(tmp_path.iterdir()) == {*theirs, tmp_path / "b"}


def test_what_was_removed_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = temporary.lock, []

    def late(handle: int, **options: bool) -> bool | None:
        if not removed:  # another process has found the folder before this one has locked it
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        return lock(handle, **options)

    monkeypatch.setattr(temporary, "lock", late)
    with files.scratch_folder(tmp_path / "b") as scratch:
        assert scratch.is_dir()
        assert scratch not in removed


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".b.less-export-abcdefgh").mkdir()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.scratch_folder(tmp_path / "b"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".b.less-export-abcdefgh"]


_PUBLISH = """
import os, sys
from pathlib import Path
from less_export.bundle import files
folder, left, rename = Path(sys.argv[1]), int(sys.argv[2]), os.replace
def killed(old, new):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    rename(old, new)
os.replace = killed
files.publish([(folder / "new" / n, folder / n) for n in sys.argv[3:]], [folder / "stale"])
"""


@pytest.mark.parametrize("moved", [("graph", "manifest"), ("manifest",)])
def test_killed_between_two_renames(moved: tuple[str, ...], tmp_path: Path) -> None:
    """Either all old files come back, or all new ones are there."""
    names = (*moved, "stale")
    for call in range(1, 20):
        folder = tmp_path / str(call)
        (folder / "new").mkdir(parents=True)
        for name in names:
            (folder / name).write_text("old")
            (folder / "new" / name).write_text("new")
        done = subprocess.run([sys.executable, "-c", _PUBLISH, str(folder), str(call), *moved])
        files.put_back(folder / "manifest")
        left = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
        if done.returncode == 0:
            assert left == dict.fromkeys(moved, "new")
            break
        assert left == dict.fromkeys(names, "old")
        assert {p.name for p in folder.iterdir()} == {*names, "new"}
    assert call == 2 * len(moved) + 2


def test_an_export_puts_back_what_a_killed_one_had_set_aside(
    run: Run, source: Path, plain: Path, quick: None, tmp_path: Path
) -> None:
    """The old bundle of a folder in use, then the folder itself: they must not be taken for others' files."""
    out = bundles.copy(plain, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    aside = out / f".{MANIFEST}.replaced-abcdefgh"
    aside.mkdir()
    for name in (MANIFEST, "model.onnx"):
        os.replace(out / name, aside / name)
    assert run(source, "--out", out, *QUICK_OPTIONS, "--target", "trt").code == 0
    Bundle.open(out, full=True)
    assert sorted(p.name for p in out.iterdir()) == [
        MANIFEST, "model.safetensors", "model.trt.onnx", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    aside = tmp_path / ".out.replaced-abcdefgh"
    aside.mkdir()
    os.replace(out, aside / "out")
    assert run(source, "--out", out, *QUICK_OPTIONS, "--budget", "none").code == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    Bundle.open(out, full=True)


@pytest.mark.slow
def test_the_next_export_removes_what_a_killed_one_left(run: Run, source: Path, quick: None, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "less_export.cli.main", str(source), "--out", str(tmp_path / "b"), *QUICK_OPTIONS]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        assert any("tracing" in line for line in process.stderr)
        process.kill()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".b.less-export-")
    assert run(source, "--out", tmp_path / "b", *QUICK_OPTIONS).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# ------------------------------------------------------------------ interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_a_step(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def step() -> None:
        with deferred(), deferred():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            done.append(True)

    before, done = signal.signal(number, interrupt), list[bool]()
    try:
        with pytest.raises(KeyboardInterrupt):
            step()
        assert done == [True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with pytest.raises(ValueError, match="own"), deferred():
            raise ValueError("own")
    finally:
        signal.signal(number, before)


def test_an_interrupt_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are renamed, then it takes effect."""
    (tmp_path / "new").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
        (tmp_path / "new" / name).write_text("new")
    rename = os.replace

    def interrupted(old: Path, new: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        rename(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.publish([(tmp_path / "new" / n, tmp_path / n) for n in ("a", "b")])
    assert [(tmp_path / n).read_text() for n in ("a", "b")] == ["new", "new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "new"]


def test_an_interrupt_stops_hashing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        files.sha256(tmp_path / "file", stop)
