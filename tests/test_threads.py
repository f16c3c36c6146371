"""Two threads on one backend or generator: one of them gets a UsageError; there are no wrong tokens and no crashes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.errors import UsageError
from less_export.runtime.generate import Generator
from less_export.runtime.ort import OrtBackend

from .tiny_decoder import CONTRACT, onnx_decoder

PROMPTS = [list(range(1, 20)), [30, 7, 7, 21], [49, 48, 3, 2, 1, 0, 5, 6]]
Busy = Callable[..., Any]
BUSY = "another thread is using this ort backend: open a generator per thread, or take turns"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_decoder(CONTRACT, tmp_path_factory.mktemp("threads") / "model.onnx")


@pytest.fixture
def backend(model: Path) -> OrtBackend:
    return OrtBackend(CONTRACT, model, threads=1)


def in_thread(call: Callable[[], Any]) -> Any:
    """The result or exception of ``call`` in another thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return results[0]


def assert_busy(error: object) -> None:
    assert isinstance(error, UsageError), repr(error)
    assert str(error) == BUSY


@pytest.fixture
def busy(backend: OrtBackend, monkeypatch: pytest.MonkeyPatch) -> Busy:
    """``busy(call, during)`` runs ``during`` in another thread while ``call`` is inside its first step."""
    step = backend._step

    def run(call: Callable[[], Any], during: Callable[[], Any]) -> Any:
        seen: list[Any] = []

        def interrupted(*inputs: Any) -> Any:
            if not seen:
                seen.append(None)
                seen[0] = in_thread(during)
            return step(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(backend, "_step", interrupted)
            result = call()
        return result, seen[0]

    return run


OPERATIONS: dict[str, Callable[[OrtBackend], Any]] = {
    "open": lambda b: b.open(2),
    "close": lambda b: b.close(),
    "step": lambda b: b.step([[1], [2]]),
    "reset_rows": lambda b: b.reset_rows([0]),
    "copy_row": lambda b: b.copy_row(0, 1),
    "read_row": lambda b: b.read_row(0),
    "write_row": lambda b: b.write_row(0, None),  # type: ignore[arg-type]
    "generate": lambda b: Generator(b).generate([[1]]),
    "prefill": lambda b: Generator(b).prefill([1]),
    "stream": lambda b: next(iter(Generator(b).stream([[1]]))),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_thread_is_refused_during_a_step(operation: str, backend: OrtBackend, busy: Busy) -> None:
    backend.open(2)
    want = backend.step([[1, 2], [3, 4]])
    backend.open(2)
    got, error = busy(lambda: backend.step([[1, 2], [3, 4]]), lambda: OPERATIONS[operation](backend))
    assert_busy(error)
    np.testing.assert_array_equal(got, want)
    assert list(backend.past_length) == [2, 2]
    backend.close()
    with pytest.raises(UsageError, match="take turns"), backend.exclusive():
        raise in_thread(lambda: OPERATIONS[operation](backend))


@pytest.mark.parametrize("run", ["generate", "prefill", "stream"])
def test_runs_hold_the_backend(run: str, backend: OrtBackend, busy: Busy) -> None:
    """generate and prefill hold the backend between their steps too, so that no second generator can interfere."""
    generator, between = Generator(backend), []
    reset = backend.reset_rows

    def reset_rows(rows: Any) -> None:  # called by the run outside of a step
        between.append(in_thread(lambda: Generator(backend).generate([[1]])))
        reset(rows)

    backend.open(1)
    backend.reset_rows = reset_rows  # type: ignore[method-assign]
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: [list(g.token_ids) for g in generator.generate(PROMPTS[:1], max_new_tokens=5)],
        "prefill": lambda: generator.prefill(PROMPTS[0]).length,
        "stream": lambda: [[t.token_id for t in generator.stream(PROMPTS[:1], max_new_tokens=5)]],
    }
    first, error = busy(calls[run], lambda: generator.generate([[1]]))
    assert_busy(error)
    assert_busy(between[0])
    backend.reset_rows = reset  # type: ignore[method-assign]
    assert calls[run]() == first


def test_a_stream_computes_in_one_thread_at_a_time(backend: OrtBackend, busy: Busy) -> None:
    generator = Generator(backend)
    (want,) = generator.generate(PROMPTS[:1], max_new_tokens=6)
    stream = generator.stream(PROMPTS[:1], max_new_tokens=6)
    first, error = busy(lambda: next(stream), lambda: next(stream))
    assert_busy(error)
    # Between two tokens the backend is free: another thread may read, and may take over the stream.
    assert in_thread(lambda: backend.read_row(0).length) == len(PROMPTS[0])
    second = in_thread(lambda: next(stream))
    assert [t.token_id for t in (first, second, *stream)] == list(want.token_ids)


@pytest.mark.parametrize("use", ["generate", "other generator", "step", "reset_rows", "write_row", "open"])
def test_what_changes_the_rows_ends_a_stream(use: str, backend: OrtBackend) -> None:
    generator = Generator(backend)
    stream = generator.stream(PROMPTS[:1], max_new_tokens=6)
    next(stream)
    uses: dict[str, Callable[[], Any]] = {
        "generate": lambda: generator.generate([[1]], max_new_tokens=1),
        "other generator": lambda: Generator(backend).prefill([1]),
        "step": lambda: backend.step([[1]]),
        "reset_rows": lambda: backend.reset_rows([0]),
        "write_row": lambda: backend.copy_row(0, 0),
        "open": lambda: backend.open(1),
    }
    in_thread(uses[use])
    with pytest.raises(UsageError, match="another run has started on this backend"):
        next(stream)
    assert list(stream) == []


def test_threads_that_race(backend: OrtBackend) -> None:
    """Each call gives the right tokens or the error, whatever the interleaving."""
    generator = Generator(backend)
    want = [generator.generate([p], max_new_tokens=20)[0] for p in PROMPTS]
    outcomes: Counter[str] = Counter()

    def work(index: int) -> None:
        for attempt in range(40):
            try:
                if attempt % 2:
                    got = generator.generate([PROMPTS[index]], max_new_tokens=20)[0].token_ids
                else:
                    got = tuple(t.token_id for t in generator.stream([PROMPTS[index]], max_new_tokens=20))
                outcomes["right" if got == want[index].token_ids else "wrong"] += 1
            except UsageError:
                outcomes["refused"] += 1
            except BaseException as error:
                outcomes[repr(error)] += 1

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(outcomes) <= {"right", "refused"}, outcomes
    assert outcomes["right"] > 0
    assert outcomes.total() == 40 * len(PROMPTS)
    assert [generator.generate([p], max_new_tokens=20)[0] for p in PROMPTS] == want
