"""Files that are whole or absent: temporary names, renames, links and hashes."""

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

from ..errors import UsageError

_umask_lock = threading.Lock()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and rename it: the file is whole or as it was before."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        apply_umask(name)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


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
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder next to ``beside`` (same file system, so that renames work), removed at the end.

    Parent folders created for it are removed too if they are still empty.
    """
    created = [p for p in beside.parents if not p.exists()]
    folder = None
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", dir=beside.parent))
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def publish(moves: Sequence[tuple[Path, Path]], removed: Iterable[Path] = ()) -> None:
    """Rename every (finished, final) and delete ``removed``; if a rename fails, the previous files are restored.

    All final names are in one folder. Replaced files are kept in a hidden folder there until the end.
    """
    aside = Path(tempfile.mkdtemp(prefix=".replaced.", dir=moves[0][1].parent))
    removed = list(removed)
    try:
        for final in removed:
            os.replace(final, aside / final.name)
        for finished, final in moves:
            if final.exists():
                os.replace(final, aside / final.name)
            os.replace(finished, final)
    except BaseException:
        for finished, final in moves:
            if not finished.exists():
                os.replace(final, finished)
        for final in (*removed, *(final for _, final in moves)):
            if (aside / final.name).exists():
                os.replace(aside / final.name, final)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        shutil.copyfile(source.resolve(), name)
        apply_umask(name)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
