"""What a request passes before the application sees it: the key, the size and the time of its body."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from .metrics import Metrics
from .options import BODY_SECONDS, MAX_BODY
from .replies import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
#: Paths that need no key: what tells whether the server runs.
_OPEN = ("/health",)


class Gate:
    """Refuses requests without the key and bodies that are too large or too slow; logs and counts all others.

    A body is read to its end before the application runs, so that a slow client takes neither a row nor a place in
    the queue. ``paths`` are those that are counted by name.
    """

    def __init__(
        self,
        app: App,
        *,
        api_key: str | None,
        metrics: Metrics,
        paths: frozenset[str],
        log: Callable[[str], None],
        max_body: int = MAX_BODY,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._metrics, self._paths, self._log = app, metrics, paths, log
        self._key = None if api_key is None else api_key.encode()
        self._max_body, self._body_seconds = max_body, body_seconds

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
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, status)
            if path != "other" and scope["method"] == "POST":
                self._log(f"{path} {status or 'aborted'} in {time.perf_counter() - begin:.2f} s")

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
        if not self._knows(headers.get(b"authorization", b"")) and scope["path"] not in _OPEN:
            body = error_body("the API key is missing or wrong", "invalid_request_error", "invalid_api_key")
            await _refuse(401, body)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body:
            await self._too_large(scope, receive, send)
            return
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._max_body:
                        await self._too_large(scope, receive, send)
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            body = error_body(f"the body did not arrive within {self._body_seconds:g} s", "timeout")
            await _refuse(408, body)(scope, receive, send)
            return
        whole = [b"".join(chunks)]

        async def replay() -> Message:
            if whole:
                return {"type": "http.request", "body": whole.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _knows(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    async def _too_large(self, scope: Message, receive: Receive, send: Send) -> None:
        body = error_body(f"the body has more than {self._max_body} bytes", "invalid_request_error")
        await _refuse(413, body)(scope, receive, send)


def _refuse(status: int, body: dict[str, Any]) -> JSONResponse:
    """A reply after which the connection closes, since the rest of the body was not read."""
    return JSONResponse(body, status, {"Connection": "close"})
