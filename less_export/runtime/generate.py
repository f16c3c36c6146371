"""Generation over any backend: prefill in chunks, decode, sampling, stop conditions, streaming.

A prompt of n tokens is fed as chunk, chunk, ..., remainder, whatever runs beside it, so that the tokens
a row evicts, and with them its text, do not depend on its batch mates.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .backend import Backend, RowState
from .sampling import SamplingParams, sample
from .tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Token:
    """One new token of prompt ``row``.

    ``text`` is what became certain with it: "" inside a character or what may be a stop string, and
    all that was held back with the last token, the one that has a ``finish_reason``.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    token_ids: new tokens only, the eos token or those of the stop string included.
    text: continues the prompt (leading space included); no special tokens, ends before the stop string.
    finish_reason: "eos", "stop" or "length" (max_new_tokens, or the longest sequence the model takes).
    prompt_tokens: tokens of the prompt, without its prefix.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class Timing:
    """Seconds and tokens of a run, all rows together, without the time its consumer takes.

    The first token of a row comes out of prefill; decode counts the others.
    """

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, 0 before there are any."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second, 0 before there are any."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Generator:
    """Generates with ``backend``, whose rows it takes over: each run starts them afresh.

    Args:
        backend: open or not; closing it stays with the caller.
        tokenizer: needed for text prompts, stop strings and text in the results.
        eos_ids: tokens that end a generation; default the tokenizer's.

    ``timing`` holds the figures of the latest run.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | None = None, *, eos_ids: Sequence[int] | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        own = tokenizer.eos_ids if tokenizer else ()
        self.eos_ids = frozenset(own if eos_ids is None else eos_ids)
        self.timing = Timing()
        self._turn = object()

    # ------------------------------------------------------------ public

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        prefix: RowState | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Continue every prompt; more prompts than ``max_batch`` run group after group.

        Args:
            prompts: texts, or lists of token ids.
            params: how to sample and when to stop; default greedy, 128 tokens.
            prefix: a state from :meth:`prefill` (or ``RowState.load``) that every prompt continues: its
                tokens follow the prefix's, without a bos token of their own.
            overrides: fields of ``params`` to replace, such as ``max_new_tokens=20``.

        Raises:
            UsageError: an empty or too long prompt, text without a tokenizer, impossible parameters; all
                before anything runs.
            BackendError: ``prefix`` belongs to another export, or the backend fails.
        """
        tokens: list[list[Token]] = [[] for _ in prompts]
        rows = self._rows(prompts, params, prefix, overrides)
        for token in self._run(rows, prefix):
            tokens[token.row].append(token)
        return [
            Generation(
                token_ids=tuple(t.token_id for t in row),
                text="".join(t.text for t in row),
                finish_reason=row[-1].finish_reason or "length",
                prompt_tokens=len(start.prompt),
            )
            for row, start in zip(tokens, rows, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        prefix: RowState | None = None,
        **overrides: Any,
    ) -> Iterator[Token]:
        """The tokens of :meth:`generate` as they come, those of one step in the order of the prompts.

        Arguments are checked now, the run starts with the first token asked for. Starting another run
        before this one is done ends it with a :class:`UsageError`.
        """
        return self._run(self._rows(prompts, params, prefix, overrides), prefix)

    def prefill(self, prompt: Prompt, prefix: RowState | None = None) -> RowState:
        """The state after ``prefix`` and ``prompt``, to continue any number of times.

        It holds no logits, so a continuation needs at least one token of its own: leave the last ones
        of a shared text to the prompts.
        """
        if prefix is not None:
            prefix.check(self.backend.contract, self.backend.identity)
        ids = self._encode(prompt, prefix, room=0)
        self.timing = Timing()
        self._turn = object()
        self._start(1, prefix)
        self._prefill([ids])
        return self.backend.read_row(0)

    # ------------------------------------------------------------ before the run

    def _rows(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None,
        prefix: RowState | None,
        overrides: dict[str, Any],
    ) -> list[_Row]:
        params = (params or SamplingParams()).with_overrides(**overrides)
        if isinstance(prompts, str) or any(isinstance(p, int | np.integer) for p in prompts):
            raise UsageError("prompts must be a list of prompts: put a single one into a list")
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer: stop by eos_ids instead")
        if prefix is not None:
            prefix.check(self.backend.contract, self.backend.identity)
        limit = self.backend.contract.token_limit()
        rows = []
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt, prefix, room=1)
            seen = len(ids) + (prefix.length if prefix else 0)
            most = params.max_new_tokens if limit is None else min(params.max_new_tokens, limit - seen)
            text = _Text(self.tokenizer, ids, params.stop) if self.tokenizer else None
            eos = frozenset() if params.ignore_eos else self.eos_ids
            rows.append(_Row(index, ids, params, params.generator(index), most, eos, text))
        return rows

    def _encode(self, prompt: Prompt, prefix: RowState | None, room: int) -> list[int]:
        """Token ids of a prompt that leaves ``room`` for more, checked."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("text prompts need a tokenizer: pass token ids instead (--token-ids)")
            ids = self.tokenizer.encode(prompt, special=prefix is None) if prompt else []
        else:
            try:
                ids = [operator.index(i) for i in prompt]
            except TypeError:
                raise UsageError("a prompt must be a text or a list of token ids (whole numbers)") from None
        if not ids:
            raise UsageError(
                "a prompt is empty: give it at least one token"
                if prefix is None
                else "a continuation is empty: it needs at least one token after its prefix"
            )
        contract = self.backend.contract
        if min(ids) < 0 or max(ids) >= contract.vocab_size:
            raise UsageError(f"token ids must lie in 0..{contract.vocab_size - 1}: is this the model's tokenizer?")
        limit, length = contract.token_limit(), len(ids) + (prefix.length if prefix else 0)
        if limit is not None and length + room > limit:
            new = " and its new tokens do" if room else " does"
            raise UsageError(
                f"a prompt of {length} tokens{new} not fit into the {limit} that this artifact takes: "
                "shorten it, or export with a larger --context or an evicting --policy"
            )
        return ids

    # ------------------------------------------------------------ the run

    def _run(self, rows: list[_Row], prefix: RowState | None) -> Iterator[Token]:
        self.timing = Timing()
        turn = self._turn = object()
        size = self.backend.contract.max_batch
        for begin in range(0, len(rows), size):
            self._check_turn(turn)
            group = rows[begin : begin + size]
            self._start(len(group), prefix)
            logits = self._prefill([r.prompt for r in group])
            yield from [r.accept(sample(x, r.params, r.rng)) for r, x in zip(group, logits, strict=True)]
            while any(r.active for r in group):
                self._check_turn(turn)
                yield from self._decode(group)

    def _check_turn(self, turn: object) -> None:
        if self._turn is not turn:
            raise UsageError("another run has started on this generator: finish a stream before the next")

    def _start(self, rows: int, prefix: RowState | None) -> None:
        if self.backend.batch != rows:
            self.backend.open(rows)
        elif prefix is None:
            self.backend.reset_rows(range(rows))
        if prefix is not None:
            for row in range(rows):
                self.backend.write_row(row, prefix)

    def _prefill(self, prompts: list[list[int]]) -> npt.NDArray[np.float32]:
        """Feed the prompts; returns the logits [B, V] after the last token of each."""
        contract = self.backend.contract
        begin_time = time.perf_counter()
        last = np.empty((len(prompts), contract.vocab_size), np.float32)
        for begin in range(0, max(map(len, prompts)), contract.chunk):
            pieces = [p[begin : begin + contract.chunk] for p in prompts]
            new = np.array([len(p) for p in pieces])
            width = int(new.max())
            if self.backend.fixed_chunk and width > 1:
                width = contract.chunk
            ids = np.zeros((len(prompts), width), np.int64)
            for row, piece in enumerate(pieces):
                ids[row, : len(piece)] = piece
            logits = self.backend.step(ids, new)
            for row, piece in enumerate(pieces):
                if piece:
                    last[row] = logits[row, len(piece) - 1 if contract.logits == "all" else 0]
        self.timing.prefill_seconds += time.perf_counter() - begin_time
        self.timing.prefill_tokens += sum(map(len, prompts))
        return last

    def _decode(self, rows: list[_Row]) -> list[Token]:
        """One token for every row that is not done; the others are parked."""
        begin_time = time.perf_counter()
        ids = np.array([[r.token_ids[-1]] for r in rows])
        logits = self.backend.step(ids, np.array([int(r.active) for r in rows]))
        tokens = [r.accept(sample(x, r.params, r.rng)) for r, x in zip(rows, logits[:, 0], strict=True) if r.active]
        self.timing.decode_seconds += time.perf_counter() - begin_time
        self.timing.decode_tokens += len(tokens)
        return tokens


@dataclass
class _Row:
    """One prompt on its way; ``most`` is how many tokens it may get."""

    index: int
    prompt: list[int]
    params: SamplingParams
    rng: np.random.Generator
    most: int
    eos_ids: frozenset[int]
    text: _Text | None
    token_ids: list[int] = field(default_factory=list)
    active: bool = True

    def accept(self, token_id: int) -> Token:
        self.token_ids.append(token_id)
        reason: FinishReason | None = None
        text, stopped = "", False
        if token_id in self.eos_ids:
            reason = "eos"
        elif self.text:
            text, stopped = self.text.push(token_id)
        if stopped:
            reason = "stop"
        elif reason is None and len(self.token_ids) >= self.most:
            reason = "length"
        if reason is not None:
            self.active = False
            if self.text and not stopped:
                text += self.text.finish()
        return Token(self.index, token_id, text, reason)


class _Text:
    """The text of a row, without what may still turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream(prompt)
        self._stop = stop
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop string was completed (the text ends before it)."""
        return self._scan(self._stream.push(token_id))

    def finish(self) -> str:
        """The rest, when no token follows."""
        text, _ = self._scan(self._stream.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _scan(self, piece: str) -> tuple[str, bool]:
        text = self._held + piece
        self._held = ""
        # The stop string that is complete first wins, however the text is cut into tokens.
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if found:
            return text[: min(found)[1]], True
        held = max((_overlap(text, s) for s in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, shorter than ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
