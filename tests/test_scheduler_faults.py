"""A sequence that fails, or a row that cannot be read, copied or moved, ends what it touches and nothing else."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from less_export.errors import BackendError
from less_export.runtime.backend import RowState, State
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Scheduler
from less_export.runtime.sequence import SequenceFactory

from .scheduling import RAISES, SPOILS, FaultyBackend, Request, play, run_all, tokens
from .test_generate import HashBackend, contract, expected


@pytest.mark.parametrize(("bad", "message"), [(RAISES, "out of something"), (SPOILS, "nan logits")])
def test_a_bad_prompt_ends_only_its_request(bad: int, message: str) -> None:
    requests = [Request((1, 2), 9, 0), Request((1, bad, 3), 9, 1), Request((4,), 9, 2), Request((6, 7), 5, 4)]
    alone = [expected(r.prompt, r.tokens) for r in requests]
    events = play(Scheduler(FaultyBackend(contract())), requests)
    (end,) = events[1]
    assert message in str(end.error)
    for index in (0, 2, 3):
        assert tokens(events[index]) == alone[index]


def test_logits_that_fail_in_decode_end_only_their_request() -> None:
    """The processor makes request 1 take a bad token as its third; the others, which run in the same step, go on."""
    requests = [Request((1, 2), 9, 0), Request((3, 1), 9, 0), Request((4,), 9, 0)]
    scheduler = Scheduler(FaultyBackend(contract()))
    factory = SequenceFactory(scheduler.backend, None, ())

    def third(token_ids: list[int], logits: np.ndarray) -> None:
        if len(token_ids) == 2:
            logits[SPOILS] = 1e9

    for index, request in enumerate(requests):
        options = SamplingParams(max_new_tokens=9, processors=(third,) if index == 1 else ())
        scheduler.submit(factory.sequence(request.prompt, options, index=index))
    events = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
    assert tokens(events[1]) == (*expected((3, 1), 2), SPOILS)
    assert "nan logits" in str(events[1][-1].error)
    for index in (0, 2):
        assert tokens(events[index]) == expected(requests[index].prompt, 9)


def test_a_step_that_raises_ends_those_that_run_and_nobody_else() -> None:
    def take_a_bad_one(token_ids: list[int], logits: np.ndarray) -> None:
        if len(token_ids) == 1:
            logits[RAISES] = 1e9

    scheduler = Scheduler(FaultyBackend(contract()), rows=3, piece=4)
    factory = SequenceFactory(scheduler.backend, None, ())
    plain = SamplingParams(max_new_tokens=6)
    options = [plain, plain.with_overrides(processors=(take_a_bad_one,)), plain, plain]
    prompts = [(1, 2), (3, 1), (5,) * 12, (4,)]
    for index, (prompt, params) in enumerate(zip(prompts, options, strict=True)):
        scheduler.submit(factory.sequence(prompt, params, index=index))
    events = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
    for index in (0, 1):  # decoded in the step that raised
        assert "out of something" in str(events[index][-1].error)
    for index in (2, 3):  # in prefill, and waiting
        assert tokens(events[index]) == expected(prompts[index], 6)


def test_a_state_that_does_not_fit_ends_its_request() -> None:
    scheduler = Scheduler(HashBackend(contract()))
    factory = SequenceFactory(scheduler.backend, None, ())
    params = SamplingParams(max_new_tokens=2)
    scheduler.submit(factory.sequence([1], params, index=0, prefix=RowState(1, {})))
    scheduler.submit(factory.sequence([2], params, index=1))
    events = [e for _ in range(5) if scheduler.busy for e in scheduler.step()]
    assert "belongs to another export" in str(events[0].error)
    assert tokens(events[1:]) == expected([2], 2)


class BrokenRows(HashBackend):
    """Copying or reading the row of a state that has seen ``length`` tokens raises, ``times`` times."""

    def __init__(self, method: str, length: int, times: int = 1) -> None:
        super().__init__(contract())
        self.method, self.length, self.times = method, length, times

    def _fail(self, method: str, row: int) -> None:
        if method == self.method and self.past_length[row] == self.length and self.times:
            self.times -= 1
            raise BackendError("out of something")

    def _copy_row(self, source: int, target: int) -> None:
        self._fail("copy", source)
        super()._write_row(target, super()._read_row(source))

    def _read_row(self, row: int) -> State:
        self._fail("read", row)
        return super()._read_row(row)


def test_a_state_that_cannot_be_read_ends_only_its_sequence() -> None:
    scheduler = Scheduler(BrokenRows("read", 2 + 4))
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=4)
    sequences = [factory.sequence([i] * i, params, index=i, keep_state=True) for i in (1, 2, 3)]
    events = run_all(scheduler, sequences)
    assert "out of something" in str(events[2][-1].error)
    assert all(e.token is None or e.token.finish_reason is None for e in events[2])  # the error alone ends it
    assert [s.state is not None for s in sequences] == [True, False, True]
    assert [tokens(events[i]) for i in (1, 3)] == [expected([i] * i, 4) for i in (1, 3)]


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_row_that_cannot_be_copied_to_twins_ends_them(times: int, by_index: bool) -> None:
    scheduler = Scheduler(BrokenRows("copy", 5, times))
    scheduler.backend.rows_by_index = by_index
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=4)
    events = run_all(scheduler, [factory.sequence([6] * 5, params, index=i) for i in range(3)])
    for index in range(3):
        if 1 <= index <= times:
            (only,) = events[index]
            assert "out of something" in str(only.error)
        else:
            assert tokens(events[index]) == expected([6] * 5, 4)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_row_that_cannot_be_moved_ends_only_its_sequence(cancelled: bool) -> None:
    """The first sequence ends, or is cancelled, when the last one, whose row is to fill its place, has seen 4 + 3."""
    scheduler = Scheduler(BrokenRows("copy", 4 + 3))
    factory = SequenceFactory(scheduler.backend, None, ())
    counts = {1: 90 if cancelled else 6, 2: 9, 4: 9}
    sequences = [factory.sequence([i] * i, SamplingParams(max_new_tokens=n), index=i) for i, n in counts.items()]
    cancels = []

    def cancel() -> None:
        if cancelled and not cancels and len(sequences[2].token_ids) == 4:
            cancels.append(scheduler.cancel(sequences[0]))

    events = run_all(scheduler, sequences, cancel)
    assert cancels == [True] * cancelled
    assert "out of something" in str(events[4][-1].error)
    assert tokens(events[4]) == expected([4] * 4, len(events[4]) - 1)
    assert tokens(events[2]) == expected([2] * 2, 9)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize(("method", "length", "bad"), [("read", 4, 0), ("copy", 6, 1), ("", 0, None)])
def test_a_prompt_in_the_way_moves(method: str, length: int, bad: int | None, rows: int) -> None:
    """The second prompt is fed first, and goes on in the row where the first one has seen as many tokens."""
    backend = BrokenRows(method, length)
    scheduler, lengths = Scheduler(backend, rows=rows, piece=2), (12, 6 if method == "copy" else 4)
    factory, params = SequenceFactory(backend, None, ()), SamplingParams(max_new_tokens=5)
    events = run_all(scheduler, [factory.sequence([i + 1] * n, params, index=i) for i, n in enumerate(lengths)])
    assert backend.times == (bad is None)  # it did happen
    for index, n in enumerate(lengths):
        if index == bad:
            (only,) = events[index]
            assert "out of something" in str(only.error)
        else:
            assert tokens(events[index]) == expected([index + 1] * n, 5)
