"""For TensorRT's tests: a stand-in for the engine of a plan, on the stand-in for CUDA."""

from __future__ import annotations

import enum
import math
import struct
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from less_export.contract import Contract
from less_export.dtypes import DTYPES, numpy_dtype
from less_export.runtime import device_sampler, trt_device
from less_export.runtime.ort import OrtBackend
from less_export.runtime.trt import TrtBackend
from less_export.tensorrt import engine
from less_export.tensorrt.trust import PluginFacts

from .fake_cuda import FakeCuda
from .trt_decoder import contract_of, decoder, serialised

HEADER = struct.Struct("<4s12xQ4B").pack
#: The plugin of a plan that contains it, of plans without rows by index.
INSIDE = PluginFacts("libless_plugins.so", "0" * 64, "1", inside=True)
#: What a parked row's state is replaced by, by the kind of its dtype.
POISON = {"f": np.nan, "i": -77, "u": 0x7FFF}
#: Of the plan that takes rows by index.
CONTRACT_TRT = contract_of("float32", max_batch=4)


class FakeEngine:
    """An engine and its execution contexts: ``graph`` maps inputs to outputs by name.

    Its plugin works in place if ``in_place``; as engines do, it does not tell unless ``reports`` says of which output.
    With ``by_index``, ``rows`` is an input like the others; the plugin takes those rows of the state and no others, and
    of these neither reads nor writes those that are parked (test_cuda_row_indices.py): the graph gets poison for them.
    Contexts may share a profile, as NvInfer.h of TensorRT 10.0 to 10.16 says of ``kPROFILE_SHARING_0806``, and bring no
    memory for activations if the caller manages it (NvInferRuntime.h, ``ExecutionContextAllocationStrategy``).
    """

    def __init__(
        self,
        contract: Contract,
        cuda: FakeCuda,
        graph: Callable[[dict[str, Any]], list[Any]],
        in_place: bool = False,
        by_index: bool = False,
    ) -> None:
        self.contract, self.cuda, self.graph = contract, cuda, graph
        self.in_place, self.by_index = in_place or by_index, by_index
        self.reports: dict[str, str] = {}
        self.inputs, self.outputs = contract.inputs(by_index), contract.outputs(by_index)
        self.specs = {s.name: s for s in (*self.inputs, *self.outputs)}
        self.num_io_tensors = len(self.specs)
        self.profiles = engine.profiles(contract, by_index)
        self.num_optimization_profiles = len(self.profiles)
        self.device_memory_size_v2 = 512
        self.contexts: list[FakeContext] = []
        #: How many can be created; for more there is no memory.
        self.most_contexts = 99
        self.used: list[int] = []
        #: Numbers of rows of the steps that ran.
        self.batches: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return [*self.specs][index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in {s.name for s in self.inputs} else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=DTYPES[self.specs[name].dtype].tensorrt)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].sized(-1, -1)

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self.profiles[index].shapes[name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.reports.get(name)

    def create_execution_context(self, strategy: str) -> FakeContext | None:
        assert strategy == "user managed"
        if len(self.contexts) >= self.most_contexts:
            return None
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """An execution context.

    NVIDIA's guide (CUDA Graphs, with dynamic shapes): after a change of input shapes, a step must run before one is
    captured, and a graph may not run once the context that it was captured from has changed. So it is after a change of
    addresses: the next step calls the plugins' ``onShapeChange`` first (NvInferRuntime.h, ``IPluginV3OneRuntime``).
    The memory for activations is a part of a graph too (NVIDIA's guide to TensorRT-RTX, Limitations of CUDA Graphs), is
    in use while a step runs, and has at least the size that the engine reports (NvInferRuntime.h,
    ``setDeviceMemoryV2``).
    """

    def __init__(self, owner: FakeEngine) -> None:
        self.owner, self.profile, self.works = owner, -1, True
        self.version, self.flushed = 0, False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self.owner.device_memory_size_v2
        self.memory = address, size
        self.version += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream == 77

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        self.version, self.flushed = self.version + 1, False
        low, _, high = self.owner.get_tensor_profile_shape(name, self.profile)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        owner = self.owner
        past = next(owner.contract.state()).past.name
        for spec in owner.inputs:  # TensorRT wants sizes of one axis to agree
            batch, chunk = self.shapes["input_ids"]
            assert self.shapes[spec.name] == spec.sized(batch, chunk, self.shapes[past][0]), spec.name
        return owner.specs[name].sized(*self.shapes["input_ids"], self.shapes[past][0])

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, "TensorRT takes aligned addresses only"
        self.addresses[name] = address
        self.version, self.flushed = self.version + 1, False
        return name in self.owner.specs

    def execute_async_v3(self, stream: int) -> bool:
        assert self.owner.cuda.capturing is None or self.flushed, "no step has run since shapes or addresses changed"
        captured = self.owner.cuda.capturing is not None
        at, version = dict(self.addresses), self.version if captured else None
        self.owner.cuda.at(*self.memory)
        self.owner.cuda.queue(lambda: self.run(at, version))
        self.owner.used.append(self.profile)
        self.flushed = True
        return self.works and stream == 77

    def run(self, at: dict[str, int], captured: int | None) -> None:
        owner = self.owner
        assert captured in (None, self.version), "a graph of a context that has changed"

        def tensor(name: str) -> np.ndarray:
            kind, shape = numpy_dtype(owner.specs[name].dtype), self.get_tensor_shape(name)
            return owner.cuda.at(at[name], math.prod(shape) * kind.itemsize).view(kind).reshape(shape)

        given = [s.name for s in owner.inputs]
        for spec in owner.outputs:
            shared = owner.in_place and spec.name.startswith("present")
            past = spec.name.replace("present", "past")
            assert [n for n in given if at[n] == at[spec.name]] == ([past] if shared else [])
        owner.batches.append(self.shapes["input_ids"][0])
        owner.cuda.at(*self.memory)[:] = 0xA5
        feed = {n: tensor(n).copy() for n in given}
        rows, ran = ..., ...  # type: Any, Any
        if owner.by_index:
            rows, parked = feed.pop("rows"), feed["new_length"] == 0
            ran, rows = np.flatnonzero(~parked), rows[~parked]
            assert len({*rows.tolist()}) == len(rows)  # less_attention.h: but those of parked rows may be any
            for name in (n for n in feed if n.startswith("past.")):
                taken = np.full((len(parked), *feed[name].shape[1:]), POISON[feed[name].dtype.kind], feed[name].dtype)
                taken[ran] = feed[name][rows]
                feed[name] = taken
        results = owner.graph(feed)
        for spec, result in zip(owner.outputs, results, strict=True):
            if spec.name.startswith("present."):
                tensor(spec.name)[rows] = result[ran]
            else:
                tensor(spec.name)[...] = result


class Fake:
    """A plan of ``contract`` whose engine runs ``graph``, and the machine to run it on."""

    def __init__(
        self,
        contract: Contract,
        folder: Path,
        patch: pytest.MonkeyPatch,
        graph: Any,
        in_place: bool = False,
        by_index: bool = False,
    ) -> None:
        self.contract, self.cuda = contract, FakeCuda()
        self.engine: FakeEngine | None = FakeEngine(contract, self.cuda, graph, in_place, by_index)
        self.errors: list[str] = []
        self.sample: Any = None  # what chooses tokens on the device; None: the host chooses
        self.plan = folder / "engine.plan"
        self.plan.write_bytes(HEADER(b"vtrt", 99, 1, 7, 0, 5).ljust(99))
        severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
        module = types.ModuleType("tensorrt_rtx")
        module.__dict__.update(
            __version__="1.7.1.116",
            Builder=object,
            ILogger=type("ILogger", (), {"Severity": severity}),
            TensorIOMode=types.SimpleNamespace(INPUT="in", OUTPUT="out"),
            ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
            Runtime=lambda log: types.SimpleNamespace(deserialize_cuda_engine=lambda data: self.load(log, data)),
        )
        self.error = lambda log, text: log.log(severity.ERROR, text)
        patch.setitem(sys.modules, "tensorrt_rtx", module)
        patch.setattr(trt_device, "_cuda", lambda: self.cuda)
        patch.setattr(device_sampler, "open_sampler", lambda: self.sample)

    def load(self, log: Any, data: Any) -> FakeEngine | None:
        assert len(data) == 99
        for text in self.errors:
            self.error(log, text)
        return self.engine

    def backend(self, **options: Any) -> TrtBackend:
        """Of a plan with the plugin inside if the engine works in place."""
        in_place = self.engine is not None and self.engine.in_place
        by_index = self.engine is not None and self.engine.by_index
        plugin = replace(INSIDE, rows_by_index=by_index) if in_place else None
        return TrtBackend(self.contract, self.plan, plugin, trust_code=True, **options)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A plan of the tiny decoder that takes rows by index; its graph is in ``tmp_path``."""
    path = tmp_path / "model.onnx"
    path.write_bytes(serialised(decoder(CONTRACT_TRT, tmp_path)))
    session = onnxruntime.InferenceSession(str(path))
    return Fake(CONTRACT_TRT, tmp_path, monkeypatch, lambda feed: session.run(None, feed), by_index=True)


def reference(folder: Path) -> OrtBackend:
    """The same decoder in ONNX Runtime."""
    return OrtBackend(CONTRACT_TRT, folder / "model.onnx", threads=1)
