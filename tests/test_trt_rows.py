"""The TensorRT backend with plans that take rows by index, on a stand-in for engine and CUDA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.errors import BackendError, EngineError
from less_export.runtime.ort import OrtBackend

from .test_row_ranges import assert_as_alone
from .tiny_decoder import CONTRACT, ReferenceBackend
from .trt_decoder import play
from .trt_support import CONTRACT_TRT, Fake, reference

pytest_plugins = ["tests.trt_support"]


def test_ranges_are_rows_too(fake: Fake, tmp_path: Path) -> None:
    backend = fake.backend()
    assert backend.rows_by_index
    assert_as_alone(backend, reference(tmp_path), 60, 2e-5)
    backend.close()
    assert not fake.cuda.memory
    assert not fake.cuda.host


def test_any_rows_in_any_order(fake: Fake, tmp_path: Path) -> None:
    """Random steps over random rows, some parked: each row ends as alone, and steps hold the others only."""
    assert fake.engine is not None
    random, backend = np.random.default_rng(3), fake.backend()
    backend.open(4)
    fed: list[list[list[int]]] = [[] for _ in range(4)]
    latest: dict[int, np.ndarray] = {}
    for step in range(60):
        kind = random.choice(["step", "step", "decode", "decode", "copy", "reset"])
        rows = random.permutation(4)[: random.integers(1, 5)].tolist()
        if kind == "copy" and len(rows) > 1:
            backend.copy_row(rows[0], rows[1])
            fed[rows[1]] = list(fed[rows[0]])
            latest[rows[1]] = latest.get(rows[0], np.zeros(0))
        elif kind == "reset":
            backend.reset_rows(rows)
            for row in rows:
                fed[row], latest[row] = [], np.zeros(0)
        else:
            width = 1 if kind == "decode" else int(random.integers(1, 5))
            ids = random.integers(0, 32, (len(rows), width))
            new = random.integers(0, width + 1, len(rows))
            fake.engine.batches.clear()
            logits = backend.step(ids, new, rows if step % 2 else np.array(rows))
            ran = np.count_nonzero(new)
            assert fake.engine.batches == ([1 << (int(ran) - 1).bit_length() if width == 1 else ran] if ran else [])
            assert np.isfinite(logits).all()
            for i, row in enumerate(rows):
                if new[i]:
                    fed[row].append(ids[i, : new[i]].tolist())
                    latest[row] = logits[i, 0]
    alone = reference(tmp_path)
    for row, pieces in enumerate(fed):
        alone.open(1)
        wanted = [alone.step([piece])[0, 0] for piece in pieces]
        state = backend.read_row(row)
        assert state.length == sum(map(len, pieces))
        for name in ("past.0.position", "past.0.h", "past.1.position"):
            np.testing.assert_allclose(state.tensors[name], alone.read_row(0).tensors[name], 2e-5, 2e-5)
        if wanted:
            np.testing.assert_allclose(latest[row], wanted[-1], 2e-5, 2e-5)


def test_the_state_is_bound_once(fake: Fake) -> None:
    """Steps over other rows change no address, and copy nothing but what goes in and comes out."""
    backend = fake.backend()
    backend.open(3)
    assert fake.engine is not None
    bound = [dict(context.addresses) for context in fake.engine.contexts]
    assert set(bound[0]) == set(fake.engine.specs)
    assert bound[0] == bound[1]
    fake.cuda.calls.clear()
    for rows in ([2], [0, 2], [2, 1, 0]):
        backend.step([[1]] * len(rows), rows=rows)
    assert fake.cuda.calls == ["up", "down"] * 3
    assert [context.addresses for context in fake.engine.contexts] == [bound[0]] * 4  # two buckets more
    backend.open(2)  # elsewhere
    assert fake.engine.contexts[0].addresses != bound[0]


@pytest.mark.parametrize("version", [12060, 12080, 13000])
def test_copies_and_resets_are_one_call(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers and rows, with CUDA 12.8 and later; one a tensor before."""
    fake = Fake(CONTRACT_TRT, tmp_path, monkeypatch, lambda feed: [], by_index=True)
    fake.cuda.version = version
    backend = fake.backend()
    backend.open(3)
    tensors = len([*CONTRACT_TRT.state()])
    random = np.random.default_rng(0)
    state = backend.read_row(0)
    for tensor in state.tensors.values():
        tensor[...] = random.integers(0, 9, tensor.shape)
    backend.write_row(1, state)
    fake.cuda.calls.clear()
    backend.copy_row(1, 2)
    assert fake.cuda.calls == (["batch"] if version >= 12080 else ["across"] * tensors)
    fake.cuda.calls.clear()
    backend.reset_rows([1, 0])
    assert fake.cuda.calls == (["batch"] if version >= 12080 else ["across"] * tensors * 2)
    fresh = ReferenceBackend(CONTRACT_TRT)
    fresh.open(1)
    for row, wanted in ((0, fresh.read_row(0).tensors), (1, fresh.read_row(0).tensors), (2, state.tensors)):
        for name, tensor in backend.read_row(row).tensors.items():
            np.testing.assert_array_equal(tensor, wanted[name])


