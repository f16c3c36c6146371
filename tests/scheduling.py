"""Requests at the steps of a schedule, and a backend that fails for some tokens, for tests of the scheduler."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from less_export.errors import BackendError
from less_export.runtime.backend import Array
from less_export.runtime.scheduler import Event, Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory

from .test_generate import HashBackend, expected

#: Prompts of tests, which go on for at most nine tokens, and two tokens that none of them comes to.
PROMPTS = [(1, 2), (4,), (6, 7), (3, 1), (5,) * 12]
RAISES, SPOILS = sorted({*range(40)} - {t for p in PROMPTS for t in (*p, *expected(p, 9))})[:2]


@dataclasses.dataclass(frozen=True)
class Request:
    """``arrives`` and ``leaves`` are steps; it leaves only if it has not finished before."""

    prompt: tuple[int, ...]
    tokens: int
    arrives: int
    leaves: int | None = None


def play(scheduler: Scheduler, requests: list[Request], **params: Any) -> dict[int, list[Event]]:
    """Submit, cancel and step as the requests say; their events by index."""
    factory = SequenceFactory(scheduler.backend, None, ())
    sequences: dict[int, Sequence] = {}
    events: dict[int, list[Event]] = defaultdict(list)
    for step in range(400):
        for index, request in enumerate(requests):
            if request.arrives == step:
                options = factory.params(None, {"max_new_tokens": request.tokens, **params})
                sequences[index] = factory.sequence(request.prompt, options, index=index)
                scheduler.submit(sequences[index])
            if request.leaves == step and index in sequences:
                ended = bool(events[index]) and (events[index][-1].token is None or not sequences[index].active)
                assert scheduler.cancel(sequences[index]) == (not ended)
                assert not scheduler.cancel(sequences[index])
        for event in scheduler.step() if scheduler.busy else ():
            events[event.sequence.index].append(event)
        assert scheduler.running <= scheduler.rows
        if not scheduler.busy and step > max(r.arrives for r in requests):
            break
    assert not scheduler.busy
    return events


def tokens(events: list[Event]) -> tuple[int, ...]:
    return tuple(e.token.token_id for e in events if e.token is not None)


def assert_as_alone(requests: list[Request], events: dict[int, list[Event]], alone: list[tuple[int, ...]]) -> None:
    """A request that was cancelled has the first of the tokens that it gets alone, the others have all."""
    for index, (request, want) in enumerate(zip(requests, alone, strict=True)):
        got = tokens(events[index])
        assert got == want[: len(got)], f"request {index}"
        if request.leaves is None or request.leaves < request.arrives:
            assert len(got) == request.tokens
            last = events[index][-1].token
            assert last is not None
            assert last.finish_reason == "length"


class FaultyBackend(HashBackend):
    """A step that feeds token ``RAISES`` raises; after token ``SPOILS`` the logits of that row are NaN."""

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, rows: Array) -> np.ndarray:
        valid = np.arange(input_ids.shape[1]) < new_length[:, None]
        if ((input_ids == RAISES) & valid).any():
            raise BackendError("out of something")
        logits = super()._step(input_ids, past_length, new_length, rows)
        logits[((input_ids == SPOILS) & valid).any(1)] = np.nan
        return logits


def run_all(
    scheduler: Scheduler, sequences: list[Sequence], after_step: Callable[[], None] = lambda: None
) -> dict[int, list[Event]]:
    for sequence in sequences:
        scheduler.submit(sequence)
    events: dict[int, list[Event]] = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
        after_step()
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert all(s.row is None for s in sequences)
    return events
