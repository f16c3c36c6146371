"""The ONNX Runtime backend on a tiny decoder: parity with torch, ping-pong state, rows, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest

from less_export.contract import Contract, Policy
from less_export.errors import BackendError, UsageError
from less_export.runtime import ort as runtime_ort
from less_export.runtime.backend import Backend, RowState
from less_export.runtime.generate import Generator
from less_export.runtime.ort import OrtBackend

from .tiny_decoder import CONTRACT, INT8, LAYERS, ReferenceBackend, onnx_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return onnx_decoder(CONTRACT, folder / "model.onnx")


@pytest.fixture(scope="module")
def shared(model: Path) -> OrtBackend:
    return OrtBackend(CONTRACT, model, threads=1)


@pytest.fixture
def ort(shared: OrtBackend) -> OrtBackend:
    shared.open(3)
    return shared


def steps(count: int, seed: int = 0, batch: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ragged chunks with parked rows; padding holds garbage."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        width = 1 if i % 3 == 2 else int(rng.integers(1, CONTRACT.chunk + 1))
        out.append((rng.integers(0, CONTRACT.vocab_size, (batch, width)), rng.integers(0, width + 1, batch)))
    return out


def assert_same_rows(a: Backend, b: Backend, tolerance: float) -> None:
    """Compare slot by slot; the contents of empty slots do not matter."""
    for row in range(a.batch):
        x, y = a.read_row(row), b.read_row(row)
        assert x.length == y.length
        for i in range(len(a.contract.layers)):
            held = x.tensors[f"past.{i}.position"] >= 0
            for field in (f.name for f in a.contract.layers[i].state_fields):
                left, right = (s.tensors[f"past.{i}.{field}"] for s in (x, y))
                if field not in ("position", "h", "z"):
                    left, right = left[held], right[held]
                np.testing.assert_allclose(left, right, tolerance, tolerance, err_msg=f"row {row} {i} {field}")


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize(("logits", "slots"), [("last", "model"), ("all", "model"), ("last", "int8")])
def test_agrees_with_the_reference(folder: Path, logits: Literal["last", "all"], slots: str) -> None:
    tolerance = 2e-5
    contract = dataclasses.replace(INT8 if slots == "int8" else CONTRACT, logits=logits)
    ours = OrtBackend(contract, onnx_decoder(contract, folder / f"{logits} {slots}.onnx", seed=1), threads=1)
    truth = ReferenceBackend(contract, seed=1)
    ours.open(3)
    truth.open(3)
    for ids, new in steps(13):
        got, want = ours.step(ids, new), truth.step(ids, new)
        assert got.dtype == np.float32
        assert got.shape == want.shape == (3, ids.shape[1] if logits == "all" else 1, CONTRACT.vocab_size)
        assert np.isfinite(got).all()
        for row in range(3):
            valid = slice(0, new[row] if logits == "all" else min(new[row], 1))
            np.testing.assert_allclose(got[row, valid], want[row, valid], tolerance, tolerance)
    assert_same_rows(ours, truth, tolerance)
    assert (ours.past_length > max(s.capacity for s in LAYERS)).all()  # evictions happened


@pytest.mark.slow
def test_many_layers(folder: Path) -> None:
    contract = dataclasses.replace(CONTRACT, layers=LAYERS * 22)
    ours = OrtBackend(contract, onnx_decoder(contract, folder / "deep.onnx"), threads=1)
    truth = ReferenceBackend(contract)
    ours.open(1)
    truth.open(1)
    for ids in ([[1, 2, 3, 4, 5]], [[6]], [[7, 8, 9]], [[10]]):
        want = truth.step(ids)
        assert np.abs(ours.step(ids) - want).max() < 1e-4 * np.abs(want).max()


def test_float16(folder: Path) -> None:
    contract = dataclasses.replace(CONTRACT, dtype="float16", layers=LAYERS[1:])
    ours = OrtBackend(contract, onnx_decoder(contract, folder / "half.onnx"), threads=1)
    truth = ReferenceBackend(contract)
    ours.open(2)
    truth.open(2)
    for ids, new in steps(8, batch=2):
        got, want = ours.step(ids, new), truth.step(ids, new)
        np.testing.assert_allclose(got[new > 0], want[new > 0], 2e-2, 2e-2)
    assert ours.read_row(0).tensors["past.0.key"].dtype == np.float16
    assert_same_rows(ours, truth, 2e-2)


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("operator", ["native", "onnx"])
def test_state_is_allocated_once(model: Path, operator: str) -> None:
    """The kernel changes one set of tensors; without it, steps go back and forth between two."""
    ort = OrtBackend(CONTRACT, model, threads=1, operator=operator)
    ort.open(3)

    def addresses() -> list[list[int]]:
        return [[v.data_ptr() for v in values.values()] for values in ort._values]

    before, seen = addresses(), [ort._sides[0]]
    assert len(before) == (1 if operator == "native" else 2)
    assert not set(before[0]) & set(before[-1]) or operator == "native"
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, new in steps(6):
        logits = ort.step(ids, new)
        kept.append((logits, logits.copy()))
        seen.append(ort._sides[0])
    assert addresses() == before
    assert seen == ([0] * 7 if operator == "native" else [0, 1, 0, 1, 0, 1, 0])
    for logits, copy in kept:  # a result belongs to the caller; later steps do not change it
        np.testing.assert_array_equal(logits, copy)


def test_memory_is_kept_low(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of these options, memory or time increases: ``benchmarks/bench_memory.py``."""
    seen: list[str] = []
    sessions: list[onnxruntime.SessionOptions] = []
    load = onnxruntime.InferenceSession

    def session(path: str, options: onnxruntime.SessionOptions, **rest: Any) -> onnxruntime.InferenceSession:
        seen.append("loads")
        sessions.append(options)
        return load(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(runtime_ort, "_trim_heap", lambda: seen.append("trims the heap"))
    backend = OrtBackend(CONTRACT, model, threads=1)
    assert seen == ["loads", "trims the heap"]
    assert sessions[0].enable_mem_pattern is False
    assert sessions[0].enable_cpu_mem_arena is True
    assert sessions[0].graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for entry in ("session.disable_prepacking", "session.disable_quant_qdq"):
        with pytest.raises(RuntimeError):  # not set
            sessions[0].get_session_config_entry(entry)

    run, shrunk = backend._session.run_with_iobinding, []

    def spy(binding: Any, options: Any = None) -> None:
        entry = options.get_run_config_entry("memory.enable_memory_arena_shrinkage") if options else None
        shrunk.append(entry)
        run(binding, options)

    monkeypatch.setattr(backend._session, "run_with_iobinding", spy)
    backend.open(1)
    for ids in ([[1, 2, 3]], [[4, 5]], [[6]], [[7]], [[8, 9]], [[10]]):
        backend.step(ids)
    assert shrunk == [None, None, "cpu:0", None, None, "cpu:0"]  # once decoding begins


def test_parked_rows_do_not_change(ort: OrtBackend) -> None:
    for ids, new in steps(3):
        ort.step(ids, new)
    before = ort.read_row(1)
    for _ in range(3):
        ort.step([[1], [2], [3]], [1, 0, 1])
    after = ort.read_row(1)
    assert after.length == before.length
    for i in range(len(LAYERS)):
        held = before.tensors[f"past.{i}.position"] >= 0
        for field in ("key", "value", "psi", "score", "position"):
            name = f"past.{i}.{field}"
            np.testing.assert_array_equal(after.tensors[name][held], before.tensors[name][held])
        for field in ("h", "z"):
            np.testing.assert_array_equal(after.tensors[f"past.{i}.{field}"], before.tensors[f"past.{i}.{field}"])


@pytest.mark.parametrize("odd", [0, 1])
def test_rows_are_copied_reset_and_written_in_the_current_set(ort: OrtBackend, odd: int) -> None:
    for ids, new in steps(4 + odd):
        ort.step(ids, np.maximum(new, 1))
    ort.copy_row(0, 2)
    assert ort.past_length[2] == ort.past_length[0]
    logits = ort.step([[7], [7], [7]])
    np.testing.assert_allclose(logits[2], logits[0], 1e-5, 1e-5)
    assert np.abs(logits[1] - logits[0]).max() > 1e-2

    ort.reset_rows([1])
    other = ort.read_row(0)
    again = ort.step([[3, 4], [3, 4], [3, 4]], [0, 2, 0])[1]
    assert list(ort.past_length)[1] == 2
    np.testing.assert_array_equal(ort.read_row(0).tensors["past.0.z"], other.tensors["past.0.z"])
    ort.open(1)
    np.testing.assert_allclose(ort.step([[3, 4]])[0], again, 1e-5, 1e-5)


def test_a_row_read_is_a_copy(ort: OrtBackend) -> None:
    ort.step([[1], [2], [3]])
    state = ort.read_row(0)
    kept = {n: x.copy() for n, x in state.tensors.items()}
    for _ in range(4):
        ort.step([[4], [5], [6]])
    for name, x in kept.items():
        np.testing.assert_array_equal(state.tensors[name], x)


def test_a_saved_state_continues_elsewhere(ort: OrtBackend, model: Path, tmp_path: Path) -> None:
    prompt, path = list(range(1, 24)), tmp_path / "prefix.safetensors"
    here = Generator(ort)
    here.prefill(prompt).save(path)
    want = here.generate([[30, 31], [32]], prefix=RowState.load(path), max_new_tokens=9)
    there = Generator(OrtBackend(CONTRACT, model, threads=1))
    got = there.generate([[30, 31], [32]], prefix=RowState.load(path), max_new_tokens=9)
    assert [g.token_ids for g in got] == [g.token_ids for g in want]
    assert want[0].token_ids != want[1].token_ids
    # Fed in the same pieces without a snapshot: the prefix's chunks, then the continuation's.
    ort.open(1)
    for begin in range(0, len(prompt), CONTRACT.chunk):
        ort.step([prompt[begin : begin + CONTRACT.chunk]])
    logits, tokens = ort.step([[30, 31]]), []
    for _ in range(9):
        tokens.append(int(logits[0, 0].argmax()))
        logits = ort.step([[tokens[-1]]])
    assert tuple(tokens) == want[0].token_ids


def test_generation_does_not_depend_on_batch_mates(ort: OrtBackend) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, CONTRACT.vocab_size, n).tolist() for n in (3, 17, 11, 5)]  # more than max_batch
    together = Generator(ort).generate(prompts, max_new_tokens=12)
    assert [Generator(ort).generate([p], max_new_tokens=12)[0] for p in prompts] == together


