"""Generation over any backend: prefill in chunks, decode, sampling, stop conditions, streaming.

Every prompt is cut into full chunks and a remainder, whatever else is in the batch, so that what a row
evicts, and therefore its text, does not depend on the other rows.
"""

from __future__ import annotations

import collections.abc
import time
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .backend import Backend, RowState
from .feeding import feed
from .sampler import TokenLogprobs
from .sampling import SamplingParams
from .scheduler import Event, Scheduler, Timing, accept
from .sequence import FinishReason, Prompt, Sequence, SequenceFactory, Token, prompt_list
from .tokenizer import Tokenizer

__all__ = ["FinishReason", "Generation", "Generator", "Prompt", "Timing", "Token"]


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Args:
        token_ids: the new tokens, including the eos token or those of the stop string.
        text: continues the prompt (including a leading space), without special tokens; ends before the stop string.
        finish_reason: "eos", "stop" or "length" (max_new_tokens, or the longest sequence the model takes).
        prompt_tokens: number of tokens of the prompt, without its prefix.
        logprobs: one for each new token, if the parameters ask for them.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None


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
        self, backend: Backend, tokenizer: Tokenizer | None = None, *, eos_ids: Ordered[int] | None = None
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self._factory = SequenceFactory(backend, tokenizer, eos_ids)
        self.eos_ids = self._factory.eos_ids
        self.timing = Timing()

    # ------------------------------------------------------------ public

    def generate(
        self,
        prompts: Ordered[Prompt],
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
        sequences = self._sequences(prompts, params, prefix, overrides)
        tokens: list[list[Token]] = [[] for _ in sequences]
        with self.backend.exclusive():
            for token in self._run(sequences):
                tokens[token.row].append(token)
        return [
            Generation(
                token_ids=tuple(t.token_id for t in row_tokens),
                text="".join(t.text for t in row_tokens),
                finish_reason=row_tokens[-1].finish_reason or "length",
                prompt_tokens=len(sequence.prompt),
                logprobs=tuple(t.logprobs for t in row_tokens if t.logprobs) or None,
            )
            for row_tokens, sequence in zip(tokens, sequences, strict=True)
        ]

    def stream(
        self,
        prompts: Ordered[Prompt],
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
        return _Stream(self.backend, self._run(self._sequences(prompts, params, prefix, overrides)))

    def prefill(self, prompt: Prompt, prefix: RowState | None = None) -> RowState:
        """Return the state after ``prefix`` and ``prompt``, which can be continued any number of times.

        It holds no logits, so every continuation needs at least one token: leave the last tokens of a
        shared text to the prompts.
        """
        self._factory.check_prefix(prefix)
        ids = self._factory.encode(prompt, prefix, new_tokens=0)
        with self.backend.exclusive():
            self.timing = Timing()
            self._start(1, prefix)
            self._prefill([ids])
            return self.backend.read_row(0)

    # ------------------------------------------------------------ the run

    def _sequences(
        self,
        prompts: Ordered[Prompt],
        params: SamplingParams | None,
        prefix: RowState | None,
        overrides: dict[str, Any],
    ) -> list[Sequence]:
        params = self._factory.params(params, overrides)
        listed = prompt_list(prompts)
        self._factory.check_prefix(prefix)
        return [self._factory.sequence(p, params, index=i, prefix=prefix) for i, p in enumerate(listed)]

    def _run(self, sequences: list[Sequence]) -> collections.abc.Generator[Token]:
        scheduler = GroupScheduler(self.backend)
        self.timing = scheduler.timing
        for sequence in sequences:
            scheduler.submit(sequence)
        while scheduler.busy:
            for event in scheduler.step():
                if event.error is not None:
                    raise event.error
                if event.token is not None:
                    yield event.token

    def _start(self, rows: int, prefix: RowState | None) -> None:
        start(self.backend, [prefix] * rows)

    def _prefill(self, prompts: list[list[int]]) -> npt.NDArray[np.float32]:
        """Feed the prompts and return the logits [B, V] after the last token of each."""
        return feed_prompts(self.backend, prompts, self.timing)


class GroupScheduler(Scheduler):
    """Runs sequences in groups of as many as the artifact has rows: they start together and keep their rows.

    Prompts of a group are fed together, one chunk of each at a time. That takes fewer steps than a scheduler's pieces,
    but the first token of a group waits for its longest prompt.
    """

    def open(self) -> None:
        """Nothing: every group opens its rows."""

    def _advance(self) -> list[Event]:
        if any(s.active for s in self._decoding):
            return self._end(self._decode_active())
        group = [self._waiting.popleft() for _ in range(min(self.rows, len(self._waiting)))]
        start(self.backend, [s.prefix for s in group])
        self._decoding = group
        return self._end(accept(group, feed_prompts(self.backend, [s.prompt for s in group], self.timing)))

    def _decode_active(self) -> list[Event]:
        """Generate one token for every active row; the others are parked."""
        begin = time.perf_counter()
        logits = feed(self.backend, [s.token_ids[-1:] if s.active else [] for s in self._decoding])
        active = [i for i, s in enumerate(self._decoding) if s.active]
        events = accept([self._decoding[i] for i in active], logits[active])
        self.timing.decode_seconds += time.perf_counter() - begin
        self.timing.decode_tokens += len(events)
        return events

    def _end(self, events: list[Event]) -> list[Event]:
        if not any(s.active for s in self._decoding):
            self._decoding = []
        return events


def start(backend: Backend, prefixes: Ordered[RowState | None]) -> None:
    """Open as many rows as there are prefixes, each with that state, or empty."""
    if backend.batch != len(prefixes):
        backend.open(len(prefixes))
    else:
        backend.reset_rows([row for row, prefix in enumerate(prefixes) if prefix is None])
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            backend.write_row(row, prefix)


def feed_prompts(backend: Backend, prompts: Ordered[list[int]], timing: Timing) -> npt.NDArray[np.float32]:
    """Feed all rows their prompts, in chunks; logits [B, V] f32 after the last token of each."""
    chunk, begin_time = backend.contract.chunk, time.perf_counter()
    last = np.empty((len(prompts), backend.contract.vocab_size), np.float32)
    for begin in range(0, max(map(len, prompts)), chunk):
        pieces = [p[begin : begin + chunk] for p in prompts]
        logits = feed(backend, pieces)
        if ended := [row for row, p in enumerate(prompts) if begin < len(p) <= begin + chunk]:
            last[ended] = logits[ended]
    timing.prefill_seconds += time.perf_counter() - begin_time
    timing.prefill_tokens += sum(map(len, prompts))
    return last


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
