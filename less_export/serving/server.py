"""A server process: the socket, the signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError
from ..runtime.engine import Engine
from .app import build_app
from .options import HEAD_SECONDS, ServerOptions

#: Seconds that the last replies may take to be read, once all of them are complete.
_LAST_WRITES = 10
#: Connections that the system holds until the server takes them.
_BACKLOG = 1024


@dataclass(frozen=True)
class Listening:
    """Where a server listens; ``certificate`` and ``key`` are PEM files for TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    def open(self) -> socket.socket:
        """The socket; port 0 takes a free one.

        Raises:
            UsageError: the address is not this machine's, or is taken; only one of the TLS files.
        """
        if (self.certificate is None) != (self.key is None):
            raise UsageError("--ssl-certfile and --ssl-keyfile belong together: give both")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise UsageError(f"cannot read {path}: no such file")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot listen on {self.host} port {self.port}: {reason}") from error

    def url(self, opened: socket.socket) -> str:
        """Address of the API behind an open socket."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{opened.getsockname()[1]}/v1"


class Server:
    """Serves an engine on an open socket until :meth:`end` or a signal.

    The first SIGTERM or SIGINT drains: new work is refused, what was accepted is finished and answered. A second one
    stops at once.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions,
        listening: Listening,
        opened: socket.socket,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._engine, self._socket, self._log = engine, opened, log
        config = uvicorn.Config(
            build_app(engine, options, log),
            http=_PromptProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(HEAD_SECONDS),
            timeout_graceful_shutdown=_LAST_WRITES,
            ssl_certfile=None if listening.certificate is None else str(listening.certificate),
            ssl_keyfile=None if listening.key is None else str(listening.key),
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError among them
            raise UsageError(f"cannot use the TLS files: {error.strerror or error}") from error
        self._server = _QuietServer(config)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early = 0  # calls of `end` before there was a loop
        self._ending = False

    def run(self) -> None:
        """Serve; returns when everything has been answered after the end was asked for."""
        try:
            asyncio.run(self._serve())
        finally:
            self._engine.stop()

    def end(self) -> None:
        """Drain and return from :meth:`run`; from any thread. A second call stops at once."""
        with self._lock:
            if self._loop is None:
                self._early += 1
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(self._end)

    async def _serve(self) -> None:
        with self._lock:
            self._loop = asyncio.get_running_loop()
        for _ in range(self._early):
            self._end()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: the caller ends it
                self._loop.add_signal_handler(number, self._end)
        await self._server.serve(sockets=[self._socket])

    def _end(self) -> None:
        # In threads of their own: those of the loop may all be busy with requests.
        if not self._ending:
            self._ending = True
            self._log("finishing what was accepted; again to stop at once")
            threading.Thread(target=self._drain, daemon=True).start()
        else:
            self._server.should_exit = self._server.force_exit = True
            threading.Thread(target=self._engine.stop, daemon=True).start()

    def _drain(self) -> None:
        self._engine.drain()
        self._server.should_exit = True


class _QuietServer(uvicorn.Server):
    """Leaves the signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _PromptProtocol(H11Protocol):
    """Closes connections whose next request does not begin, or whose head does not end, in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        requests = self.cycle
        super().data_received(data)
        if self.cycle is not requests:  # a head is complete
            self._cancel()
        elif self._deadline is None and (requests is None or requests.response_complete):
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def environment_key() -> str | None:
    """The API key of the environment, which other users of the machine do not see in the list of processes."""
    return os.environ.get("LESS_EXPORT_API_KEY", "").strip() or None
