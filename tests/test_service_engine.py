"""The engine's thread: many callers, a limited queue, cancels, failures, draining, and a long run of all of it."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from less_export.errors import BackendError, UsageError
from less_export.runtime.backend import Array
from less_export.runtime.engine import Engine, QueueFullError, StoppedError
from less_export.runtime.generate import Generator
from less_export.runtime.scheduler import Event
from less_export.runtime.sequence import Sequence

from .marks import slow_but
from .test_generate import HashBackend, contract, expected, letter_tokenizer

LONG = 60


class GatedBackend(HashBackend):
    """Its steps wait for the test: ``gate.release()`` lets one through, ``gate.release(10**6)`` all."""

    def __init__(self, free: bool = False) -> None:
        super().__init__(contract())
        self.gate = threading.Semaphore(10**6 if free else 0)
        self.inside = threading.Event()

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, rows: Array) -> np.ndarray:
        self.inside.set()
        assert self.gate.acquire(timeout=LONG)
        return super()._step(input_ids, past_length, new_length, rows)


def engine(backend: HashBackend, **options: Any) -> Engine:
    return Engine(Generator(backend, eos_ids=[]), **options)


def results(events: queue.SimpleQueue[Event], count: int) -> dict[Sequence, list[Event]]:
    """Events until ``count`` sequences have ended."""
    out: dict[Sequence, list[Event]] = {}
    while count:
        event = events.get(timeout=LONG)
        out.setdefault(event.sequence, []).append(event)
        count -= event.error is not None or bool(event.token and event.token.finish_reason)
    return out


def token_ids(events: list[Event]) -> tuple[int, ...]:
    return tuple(e.token.token_id for e in events if e.token is not None)


def test_many_callers() -> None:
    prompts = [[1, 2, 3], [5] * 9, [4, 3, 2, 1, 0, 9], [8], [7, 7, 7, 7], [9, 9]]
    streamed: dict[int, tuple[int, ...]] = {}
    with engine(HashBackend(contract())) as service:

        def call(index: int) -> None:
            tokens = service.stream(prompts[index], max_new_tokens=9)
            streamed[index] = tuple(t.token_id for t in tokens)

        threads = [threading.Thread(target=call, args=[i]) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
    assert streamed == {i: expected(p, 9) for i, p in enumerate(prompts)}
    assert service.counts == {"accepted": 6, "finished_length": 6, "cancelled": 0, "failed": 0}
    assert (service.timing.prefill_tokens, service.timing.decode_tokens) == (25, 6 * 8)


def test_rows_and_queue_are_accepted_and_no_more() -> None:
    backend, events = GatedBackend(), queue.SimpleQueue[Event]()
    with engine(backend, rows=2, max_queue=3) as service:
        sequences = [service.sequence([i], max_new_tokens=2) for i in range(1, 6)]
        for sequence in sequences[:4]:
            service.submit([sequence], events.put)
        with pytest.raises(QueueFullError, match="4 requests are running or waiting, and this engine takes 5"):
            service.submit([sequences[4], service.sequence([1])], events.put)  # all of them or none
        service.submit([sequences[4]], events.put)
        with pytest.raises(QueueFullError, match="try again later"):
            service.submit([service.sequence([1])], events.put)
        assert service.counts["rejected"] == 3
        backend.gate.release(10**6)
        ended = results(events, 5)
        assert {token_ids(ended[s]) for s in sequences} == {expected([i], 2) for i in range(1, 6)}
        service.submit([service.sequence([1], max_new_tokens=1)], events.put)
        results(events, 1)


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_a_cancelled_sequence_frees_its_row_before_the_next_step(when: str) -> None:
    backend, events = GatedBackend(), queue.SimpleQueue[Event]()
    with engine(backend, rows=1, piece=4) as service:
        first, second = (service.sequence([i] * 9, max_new_tokens=4) for i in (1, 2))
        service.submit([first], events.put)
        service.submit([second], events.put)
        steps = {"waiting": 0, "prefill": 1, "decode": 3}[when]
        victim, other = (second, first) if when == "waiting" else (first, second)
        assert backend.inside.wait(LONG)
        backend.inside.clear()
        for _ in range(steps):
            backend.gate.release()
            assert backend.inside.wait(LONG)
            backend.inside.clear()
        if when == "decode":
            assert len(victim.token_ids) == 1
        service.cancel([victim])  # in the middle of a step
        service.cancel([victim])
        backend.gate.release(10**6)
        ended = results(events, 1)
        assert token_ids(ended[other]) == expected(other.prompt, 4)
        got = token_ids(ended.get(victim, []))
        assert got == ()  # not even those of the step that was running
        assert service.counts["cancelled"] == 1
        assert (service.running, service.waiting) == (0, 0)
        service.cancel([victim, other])
        assert service.counts["cancelled"] == 1


def test_closing_a_stream_cancels_it() -> None:
    with engine(GatedBackend(free=True), rows=1) as service:
        stream = service.stream([1, 2], max_new_tokens=10**6)
        assert next(stream).token_id == expected([1, 2], 1)[0]
        stream.close()  # type: ignore[attr-defined]
        assert tuple(t.token_id for t in service.stream([3], max_new_tokens=3)) == expected([3], 3)
        assert service.counts["cancelled"] == 1


def test_draining_ends_what_was_accepted_and_refuses_the_rest() -> None:
    backend, events = GatedBackend(), queue.SimpleQueue[Event]()
    service = engine(backend, rows=1)
    sequences = [service.sequence([i], max_new_tokens=3) for i in (1, 2)]
    service.submit(sequences, events.put)
    assert backend.inside.wait(LONG)
    assert service.accepts
    assert not service.drain(timeout=0.01)
    assert not service.accepts
    with pytest.raises(StoppedError, match="takes no more work"):
        service.submit([service.sequence([3])], events.put)
    backend.gate.release(10**6)
    assert service.drain(timeout=LONG)
    assert {token_ids(e) for e in results(events, 2).values()} == {expected([i], 3) for i in (1, 2)}
    service.backend.open(1)  # the rows are free for others


def test_stopping_tells_those_that_wait() -> None:
    backend, events = GatedBackend(), queue.SimpleQueue[Event]()
    service = engine(backend, rows=1)
    service.submit([service.sequence([i], max_new_tokens=3) for i in (1, 2)], events.put)
    assert backend.inside.wait(LONG)
    stop = threading.Thread(target=service.stop)
    stop.start()
    while service.accepts:
        time.sleep(0.001)
    backend.gate.release(10**6)
    stop.join(LONG)
    ended = results(events, 2)
    assert all(isinstance(e[-1].error, StoppedError) for e in ended.values())
    assert service.counts["failed"] == 2


def test_a_sequence_runs_once() -> None:
    backend, events = GatedBackend(), queue.SimpleQueue[Event]()
    with engine(backend) as service:
        first, second = (service.sequence([i], max_new_tokens=2) for i in (1, 2))
        service.submit([first], events.put)
        for again in ([first], [second, first], [second, second]):
            with pytest.raises(UsageError, match="was submitted before"):
                service.submit(again, events.put)
        backend.gate.release(10**6)
        service.submit([second], events.put)
        results(events, 2)
        with pytest.raises(UsageError, match="was submitted before"):
            service.submit([first], events.put)
        assert service.counts == {"accepted": 2, "finished_length": 2, "cancelled": 0}


def test_an_idle_engine_keeps_no_state() -> None:
    alive: weakref.WeakSet[Sequence] = weakref.WeakSet()
    with engine(HashBackend(contract())) as service:
        events = queue.SimpleQueue[Event]()
        sequence = service.sequence([1, 2], max_new_tokens=2, keep_state=True)
        alive.add(sequence)
        service.submit([sequence], events.put)
        results(events, 1)
        del sequence
        for _ in range(100 * LONG):  # until the engine's thread waits
            if not alive:
                return
            time.sleep(0.01)
        raise AssertionError("a sequence that has ended is still there")


def test_nobody_else_may_use_the_backend() -> None:
    backend = GatedBackend(free=True)
    with engine(backend) as service:
        next(service.stream([1]))
        with pytest.raises(UsageError, match="another thread is using this hash backend"):
            backend.reset_rows([0])


def test_a_sink_that_raises_ends_only_its_sequence() -> None:
    events = queue.SimpleQueue[Event]()

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    with engine(HashBackend(contract())) as service:
        service.submit([service.sequence([1], max_new_tokens=50)], fail)
        service.submit([service.sequence([2], max_new_tokens=50)], events.put)
        (ended,) = results(events, 1).values()
        assert token_ids(ended) == expected([2], 50)
        assert service.counts["cancelled"] == 1


def test_a_failed_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    events = queue.SimpleQueue[Event]()
    service = engine(HashBackend(contract()))
    monkeypatch.setattr(service._scheduler, "step", lambda: 1 / 0)
    service.submit([service.sequence([1])], events.put)
    (ended,) = results(events, 1).values()
    assert str(ended[0].error) == "the engine has failed: start it again"
    assert isinstance(ended[0].error.__cause__, ZeroDivisionError)
    assert service.drain(LONG)
    assert not service.accepts


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s: s.sequence([]), UsageError, "a prompt is empty"),
        (lambda s: s.sequence([1], temperature=-1), UsageError, "temperature"),
        (lambda s: s.sequence([1], prefix=3), UsageError, "prefix must be a RowState"),
        (lambda s: s.sequence([40]), UsageError, "0..39"),
        (lambda s: engine(s.backend, max_queue=-1), UsageError, "max_queue must be at least 0"),
        (lambda s: engine(HashBackend(contract()), rows=9), UsageError, "1 to 3 rows"),
    ],
)
def test_refusals(call: Callable[[Engine], object], error: type[BackendError], match: str) -> None:
    with engine(HashBackend(contract())) as service, pytest.raises(error, match=match):
        call(service)


def test_a_session_goes_on_in_another_engine() -> None:
    model = [Generator(HashBackend(contract()), letter_tokenizer()) for _ in range(2)]
    events = queue.SimpleQueue[Event]()
    with Engine(model[0]) as service:
        first = service.sequence([1, 2, 3], max_new_tokens=4, ignore_eos=True, keep_state=True)
        service.submit([first], events.put)
        results(events, 1)
    with Engine(model[1]) as service:
        rest = service.stream([5], prefix=first.state, max_new_tokens=4, ignore_eos=True)
        assert tuple(t.token_id for t in rest) == expected([1, 2, 3, *first.token_ids, 5], 4)


@pytest.mark.parametrize("count", slow_but([300, 2000], 300))
def test_soak(count: int) -> None:
    """Requests with random cancels: right tokens, no leaked row, counters that add up, nothing that stays in memory."""
    rng = np.random.default_rng(0)
    backend, events = HashBackend(contract()), queue.SimpleQueue[Event]()
    prompts = [rng.integers(0, 40, rng.integers(1, 12)).tolist() for _ in range(40)]
    wanted = [expected(p, 5) for p in prompts]
    outcomes: Counter[str] = Counter()
    alive: weakref.WeakSet[Sequence] = weakref.WeakSet()
    with engine(backend, max_queue=20) as service:
        running: dict[Sequence, tuple[int, list[int]]] = {}

        def take(block: bool) -> None:
            while block or not events.empty():
                block = False
                event = events.get(timeout=LONG)
                if event.sequence not in running:
                    continue  # was cancelled while the event was on its way
                which, tokens = running[event.sequence]
                assert event.token is not None
                tokens.append(event.token.token_id)
                if event.token.finish_reason is not None:
                    assert tuple(tokens) == wanted[which]
                    del running[event.sequence]
                    outcomes["finished"] += 1

        for _ in range(count):
            which = int(rng.integers(len(prompts)))
            sequence = service.sequence(prompts[which], max_new_tokens=5)
            while True:
                try:
                    service.submit([sequence], events.put)
                    break
                except QueueFullError:
                    take(block=True)
            running[sequence] = (which, [])
            alive.add(sequence)
            if rng.random() < 0.25 and running:
                victim = list(running)[int(rng.integers(len(running)))]
                service.cancel([victim])
                del running[victim]
                outcomes["cancelled"] += 1
            take(block=False)
            backend.calls.clear()
        while running:
            take(block=True)
        assert service.drain(LONG)
        take(block=False)  # what was on its way to those that were cancelled
    counts = service.counts
    assert outcomes.total() == counts["accepted"] == count
    assert counts["failed"] == 0
    # A sequence may end while its cancel is on its way.
    assert counts["finished_length"] + counts["cancelled"] == count
    assert counts["finished_length"] >= outcomes["finished"] > count / 2
    assert (service.running, service.waiting, len(service._sinks)) == (0, 0, 0)
    del sequence, victim
    gc.collect()
    assert not alive
