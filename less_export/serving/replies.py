"""Replies of the OpenAI API: whole ones, chunks of streams, log probabilities, usage and errors."""

from __future__ import annotations

import json
import time
import traceback
import uuid
from collections.abc import Sequence as Ordered
from typing import Any

from ..runtime.sampler import TokenLogprobs
from ..runtime.sequence import Sequence, Token
from ..runtime.tokenizer import Tokenizer

#: Our finish reasons in OpenAI's words.
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", None: None}


class Reply:
    """The reply to one request, which grows with its tokens; one choice for each sequence.

    Args:
        model: the model's name.
        sequences: the choices, in order; those of one prompt follow one another.
        choices: choices of each prompt.
        tokenizer: for the text of single tokens.
        session_id: named in the reply, if there is one.
    """

    prefix = "cmpl"
    kind = stream_kind = "text_completion"

    def __init__(
        self,
        model: str,
        sequences: Ordered[Sequence],
        choices: int,
        tokenizer: Tokenizer | None,
        session_id: str | None = None,
    ) -> None:
        self._tokens: list[list[Token]] = [[] for _ in sequences]
        self._places = {s: i for i, s in enumerate(sequences)}
        self._prompt_tokens = sum(len(s.prompt) for s in sequences[::choices])
        self._tokenizer = tokenizer
        self._offsets = [0 for _ in sequences]
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            **({"session_id": session_id} if session_id else {}),
        }

    def add(self, sequence: Sequence, token: Token) -> int:
        """Take a token; returns the index of its choice."""
        index = self._places[sequence]
        self._tokens[index].append(token)
        return index

    @property
    def id(self) -> str:
        """The reply's name."""
        return str(self._head["id"])

    @property
    def completion_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def usage(self) -> dict[str, int]:
        new = self.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    def whole(self) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        choices = [
            {
                "index": index,
                **self._content("".join(t.text for t in tokens)),
                "logprobs": self._logprobs(index, tokens),
                "finish_reason": _REASONS[tokens[-1].finish_reason],
            }
            for index, tokens in enumerate(self._tokens)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunk(self, index: int, token: Token) -> dict[str, Any]:
        """The chunk of a stream for one token of a choice."""
        return self._chunk(index, self._piece(token.text), self._logprobs(index, [token]), token.finish_reason)

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage, at the end of a stream."""
        return {**self._head, "object": self.stream_kind, "choices": [], "usage": self.usage}

    def _chunk(self, index: int, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": _REASONS[reason]}
        return {**self._head, "object": self.stream_kind, "choices": [choice]}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str) -> dict[str, Any]:
        return self._content(text)

    def _logprobs(self, index: int, tokens: Ordered[Token]) -> dict[str, Any] | None:
        reported = [(t, t.logprobs) for t in tokens if t.logprobs is not None]
        if not reported:
            return None
        texts = [self._text(t.token_id) for t, _ in reported]
        offsets = []
        for token, _ in reported:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(p.logprob) for _, p in reported],
            "top_logprobs": [self._top(text, p) for text, (_, p) in zip(texts, reported, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, chosen: str, logprobs: TokenLogprobs) -> dict[str, float]:
        """Likely tokens and the chosen one, by their texts; of several with the same text, the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in logprobs.top:
            top.setdefault(self._text(token_id), _finite(logprob))
        top.setdefault(chosen, _finite(logprobs.logprob))
        return top

    def _text(self, token_id: int) -> str:
        """The text of one token; special ones by their own."""
        if self._tokenizer is None:
            return str(token_id)
        special = self._tokenizer.special_texts.get(token_id)
        return self._tokenizer.decode([token_id]) if special is None else special


class ChatReply(Reply):
    """The same for chats."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)
            for index in range(len(self._tokens))
        ]

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, index: int, tokens: Ordered[Token]) -> dict[str, Any] | None:
        content = [
            {**self._entry(t.token_id, p.logprob), "top_logprobs": [self._entry(i, x) for i, x in p.top]}
            for t, p in ((t, t.logprobs) for t in tokens)
            if isinstance(p, TokenLogprobs)
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API writes this for tokens that are impossible."""
    return max(logprob, -9999.0)


def server_sent(event: dict[str, Any] | bytes) -> bytes:
    """One event of a stream; bytes are taken as they are."""
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event, allow_nan=False).encode()) + b"\n\n"


def error_body(message: str, kind: str, code: str | int | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def origin(error: BaseException) -> str:
    """Type of an error and where it was raised; its message may hold what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
