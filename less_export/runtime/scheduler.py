"""Continuous batching: sequences come and go between steps over the rows of one backend.

A decode step runs exactly the rows that decode. Where the backend takes rows by index, a sequence keeps its row from
its prompt to its end. Elsewhere the sequences that decode have rows 0 to n - 1, and a row that becomes free is filled
by the last of them; prompts are fed in the rows behind them.

Prompts are fed in pieces of ``piece`` tokens whatever else runs, because what a row evicts depends on how its prompt
was cut. Pieces alternate with decode steps, so that those that decode wait for one piece at most between two tokens.
The prompts take turns, piece by piece: a short one does not wait for the whole of a long one. Sequences with the same
prompt are prefilled once, if the later ones get a row in time, and the row is copied.

A scheduler starts no thread, reads no clock but for its figures, and does the same at the same calls.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .backend import Backend
from .feeding import feed
from .prefill import Prefill
from .sampler import KeptLogits, choose_all
from .sequence import Sequence, Token


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


@dataclass(frozen=True)
class Event:
    """A new token of a sequence, or the error that ended it.

    The last event of a sequence has an error, or a token with a finish reason; its row is free by then.
    """

    sequence: Sequence
    token: Token | None = None
    error: Exception | None = None


class Scheduler:
    """Runs sequences over the rows of ``backend``.

    Args:
        backend: nothing else may use its rows meanwhile; opened by :meth:`open` or the first step.
        rows: most sequences that run at a time; default all that the artifact takes.
        piece: tokens of a prompt that are fed at a time; default and at most the artifact's chunk.

    ``timing`` adds up over the scheduler's life.

    Raises:
        UsageError: ``rows`` or ``piece`` out of range.
    """

    def __init__(self, backend: Backend, *, rows: int | None = None, piece: int | None = None) -> None:
        contract = backend.contract
        self.backend = backend
        self.rows = contract.max_batch if rows is None else rows
        self.piece = contract.chunk if piece is None else piece
        if not 1 <= self.rows <= contract.max_batch:
            raise UsageError(
                f"this artifact takes 1 to {contract.max_batch} rows (--max-batch at export), not {self.rows}"
            )
        if not 1 <= self.piece <= contract.chunk:
            raise UsageError(
                f"this artifact takes prompts in pieces of 1 to {contract.chunk} tokens (--chunk at export), "
                f"not {self.piece}"
            )
        self.timing = Timing()
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Prefill] = deque()  # the next one to feed first
        self._decoding: list[Sequence] = []  # by row, unless the backend takes rows by index
        self._held: dict[Sequence, Token] = {}  # last tokens of sequences that are fed once more for their state
        self._lost: list[Event] = []  # errors of sequences whose row could not be moved
        self._revision: int | None = None

    # ------------------------------------------------------------ public

    @property
    def waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a row, or with one that waits for a prompt which they share."""
        return len(self._decoding) + sum(len(p.sequences) for p in self._prefilling)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self._lost)

    def open(self) -> None:
        """Open the backend's rows, if this was not done."""
        if self._revision is None:
            self.backend.open(self.rows)
            self._revision = self.backend.revision

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; it gets a row in the order of submission."""
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence without further events, and free its row at once; False if it is not here (any more)."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif (prefill := next((p for p in self._prefilling if sequence in p.sequences), None)) is not None:
            if not prefill.drop(sequence):
                self._prefilling.remove(prefill)
        elif sequence in self._decoding:
            self._undisturbed()
            self._release([sequence])
            self._revision = self.backend.revision
        else:
            return False
        sequence.row = None
        return True

    def step(self) -> list[Event]:
        """Feed at most one piece of a prompt, then decode one token of every sequence whose prompt was fed.

        What fails ends the sequences that it touches, with an error event each, and no others.

        Raises:
            UsageError: something else has used the backend's rows. BackendError: they cannot be opened.
        """
        self._undisturbed()
        self.open()
        try:
            return self._advance()
        finally:
            self._revision = self.backend.revision

    # ------------------------------------------------------------ a step

    def _undisturbed(self) -> None:
        if self._revision is not None and self.backend.revision != self._revision:
            raise UsageError("another run has started on this backend: finish a stream before the next")

    def _advance(self) -> list[Event]:
        events = self._admit()
        if self._prefilling:
            events += self._prefill(self._prefilling.popleft())
        if self._decoding:
            events += self._decode()
        lost, self._lost = self._lost, []
        return events + lost

    def _admit(self) -> list[Event]:
        """Give every free row to the next sequence; one whose prompt is being fed waits for it, and has a row then."""
        failed = []
        while self._waiting and self.running < self.rows:
            sequence = self._waiting.popleft()
            same = next((p for p in self._prefilling if p.is_for(sequence)), None)
            if same is not None:
                same.sequences.append(sequence)
                continue
            row = self._free_row()
            try:
                if sequence.prefix is None:
                    self.backend.reset_rows([row])
                else:
                    self.backend.write_row(row, sequence.prefix)
            except Exception as error:  # a state that does not fit
                failed.append(Event(sequence, error=error))
                continue
            sequence.row = row
            self._prefilling.append(Prefill(row, [sequence]))
        return failed

    def _free_row(self, *but: int) -> int:
        """The first row of no sequence, and none of these."""
        taken = self._taken() | {*but}
        return next(row for row in range(self.rows) if row not in taken)

    def _taken(self) -> set[int | None]:
        """The rows that decode, and those in which prompts are fed."""
        return {s.row for s in self._decoding} | {p.row for p in self._prefilling}

    def _prefill(self, prefill: Prefill) -> list[Event]:
        """Feed the next piece; the last one gives the first token and joins the row to those that decode."""
        sequence, row = prefill.leader, prefill.row
        piece = sequence.prompt[sequence.fed : sequence.fed + self.piece]
        begin = time.perf_counter()
        try:
            logits = feed(self.backend, [piece], slice(row, row + 1))
        except Exception as error:
            return [self._lose(prefill, error)]
        finally:
            self.timing.prefill_seconds += time.perf_counter() - begin
        sequence.fed += len(piece)
        self.timing.prefill_tokens += len(piece)
        if sequence.fed < len(sequence.prompt):
            event = _observed(self.backend, Event(sequence))
            if event.error is None or prefill.drop(sequence):
                self._prefilling.append(prefill)
            return [] if event.error is None else [event]
        begin = time.perf_counter()
        joined, failed = self._join(prefill)
        events = accept(joined, logits[[0] * len(joined)])  # which waits for the piece where the backend did not
        self.timing.prefill_seconds += time.perf_counter() - begin
        return failed + self._settle(events)

    def _lose(self, prefill: Prefill, error: Exception) -> Event:
        """The end of the sequence whose prompt was fed; its twins begin again."""
        sequence, *twins = prefill.sequences
        sequence.row = None
        self._waiting.extendleft(reversed(twins))
        return Event(sequence, error=error)

    def _join(self, prefill: Prefill) -> tuple[list[Sequence], list[Event]]:
        """Let the sequences of a prompt decode from its state; those that do, and the errors of the others."""
        joined: list[Sequence] = []
        failed: list[Event] = []
        source, fed = prefill.row, prefill.leader.fed
        for sequence in prefill.sequences:
            sequence.row, sequence.fed = None, fed
            sequence.prefix = None  # a state takes memory: this one is in the row
            try:
                sequence.row = self._place(source)
            except Exception as error:
                failed.append(Event(sequence, error=error))
                continue
            source = sequence.row
            self._decoding.append(sequence)
            joined.append(sequence)
        return joined, failed

    def _place(self, source: int) -> int:
        """The row in which one more sequence decodes, with the state of row ``source``: that one if it is free."""
        if not self.backend.rows_by_index:
            place = len(self._decoding)
            self._copy_to_last(source, place)
        elif source not in self._taken():
            place = source
        else:
            place = self._free_row()
            self.backend.copy_row(source, place)
        return place

    def _copy_to_last(self, source: int, place: int) -> None:
        """Copy a row to the one behind those that decode; a prompt that is fed there moves to another."""
        if source == place:
            return
        other = next((p for p in self._prefilling if p.row == place), None)
        if other is None:
            self.backend.copy_row(source, place)
            return
        # There may be no free row but `source`, so the state of the other one waits outside of the rows.
        self._prefilling.remove(other)
        try:
            state = self.backend.read_row(place)
        except Exception as error:
            self._lost.append(self._lose(other, error))
            self.backend.copy_row(source, place)
            return
        try:
            self.backend.copy_row(source, place)
            other.row = self._free_row(place)
        finally:
            try:
                self.backend.write_row(other.row, state)
                other.leader.row = other.row
                self._prefilling.appendleft(other)
            except Exception as error:
                self._lost.append(self._lose(other, error))

    def _decode(self) -> list[Event]:
        begin = time.perf_counter()
        sequences = list(self._decoding)
        ids = [[s.token_ids[-1]] for s in sequences]
        try:
            logits = feed(self.backend, ids, [s.row for s in sequences if s.row is not None])
        except Exception as error:
            self._held.clear()
            self._decoding.clear()
            for sequence in sequences:
                sequence.row = None
            return [Event(s, error=error) for s in sequences]
        active = [i for i, s in enumerate(sequences) if s not in self._held]
        wanted = logits if len(active) == len(sequences) else logits[active]
        events = [Event(s, token) for s, token in self._held.items()]
        events += accept([sequences[i] for i in active], wanted)
        self.timing.decode_seconds += time.perf_counter() - begin
        self.timing.decode_tokens += sum(e.token is not None for e in events[len(self._held) :])
        return self._settle(events)

    def _settle(self, events: list[Event]) -> list[Event]:
        """Free the rows of sequences that have ended; those whose state lacks their last token run once more."""
        settled = []
        for event in (_observed(self.backend, e) for e in events):
            sequence, token = event.sequence, event.token
            unseen = sequence.keep_state and sequence not in self._held
            if unseen and token is not None and token.finish_reason == "length":
                self._held[sequence] = token
            else:
                settled.append(self._with_state(event))
        self._release(e.sequence for e in settled if e.error is not None or not e.sequence.active)
        return settled

    def _with_state(self, event: Event) -> Event:
        """The event, once a sequence that ends with it has its state; or the error that stands against it."""
        sequence = event.sequence
        if event.error is None and sequence.keep_state and not sequence.active:
            assert sequence.row is not None
            try:
                sequence.state = self.backend.read_row(sequence.row)
            except Exception as error:
                return Event(sequence, error=error)
        return event

    def _release(self, sequences: Iterable[Sequence]) -> None:
        """Free rows of decoding sequences."""
        if not self.backend.rows_by_index:
            self._fill_gaps(sequences)
            return
        for sequence in sequences:
            self._decoding.remove(sequence)
            self._leave(sequence)

    def _fill_gaps(self, sequences: Iterable[Sequence]) -> None:
        """Free rows of decoding sequences; the last ones fill the gaps, or end if their state cannot be copied."""
        for sequence in sorted(sequences, key=lambda s: s.row or 0, reverse=True):
            row = sequence.row
            assert row is not None
            while True:
                last = self._decoding.pop()
                if last is sequence:
                    break
                try:
                    self.backend.copy_row(len(self._decoding), row)
                except Exception as error:
                    self._leave(last)
                    self._lost.append(Event(last, error=error))
                    continue
                self._decoding[row], last.row = last, row
                break
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        sequence.row = None
        self._held.pop(sequence, None)


def _observed(backend: Backend, event: Event) -> Event:
    """The event, once the observer of its sequence has seen the row; or the error that stands against it."""
    sequence = event.sequence
    if event.error is None and sequence.observer is not None and sequence.row is not None:
        try:
            sequence.observer(backend, sequence.row)
        except Exception as error:
            return Event(sequence, error=error)
    return event


def accept(sequences: Ordered[Sequence], logits: npt.NDArray[np.float32] | KeptLogits) -> list[Event]:
    """Choose the next token of every sequence by its logits [B, V]."""
    choices = choose_all(logits, [s.sampler for s in sequences], [s.token_ids for s in sequences])
    events = []
    for sequence, choice in zip(sequences, choices, strict=True):
        if isinstance(choice, Exception):
            events.append(Event(sequence, error=choice))
            continue
        try:
            events.append(Event(sequence, sequence.accept(choice)))
        except Exception as error:  # text that the tokenizer cannot decode
            events.append(Event(sequence, error=error))
    return events
