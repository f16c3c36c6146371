"""The TensorRT backend on a stand-in for engine and CUDA: where the state is, what is allocated, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from less_export.contract import SlotDtype, StateBits
from less_export.errors import BackendError, EngineError
from less_export.runtime.ort import OrtBackend
from less_export.runtime.trt import TrtBackend
from less_export.tensorrt.engine import profiles

from .trt_decoder import contract_of, decoder, play, serialised
from .trt_support import Fake, FakeEngine

pytest_plugins = ["tests.trt_decoder"]


def test_cuda_bindings_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"needs cuda-bindings .*pip install 'less-export\[trt\]'"):
        TrtBackend(contract_of("float16"), tmp_path / "engine.plan")


@pytest.mark.parametrize(("in_place", "slots", "bits"), [(False, "model", 32), (True, "model", 32), (True, "int8", 16)])
def test_backend_keeps_the_state(
    in_place: bool, slots: SlotDtype, bits: StateBits, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract, path = contract_of("float32", slots=slots, state_bits=bits), weights / "model.onnx"
    path.write_bytes(serialised(decoder(contract, weights)))
    session = onnxruntime.InferenceSession(str(path))
    fake = Fake(contract, weights, monkeypatch, lambda feed: session.run(None, feed))
    assert fake.engine is not None
    fake.engine.in_place = in_place
    results = zip(play(fake.backend()), play(OrtBackend(contract, path, operator="onnx")), strict=True)
    for count, ((name, got), (_, wanted)) in enumerate(results):  # noqa: B007
        np.testing.assert_array_equal(got, wanted, name)
    assert count > 500
    assert set(fake.engine.used) == {0, 1}
    assert not fake.cuda.memory  # all freed


@pytest.mark.parametrize(("in_place", "slots"), [(False, "model"), (True, "model"), (False, "int8"), (True, "int8")])
def test_backend_allocates_once(
    in_place: bool, slots: SlotDtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = contract_of("bfloat16").with_slots(slots)
    outputs = contract.outputs()

    def graph(feed: dict[str, Any]) -> list[Any]:  # adds one to the bits of everything
        return [np.zeros(outputs[0].sized(2), np.float32), *(feed[s.past.name] + 1 for s in contract.state())]

    fake = Fake(contract, tmp_path, monkeypatch, graph)
    assert fake.engine is not None
    fake.engine.in_place = in_place
    backend = fake.backend()
    backend.open(2)
    held = dict(fake.cuda.memory)
    inputs = 3 * 256  # of two rows, each input in units of 256 bytes
    state = sum(len(m) for m in held.values()) - inputs - 2 * 32 * 4 - fake.engine.device_memory_size_v2
    rows = 2 * (1 if in_place else 2) + 1  # and an empty one
    assert state == rows * contract.state_bytes()
    assert sum(len(m) for m in fake.cuda.host.values()) == inputs + 2 * 32 * 4
    before = backend.read_row(1)
    for _ in range(3):
        backend.step([[1, 2], [3, 4]])
    assert [*fake.cuda.memory] == [*held]
    after = backend.read_row(1)
    assert (before.length, after.length) == (0, 6)
    for name, tensor in after.tensors.items():
        np.testing.assert_array_equal(tensor, before.tensors[name] + 3)
    backend.write_row(0, before)
    np.testing.assert_array_equal(backend.read_row(0).tensors["past.0.key"], before.tensors["past.0.key"])
    np.testing.assert_array_equal(backend.read_row(1).tensors["past.0.key"], after.tensors["past.0.key"])
    backend.close()
    assert not fake.cuda.memory
    assert not fake.cuda.host
    backend.open(1)
    del backend  # without closing it
    assert not fake.cuda.memory
    assert not fake.cuda.host


def test_what_the_backend_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = contract_of("float16")
    fake = Fake(contract, tmp_path, monkeypatch, lambda feed: [])
    loaded = fake.engine
    assert loaded is not None

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            fake.backend().open(3)

    fake.cuda.room = 5_000
    refused(BackendError, r"not enough GPU memory for 3 rows of 0\.0 MB: .*cudaMalloc failed on the GPU: error 2")
    assert fake.cuda.room == 5_000
    fake.cuda.room = 1 << 30
    loaded.num_optimization_profiles = 1
    refused(EngineError, "the plan has 1 profiles instead of 2: build it again")
    loaded.num_optimization_profiles = 2
    loaded.profiles = profiles(contract_of("float16", max_batch=2))
    refused(EngineError, r"decode profile takes input_ids from \[1, 1\] to \[2, 1\], the contract needs .* to \[3, 1\]")
    loaded.profiles = profiles(contract)
    loaded.specs["logits"] = contract_of("bfloat16").state().__next__().past
    refused(EngineError, "the plan has logits as bfloat16")
    fake.engine, fake.errors = None, ["IRuntime::deserializeCudaEngine: wrong version In f at /_src/a.cpp:12"]
    refused(
        EngineError,
        r"RTX 1\.7\.1\.116 cannot load .* \(built by version 1\.7\.0\.5\): IRuntime.*wrong version: build it again",
    )
    fake.cuda.devices, fake.cuda.version = (35, 0), 12040
    refused(BackendError, "the driver supports CUDA up to 12.4, cuda-bindings needs 13.5: update the driver")
    fake.cuda.devices, fake.cuda.version = (100, 0), 13050
    refused(BackendError, r"no CUDA GPU \(error 100\)")


@pytest.mark.parametrize("asked", [True, False], ids=["says nothing", "cannot be asked"])
def test_the_manifest_says_where_the_state_is(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT reports no alias of a plugin, and before 10.15 has no call to ask: the plugin still works in place."""
    if not asked:
        monkeypatch.delattr(FakeEngine, "get_aliased_input_tensor")
    contract = contract_of("float16")
    outputs = contract.outputs()

    def graph(feed: dict[str, Any]) -> list[Any]:
        return [np.zeros(outputs[0].sized(1), np.float32), *(feed[s.past.name] + 1 for s in contract.state())]

    for in_place in (True, False):
        fake = Fake(contract, tmp_path, monkeypatch, graph)
        assert fake.engine is not None
        fake.engine.in_place = in_place
        backend = fake.backend()
        backend.open(1)
        backend.step([[1]])  # the double checks the addresses
        backend.step([[1]])
        assert fake.engine.used == [0, 0]
        backend.close()


def test_an_engine_that_contradicts_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(contract_of("float16"), tmp_path, monkeypatch, lambda feed: [])
    assert fake.engine is not None
    fake.engine.reports = {"present.0.key": "past.0.key"}
    with pytest.raises(EngineError, match=r"present\.0\.key into past\.0\.key, but its manifest names no plugin"):
        fake.backend()
    fake.engine.in_place = True
    fake.backend()
    fake.engine.reports = {"present.0.key": "past.1.z"}
    with pytest.raises(EngineError, match=r"the plan writes present\.0\.key into past\.1\.z: build it again"):
        fake.backend()


def test_a_failed_step_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(contract_of("float16"), tmp_path, monkeypatch, lambda feed: [])
    backend = fake.backend()
    backend.open(1)
    assert fake.engine is not None
    fake.engine.contexts[0].works = False
    with pytest.raises(BackendError, match=r"TensorRT-RTX 1.7.1.116 cannot run this step: no reason given"):
        backend.step([[1]])
    assert backend.past_length[0] == 0
