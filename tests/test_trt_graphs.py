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


def test_one_graph_runs_any_rows(fake: Fake) -> None:
    """Captured at the second step of so many rows; a prompt in between does not matter, another number of rows does."""
    backend = fake.backend()
    backend.open(4)
    for rows in ([0, 1], [2, 3], [1, 0]):
        decode(backend, rows)
    assert fake.cuda.calls.count("captured") == 1
    assert fake.cuda.calls.count("launched") == 2
    backend.step([[1, 2, 3]], rows=[3])
    decode(backend, [3, 1])
    backend.reset_rows([0])
    backend.copy_row(3, 2)
    decode(backend, [2, 0])
    assert fake.cuda.calls.count("captured") == 1
    assert fake.cuda.calls.count("launched") == 4
    for rows in ([0], [1], [2], [3, 0], [1, 2]):
        decode(backend, rows)
    assert fake.cuda.calls.count("captured") == 3
    assert fake.cuda.calls.count("launched") == 7
    assert len(fake.cuda.graphs) == 1  # the others are gone
    backend.open(2)  # other addresses
    assert not fake.cuda.graphs
    decode(backend, [1, 0])
    decode(backend, [0, 1])
    assert fake.cuda.calls.count("captured") == 4
    del backend
    assert not fake.cuda.graphs


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
    backend._contexts[0].works = False
    with pytest.warns(UserWarning, match="cannot run this step"), pytest.raises(BackendError, match="cannot run"):
        decode(backend, [0])
    assert fake.cuda.capturing is None
    assert not fake.cuda.graphs
    backend._contexts[0].works = True
    decode(backend, [0])
    assert backend.past_length.tolist() == [2]
