"""What a request passes before the application sees it: the key, the size and the time of its body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from ..view.pages import FILES
from .metrics import Metrics
from .options import BODY_SECONDS, MAX_BODIES, MAX_BODY, RETRY_SECONDS
from .replies import error_body, origin

_LOG = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
#: Paths that need no key: what tells whether the server runs, and the files of the page, which asks for the key.
_OPEN = ("/health", *FILES)
#: Most bytes and seconds of a body that is dropped before its request is refused.
_DISCARD_BYTES, _DISCARD_SECONDS = 1 << 20, 1.0


class Gate:
    """Refuses requests without the key and bodies that are too large, too slow or too many; logs and counts all.

    A body is read to its end before the application runs, so that a slow client takes neither a row nor a place in
    the queue; the bodies of all requests that have not ended have at most ``max_bodies`` bytes. ``paths`` are those
    that are counted by name; requests to those in ``queued`` are refused while ``full()``, and their bodies dropped.
    What the application raises gets status 500, and its message, which may hold a prompt, is not logged.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        metrics: Metrics,
        paths: frozenset[str],
        queued: frozenset[str],
        full: Callable[[], bool],
        log: Callable[[str], None],
        max_body: int = MAX_BODY,
        max_bodies: int = MAX_BODIES,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._metrics, self._paths, self._log = app, metrics, paths, log
        self._key = None if api_key is None else api_key.encode()
        self._queued, self._full = queued, full
        self._max_body, self._max_bodies, self._body_seconds = max_body, max_bodies, body_seconds
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, watched)
        except Exception as error:
            _LOG.error("a request failed: %s", origin(error))
            if not status:
                await _refuse(500, error_body("internal error", "server_error"))(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status)
            if path != "other" and scope["method"] == "POST":
                self._log(f"{path} {status or 'aborted'} in {time.perf_counter() - begin:.2f} s")

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
        if not self._knows(headers.get(b"authorization", b"")) and scope["path"] not in _OPEN:
            reason = error_body("the API key is missing or wrong", "invalid_request_error", "invalid_api_key")
            await _discard(receive)
            await _refuse(401, reason)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            await self._too_large()(scope, receive, send)
            return
        if scope["path"] in self._queued and self._full():
            await _discard(receive)
            await _busy("rows and queue are full: try again later", "queue_full")(scope, receive, send)
            return
        body = _Body()
        try:
            refusal = await self._read(receive, body)
            if refusal is not None:
                await refusal(scope, receive, send)
            elif body.complete:
                await self._app(scope, body.then(receive), send)
        finally:
            self._held -= body.size

    async def _read(self, receive: Receive, body: _Body) -> JSONResponse | None:
        """Read a body to its end, unless the client leaves; or the reply that refuses it."""
        try:
            async with asyncio.timeout(self._body_seconds):
                while not body.complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    self._held += body.add(message)
                    if body.size > self._max_body:
                        return self._too_large()
                    if self._held > self._max_bodies:
                        if not body.complete:
                            await _discard(receive)
                        return _busy("the requests of others take all the memory for bodies: try again later")
        except TimeoutError:
            return _refuse(408, error_body(f"the body did not arrive within {self._body_seconds:g} s", "timeout"))
        return None

    def _knows(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    def _too_large(self) -> JSONResponse:
        return _refuse(413, error_body(f"the body has more than {self._max_body} bytes", "invalid_request_error"))


class _Body:
    """What has arrived of a body."""

    def __init__(self) -> None:
        self.size, self.complete = 0, False
        self._chunks: list[bytes] = []

    def add(self, message: Message) -> int:
        """Take a part; returns its bytes."""
        chunk = message.get("body", b"")
        self._chunks.append(chunk)
        self.size += len(chunk)
        self.complete = not message.get("more_body", False)
        return len(chunk)

    def then(self, receive: Receive) -> Receive:
        """What the application receives: the whole body, and what comes after it."""

        async def replay() -> Message:
            if self._chunks:
                whole = b"".join(self._chunks)
                self._chunks.clear()
                return {"type": "http.request", "body": whole, "more_body": False}
            return await receive()

        return replay


async def _discard(receive: Receive) -> None:
    """Take a body that is short and at once there, and drop it: a connection that closes with data unread is reset, and
    the client may lose the reply."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size < _DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _refuse(status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A reply after which the connection closes, since the rest of the body was not read."""
    return JSONResponse(body, status, {"Connection": "close", **(headers or {})})


def _busy(message: str, code: str | None = None) -> JSONResponse:
    return _refuse(429, error_body(message, "rate_limit_error", code), {"Retry-After": str(RETRY_SECONDS)})
