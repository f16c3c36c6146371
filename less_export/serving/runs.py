"""A request's way from its first token to its reply, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, ClientGoneError
from .failures import refusal
from .replies import Reply, server_sent

#: Seconds that a client may take to read the error at the end of a stream.
_LAST_SECONDS = 1.0


class Run:
    """A call and the reply that it fills; ``park`` runs before the last token is told."""

    def __init__(self, call: Call, reply: Reply, park: Callable[[], Any], timeout: float) -> None:
        self.reply, self.timeout = reply, timeout
        self._call, self._park = call, park

    async def whole(self) -> Response:
        async with asyncio.timeout(self.timeout):
            async for sequence, token in self._call.tokens():
                self.reply.add(sequence, token)
            await self._park()
        return JSONResponse(self.reply.whole())

    async def chunks(self, with_usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream; tokens whose text is not certain yet come with the next one."""
        usage = {"usage": None} if with_usage else {}
        for chunk in self.reply.opening():
            yield server_sent({**chunk, **usage})
        async for sequence, token in self._call.tokens():
            index = self.reply.add(sequence, token)
            if token.finish_reason is not None:
                await self._park()
            if token.text or token.finish_reason is not None or token.logprobs is not None:
                yield server_sent({**self.reply.chunk(index, token), **usage})
        if with_usage:
            yield server_sent(self.reply.closing())
        yield server_sent(b"[DONE]")


class EventStream(Response):
    """Server-sent events of a run, within its time, which a client that does not read cannot prolong."""

    def __init__(self, run: Run, with_usage: bool, stack: contextlib.AsyncExitStack) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._run, self._with_usage, self._stack = run, with_usage, stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def event(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with self._stack:
            try:
                async with asyncio.timeout(self._run.timeout):
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    async for chunk in self._run.chunks(self._with_usage):
                        await event(chunk)
                    await event(b"", more=False)
            except Exception as error:
                if isinstance(error, ClientGoneError) or (
                    isinstance(error, OSError) and not isinstance(error, TimeoutError)
                ):
                    return
                with contextlib.suppress(TimeoutError, OSError):  # the status is out: the stream says what happened
                    async with asyncio.timeout(_LAST_SECONDS):
                        await event(server_sent(bytes(refusal(error).body)))
                        await event(b"", more=False)
