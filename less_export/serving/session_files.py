"""The files of saved sessions: in a folder, or in an object store."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any, Protocol

from ..bundle import temporary
from ..bundle.files import replace
from ..errors import BackendError, UsageError, install_hint, one_line
from ..runtime.row_state import RowState
from .range_locks import RangeLocks

#: Names that servers give to sessions.
ID = re.compile(r"[0-9a-f]{32}")
#: What a killed server leaves of a save.
_LEFT = re.compile(r"\.([0-9a-f]{32}\.safetensors)\.less-export-.*")
#: The file in which servers that share a folder lock the sessions of their requests.
_LOCKS = ".locks"


class SessionFiles(Protocol):
    """One file a session. All but ``take`` and ``leave`` raise ``OSError`` where the storage fails."""

    def take(self, session: str) -> bool:
        """Lock a session against other servers; False if one of them has it."""

    def leave(self, session: str) -> None:
        """Unlock a session."""

    def load(self, session: str) -> RowState:
        """A state; raises :class:`BackendError` if there is none, or it is damaged."""

    def write(self, session: str, content: bytes) -> None:
        """Write a state, whole or not at all."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every session."""

    def time(self, session: str) -> float:
        """When a session was saved, in seconds."""

    def drop(self, session: str) -> None:
        """Remove a session."""


def session_files(place: Path | str) -> SessionFiles:
    """The sessions at a folder, or at a URL of fsspec (``s3://bucket/sessions``).

    Raises:
        UsageError: it cannot be written to, or what the URL needs is not installed.
    """
    return ObjectStore(place) if isinstance(place, str) and "://" in place else Folder(Path(place))


class Folder:
    """Files that nobody but the user of the process can read, with locks between processes.

    Raises:
        UsageError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}") from error
        try:
            with temporary.file(folder / "probe"):
                pass
            self._locks = RangeLocks(folder / _LOCKS)
        except OSError as error:
            raise UsageError(f"cannot write into the folder {folder}: {error.strerror or error}") from error
        for name in {m[1] for m in map(_LEFT.fullmatch, os.listdir(folder)) if m}:
            temporary.remove_abandoned(folder / name)

    def take(self, session: str) -> bool:
        return self._locks.take(session)

    def leave(self, session: str) -> None:
        self._locks.leave(session)

    def load(self, session: str) -> RowState:
        return RowState.load(self._path(session))

    def write(self, session: str, content: bytes) -> None:
        path = self._path(session)
        with temporary.file(path) as part:  # which nobody else may read
            part.write_bytes(content)
            replace(part, path)

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # dropped by another server meanwhile
                sizes[path.stem] = path.stat().st_size
        return {session: size for session, size in sizes.items() if ID.fullmatch(session)}

    def time(self, session: str) -> float:
        return self._path(session).stat().st_mtime_ns / 1e9

    def drop(self, session: str) -> None:
        os.unlink(self._path(session))

    def _path(self, session: str) -> Path:
        return self._folder / f"{session}.safetensors"


class ObjectStore:
    """Objects below a URL of fsspec. An object store has no locks: of two servers that save a session, the later wins.

    Raises:
        UsageError: fsspec or its package for this URL is not installed, or the store refuses a small object.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UsageError(f"sessions at {url} need fsspec: {install_hint('remote')}") from None
        try:
            self._store, self._root = url_to_fs(url)
            self._store.makedirs(self._root, exist_ok=True)
            probe = f"{self._root}/probe-{secrets.token_hex(8)}"  # servers may start at the same time
            self._store.pipe_file(probe, b"")
            self._store.rm_file(probe)
        except Exception as error:  # stores raise what their libraries raise
            raise UsageError(f"cannot write to {url}: {one_line(error) or type(error).__name__}") from error

    def take(self, session: str) -> bool:
        return True

    def leave(self, session: str) -> None:
        return

    def load(self, session: str) -> RowState:
        with tempfile.TemporaryDirectory(prefix="less-export-") as folder:
            file = Path(folder) / "session.safetensors"
            try:
                file.write_bytes(self._store.cat_file(self._path(session)))
            except Exception as error:
                raise BackendError(f"cannot read the session: {one_line(error) or type(error).__name__}") from error
            return RowState.load(file)

    def write(self, session: str, content: bytes) -> None:
        self._do("pipe_file", self._path(session), content)

    def sizes(self) -> dict[str, int]:
        self._store.invalidate_cache()
        found = self._do("find", self._root, detail=True)
        names = {Path(name).stem: int(facts["size"]) for name, facts in found.items() if name.endswith(".safetensors")}
        return {session: size for session, size in names.items() if ID.fullmatch(session)}

    def time(self, session: str) -> float:
        return float(self._do("modified", self._path(session)).timestamp())

    def drop(self, session: str) -> None:
        self._do("rm_file", self._path(session))

    def _path(self, session: str) -> str:
        return f"{self._root}/{session}.safetensors"

    def _do(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the store; whatever it raises becomes an ``OSError``."""
        try:
            return getattr(self._store, method)(*args, **options)
        except Exception as error:
            raise OSError(one_line(error) or type(error).__name__) from error
