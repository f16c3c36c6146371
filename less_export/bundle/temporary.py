"""Hidden files and folders beside what they become, each locked while the process that made it works on it.

A process that is killed leaves them behind, unlocked. The next one that makes some for the same name finds them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import interrupts

#: Begin of the last part of a name: ``.NAME.less-export-XXXXXXXX``.
_MARK = "less-export-"


@contextlib.contextmanager
def folder(beside: Path) -> Iterator[Path]:
    """An empty folder next to ``beside`` (same file system, so that renames work); it is removed at the end."""
    with _until_the_end(beside, lambda: make_folder(beside)) as path:
        yield path


@contextlib.contextmanager
def file(beside: Path) -> Iterator[Path]:
    """An empty file next to ``beside``, which is removed at the end unless it has been renamed."""
    with _until_the_end(beside, lambda: _locked(lambda: _empty_file(beside))) as path:
        yield path


@contextlib.contextmanager
def _until_the_end(beside: Path, make: Callable[[], tuple[Path, int]]) -> Iterator[Path]:
    """What ``make`` makes and locks; it is removed before its lock is given up."""
    remove_abandoned(beside)
    path, lock = None, None
    try:
        with interrupts.deferred():
            path, lock = make()
        yield path
    finally:
        with interrupts.deferred():
            if path is not None:
                _remove(path)
            if lock is not None:
                os.close(lock)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def make_folder(beside: Path, mark: str = _MARK) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it until it is closed."""
    return _locked(lambda: tempfile.mkdtemp(prefix=f".{beside.name}.{mark}", dir=beside.parent))


def _empty_file(beside: Path) -> str:
    handle, name = tempfile.mkstemp(prefix=f".{beside.name}.{_MARK}", dir=beside.parent)
    os.close(handle)
    return name


def _locked(make: Callable[[], str]) -> tuple[Path, int]:
    """What ``make`` makes, locked. Another process may have removed it before it was locked: then it is made again."""
    while True:
        path = Path(make())
        handle = os.open(path, os.O_RDONLY)
        lock(handle, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return path, handle
        os.close(handle)


def lock(handle: int, *, wait: bool = False, alone: bool = False) -> bool | None:
    """Lock an open file or folder for as long as the descriptor is open; any number of holders, unless ``alone``.

    Returns:
        Whether it was locked; None where the system or the file system has no locks.
    """
    try:
        import fcntl  # not on every system that runs ONNX Runtime

        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def abandoned(beside: Path, mark: str = _MARK) -> Iterator[Path]:
    """What killed processes left next to ``beside``; locked while the caller looks at it."""
    pattern = re.compile(re.escape(f".{beside.name}.{mark}") + "[a-z0-9_]{8}")
    try:
        paths = [p for p in beside.parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:
        return
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone, another user's, or a link
            continue
        try:
            if lock(handle, alone=True):
                yield path
        finally:
            os.close(handle)


def remove_abandoned(beside: Path) -> None:
    """Remove what killed processes left next to ``beside``, as far as that is possible."""
    for path in abandoned(beside):
        _remove(path)
