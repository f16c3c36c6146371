"""Conversations whose state is parked in a folder between requests."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from ..bundle import temporary
from ..bundle.files import replace
from ..errors import BackendError, UsageError
from ..runtime.backend import RowState
from .range_locks import RangeLocks

_LOG = logging.getLogger(__name__)
_ID = re.compile(r"[0-9a-f]{32}")
#: What a killed server leaves of a save.
_LEFT = re.compile(r"\.([0-9a-f]{32}\.safetensors)\.less-export-.*")
#: What a request names to begin a session.
NEW = "new"
#: The file in which servers that share a folder lock the sessions of their requests.
_LOCKS = ".locks"


class NoSuchSessionError(UsageError):
    """The session is unknown, was dropped to make space, or belongs to another model."""


class BusySessionError(UsageError):
    """Another request of the session has not ended."""


class SessionStore:
    """States by ids that this class makes, one file each in ``folder``, the oldest dropped beyond ``limit`` bytes.

    A state is written whole or not at all, so a server that is killed loses nothing that was parked; nobody but the
    user of the process can read it. Several servers may share a folder: a session that a request of one of them has is
    busy in the others, until it ends or its server does. ``check`` raises :class:`BackendError` for a state of another
    model.

    Raises:
        UsageError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path, limit: int, check: Callable[[RowState], None]) -> None:
        self._folder, self._limit, self._check = folder, limit, check
        self._busy: set[str] = set()
        self._lock = threading.Lock()
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

    def claim(self, name: str) -> str:
        """The id of a session, for one request until :meth:`release`; ``new`` makes an id.

        Raises:
            NoSuchSessionError: not an id of this class. BusySessionError: another request has it.
        """
        session = secrets.token_hex(16) if name == NEW else name
        if not _ID.fullmatch(session):
            raise NoSuchSessionError("no such session: begin one with the session_id 'new'")
        with self._lock:
            if session in self._busy or not self._locks.take(session):
                raise BusySessionError("another request of this session has not ended: wait for it")
            self._busy.add(session)
        return session

    def release(self, session: str) -> None:
        """Let other requests claim a session."""
        with self._lock:
            if session in self._busy:
                self._busy.remove(session)
                self._locks.leave(session)

    def load(self, session: str) -> RowState:
        """The state of a session.

        Raises:
            NoSuchSessionError: there is none, it cannot be read, or it belongs to another model.
        """
        try:
            state = RowState.load(self._path(session))
            self._check(state)
            return state
        except BackendError:  # its message names a path
            raise NoSuchSessionError(
                "no such session of this model: it may have been dropped to make space; begin one with session_id 'new'"
            ) from None

    def save(self, session: str, state: RowState) -> None:
        """Park a state, and drop the oldest others beyond the limit.

        Raises:
            BackendError: the file cannot be written.
        """
        path = self._path(session)
        try:
            with temporary.file(path) as part:  # which nobody else may read
                part.write_bytes(state.content())
                replace(part, path)
        except OSError as error:
            _LOG.error("a session was lost: cannot write %s: %s", path, error.strerror or error)
            raise BackendError("the server could not save the session: its disk may be full") from error
        self._drop_oldest(path)

    def _path(self, session: str) -> Path:
        return self._folder / f"{session}.safetensors"

    def _drop_oldest(self, latest: Path) -> None:
        files = []
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # dropped by another server meanwhile
                facts = path.stat()
                if _ID.fullmatch(path.stem):
                    files.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                return
            if path != latest:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size
