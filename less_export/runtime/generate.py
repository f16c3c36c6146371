"""Generation over any backend: prefill in chunks, decode, sampling, stop conditions, streaming.

Every prompt is cut into full chunks and a remainder, whatever else is in the batch, so that what a row
evicts, and therefore its text, does not depend on the other rows.
"""

from __future__ import annotations

import collections.abc
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .backend import Backend, RowState
from .sampling import SamplingParams, sample
from .stop_strings import StoppableText
from .tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
Prompt = str | Iterable[int]


@dataclass(frozen=True)
class Token:
    """One new token of prompt ``row``.

    ``text`` is the text that became certain with it: "" inside a character or a possible stop string. The
    last token of a row has a ``finish_reason`` and brings all text that was held back.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Args:
        token_ids: the new tokens, including the eos token or those of the stop string.
        text: continues the prompt (including a leading space), without special tokens; ends before the stop string.
        finish_reason: "eos", "stop" or "length" (max_new_tokens, or the longest sequence the model takes).
        prompt_tokens: number of tokens of the prompt, without its prefix.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class Timing:
    """Seconds and tokens of a run over all rows, without the time that the consumer of a stream takes.

    Prefill produces the first token of a row; decode counts the others.
    """

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second; 0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Generator:
    """Generates with ``backend``; each run resets its rows.

    Args:
        backend: open or not; the caller closes it.
        tokenizer: needed for text prompts, stop strings and text in the results.
        eos_ids: tokens that end a generation; default the tokenizer's.

    ``timing`` holds the figures of the latest run.

    A generator, like its backend, belongs to one thread at a time: :meth:`generate` and :meth:`prefill` hold the
    backend until they return, a stream holds it while it computes a token. Meanwhile every other thread gets a
    :class:`UsageError`: make a generator with its own backend per thread, or take turns.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | None = None, *, eos_ids: Sequence[int] | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        if eos_ids is None:
            eos_ids = tokenizer.eos_ids if tokenizer else ()
        self.eos_ids = frozenset(_token_ids(eos_ids, "eos_ids must be a list of token ids (whole numbers)"))
        self.timing = Timing()

    # ------------------------------------------------------------ public

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        prefix: RowState | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Continue every prompt; more prompts than ``max_batch`` run in groups, one after the other.

        Args:
            prompts: texts, or lists of token ids; arrays, tensors and iterators of these are fine too.
            params: how to sample and when to stop; default greedy, 128 tokens.
            prefix: a state from :meth:`prefill` (or ``RowState.load``) that every prompt continues. No bos
                token is added to the prompts then.
            overrides: fields of ``params`` to replace, such as ``max_new_tokens=20``.

        Raises:
            UsageError: an empty or too long prompt, text without a tokenizer, invalid parameters; raised
                before anything runs.
            BackendError: ``prefix`` belongs to another export, or the backend fails.
        """
        rows = self._rows(prompts, params, prefix, overrides)
        tokens: list[list[Token]] = [[] for _ in rows]
        with self.backend.exclusive():
            for token in self._run(rows, prefix):
                tokens[token.row].append(token)
        return [
            Generation(
                token_ids=tuple(t.token_id for t in row_tokens),
                text="".join(t.text for t in row_tokens),
                finish_reason=row_tokens[-1].finish_reason or "length",
                prompt_tokens=len(row.prompt),
            )
            for row_tokens, row in zip(tokens, rows, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        prefix: RowState | None = None,
        **overrides: Any,
    ) -> Iterator[Token]:
        """Yield the tokens of :meth:`generate` one by one; those of one step come in the order of the prompts.

        Arguments are checked at the call; the run starts when the first token is requested. Anything else that
        uses the backend's rows before this run has finished, such as another run, ends it with a
        :class:`UsageError`.
        """
        return _Stream(self.backend, self._run(self._rows(prompts, params, prefix, overrides), prefix))

    def prefill(self, prompt: Prompt, prefix: RowState | None = None) -> RowState:
        """Return the state after ``prefix`` and ``prompt``, which can be continued any number of times.

        It holds no logits, so every continuation needs at least one token: leave the last tokens of a
        shared text to the prompts.
        """
        self._check_prefix(prefix)
        ids = self._encode(prompt, prefix, new_tokens=0)
        with self.backend.exclusive():
            self.timing = Timing()
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
        if params is not None and not isinstance(params, SamplingParams):
            raise UsageError(f"params must be SamplingParams, not {type(params).__name__}")
        params = (params or SamplingParams()).with_overrides(**overrides)
        prompts = _items(prompts, "prompts must be a list of prompts: put a single one into a list")
        if any(isinstance(p, int | np.integer) for p in prompts):
            raise UsageError("prompts must be a list of prompts: put a single one into a list")
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer: stop by eos_ids instead")
        self._check_prefix(prefix)
        limit = self.backend.contract.token_limit()
        rows = []
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt, prefix, new_tokens=1)
            length = len(ids) + (prefix.length if prefix else 0)
            max_new_tokens = params.max_new_tokens if limit is None else min(params.max_new_tokens, limit - length)
            text = StoppableText(self.tokenizer, ids, params.stop) if self.tokenizer else None
            eos = frozenset() if params.ignore_eos else self.eos_ids
            rows.append(_Row(index, ids, params, params.generator(index), max_new_tokens, eos, text))
        return rows

    def _check_prefix(self, prefix: RowState | None) -> None:
        if prefix is None:
            return
        if not isinstance(prefix, RowState):
            raise UsageError(f"prefix must be a RowState, not {type(prefix).__name__}: RowState.load reads a file")
        prefix.check(self.backend.contract, self.backend.identity)

    def _encode(self, prompt: Prompt, prefix: RowState | None, new_tokens: int) -> list[int]:
        """Token ids of a prompt, checked to leave space for ``new_tokens`` more."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("text prompts need a tokenizer: pass token ids instead (--token-ids)")
            ids = self.tokenizer.encode(prompt, special=prefix is None) if prompt else []
        else:
            ids = _token_ids(prompt, "a prompt must be a string or a list of token ids (whole numbers)")
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
        if limit is not None and length + new_tokens > limit:
            does = " and its new tokens do" if new_tokens else " does"
            raise UsageError(
                f"a prompt of {length} tokens{does} not fit into the {limit} that this artifact takes: "
                "shorten it, or export with a larger --context or an evicting --policy"
            )
        return ids

    # ------------------------------------------------------------ the run

    def _run(self, rows: list[_Row], prefix: RowState | None) -> collections.abc.Generator[Token]:
        self.timing = Timing()
        size = self.backend.contract.max_batch
        revision = self.backend.revision
        for begin in range(0, len(rows), size):
            self._check_undisturbed(revision)
            group = rows[begin : begin + size]
            self._start(len(group), prefix)
            logits = self._prefill([r.prompt for r in group])
            revision = self.backend.revision
            yield from [r.accept(sample(x, r.params, r.rng)) for r, x in zip(group, logits, strict=True)]
            while any(r.active for r in group):
                self._check_undisturbed(revision)
                tokens = self._decode(group)
                revision = self.backend.revision
                yield from tokens

    def _check_undisturbed(self, revision: int) -> None:
        if self.backend.revision != revision:
            raise UsageError("another run has started on this backend: finish a stream before the next")

    def _start(self, rows: int, prefix: RowState | None) -> None:
        if self.backend.batch != rows:
            self.backend.open(rows)
        elif prefix is None:
            self.backend.reset_rows(range(rows))
        if prefix is not None:
            for row in range(rows):
                self.backend.write_row(row, prefix)

    def _prefill(self, prompts: list[list[int]]) -> npt.NDArray[np.float32]:
        """Feed the prompts and return the logits [B, V] after the last token of each."""
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
        """Generate one token for every active row; the others are parked."""
        begin_time = time.perf_counter()
        ids = np.array([[r.token_ids[-1]] for r in rows])
        logits = self.backend.step(ids, np.array([int(r.active) for r in rows]))
        tokens = [r.accept(sample(x, r.params, r.rng)) for r, x in zip(rows, logits[:, 0], strict=True) if r.active]
        self.timing.decode_seconds += time.perf_counter() - begin_time
        self.timing.decode_tokens += len(tokens)
        return tokens