def test_without_batches_in_the_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(CONTRACT_TRT, tmp_path, monkeypatch, lambda feed: [], by_index=True)
    monkeypatch.delattr(type(fake.cuda), "cudaMemcpyBatchAsync")
    backend = fake.backend()
    backend.open(2)
    fake.cuda.calls.clear()
    backend.copy_row(0, 1)
    assert fake.cuda.calls == ["across"] * len([*CONTRACT_TRT.state()])


def test_a_plan_that_takes_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest decides what the plan should have."""
    fake = Fake(CONTRACT_TRT, tmp_path, monkeypatch, lambda feed: [], in_place=True)
    assert fake.engine is not None
    fake.engine.by_index = True
    with pytest.raises(EngineError, match="the plan lacks the tensor rows: export the bundle again"):
        fake.backend()
    other = Fake(CONTRACT_TRT, tmp_path, monkeypatch, lambda feed: [], by_index=True)
    assert other.engine is not None
    other.engine.by_index = False
    with pytest.raises(EngineError, match="the plan has the tensor rows, which the contract lacks"):
        other.backend()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 0], r"rows must be distinct rows within 0..2, not \[0, 0\]"),
        ([3, 0], r"rows must be distinct rows within 0..2, not \[3, 0\]"),
        ([-1, 0], r"distinct rows within 0..2"),
        ([], r"rows must be integers|distinct rows"),
        ([0.0, 1.0], "rows must be integers"),
        ([[0, 1]], "distinct rows within 0..2"),
        ([2, 0, 1], r"input_ids must be \[3, T\]"),
    ],
)
def test_rows_that_are_refused(rows: Any, message: str, fake: Fake) -> None:
    backend = fake.backend()
    backend.open(3)
    with pytest.raises(BackendError, match=message):
        backend.step([[1], [2]], rows=rows)
    assert backend.past_length.tolist() == [0, 0, 0]


def test_backends_of_ranges_refuse_other_rows() -> None:
    backend = ReferenceBackend(CONTRACT)
    backend.open(3)
    assert not backend.rows_by_index
    backend.step([[1], [2]], rows=[1, 2])
    assert backend.past_length.tolist() == [0, 1, 1]
    for rows in ([2, 1], [0, 2]):
        with pytest.raises(BackendError, match=rf"backend runs adjacent rows in order, not \[{rows[0]}, {rows[1]}\]$"):
            backend.step([[1], [2]], rows=rows)


def test_many_logits_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into page-locked memory comes back all the same, and results are the caller's."""
    contract = dataclasses.replace(CONTRACT_TRT, logits="all")

    def graph(feed: dict[str, Any]) -> list[Any]:
        ids = feed["input_ids"]
        return [np.repeat(ids[..., None], 32, -1).astype(np.float32), *(feed[s.past.name] for s in contract.state())]

    backend = Fake(contract, tmp_path, monkeypatch, graph, by_index=True).backend()
    backend.open(2)
    many = backend.step([[1, 2, 3, 4], [5, 6, 7, 8]])
    few = backend.step([[9], [8]])
    last = backend.step([[3]], rows=[1])
    assert many[..., 31].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert few[..., 0].tolist() == [[9], [8]]
    assert last[..., 0].tolist() == [[3]]


def test_the_whole_life_of_a_backend(fake: Fake, tmp_path: Path) -> None:
    results = zip(play(fake.backend()), play(OrtBackend(CONTRACT_TRT, tmp_path / "model.onnx")), strict=True)
    for (name, got), (_, wanted) in results:
        if "logits" in name or "position" in name:
            np.testing.assert_allclose(got, wanted, 2e-5, 2e-5, err_msg=name)
