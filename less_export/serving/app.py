"""The routes: OpenAI's models, completions and chats, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .._version import __version__
from ..errors import LessExportError, UsageError, one_line
from ..runtime.backend import RowState
from ..runtime.engine import Engine
from ..runtime.sequence import Sequence
from ..runtime.structured import Grammars, StructuredUnavailableError
from ..runtime.tokenizer import Tokenizer
from ..view import pages
from .calls import Call, ClientGoneError
from .conversations import continuation
from .failures import failed, http_error, invalid, refusal
from .gate import Gate
from .metrics import CONTENT_TYPE, Metrics
from .options import ServerOptions
from .replies import ChatReply, Reply, error_body
from .runs import EventStream, Run
from .schemas import (
    COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
)
from .sessions import SessionStore
from .views import LiveView, Views


def build_app(engine: Engine, options: ServerOptions, log: Callable[[str], None] = lambda line: None) -> FastAPI:
    """The application over a running engine; ``log`` takes lines about requests."""
    sessions = None
    if options.state_dir is not None:
        sessions = SessionStore(options.state_dir, options.state_limit, engine.check_state)
    service = _Service(engine, options, sessions, Metrics(engine), log)
    app = FastAPI(title="less-export", version=__version__, docs_url=None, redoc_url=None)
    for path, method, route in service.routes():
        app.add_api_route(path, route, methods=[method], response_model=None)
    for error, handler in ((RequestValidationError, invalid), (HTTPException, http_error)):
        app.add_exception_handler(error, handler)
    for kind in (LessExportError, TimeoutError):
        app.add_exception_handler(kind, failed)
    paths = frozenset(path for path, _, _ in service.routes())
    app.add_middleware(
        Gate,
        api_key=options.api_key,
        metrics=service.metrics,
        paths=paths,
        queued=frozenset(("/v1/completions", "/v1/chat/completions")),
        full=lambda: engine.full,
        log=log,
    )
    if options.cors:
        app.add_middleware(CORSMiddleware, allow_origins=options.cors, allow_methods=["*"], allow_headers=["*"])
    return app


class _Service:
    """The routes and what they share."""

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions,
        sessions: SessionStore | None,
        metrics: Metrics,
        log: Callable[[str], None],
    ) -> None:
        self._engine, self._options, self._sessions, self.metrics, self._log = engine, options, sessions, metrics, log
        self._started = int(time.time())
        self._saves: dict[str, asyncio.Future[None]] = {}  # by session
        self._structured = _grammars(engine)
        self._views = Views()

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        return [
            ("/v1/models", "GET", self.models),
            ("/v1/models/{model:path}", "GET", self.model),
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.figures),
            ("/version", "GET", self.version),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
            ("/v1/views/{name}", "GET", self.view),
            *((path, "GET", _file(*file)) for path, file in pages.FILES.items()),
        ]

    # ------------------------------------------------------------ completions

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self._check_model(body.model)
        count = body.max_tokens or min(COMPLETION_TOKENS, self._options.max_new_tokens)

        def prepare(prefix: RowState | None) -> list[Sequence]:
            prompts = body.prompts()
            self._check_space(len(prompts) * body.n)
            encoded = [self._encode(p, prefix) for p in prompts]
            return self._sequences(encoded, body, count, body.logprobs, prefix)

        return await self._answer(body, http, Reply, prepare)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self._check_model(body.model)
        count = body.max_completion_tokens or body.max_tokens or self._options.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None

        def prepare(prefix: RowState | None) -> list[Sequence]:
            self._check_space(body.n)
            prompt = self._render(body, prefix is not None)
            return self._sequences([self._tokens(prompt, special=False)], body, count, logprobs, prefix)

        return await self._answer(body, http, ChatReply, prepare)

    async def _answer(
        self,
        body: Request,
        http: HttpRequest,
        kind: type[Reply],
        prepare: Callable[[RowState | None], list[Sequence]],
    ) -> Response:
        """Run a request's sequences, and reply with all at the end or as they grow."""
        async with contextlib.AsyncExitStack() as stack:
            session, prefix = None, None
            if body.session_id is not None:
                if self._sessions is None:
                    raise UsageError("this server keeps no sessions: start it with --state-dir")
                session = self._sessions.claim(body.session_id)
                stack.callback(self._leave, session)
                if session == body.session_id:
                    prefix = await asyncio.to_thread(self._sessions.load, session)
            sequences = await asyncio.to_thread(prepare, prefix)
            del prefix  # the sequence keeps it, until its row has it
            if session is not None and len(sequences) != 1:
                raise UsageError("a session takes one prompt with n = 1")
            reply = kind(self._options.model_name, sequences, body.n, self._engine.tokenizer, session)
            if body.live_view:
                stack.callback(self._watched(reply.id, sequences).close)
            call = Call(self._engine, sequences, http.receive, self.metrics)
            call.submit()
            stack.callback(call.close)
            run = Run(call, reply, lambda: self._park(session, sequences), self._options.timeout)
            if body.stream:
                return EventStream(run, body.wants_usage, stack.pop_all())
            try:
                return await run.whole()
            except ClientGoneError:
                return Response(status_code=499)
            except Exception as error:
                return refusal(error)

    def _watched(self, name: str, sequences: list[Sequence]) -> LiveView:
        """Let whoever knows the name of a reply look at the state of its sequence."""
        if len(sequences) != 1:
            raise UsageError("live_view takes one prompt with n = 1")
        live = LiveView(sequences[0], self._engine.backend.contract, self._engine.tokenizer)
        self._views.add(name, live)
        return live

    async def _park(self, session: str | None, sequences: list[Sequence]) -> None:
        """Save the state of a session, before the client hears of the end."""
        state = sequences[0].state
        if session is not None and self._sessions is not None and state is not None:
            save = asyncio.ensure_future(asyncio.to_thread(self._sessions.save, session, state))
            self._saves[session] = save
            await asyncio.shield(save)

    def _leave(self, session: str) -> None:
        """Let other requests have a session, once its state is saved: that goes on if the request's time is over."""
        assert self._sessions is not None
        release = self._sessions.release
        save = self._saves.pop(session, None)
        if save is None or save.done():
            release(session)
        else:
            save.add_done_callback(lambda save: (save.cancelled() or save.exception(), release(session)))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self._options.model_name):
            body = error_body(
                f"the model {one_line(name, 60)!r} does not exist: this server has {self._options.model_name!r}",
                "invalid_request_error",
                "model_not_found",
                "model",
            )
            raise HTTPException(404, body)  # type: ignore[arg-type]

    def _check_space(self, sequences: int) -> None:
        space = self._engine.rows + self._engine.max_queue
        if sequences > space:
            raise UsageError(
                f"{sequences} answers (prompts times n) are more than the {space} that this server takes at a time: "
                "ask for them in several requests"
            )

    def _sequences(
        self, prompts: list[list[int]], body: Request, count: int, logprobs: int | None, prefix: RowState | None
    ) -> list[Sequence]:
        longest, most = self._options.max_prompt_tokens, self._options.max_new_tokens
        for ids in prompts:
            if longest is not None and len(ids) > longest:
                raise UsageError(f"the prompt has {len(ids)} tokens, and this server takes {longest}: shorten it")
        if count > most:
            raise UsageError(f"max_tokens is {count}, and this server generates up to {most}: ask for fewer")
        params = body.sampling(count, logprobs, body.grammar(self._grammars))
        keep = body.session_id is not None
        return [
            self._engine.sequence(ids, params, index=place * body.n + i, prefix=prefix, keep_state=keep)
            for place, ids in enumerate(prompts)
            for i in range(body.n)
        ]

    def _grammars(self) -> Grammars:
        if isinstance(self._structured, StructuredUnavailableError):
            raise self._structured.with_traceback(None)
        return self._structured

    # ------------------------------------------------------------ text and tokens

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._engine.tokenizer is None:
            raise UsageError("this model has no tokenizer: send token ids to /v1/completions")
        return self._engine.tokenizer

    def _encode(self, prompt: str | list[int], prefix: RowState | None) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return self._tokens(prompt, special=prefix is None)

    def _tokens(self, text: str, special: bool) -> list[int]:
        if self._options.log_prompts:
            self._log(f"prompt: {text}")
        longest = self._options.max_prompt_tokens
        if longest is not None and len(text) > longest * self._tokenizer.longest_token:
            raise UsageError(
                f"the prompt has {len(text)} characters, which are more than the {longest} tokens that this server "
                "takes: shorten it"
            )
        return self._tokenizer.encode(text, special=special) if text else []

    def _render(self, body: ChatRequest, continues: bool) -> str:
        """The prompt of a conversation; of one that continues a session, only what follows the latest answer."""
        messages, variables = body.plain_messages(), body.template_variables()
        variables["add_generation_prompt"] = body.add_generation_prompt
        if not continues:
            return self._tokenizer.chat(messages, **variables)
        return continuation(self._tokenizer, messages, variables)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        def tokens() -> list[int]:
            if body.messages is None:
                return self._tokenizer.encode(body.prompt or "", special=body.add_special_tokens)
            chat = {"messages": body.messages, "add_generation_prompt": body.add_generation_prompt}
            return self._tokenizer.encode(self._render(ChatRequest.model_validate(chat), False), special=False)

        ids = await asyncio.to_thread(tokens)
        return {"count": len(ids), "max_model_len": self._engine.backend.contract.token_limit(), "tokens": ids}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        highest = self._engine.backend.contract.vocab_size - 1
        if any(not 0 <= i <= highest for i in body.tokens):
            raise UsageError(f"token ids must lie in 0..{highest}")
        return {"prompt": await asyncio.to_thread(self._tokenizer.decode, body.tokens)}

    async def view(self, name: str, layer: int | None = None) -> JSONResponse:
        content = await asyncio.to_thread(self._views.get(name).content, layer)
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    # ------------------------------------------------------------ about the server

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self._options.model_name)]}

    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        name = self._options.model_name
        return {"id": name, "object": "model", "created": self._started, "owned_by": "less-export"}

    async def health(self) -> Response:
        if self._engine.accepts:
            return PlainTextResponse("ok")
        return PlainTextResponse("stopping, or failed", 503)

    async def figures(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def version(self) -> dict[str, str]:
        return {"version": __version__}


def _grammars(engine: Engine) -> Grammars | StructuredUnavailableError:
    """Made at the start, not for the first request: it takes seconds for a large vocabulary, and stops every thread."""
    try:
        if engine.tokenizer is None:
            raise StructuredUnavailableError("structured answers need a tokenizer, and this model has none")
        return Grammars(engine.tokenizer, engine.backend.contract.vocab_size, engine.eos_ids)
    except StructuredUnavailableError as error:
        return error


def _file(name: str, kind: str) -> Callable[..., Any]:
    """The route of a file of the page."""
    content, headers = pages.read(name), {**pages.HEADERS, "Content-Type": kind}

    async def file() -> Response:
        return Response(content, headers=headers)

    return file