def _items(values: Any, message: str) -> list[Any]:
    """What an ordered collection holds: a list, an iterator, an array or tensor; refused with ``message`` if none."""
    if callable(getattr(values, "tolist", None)):  # numpy, torch
        values = values.tolist()
    ordered = isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping | AbstractSet)
    if not ordered:
        raise UsageError(message)
    return list(values)


def _token_ids(values: Any, message: str) -> list[int]:
    ids = _items(values, message)
    try:
        if any(isinstance(i, bool) for i in ids):
            raise TypeError
        return [operator.index(i) for i in ids]
    except TypeError:
        raise UsageError(message) from None


class _Stream(Iterator[Token]):
    """The tokens of a run; holds the backend while it computes, not between tokens."""

    def __init__(self, backend: Backend, tokens: collections.abc.Generator[Token]) -> None:
        self._backend = backend
        self._tokens = tokens

    def __next__(self) -> Token:
        with self._backend.exclusive():
            return next(self._tokens)

    def close(self) -> None:
        """End the run."""
        with self._backend.exclusive():
            self._tokens.close()


@dataclass
class _Row:
    """A prompt that is being continued."""

    index: int
    prompt: list[int]
    params: SamplingParams
    rng: np.random.Generator
    max_new_tokens: int
    eos_ids: frozenset[int]
    text: StoppableText | None
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
        elif reason is None and len(self.token_ids) >= self.max_new_tokens:
            reason = "length"
        if reason is not None:
            self.active = False
            if self.text and not stopped:
                text += self.text.finish()
        return Token(self.index, token_id, text, reason)
