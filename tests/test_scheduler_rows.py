"""The scheduler over a backend that takes rows by index: sequences keep their rows, and steps hold what decodes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from less_export.runtime.backend import Array
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory

from .scheduling import Request, play, tokens
from .test_generate import HashBackend, contract, expected


class IndexedBackend(HashBackend):
    """Takes rows by index, and notes those of each step and each copy."""

    rows_by_index = True

    def __init__(self, rows: int = 3) -> None:
        super().__init__(contract(max_batch=rows))
        self.stepped: list[list[int]] = []
        self.copied: list[tuple[int, int]] = []

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, rows: Array) -> np.ndarray:
        self.stepped.append(rows.tolist())
        return super()._step(input_ids, past_length, new_length, rows)

    def _copy_row(self, source: int, target: int) -> None:
        self.copied.append((source, target))
        super()._copy_row(source, target)


def test_a_sequence_keeps_its_row_and_nothing_is_copied() -> None:
    """Whoever ends in whatever order; the next one takes the row that became free."""
    backend = IndexedBackend()
    scheduler, factory = Scheduler(backend), SequenceFactory(backend, None, ())
    sequences = [
        factory.sequence([i + 1], SamplingParams(max_new_tokens=n), index=i) for i, n in enumerate((9, 2, 9, 4))
    ]
    for sequence in sequences:
        scheduler.submit(sequence)
    rows: dict[Sequence, set[int]] = defaultdict(set)
    got: dict[int, list[int]] = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            assert event.token is not None
            got[event.sequence.index].append(event.token.token_id)
        running = [s for s in sequences if s.row is not None]
        assert len({s.row for s in running}) == len(running)
        for sequence in running:
            assert sequence.row is not None
            rows[sequence].add(sequence.row)
    assert all(len(places) == 1 for places in rows.values())
    assert backend.copied == []
    assert [tuple(got[i]) for i in range(4)] == [expected(s.prompt, len(got[i])) for i, s in enumerate(sequences)]
    gaps = [s for s in backend.stepped if len(s) > 1 and np.diff(sorted(s)).max() > 1]
    assert gaps, "a step over rows that are not adjacent"


def test_a_decode_step_holds_what_decodes() -> None:
    """No prompt that is fed, and no free row: also where a long prompt lies between those that decode."""
    backend = IndexedBackend()
    scheduler, factory = Scheduler(backend, piece=2), SequenceFactory(backend, None, ())
    first, long, last = (
        factory.sequence(p, SamplingParams(max_new_tokens=8), index=i) for i, p in enumerate(([1], [2] * 20, [3]))
    )
    for sequence in (first, long, last):
        scheduler.submit(sequence)
    for _ in range(4):
        scheduler.step()
    assert (first.row, long.row, last.row) == (0, 1, 2)
    backend.stepped.clear()
    scheduler.step()
    assert backend.stepped == [[1], [0, 2]]
    assert scheduler.cancel(first)
    backend.stepped.clear()
    scheduler.step()
    assert backend.stepped == [[1], [2]]


@pytest.mark.parametrize("leave", [0, 1, 2])
def test_twins_decode_where_rows_are_free(leave: int) -> None:
    """The first one of a prompt stays in the row where it was fed; a copy goes to each other."""
    backend = IndexedBackend(rows=4)
    scheduler, factory = Scheduler(backend), SequenceFactory(backend, None, ())
    before = factory.sequence([9], SamplingParams(max_new_tokens=30), index=9)
    scheduler.submit(before)
    scheduler.step()
    twins = [factory.sequence([6] * 5, SamplingParams(max_new_tokens=4), index=i) for i in range(3)]
    for twin in twins:
        scheduler.submit(twin)
    scheduler.step()
    assert scheduler.cancel(twins[leave])
    got: dict[int, list[int]] = defaultdict(list)
    while any(t.active for i, t in enumerate(twins) if i != leave):
        for event in scheduler.step():
            assert event.token is not None
            got[event.sequence.index].append(event.token.token_id)
    (copy,) = backend.copied
    assert copy == (1, 2)
    for index in {0, 1, 2} - {leave}:
        assert tuple(got[index]) == expected([6] * 5, 4)


def test_rows_in_the_order_of_requests_or_not() -> None:
    """The same tokens as over adjacent rows."""
    requests = [Request((i + 1,) * (i + 1), 9 - i, i // 2, leaves=6 if i == 3 else None) for i in range(7)]
    by_index = play(Scheduler(IndexedBackend(), piece=2), requests)
    adjacent = play(Scheduler(HashBackend(contract()), piece=2), requests)
    assert {i: tokens(e) for i, e in by_index.items()} == {i: tokens(e) for i, e in adjacent.items()}
