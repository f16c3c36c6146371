"""Steps over ranges of rows, against every row on its own; copies and resets between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from less_export.errors import BackendError
from less_export.runtime.backend import Backend
from less_export.runtime.ort import OrtBackend

from .conftest import Opened
from .tiny_decoder import CONTRACT, INT8, ReferenceBackend, onnx_decoder
from .trt_decoder import contract_of, decoder, serialised
from .trt_support import Fake

ROWS = 3
Pieces = list[list[int]]


def play(backend: Backend, count: int, seed: int = 0) -> tuple[list[Pieces], list[np.ndarray | None]]:
    """Random steps, copies and resets: what each row was fed, and its latest logits if it was stepped last."""
    random, contract = np.random.default_rng(seed), backend.contract
    backend.open(ROWS)
    fed: list[Pieces] = [[] for _ in range(ROWS)]
    latest: list[np.ndarray | None] = [None] * ROWS
    for _ in range(count):
        one, other = (int(x) for x in random.integers(0, ROWS, 2))
        kind = random.choice(["step", "step", "step", "decode", "decode", "copy", "reset"])
        if kind == "copy":
            backend.copy_row(one, other)
            fed[other], latest[other] = list(fed[one]), latest[one]
        elif kind == "reset":
            backend.reset_rows([one])
            fed[one], latest[one] = [], None
        else:
            rows = slice(min(one, other), max(one, other) + 1)
            width = 1 if kind == "decode" else int(random.integers(1, min(contract.chunk, 6) + 1))
            size = rows.stop - rows.start
            ids, new = random.integers(0, contract.vocab_size, (size, width)), random.integers(0, width + 1, size)
            logits = backend.step(ids, new, rows)
            for i, row in enumerate(range(rows.start, rows.stop)):
                if new[i]:
                    fed[row].append(ids[i, : new[i]].tolist())
                    latest[row] = logits[i, new[i] - 1 if contract.logits == "all" else 0].copy()
    return fed, latest


def assert_as_alone(backend: Backend, alone: Backend, count: int, tolerance: float) -> None:
    """Every row holds what it holds in ``alone``, a backend of the same model where it is the only one."""
    fed, latest = play(backend, count)
    states = [backend.read_row(row) for row in range(ROWS)]
    assert [s.length for s in states] == [sum(map(len, pieces)) for pieces in fed]
    for row, pieces in enumerate(fed):
        alone.open(1)
        logits = None
        for piece in pieces:
            logits = alone.step([piece])[0, -1]
        if logits is None:
            assert latest[row] is None
            continue
        np.testing.assert_allclose(latest[row], logits, tolerance, tolerance, err_msg=f"row {row}")
        for layer in range(len(backend.contract.layers)):
            for field in ("position", "h", "z"):
                name = f"past.{layer}.{field}"
                want = alone.read_row(0).tensors[name]
                np.testing.assert_allclose(states[row].tensors[name], want, tolerance, tolerance, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


@pytest.mark.parametrize("contract", [CONTRACT, INT8], ids=["model", "int8"])
def test_onnx_runtime(contract: object, folder: Path) -> None:
    path = onnx_decoder(contract, folder / "model.onnx")
    backend, alone = (OrtBackend(contract, path, threads=1) for _ in range(2))
    for seed_count in (40, 41):
        assert_as_alone(backend, alone, seed_count, 2e-5)


def test_more_ranges_than_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("less_export.runtime.ort._MAX_RANGES", 2)
    path = onnx_decoder(CONTRACT, folder / "model.onnx")
    backend, alone = (OrtBackend(CONTRACT, path, threads=1) for _ in range(2))
    assert_as_alone(backend, alone, 40, 2e-5)
    assert len(backend._bindings) == 2


def test_no_state_is_copied_between_steps_of_one_range(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph's own nodes, which read one set of buffers and write the other; the kernel has one set."""
    path, moved = onnx_decoder(CONTRACT, folder / "model.onnx"), []
    backend, kernel = (OrtBackend(CONTRACT, path, threads=1, operator=o) for o in ("onnx", "native"))
    for one in (backend, kernel):
        one.open(3)
        monkeypatch.setattr(one, "_put", lambda row, *rest, put=one._put: (moved.append(row), put(row, *rest)))
    kernel.step([[1, 2]], rows=slice(2, 3))
    kernel.step([[1], [2], [3]])
    for _ in range(3):
        backend.step([[1, 2]], rows=slice(2, 3))
        backend.step([[1], [2]], rows=slice(0, 2))
    assert moved == []
    backend.step([[1]], rows=slice(2, 3))
    backend.step([[1], [2], [3]])  # row 2 joins the others, once
    backend.step([[1], [2], [3]])
    assert moved == [2]


def test_reference_double() -> None:
    assert_as_alone(ReferenceBackend(CONTRACT), ReferenceBackend(CONTRACT), 40, 2e-5)


@pytest.mark.slow
def test_torch(opened: Opened) -> None:
    backend, alone = (opened("llama", "h2o", "torch", copy=copy) for copy in (0, 1))
    assert_as_alone(backend, alone, 12, 1e-4)


@pytest.mark.parametrize("in_place", [False, True])
def test_tensorrt_by_address(in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some tensors begin at addresses that TensorRT cannot take: these are staged."""
    contract, path = contract_of("float32"), tmp_path / "model.onnx"
    path.write_bytes(serialised(decoder(contract, tmp_path)))
    session = onnxruntime.InferenceSession(str(path))
    fake = Fake(contract, tmp_path, monkeypatch, lambda feed: session.run(None, feed))
    assert fake.engine is not None
    fake.engine.in_place = in_place
    assert {t.row_bytes % 256 == 0 for t in contract.state()} == {True, False}
    backend = fake.backend()
    assert_as_alone(backend, OrtBackend(contract, path, threads=1), 60, 2e-5)
    backend.close()
    assert not fake.cuda.memory


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([[1]], slice(3, 4), "within 0..2"),
        ([[1]], slice(-1, None), "within 0..2"),
        ([[1]], slice(1, 1), "adjacent rows"),
        ([[1], [2]], slice(0, 3, 2), "adjacent rows"),
        ([[1], [2]], slice(1, 2), r"input_ids must be \[1, T\]"),
    ],
)
def test_what_is_no_range(ids: list[list[int]], rows: slice, message: str) -> None:
    backend = ReferenceBackend(CONTRACT)
    backend.open(3)
    with pytest.raises(BackendError, match=message):
        backend.step(ids, rows=rows)
    assert backend.past_length.tolist() == [0, 0, 0]


@pytest.mark.parametrize("operation", ["copy_row", "step"])
def test_other_rows_are_left_alone(operation: str) -> None:
    backend = ReferenceBackend(CONTRACT)
    backend.open(3)
    backend.step([[1, 2], [3, 4], [5, 6]])
    before = backend.read_row(1)
    calls: dict[str, Callable[[], object]] = {
        "copy_row": lambda: backend.copy_row(0, 2),
        "step": lambda: (backend.step([[7]], rows=slice(0, 1)), backend.step([[7]], rows=slice(2, 3))),
    }
    calls[operation]()
    after = backend.read_row(1)
    assert (after.length, backend.past_length.tolist()[1]) == (2, 2)
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], tensor)
