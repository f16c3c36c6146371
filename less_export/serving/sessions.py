"""Conversations whose state is parked in a folder between requests."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import BackendError, UsageError
from ..runtime.backend import RowState
from .session_files import ID, session_files

_LOG = logging.getLogger(__name__)
#: What a request names to begin a session.
NEW = "new"


class NoSuchSessionError(UsageError):
    """The session is unknown, was dropped to make space, or belongs to another model."""


class BusySessionError(UsageError):
    """Another request of the session has not ended."""


class SessionStore:
    """States by ids that this class makes, one file each at ``place``, the oldest dropped beyond ``limit`` bytes.

    A state is written whole or not at all, so a server that is killed loses nothing that was parked. Several servers
    may share a place: a session that a request of one of them has is busy in the others, until it ends or its server
    does; but not in an object store, which has no locks. ``check`` raises :class:`BackendError` for a state of
    another model.

    Raises:
        UsageError: nothing can be written at ``place``.
    """

    def __init__(self, place: Path | str, limit: int, check: Callable[[RowState], None]) -> None:
        self._files, self._limit, self._check = session_files(place), limit, check
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, name: str) -> str:
        """The id of a session, for one request until :meth:`release`; ``new`` makes an id.

        Raises:
            NoSuchSessionError: not an id of this class. BusySessionError: another request has it.
        """
        session = secrets.token_hex(16) if name == NEW else name
        if not ID.fullmatch(session):
            raise NoSuchSessionError("no such session: begin one with the session_id 'new'")
        with self._lock:
            if session in self._busy or not self._files.take(session):
                raise BusySessionError("another request of this session has not ended: wait for it")
            self._busy.add(session)
        return session

    def release(self, session: str) -> None:
        """Let other requests claim a session."""
        with self._lock:
            if session in self._busy:
                self._busy.remove(session)
                self._files.leave(session)

    def load(self, session: str) -> RowState:
        """The state of a session.

        Raises:
            NoSuchSessionError: there is none, it cannot be read, or it belongs to another model.
        """
        try:
            state = self._files.load(session)
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
        try:
            self._files.write(session, state.content())
        except OSError as error:
            _LOG.error("a session was lost: cannot write %s: %s", session, error.strerror or error)
            raise BackendError("the server could not save the session: its disk may be full") from error
        self._drop_oldest(session)

    def _drop_oldest(self, latest: str) -> None:
        try:
            sizes = self._files.sizes()
        except OSError as error:
            _LOG.error("cannot list the sessions: %s", error.strerror or error)
            return
        total, times = sum(sizes.values()), {}
        for session in sizes.keys() - {latest} if total > self._limit else ():
            with contextlib.suppress(OSError):  # dropped by another server meanwhile
                times[session] = self._files.time(session)
        for session in sorted(times, key=times.__getitem__):
            if total <= self._limit:
                return
            with contextlib.suppress(OSError):
                self._files.drop(session)
            total -= sizes[session]
