"""Decode steps as CUDA graphs of ONNX Runtime, over a session on host memory that captures as it does on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from less_export.errors import BackendError
from less_export.runtime import ort, ort_graphs
from less_export.runtime.ort import OrtBackend
from less_export.runtime.ort_graphs import DecodeGraphs

from .tiny_decoder import CONTRACT, onnx_decoder

WIDTHS = (4, 1, 1, 3, 1, 1, 1)


class Capturing:
    """A session whose runs are captured into graphs.

    As ONNX Runtime's issue 32243 describes, and pull request 2452 of onnxruntime-genai works around: the first run of a
    number runs twice before it is captured, and is run once more for that. Its Python API (1.32,
    ``onnxruntime_inference_collection.py``) says that -1 captures nothing, and that without a number it is 0.
    A replay reads and writes the memory of the captured binding, whatever it is given.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.graphs: dict[str, Any] = {}
        self.plain, self.replays = 0, 0
        self.fails = False
        self.captures = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if self.fails:
            raise RuntimeError("a kernel failed")
        number = options.get_run_config_entry("gpu_graph_id") if options is not None else "0"
        if number == "-1":
            self.plain += 1
            self._session.run_with_iobinding(binding)
            return
        times = 1
        if number in self.graphs:
            self.replays += 1
        elif not self.captures:
            raise RuntimeError("out of memory")
        else:
            self.graphs[number], times = binding, 3
        for _ in range(times):
            self._session.run_with_iobinding(self.graphs[number])


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[OrtBackend, OrtBackend, Capturing]]:
    """A backend whose decode steps are captured, one whose are not, and the session of the first."""
    path = onnx_decoder(CONTRACT, tmp_path / "model.onnx")
    ours, truth = (OrtBackend(CONTRACT, path, threads=1, operator="native") for _ in range(2))
    session = Capturing(ours._session)
    ours._session, ours._graphs = session, DecodeGraphs(onnxruntime, session, CONTRACT, "cpu")
    with ours, truth:
        yield ours, truth, session


def same_steps(ours: OrtBackend, truth: OrtBackend, rows: slice, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    count = rows.stop - rows.start
    for width in WIDTHS:
        ids = random.integers(0, CONTRACT.vocab_size, (count, width))
        new = random.integers(0, width + 1, count) if width > 1 else np.arange(count) % 3 != 1
        got, want = ours.step(ids, new.astype(int), rows), truth.step(ids, new.astype(int), rows)
        np.testing.assert_array_equal(got[new > 0], want[new > 0])
    for row in range(ours.batch):
        for name, tensor in truth.read_row(row).tensors.items():
            np.testing.assert_array_equal(ours.read_row(row).tensors[name], tensor, name)


def test_captured_steps_are_the_same(pair: tuple[OrtBackend, OrtBackend, Capturing]) -> None:
    """A graph for each range of rows; chunks are not captured; the runs before a capture leave the state alone."""
    ours, truth, session = pair
    ours.open(3)
    truth.open(3)
    for seed, rows in enumerate((slice(0, 3), slice(1, 3), slice(0, 3), slice(2, 3))):
        same_steps(ours, truth, rows, seed)
    assert len(session.graphs) == 3
    assert session.plain == 4 * sum(w > 1 for w in WIDTHS)
    assert session.replays == 4 * WIDTHS.count(1)


def test_graphs_stay_while_the_state_stays(pair: tuple[OrtBackend, OrtBackend, Capturing]) -> None:
    """Fewer rows are the first of those that are there, and empty; more rows move the state."""
    ours, truth, session = pair
    for batch in (2, 1, 2, 3, 2):
        ours.open(batch)
        truth.open(batch)
        same_steps(ours, truth, slice(0, batch), batch)
    assert len(session.graphs) == 2 + 2


def test_no_more_graphs_than_a_session_may_keep(
    pair: tuple[OrtBackend, OrtBackend, Capturing], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, truth, session = pair
    monkeypatch.setattr(ort_graphs, "MOST", 1)
    ours.open(3)
    truth.open(3)
    same_steps(ours, truth, slice(0, 2))
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: a session keeps up to 1"):
        same_steps(ours, truth, slice(1, 3))
    same_steps(ours, truth, slice(0, 2))
    assert len(session.graphs) == 1


def test_a_capture_that_fails(pair: tuple[OrtBackend, OrtBackend, Capturing]) -> None:
    """The step runs without one, and so do those that follow."""
    ours, truth, session = pair
    session.captures = False
    ours.open(2)
    truth.open(2)
    with pytest.warns(RuntimeWarning, match="run without CUDA graphs: out of memory") as warned:
        same_steps(ours, truth, slice(0, 2))
    assert len(warned) == 1
    assert session.replays == 0
    assert session.plain == len(WIDTHS)


def test_failure_of_a_captured_step(pair: tuple[OrtBackend, OrtBackend, Capturing]) -> None:
    ours, _, session = pair
    ours.open(1)
    ours.step([[1]])
    session.fails = True
    with pytest.raises(BackendError, match="ONNX Runtime failed: a kernel failed"):
        ours.step([[1]])


@pytest.mark.parametrize("refused", [False, True])
def test_a_session_that_may_capture(refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless ONNX Runtime refuses to, which it does when it loads a graph; without the short products of TF32."""
    exact = {"use_tf32": "0"}
    path = onnx_decoder(CONTRACT, tmp_path / "model.onnx")
    asked: list[dict[str, str]] = []
    load = onnxruntime.InferenceSession

    class OnCuda:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            own = dict(providers[0][1]) if isinstance(providers[0], tuple) else {}
            asked.append(own)
            if refused and "enable_cuda_graph" in own:
                raise RuntimeError("This session cannot use the graph capture feature")
            self._session = load(path, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCuda)
    monkeypatch.setitem(ort._KERNELS, "cuda", ort._KERNELS["cpu"])
    OrtBackend(CONTRACT, path, provider="cuda", cuda_graphs=False)
    assert asked == [exact]
    if refused:
        with pytest.warns(RuntimeWarning, match="run without CUDA graphs: This session cannot use the graph capture"):
            OrtBackend(CONTRACT, path, provider="cuda")
        assert asked == [exact, exact | {"enable_cuda_graph": "1"}, exact]
    else:
        OrtBackend(CONTRACT, path, provider="cuda")
        assert asked == [exact, exact | {"enable_cuda_graph": "1"}]
