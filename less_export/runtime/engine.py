"""A scheduler on a thread of its own, for programs that serve many at a time."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from typing import Any

from ..errors import BackendError, UsageError
from .backend import RowState
from .generate import Generator
from .sampling import SamplingParams
from .scheduler import Event, Scheduler, Timing
from .sequence import Prompt, Sequence, SequenceFactory, Token

_LOG = logging.getLogger(__name__)
#: Called on the engine's thread with every event of a sequence; must not block.
Sink = Callable[[Event], None]


class QueueFullError(UsageError):
    """More sequences wait than the engine takes: try again later."""


class StoppedError(BackendError):
    """The engine takes no more work: it drains, has stopped or has failed."""


class Engine:
    """Runs sequences of many callers over the rows of one model.

    Args:
        model: what :func:`less_export.open_bundle` returns. Its backend belongs to the engine's thread until the engine
            has stopped; every other use gets a :class:`UsageError`.
        rows: most sequences that run at a time; default all that the artifact takes.
        piece: tokens of a prompt that are fed between two tokens of the others; default the artifact's chunk.
        max_queue: most sequences that wait for a row.

    All methods may be called from any thread. ``counts`` holds how many sequences were ``accepted``, ``rejected``
    (the queue was full), ``cancelled``, ``failed``, and ``finished_eos``, ``finished_stop`` and ``finished_length``.

    Raises:
        UsageError: ``rows`` or ``piece`` out of range. BackendError: not enough memory.
    """

    def __init__(
        self, model: Generator, *, rows: int | None = None, piece: int | None = None, max_queue: int = 64
    ) -> None:
        if max_queue < 0:
            raise UsageError(f"max_queue must be at least 0, not {max_queue}")
        self.backend = model.backend
        self.tokenizer = model.tokenizer
        self.max_queue = max_queue
        self.counts: Counter[str] = Counter()
        self._factory = SequenceFactory(model.backend, model.tokenizer, sorted(model.eos_ids))
        self._scheduler = Scheduler(model.backend, rows=rows, piece=piece)
        self._scheduler.open()
        self._wake = threading.Condition()
        # Guarded by _wake: sequences that were accepted and have not ended, those the scheduler has not seen, and those
        # to cancel.
        self._sinks: dict[Sequence, Sink] = {}
        self._arrived: list[Sequence] = []
        self._cancelled: set[Sequence] = set()
        self._draining = self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="less-export engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ facts

    @property
    def rows(self) -> int:
        """Most sequences that run at a time."""
        return self._scheduler.rows

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return max(0, len(self._sinks) - self.running)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return self._factory.eos_ids

    @property
    def timing(self) -> Timing:
        """Seconds and tokens so far."""
        return self._scheduler.timing

    @property
    def accepts(self) -> bool:
        """Whether it takes new work, which it does until it drains, stops or fails."""
        return self._thread.is_alive() and not self._draining

    @property
    def full(self) -> bool:
        """Whether it would take new work, but rows and queue have no space."""
        return self.accepts and len(self._sinks) >= self.rows + self.max_queue

    # ------------------------------------------------------------ work

    def sequence(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        index: int = 0,
        prefix: RowState | None = None,
        keep_state: bool = False,
        **overrides: Any,
    ) -> Sequence:
        """A sequence to :meth:`submit`; the same parameters, seed and ``index`` give the same tokens.

        Args:
            prompt: text or token ids.
            params: how to sample and when to stop; ``overrides`` replace its fields.
            prefix: a state that the prompt continues.
            keep_state: whether the finished sequence is to have its ``state``.

        Raises:
            UsageError: an empty or too long prompt, text without a tokenizer, invalid parameters.
            BackendError: ``prefix`` belongs to another export.
        """
        checked = self._factory.params(params, overrides)
        self._factory.check_prefix(prefix)
        return self._factory.sequence(prompt, checked, index=index, prefix=prefix, keep_state=keep_state)

    def check_state(self, state: RowState) -> None:
        """Raise :class:`BackendError` unless ``state`` is one of this model's."""
        self._factory.check_prefix(state)

    def submit(self, sequences: Ordered[Sequence], sink: Sink) -> None:
        """Queue all of ``sequences`` or none; ``sink`` gets their events. A sequence runs once.

        Raises:
            UsageError: a sequence was submitted before.
            QueueFullError: rows and queue have no space for all of them.
            StoppedError: the engine takes no more work.
        """
        with self._wake:
            if not self.accepts:
                raise StoppedError("this engine takes no more work: it is stopping, or has failed")
            if len(set(sequences)) < len(sequences) or any(s.submitted for s in sequences):
                raise UsageError("a sequence was submitted before: make another one")
            if len(self._sinks) + len(sequences) > self.rows + self.max_queue:
                self.counts["rejected"] += len(sequences)
                raise QueueFullError(
                    f"{len(self._sinks)} requests are running or waiting, and this engine takes "
                    f"{self.rows + self.max_queue}: try again later"
                )
            self.counts["accepted"] += len(sequences)
            self._sinks.update(dict.fromkeys(sequences, sink))
            self._arrived += sequences
            for sequence in sequences:
                sequence.submitted = True
            self._wake.notify_all()

    def cancel(self, sequences: Ordered[Sequence]) -> None:
        """End ``sequences``; their rows are free before the next step.

        The sink gets no further events, except one that it is being called with.
        """
        with self._wake:
            self._cancelled.update(s for s in sequences if s in self._sinks)
            self._wake.notify_all()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Token]:
        """Yield the tokens of one sequence; ``options`` as for :meth:`sequence`. Closing the iterator cancels it.

        Raises:
            LessExportError: as :meth:`sequence` and :meth:`submit` do, at the first token; or what ended the sequence.
        """
        sequence = self.sequence(prompt, params, **options)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit([sequence], events.put)
        try:
            while True:
                event = events.get()
                if event.error is not None:
                    raise event.error
                assert event.token is not None
                yield event.token
                if event.token.finish_reason is not None:
                    return
        finally:
            self.cancel([sequence])

    # ------------------------------------------------------------ the end

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new work, finish what was accepted, and stop; False if ``timeout`` seconds did not suffice."""
        with self._wake:
            self._draining = True
            self._wake.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop before the next step; sequences that have not ended get a :class:`StoppedError`."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            with self.backend.exclusive():
                while self._next_work():
                    if self._scheduler.busy:
                        for event in self._scheduler.step():
                            self._deliver(event)
                            del event  # its sequence may have a state, and the next step may be hours away
        except BaseException as error:
            self._failure = error
            _LOG.error("the engine has failed", exc_info=error)
        finally:
            self._end_all()

    def _next_work(self) -> bool:
        """Wait for something to do, and pass it to the scheduler; False at the end."""
        with self._wake:
            while not (self._arrived or self._cancelled or self._scheduler.busy or self._draining):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
            for sequence in cancelled:
                self._sinks.pop(sequence, None)
            self.counts["cancelled"] += len(cancelled)
            for sequence in arrived:
                if sequence not in cancelled:
                    self._scheduler.submit(sequence)
            if self._stopping or (self._draining and not self._sinks):
                return False
        for sequence in cancelled:
            self._scheduler.cancel(sequence)
        return True

    def _deliver(self, event: Event) -> None:
        sequence, token = event.sequence, event.token
        reason = None if token is None else token.finish_reason
        with self._wake:
            sink = None if sequence in self._cancelled else self._sinks.get(sequence)
            if event.error is not None or reason is not None:
                self._sinks.pop(sequence, None)
                self._cancelled.discard(sequence)
                self.counts["failed" if reason is None else f"finished_{reason}"] += 1
        if sink is not None:
            try:
                sink(event)
            except Exception:  # whatever a caller's sink raises concerns this sequence only
                self.cancel([sequence])

    def _end_all(self) -> None:
        """Tell those that wait that nothing more comes."""
        with self._wake:
            self._draining = True
            sinks, self._sinks = self._sinks, {}
            self.counts["failed"] += len(sinks)
        for sequence, sink in sinks.items():
            error = StoppedError(f"the engine has {'failed' if self._failure else 'stopped'}: start it again")
            error.__cause__ = self._failure
            with contextlib.suppress(Exception):
                sink(Event(sequence, error=error))
