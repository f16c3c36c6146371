"""Decode steps whose logits stay on the device are not waited for: one wait a token, and whose fault a failure is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.errors import BackendError
from less_export.native import sampler as native
from less_export.runtime.sampler import Choice, KeptLogits, Sampler, choose_all
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Scheduler
from less_export.runtime.sequence import SequenceFactory

from .fake_cuda import FakeCuda
from .trt_support import Fake, reference

pytest_plugins = ["tests.trt_support"]

FAILED = "cudaStreamSynchronize failed on the GPU: error 719"


def greedy(cuda: FakeCuda, fault_at: int = 0) -> native.Sample:
    """The most likely token, in stream order; test_device_sampler.py has the kernel itself.

    When it is asked for the ``fault_at``-th time, the step before it fails.
    """
    asked_for = itertools.count(1)

    def sample(logits: int, vocab: int, rows: int, count: int, histories: int, picks: int, stream: int) -> int:
        def work() -> None:
            asked = cuda.at(rows, count * native.ROW.itemsize).view(native.ROW)
            for i, place in enumerate(asked["logits"].tolist()):
                given = cuda.at(logits + place * vocab * 4, vocab * 4).view(np.float32)
                cuda.at(picks, count * 4).view(np.int32)[i] = given.argmax()

        cuda.queue(work)
        cuda.fault = 719 if next(asked_for) == fault_at else 0
        return 0

    return sample


@pytest.fixture
def kept(fake: Fake) -> Fake:
    """The plan by index, with tokens that are chosen on the device."""
    fake.sample = greedy(fake.cuda)
    return fake


def samplers(count: int) -> list[Sampler]:
    return [Sampler(SamplingParams(), np.random.default_rng(0)) for _ in range(count)]


def step(backend: Any, rows: list[int], token: int = 1) -> KeptLogits:
    logits = backend.step_last(np.full((len(rows), 1), token), np.ones(len(rows), np.int64), rows)
    assert not isinstance(logits, np.ndarray)
    return logits


def chosen(logits: KeptLogits) -> list[int]:
    choices = choose_all(logits, samplers(len(logits)), [[]] * len(logits))
    assert all(isinstance(c, Choice) for c in choices), choices
    return [c.token_id for c in choices if isinstance(c, Choice)]


def errors(logits: KeptLogits) -> list[str]:
    results = choose_all(logits, samplers(len(logits)), [[]] * len(logits))
    assert all(isinstance(r, BackendError) for r in results), results
    return [str(r) for r in results]


def test_one_wait_a_token(kept: Fake, tmp_path: Path) -> None:
    """With a graph and without; the tokens are those of the logits on the host."""
    backend, host = kept.backend(), reference(tmp_path)
    backend.open(3)
    host.open(3)
    for token in range(5):
        kept.cuda.waits = 0
        got = chosen(step(backend, [0, 1, 2], token))
        assert kept.cuda.waits == 1
        wanted = host.step_last(np.full((3, 1), token), np.ones(3, np.int64))
        assert got == np.asarray(wanted).argmax(-1).tolist()
    assert kept.cuda.calls.count("launched") == 4


def test_inputs_wait_for_the_step_that_reads_them(kept: Fake, tmp_path: Path) -> None:
    """Steps that nobody chooses after leave the state of each row as it would be alone."""
    backend, host = kept.backend(), reference(tmp_path)
    backend.open(4)
    for token, rows in enumerate(([0, 1], [2], [3, 1, 0], [1], [0, 2], [1])):
        step(backend, rows, token)
    for row, tokens in enumerate(([0, 2, 4], [0, 2, 3, 5], [1, 4], [2])):
        host.open(1)
        for token in tokens:
            host.step([[token]])
        state, wanted = backend.read_row(row), host.read_row(0)
        assert state.length == len(tokens)
        held = wanted.tensors["past.1.position"] >= 0
        assert held.sum() == 2 * len(tokens)
        np.testing.assert_array_equal(state.tensors["past.1.position"], wanted.tensors["past.1.position"])
        np.testing.assert_allclose(state.tensors["past.1.key"][held], wanted.tensors["past.1.key"][held], 2e-5, 2e-5)


def test_a_failure_is_said_by_the_choice_and_by_the_rows(kept: Fake) -> None:
    kept.sample = greedy(kept.cuda, fault_at=1)
    backend = kept.backend()
    backend.open(4)
    logits = step(backend, [2, 0])
    assert errors(logits) == [FAILED] * 2
    assert errors(logits) == [FAILED] * 2  # not only to the first who asks
    undefined = (
        rf"an earlier step failed, and the state of row 2 is undefined: write, reset or copy over it \({FAILED}\)"
    )
    for use in (
        lambda: step(backend, [1, 2]),
        lambda: backend.step([[1]], rows=[2]),
        lambda: backend.read_row(2),
        lambda: backend.copy_row(2, 1),
    ):
        with pytest.raises(BackendError, match=undefined):
            use()
    chosen(step(backend, [1, 3]))
    backend.reset_rows([2])
    backend.copy_row(1, 0)
    chosen(step(backend, [2, 0]))
    assert backend.past_length.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("between", ["nothing", "another row", "a step"])
def test_a_failure_that_others_come_upon(between: str, kept: Fake) -> None:
    """It is not theirs, but that of the step and of its rows."""
    backend = kept.backend()
    backend.open(4)
    logits = step(backend, [0, 1])
    kept.cuda.fault = 719
    if between == "nothing":
        np.testing.assert_raises(BackendError, np.asarray, logits)  # a download finds it too
    if between == "another row":
        backend.read_row(2)
        backend.reset_rows([3])
    if between == "a step":
        chosen(step(backend, [2, 3]))
        with pytest.raises(BackendError, match="the logits of an earlier step are gone"):
            choose_all(logits, samplers(2), [[]] * 2)
    else:
        assert errors(logits) == [FAILED] * 2
    with pytest.raises(BackendError, match="the state of row 1 is undefined"):
        step(backend, [1])
    backend.open(2)  # and a new beginning
    chosen(step(backend, [0, 1]))


def test_a_failure_ends_what_it_touches(fake: Fake) -> None:
    """In a scheduler: every sequence of the step, also one that is fed once more for its state, and no later one."""
    fake.sample = greedy(fake.cuda, fault_at=4)
    backend = fake.backend()
    factory, scheduler = SequenceFactory(backend), Scheduler(backend)
    two, more = (factory.params(SamplingParams(max_new_tokens=n), {}) for n in (2, 9))
    first = factory.sequence([1, 2, 3], two, keep_state=True)
    second = factory.sequence([4, 5], more, index=1)
    scheduler.submit(first)
    scheduler.submit(second)
    assert [e.error for e in scheduler.step()] == [None]  # its last token waits for the state
    prompt, *events = scheduler.step()
    assert (prompt.sequence, prompt.error) == (second, None)
    assert {(e.sequence, str(e.error).endswith(f"({FAILED})")) for e in events} == {(first, True), (second, False)}
    assert [str(e.error) for e in events if e.sequence is second] == [FAILED]
    assert not scheduler.busy
    scheduler.submit(factory.sequence([5, 6], two))
    assert [e.error for e in scheduler.step()] == [None] * 2


def test_steps_whose_logits_come_back_are_waited_for(kept: Fake) -> None:
    backend = kept.backend()
    backend.open(2)
    kept.cuda.fault = 719
    with pytest.raises(BackendError, match=FAILED):
        backend.step([[1]], rows=[0])
    assert backend.past_length.tolist() == [0, 0]
    kept.cuda.fault = 719
    with pytest.raises(BackendError, match=FAILED):  # a prompt's piece
        backend.step_last(np.array([[1, 2]]), np.array([2]), [0])
    kept.cuda.waits = 0
    backend.step([[1]], rows=[1])
    assert kept.cuda.waits == 1


def test_closing_after_a_failure(kept: Fake) -> None:
    backend = kept.backend()
    backend.open(2)
    step(backend, [0])
    kept.cuda.fault = 719
    backend.close()
    assert not kept.cuda.memory
    assert not kept.cuda.graphs