def test_a_failed_step_leaves_the_state_whole(ort: OrtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    ort.step([[1], [2], [3]])
    before = ort.read_row(0)

    class Broken:
        def run_with_iobinding(self, binding: object, options: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : out of something\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(ort, "_session", Broken())
        with pytest.raises(BackendError, match=r"^ONNX Runtime failed: out of something$"):
            ort.step([[1], [2], [3]])
    assert ort.read_row(0).length == before.length == 1
    np.testing.assert_array_equal(ort.read_row(0).tensors["past.0.key"], before.tensors["past.0.key"])
    ort.step([[1], [2], [3]])


def test_lifecycle(shared: OrtBackend) -> None:
    shared.close()
    with pytest.raises(BackendError, match="not open"):
        shared.step([[1]])
    with pytest.raises(BackendError, match=r"outside 1\.\.3"):
        shared.open(4)
    shared.open(2)
    shared.step([[1], [2]])
    shared.open(1)
    assert shared.batch == 1
    assert (shared.read_row(0).tensors["past.0.position"] == -1).all()


def test_scratch_of_prefill_is_given_back_once(ort: OrtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    session, shrunk = ort._session, []

    class Watched:
        def run_with_iobinding(self, binding: object, options: object) -> None:
            shrunk.append(options is not None)
            session.run_with_iobinding(binding, options)

    monkeypatch.setattr(ort, "_session", Watched())
    for width in (4, 5, 1, 1, 2, 1):
        ort.step(np.ones((3, width), int))
    assert shrunk == [False, False, True, False, False, True]


# ------------------------------------------------------------------ refusals


def refuse(contract: Contract, path: Path, match: str, **options: object) -> None:
    with pytest.raises(BackendError, match=match) as caught:
        OrtBackend(contract, path, **options)
    assert "\n" not in str(caught.value)


def changed(index: int, **fields: object) -> tuple:
    return tuple(dataclasses.replace(s, **fields) if i == index else s for i, s in enumerate(LAYERS))


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"layers": LAYERS[:2]}, "unexpected input past.2."),
        ({"layers": (*LAYERS, LAYERS[0])}, "lacks input past.3."),
        ({"layers": changed(0, heavy=4, capacity=8)}, r"past.0.key is .*7, 8.*says float32 \['batch', 2, 8, 8\]"),
        ({"layers": changed(2, rank=4)}, "past.2.psi is"),
        ({"dtype": "float16"}, "says float16"),
        ({"vocab_size": 51}, "logits is"),
        ({"logits": "all"}, "logits is"),
    ],
)
def test_a_graph_of_another_contract_is_refused(model: Path, other: dict, match: str) -> None:
    refuse(dataclasses.replace(CONTRACT, **other), model, match)


