"""The cache of what this machine built: a private folder with plugin libraries, and the hashes of native code.

Native code (plugin libraries, plans that carry one) is loaded without a question only if its hash is known here. A hash
becomes known when this machine builds the code, never because a manifest states it. Who can write here can run code as
this user, so the folder must belong to the user, and nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..bundle.files import replace, scratch_folder, sha256, write_atomically
from ..errors import EngineError

#: The file of known hashes: one SHA-256 in hexadecimal a line.
KNOWN = "built-here.sha256"
#: Suffix of the file that holds the hash of the library beside it.
HASH_SUFFIX = ".sha256"


def cache_folder() -> Path:
    """LESS_EXPORT_CACHE, or less-export in XDG_CACHE_HOME or ~/.cache; absolute.

    Raises:
        EngineError: there is no home folder.
    """
    if os.environ.get("LESS_EXPORT_CACHE"):
        return Path(os.environ["LESS_EXPORT_CACHE"]).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "less-export"
    except RuntimeError:
        raise EngineError("there is no home folder for the cache: set LESS_EXPORT_CACHE to a folder") from None


def refuse_shared(path: Path) -> None:
    """Raise :class:`EngineError` for a file or folder of another user's, or that others may write to.

    Nothing at ``path`` is fine.
    """
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    advice = "set LESS_EXPORT_CACHE to a folder of your own"
    if facts.st_uid != os.geteuid():
        raise EngineError(f"the cache {path} belongs to another user: {advice}")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EngineError(f"others may write to the cache {path}: delete it, or {advice}")


def make_private(folder: Path) -> None:
    """Create a folder of the cache that only this user can enter, or make it one.

    Raises:
        EngineError: see :func:`refuse_shared`. OSError: it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_shared(folder)
    folder.chmod(0o700)


def record(digest: str) -> None:
    """Note that this machine built the code with this hash.

    Raises:
        EngineError: the cache is another user's. OSError: it cannot be written.
    """
    import fcntl  # not on every system that runs ONNX Runtime

    make_private(cache_folder())
    with _known(os.O_RDWR | os.O_CREAT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        if digest.encode() not in text.split():
            file.write((b"\n" if text and not text.endswith(b"\n") else b"") + f"{digest}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def is_known(digest: str) -> bool:
    """Whether this machine built the code with this hash.

    Raises:
        EngineError: others could have written the answer.
    """
    refuse_shared(cache_folder())
    try:
        with _known(os.O_RDONLY) as file:
            return bool(re.fullmatch("[0-9a-f]{64}", digest)) and digest.encode() in file.read().split()
    except OSError:
        return False


@contextlib.contextmanager
def _known(flags: int) -> Iterator[BinaryIO]:
    path = cache_folder() / KNOWN
    handle = os.open(path, flags | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "rb" if flags == os.O_RDONLY else "r+b") as file:
        refuse_shared(path)
        yield file


def stored(library: Path) -> str | None:
    """The hash of a library in the cache; None if it is missing, or not as it was stored.

    Raises:
        EngineError: others could have written it.
    """
    folder, beside = library.parent, library.with_name(library.name + HASH_SUFFIX)
    for path in (cache_folder(), folder.parent, folder, library, beside):
        refuse_shared(path)
    if not library.is_file() or not beside.is_file():
        return None
    digest = sha256(library)
    return digest if beside.read_text(errors="replace").strip() == digest else None


def known(library: Path) -> Path | None:
    """A library in the cache; None if it is missing, or not as it was stored. Its hash is recorded where it is not.

    Raises:
        EngineError: others could have written it. OSError: the cache cannot be read, or not be written.
    """
    digest = stored(library)
    if digest is None:
        return None
    if not is_known(digest):
        record(digest)
    return library


def first_known(folder: Path, libraries: Iterable[Path]) -> Path | None:
    """The first of these libraries in a folder of the cache that is as it was stored; None without one.

    Raises:
        EngineError: the cache is another user's, or cannot be read.
    """
    try:
        return next((library for library in libraries if known(library)), None)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"cannot read {folder}: {reason} (set LESS_EXPORT_CACHE to another folder)") from error


@contextlib.contextmanager
def building(what: str, library: Path) -> Iterator[Path]:
    """A scratch folder in which ``what`` is built, before it is stored as ``library``; the cache's folders are private.

    Raises:
        EngineError: they are another user's, or cannot be written.
    """
    try:
        for folder in (cache_folder(), library.parents[1]):
            make_private(folder)
        with scratch_folder(library.parent) as folder:
            yield folder
    except OSError as error:
        raise EngineError(
            f"cannot write the {what} to {library.parent}: {error.strerror or error} "
            "(set LESS_EXPORT_CACHE to another folder)"
        ) from error
    finally:
        for folder in (library.parents[1], cache_folder()):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def store(part: Path, library: Path) -> None:
    """Move a finished library into the cache with its hash, and record it.

    Raises:
        EngineError: see :func:`refuse_shared`. OSError: it cannot be written.
    """
    digest = sha256(part)
    record(digest)
    make_private(library.parent)
    beside = library.with_name(library.name + HASH_SUFFIX)
    write_atomically(beside, f"{digest}\n".encode())
    for path, mode in ((beside, 0o600), (part, 0o700)):  # whatever the umask
        path.chmod(mode)
    replace(part, library)
