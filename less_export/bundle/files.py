"""Files that are whole or absent, even after a power cut: renames, links and hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .. import interrupts
from ..errors import UsageError
from . import temporary

#: Begin of the last part of the names of folders with replaced files: ``.NAME.replaced-XXXXXXXX``.
_REPLACED = "replaced-"
_umask_lock = threading.Lock()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and rename it: the file is whole or as it was before.

    What a link points to is replaced, not the link. A device or pipe is written to.
    """
    target = Path(os.path.realpath(path))
    if is_special(Path(path)):
        with open(path, "wb") as file:
            file.write(data)
        return
    with temporary.file(target) as part:
        part.write_bytes(data)
        apply_umask(part)
        replace(part, target)


def is_special(path: Path) -> bool:
    """Whether ``path`` is there and neither a file nor a folder: a device or pipe, which cannot be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def replace(finished: Path, final: Path) -> None:
    """Rename a finished file, so that even after a power cut ``final`` is it or what was there before."""
    flush(finished)
    os.replace(finished, final)
    _flush_folder(final.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a folder and all that is in it, is on the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    for inner in path.iterdir() if path.is_dir() else ():
        flush(inner)
    if path.is_dir():
        _flush_folder(path)
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def _flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def apply_umask(path: str | Path) -> None:
    """Give a file or folder created by ``tempfile`` or safetensors the permissions that the umask allows."""
    with _umask_lock:
        umask = os.umask(0o077)  # the only way to read it is to set it
        os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


def refuse_unwritable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose results it is for.

    Raises:
        UsageError: it is a folder, or its folder is missing or not writable.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if is_special(path):
            return
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder next to ``beside`` (same file system, so that renames work), removed at the end.

    Parent folders created for it are removed too if they are still empty. What killed processes left there is removed.
    """
    created = [p for p in beside.parents if not p.exists()]
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with temporary.folder(beside) as folder:
            yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def publish(moves: Sequence[tuple[Path, Path]], removed: Iterable[Path] = ()) -> None:
    """Rename every (finished, final) and delete ``removed``; if a rename fails, the previous files are restored.

    All final names are in one folder. The last one shows whether all others are there: it goes first and comes last.
    Replaced files are kept in a hidden folder there until the end, for :func:`put_back`.
    """
    for finished, _ in moves:
        flush(finished)
    with interrupts.deferred():
        _rename(moves, list(removed))
    _flush_folder(moves[-1][1].parent)


def _rename(moves: Sequence[tuple[Path, Path]], removed: Sequence[Path]) -> None:
    last = moves[-1][1]
    aside, lock = temporary.make_folder(last, _REPLACED)
    try:
        for final in (last, *(final for _, final in moves[:-1]), *removed):
            if final.exists():
                os.replace(final, aside / final.name)
        for finished, final in moves:
            os.replace(finished, final)
    except BaseException:
        for finished, final in moves:
            if not finished.exists():
                os.replace(final, finished)
        _return(aside, last)
        raise
    finally:
        os.close(lock)
    shutil.rmtree(aside, ignore_errors=True)


def put_back(last: Path) -> None:
    """Put back what a process had set aside when it was killed in :func:`publish`.

    last: the last final name of its moves. If it is there, everything had been renamed.

    Raises:
        OSError: a file cannot be renamed.
    """
    for aside in temporary.abandoned(last, _REPLACED):
        if last.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _return(aside, last)


def _return(aside: Path, last: Path) -> None:
    for path in sorted(aside.iterdir(), key=lambda p: p.name == last.name):
        os.replace(path, last.parent / path.name)
    aside.rmdir()


def link(source: Path, target: Path) -> bool:
    """Hard-link the file behind ``source`` (links followed) to ``target``; False where links are impossible.

    Raises:
        FileExistsError: ``target`` exists.
    """
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def copy(source: Path, target: Path) -> None:
    """Copy the file behind ``source`` to ``target``, which is whole or absent.

    Raises:
        FileExistsError: ``target`` exists. It may be a link to a file that must not be written to.
    """
    with temporary.file(target) as part:
        shutil.copyfile(source.resolve(), part)
        apply_umask(part)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        replace(part, target)


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Hex digest of a file, read in pieces; ``stop`` ends it early, with an :class:`InterruptedError`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if stop is not None and stop.is_set():
                raise InterruptedError
            digest.update(block)
    return digest.hexdigest()