def test_all_logits_do_not_pass_for_the_last(folder: Path) -> None:
    everything = dataclasses.replace(CONTRACT, logits="all")
    refuse(CONTRACT, onnx_decoder(everything, folder / "everything.onnx"), "logits is")


def test_a_fixed_batch_is_refused(model: Path, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(model)
    for value in graph.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(graph, tmp_path / "fixed.onnx")
    refuse(CONTRACT, tmp_path / "fixed.onnx", r"input input_ids is tensor\(int64\) \[2,")


def test_damaged_files(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("text", b"hello" * 50), ("none", b"")):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        refuse(CONTRACT, tmp_path / f"{name}.onnx", rf"cannot load .*{name}.onnx: .*export the bundle again")
    refuse(CONTRACT, tmp_path / "absent.onnx", "no such file")
    refuse(CONTRACT, tmp_path, "no such file")


def test_missing_weights(model: Path, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(model)
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
    OrtBackend(CONTRACT, tmp_path / "m.onnx", threads=1)
    (tmp_path / "m.data").unlink()
    refuse(CONTRACT, tmp_path / "m.onnx", "cannot load")


def test_options(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(dataclasses.replace(CONTRACT, dtype="bfloat16"), model, "bfloat16.*--dtype float32")
    for options, match in (({"threads": 0}, "threads"), ({"provider": "tpu"}, "choose cpu or cuda")):
        with pytest.raises(UsageError, match=match):
            OrtBackend(CONTRACT, model, **options)
    OrtBackend(CONTRACT, model, provider="CPUExecutionProvider", threads=1)
    monkeypatch.setattr(runtime_ort, "_installed", lambda package: package == "onnxruntime")
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    refuse(CONTRACT, model, r"without CUDA.*less-export\[gpu\]", provider="cuda")


def test_both_runtimes_installed_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_ort, "_installed", lambda package: True)
    with pytest.warns(RuntimeWarning, match="both installed"):
        OrtBackend(CONTRACT, model, threads=1)
    refuse(CONTRACT, model, "both installed", provider="cuda")


def test_a_missing_runtime_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuse(CONTRACT, model, r"pip install 'less-export\[cpu\]'$")


def test_a_full_state_takes_no_more(folder: Path) -> None:
    full = dataclasses.replace(LAYERS[1], policy=Policy.FULL, window=0, recent=8, capacity=8)
    contract = Contract((full,), 50, "float32", chunk=5, max_batch=2)
    backend = OrtBackend(contract, onnx_decoder(contract, folder / "full.onnx"), threads=1)
    (result,) = Generator(backend).generate([[1, 2, 3, 4, 5]], max_new_tokens=20)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")
    with pytest.raises(UsageError, match="8 tokens and its new tokens do not fit into the 8"):
        Generator(backend).generate([[1] * 8])
    assert Generator(backend).prefill([1] * 8).length == 8
    with pytest.raises(UsageError, match="9 tokens does not fit"):
        Generator(backend).prefill([1] * 9)


def test_running_imports_neither_torch_nor_transformers(model: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from less_export.contract import LayerSpec, Contract, Policy\n"
        "from less_export.runtime import backend, generate, ort, sampling, tokenizer\n"
        "assert 'onnxruntime' not in sys.modules, 'imported early'\n"
        "for name in ('torch', 'transformers', 'onnx'): assert name not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=60)
