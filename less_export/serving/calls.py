"""One request on its way through the engine: its events in an event loop, until it ends or its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from collections.abc import Sequence as Ordered
from typing import Any

from ..runtime.engine import Engine
from ..runtime.scheduler import Event
from ..runtime.sequence import Sequence, Token
from .metrics import Metrics

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """The client has closed the connection: nobody reads the answer."""


class Call:
    """Runs the sequences of one request.

    :meth:`submit` queues all of them or none. :meth:`close` must be called at the end: it cancels what has not ended,
    so that the rows are free before the engine's next step.
    """

    def __init__(self, engine: Engine, sequences: Ordered[Sequence], receive: Receive, metrics: Metrics) -> None:
        self._engine, self._sequences, self._receive, self._metrics = engine, sequences, receive, metrics
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self._times: dict[Sequence, float] = {}

    def submit(self) -> None:
        """Queue the sequences, and watch the client.

        Raises:
            QueueFullError, StoppedError: see :meth:`Engine.submit`.
        """
        loop = asyncio.get_running_loop()
        arrived = time.perf_counter()

        def sink(event: Event) -> None:  # on the engine's thread
            self._metrics.observe(event, arrived, self._times)
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._engine.submit(self._sequences, sink)
        self._watch = asyncio.create_task(self._until_gone())

    async def tokens(self) -> AsyncIterator[tuple[Sequence, Token]]:
        """The tokens of all sequences as they come.

        Raises:
            ClientGoneError: the client has closed the connection. Exception: what ended a sequence.
        """
        open_sequences = len(self._sequences)
        while open_sequences:
            event = await self._events.get()
            if event is None:
                raise ClientGoneError
            if event.error is not None:
                raise event.error
            assert event.token is not None
            open_sequences -= event.token.finish_reason is not None
            yield event.sequence, event.token

    def close(self) -> None:
        """Cancel what has not ended."""
        self._engine.cancel(self._sequences)
        if self._watch is not None:
            self._watch.cancel()

    async def _until_gone(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self._events.put_nowait(None)
