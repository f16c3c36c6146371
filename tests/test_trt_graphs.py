"""CUDA graphs of the decode step in the TensorRT backend, on a stand-in for engine and CUDA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.errors import BackendError

from .test_row_ranges import assert_as_alone
from .trt_support import CONTRACT_TRT, Fake, reference

pytest_plugins = ["tests.trt_support"]


def decode(backend: Any, rows: list[int], token: int = 1) -> np.ndarray:
    logits: np.ndarray = backend.step([[token]] * len(rows), rows=rows)
    return logits


def counts(fake: Fake) -> tuple[int, int]:
    """How often a graph was captured, and launched."""
    return fake.cuda.calls.count("captured"), fake.cuda.calls.count("launched")


def test_one_graph_runs_any_rows(fake: Fake) -> None:
    """Captured at the second step of its bucket; whatever comes in between does not matter."""
    backend = fake.backend()
    backend.open(4)
    for rows in ([0, 1], [2, 3], [1, 0]):
        decode(backend, rows)
    assert counts(fake) == (1, 2)
    backend.step([[1, 2, 3]], rows=[3])
    decode(backend, [3, 1])
    backend.reset_rows([0])
    backend.copy_row(3, 2)
    decode(backend, [2, 0])
    assert counts(fake) == (1, 4)
    del backend
    assert not fake.cuda.graphs


def test_a_graph_for_each_bucket(fake: Fake) -> None:
    """Other numbers of rows, and the last token of a prompt, drop nothing; nor does a bucket bring memory."""
    assert fake.engine is not None
    backend = fake.backend()
    backend.open(4)
    allocated = [*fake.cuda.memory]
    for rows in ([0], [1], [2, 3], [3, 1], [3, 1, 2], [0, 1, 2], [3, 0, 1, 2]):
        decode(backend, rows)
    assert fake.engine.batches == [1, 1, 2, 2, 4, 4, 4]
    assert counts(fake) == (3, 4)
    fake.engine.batches.clear()
    for rows in ([2], [1, 3], [2, 0, 3], [1], [0, 1, 2, 3]):
        decode(backend, rows)
    backend.step([[1, 2, 3]], rows=[3])
    backend.step([[4]], rows=[3])
    assert fake.engine.batches == [1, 2, 4, 1, 4, 1, 1]
    assert counts(fake) == (3, 10)
    assert len(fake.cuda.graphs) == 3
    assert [*fake.cuda.memory] == allocated
    assert len({context.memory for context in fake.engine.contexts}) == 1


@pytest.mark.parametrize(("rows", "buckets"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4, 4])])
def test_the_last_bucket_is_of_all_rows(rows: int, buckets: list[int], fake: Fake) -> None:
    assert fake.engine is not None
    backend = fake.backend()
    backend.open(rows)
    for count in range(1, rows + 1):
        decode(backend, [*range(count)])
    assert fake.engine.batches == buckets


def test_reopening(fake: Fake) -> None:
    """At other addresses, a step has to run before it is captured; contexts are used again."""
    assert fake.engine is not None
    backend = fake.backend()
    for rows in (4, 4, 3, 2, 4):
        fake.cuda.calls.clear()
        backend.open(rows)
        assert not fake.cuda.graphs
        for count in (1, 2, rows):
            decode(backend, [*range(count)])
        assert counts(fake) == ((1, 1) if rows == 2 else (0, 0))
        for count in (1, 2, rows):
            decode(backend, [*range(count)])
        assert counts(fake) == ((2, 4) if rows == 2 else (3, 3))
    assert len(fake.engine.contexts) == 4  # that of prompts, and three that decode
    backend.close()
    assert not fake.cuda.graphs
    assert not fake.cuda.memory


def test_without_memory_for_a_context(fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A larger bucket runs the rows."""
    assert fake.engine is not None
    fake.engine.most_contexts = 3
    backend = fake.backend()
    backend.open(4)
    for rows in ([0, 1], [2], [3], [0, 1, 2], [1]):
        decode(backend, rows)
    assert fake.engine.batches == [2, 2, 2, 4, 2]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "steps of few rows are padded to more: TensorRT-RTX 1.7.1.116 cannot prepare decode: "
        "no reason given (--verbose shows its log)"
    ]
    fake.engine.contexts.clear()
    fake.engine.most_contexts = 2
    other = fake.backend()
    assert_as_alone(other, reference(tmp_path), 60, 2e-5)


def test_graphs_compute_the_same(fake: Fake, tmp_path: Path) -> None:
    backend = fake.backend()
    assert_as_alone(backend, reference(tmp_path), 80, 2e-5)
    assert fake.cuda.calls.count("launched") > 3
    backend.close()
    assert not fake.cuda.graphs
    assert not fake.cuda.memory


def test_results_are_the_callers(fake: Fake) -> None:
    """The next launch writes to the same memory."""
    backend = fake.backend()
    backend.open(1)
    results = [decode(backend, [0], token) for token in (1, 2, 3)]
    copies = [x.copy() for x in results]
    decode(backend, [0], 9)
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)
    assert not np.array_equal(results[1], results[2])


def test_they_can_be_switched_off(fake: Fake) -> None:
    backend = fake.backend(cuda_graphs=False)
    backend.open(2)
    for _ in range(4):
        decode(backend, [1, 0])
    assert not {"captured", "launched"} & {*fake.cuda.calls}


def test_plans_of_ranges_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their addresses change from step to step."""
    outputs = CONTRACT_TRT.outputs()

    def graph(feed: dict[str, Any]) -> list[Any]:
        rows = len(feed["past_length"])
        return [np.zeros(outputs[0].sized(rows), np.float32), *(feed[s.past.name] for s in CONTRACT_TRT.state())]

    fake = Fake(CONTRACT_TRT, tmp_path, monkeypatch, graph, in_place=True)
    backend = fake.backend()
    backend.open(2)
    for _ in range(4):
        backend.step([[1], [2]])
    assert not {"captured", "launched"} & {*fake.cuda.calls}


def test_a_capture_that_fails_is_said_once(fake: Fake) -> None:
    """And steps go on without it."""
    fake.cuda.captures = False
    backend = fake.backend()
    backend.open(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in ([0], [1], [1, 0], [0, 1], [1, 0]):
            decode(backend, rows)
    (warning,) = caught
    message = "decoding without a CUDA graph, as the step cannot be captured: cudaStreamEndCapture failed on the GPU"
    assert str(warning.message) == f"{message}: error 901"
    assert warning.filename == __file__
    assert fake.cuda.capturing is None
    assert backend.past_length.tolist() == [4, 4]


def test_a_step_that_fails_while_it_is_captured(fake: Fake) -> None:
    """The stream must not stay in capture."""
    backend = fake.backend()
    backend.open(1)
    decode(backend, [0])
    assert fake.engine is not None
    fake.engine.contexts[0].works = False
    with pytest.warns(UserWarning, match="cannot run this step"), pytest.raises(BackendError, match="cannot run"):
        decode(backend, [0])
    assert fake.cuda.capturing is None
    assert not fake.cuda.graphs
    fake.engine.contexts[0].works = True
    decode(backend, [0])
    assert backend.past_length.tolist() == [2]
