"""For TensorRT's tests: a tiny decoder with its weights in a separate file, and a fake GPU in host memory."""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
import struct
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from less_export.contract import OP_DOMAIN, OP_NAME, OP_VERSION, Contract, LayerSpec, Policy, SlotDtype, StateBits
from less_export.dtypes import DTYPES, numpy_dtype
from less_export.exporter import onnx_nodes, onnx_op
from less_export.runtime import device_sampler, trt_device
from less_export.runtime.backend import Backend
from less_export.runtime.trt import TrtBackend
from less_export.tensorrt import engine
from less_export.tensorrt.trust import PluginFacts

from .oracle import table_of

NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int32": np.int32,
    "int64": np.int64,
    "int8": np.int8,
}


def contract_of(
    dtype: str, chunk: int = 4, max_batch: int = 3, capacity: int = 6, slots: SlotDtype = "model",
    max_distance: int | None = None, state_bits: StateBits = 32,
) -> Contract:  # fmt: skip
    """A layer of h2o, with a state of ``state_bits``, and one of window; ``slots`` is what they hold."""
    heavy = capacity // 2
    h2o = LayerSpec(4, 2, 8, 0.35, Policy.H2O, heavy, capacity - heavy, 0, True, capacity, 4)
    window = LayerSpec(4, 2, 8, 0.35, Policy.WINDOW, 0, 5, 5, False, 5, 1)
    h2o, window = (replace(s, slot_dtype=slots, max_distance=max_distance) for s in (h2o, window))
    return Contract(
        (replace(h2o, state_bits=state_bits), window), vocab_size=32, dtype=dtype, chunk=chunk, max_batch=max_batch
    )


def decoder(contract: Contract, folder: Path) -> ir.Model:
    """Embedding, attention layers, head; the weights in ``folder``/weights.bin."""
    kinds = {n: ir.DataType.from_numpy(np.dtype(t)) for n, t in NUMPY.items()}
    op, random, blob = onnx_nodes.Nodes(), np.random.default_rng(0), bytearray()
    initializers: list[ir.Value] = []

    def constant(data: np.ndarray) -> ir.Value:
        name, kind, shape = f"w{len(initializers)}", ir.DataType.from_numpy(data.dtype), data.shape
        where = {"location": "weights.bin", "offset": len(blob), "length": data.nbytes}
        tensor = ir.ExternalTensor(**where, dtype=kind, shape=ir.Shape(shape), name=name, base_dir=folder)
        blob.extend(data.tobytes())
        initializers.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(kind)))
        return initializers[-1]

    def weight(*shape: int, scale: float = 1.0) -> ir.Value:
        data = random.standard_normal(shape) * scale / math.sqrt(shape[0])
        return constant(data.astype(NUMPY[contract.dtype]))

    def values(specs: Any) -> list[ir.Value]:
        return [ir.Value(name=s.name, shape=ir.Shape(s.shape), type=ir.TensorType(kinds[s.dtype])) for s in specs]

    inputs = values(contract.inputs())
    ids, *lengths = inputs[:3]
    past, presents = iter(inputs[3:]), []
    width = contract.layers[0].query_heads * contract.layers[0].head_dim
    x = op.Gather(weight(contract.vocab_size, width, scale=5.0), ids)
    for layer in contract.layers:

        def heads(count: int, x: ir.Value = x, layer: LayerSpec = layer) -> ir.Value:
            flat = op.MatMul(x, weight(width, count * layer.head_dim))
            return op.Transpose(op.Reshape(flat, op.ints(0, 0, count, layer.head_dim)), perm=[0, 2, 1, 3])

        q, k, v = heads(layer.query_heads), heads(layer.kv_heads), heads(layer.kv_heads)
        log_phi = op.to_f32(op.MatMul(q, weight(layer.head_dim, layer.rank)))
        psi = op.MatMul(k, weight(layer.head_dim, layer.rank, scale=float(layer.absorb)))
        psi = op.Softmax(psi, axis=-1) if layer.absorb else psi
        fields, size, centring = len(layer.state_fields), (layer.kv_heads, layer.head_dim), []
        if layer.int8:
            centring = [constant(np.full(size, x, np.float32)) for x in (0.1, 0.7)]
        turning = [] if layer.max_distance is None else [constant(table_of(layer))]  # of some channels
        out, *present = op.op_multi_out(
            OP_NAME,
            [q, k, v, log_phi, psi, *itertools.islice(past, fields), *lengths, *centring, *turning],
            onnx_op.node_attributes(layer),
            num_outputs=1 + fields,
            domain=OP_DOMAIN,
        )
        presents += present
        out = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.ints(0, 0, width))
        x = op.Add(x, op.MatMul(out, weight(width, width)))
    last = op.Max(op.Sub(op.Cast(lengths[1], to=ir.DataType.INT64), op.ints(1)), op.ints(0))
    x = op.GatherND(x, op.Reshape(last, op.ints(-1, 1, 1)), batch_dims=1)
    outputs = [op.to_f32(op.MatMul(x, weight(width, contract.vocab_size))), *presents]
    for value, declared in zip(outputs, values(contract.outputs()), strict=True):
        value.name, value.shape, value.type = declared.name, declared.shape, declared.type
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=op.nodes,
        initializers=initializers,
        name="decoder",
        opset_imports={"": onnx_op.OPSET, OP_DOMAIN: OP_VERSION},
    )
    (folder / "weights.bin").write_bytes(blob)
    model = ir.Model(graph, ir_version=10)
    onnx_op.add_bodies(model, decoding=False)
    return model


def serialised(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


HEADER = struct.Struct("<4s12xQ4B").pack
#: The plugin of a plan that contains it, of plans without rows by index.
INSIDE = PluginFacts("libless_plugins.so", "0" * 64, "1", inside=True)


class FakeCuda:
    """The cuda-bindings calls that the backend uses. Queued work runs when the stream is synchronised.

    Batches of copies are as CUDA 13's API reference says of cudaMemcpyBatchAsync: in any order among themselves, one
    set of attributes from the first copy on, not on the default stream. CUDA 12 returns the index of a failed copy too.
    """

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.stream: list[Callable[[], None]] = []
        self.room, self.next, self.version, self.devices = 1 << 30, 1 << 44, 13050, (0, 1)
        self.host: dict[int, Any] = {}
        self.calls: list[str] = []
        #: Work that is being captured, graphs and what can be launched of them, whether capturing succeeds.
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.captures = True

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self.devices

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13050

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error}".encode()

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 77

    # Captures are as the CUDA runtime's API reference says: what is queued meanwhile is recorded and does not run, a
    # wait for the stream is an error that spoils the capture, and a graph that was instantiated lives on its own.

    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def queue(self, work: Callable[[], None]) -> None:
        (self.stream if self.capturing is None else self.capturing).append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert self.capturing is None
        assert (stream, mode) == (77, 1)
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        assert self.capturing is not None
        work, self.capturing = self.capturing, None
        if not self.captures:
            return 901, None
        self.calls.append("captured")
        return 0, self._graph(work)

    def _graph(self, work: list[Callable[[], None]]) -> int:
        self.next += 1 << 20
        self.graphs[self.next] = work
        return self.next

    def cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> tuple[int, int]:
        assert flags == 0
        return 0, self._graph(self.graphs[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        assert self.capturing is None
        self.calls.append("launched")
        self.stream += self.graphs[graph]
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if size > self.room:
            return 2, 0
        self.room -= size
        self.next += 1 << 20
        self.memory[self.next] = np.full(size, 0xA5, np.uint8)
        return 0, self.next

    def cudaFree(self, address: int) -> tuple[int]:
        self.room += len(self.memory.pop(address))
        return (0,)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        memory = (ctypes.c_uint8 * size)(*b"\xa5" * size)
        self.host[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.host[address]
        return (0,)

    cudaMemcpyAttributes = types.SimpleNamespace
    cudaMemcpySrcAccessOrder = types.SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)

    def cudaMemcpyBatchAsync(
        self, targets: list[int], sources: list[int], sizes: list[int], count: int, attributes: list[Any],
        attribute_places: list[int], attribute_count: int, stream: int,
    ) -> tuple[int, ...]:  # fmt: skip
        assert (len(targets), len(sources), len(sizes)) == (count, count, count)
        assert (attribute_places, attribute_count) == ([0], 1)
        assert [a.srcAccessOrder for a in attributes] == [1]
        self.calls.append("batch")
        for target, source, size in reversed([*zip(targets, sources, sizes, strict=True)]):
            self._copy(target, source, size, "across", stream)
        return (0,) if self.version >= 13000 else (0, 0)

    def at(self, address: int, size: int) -> np.ndarray:
        """Device memory at an address; an address that is not allocated is an error."""
        base = max(a for a in self.memory if a <= address)
        view = self.memory[base][address - base :][:size]
        assert len(view) == size, "outside the allocation"
        return view

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        self.calls.append(kind)
        return self._copy(target, source, size, kind, stream)

    def _copy(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        assert stream == 77
        if kind == "across":
            views = self.at(target, size), self.at(source, size)
            self.queue(lambda: np.copyto(*views))
            return (0,)
        host, device = (source, target) if kind == "up" else (target, source)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        view = self.at(device, size)
        self.queue(lambda: np.copyto(*((view, data) if kind == "up" else (data, view))))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.capturing is None, "a wait for a stream that is being captured"
        while self.stream:
            self.stream.pop(0)()
        return (0,)


class FakeEngine:
    """An engine and its execution contexts: ``graph`` maps inputs to outputs by name.

    Its plugin works in place if ``in_place``; as engines do, it does not tell unless ``reports`` says of which output.
    With ``by_index``, ``rows`` is an input like the others; the plugin takes those rows of the state and no others.
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

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "on profile change"
        return FakeContext(self)


class FakeContext:
    """An execution context.

    NVIDIA's guide (CUDA Graphs, with dynamic shapes): after a change of input shapes, a step must run before one is
    captured, and a graph may not run once the context that it was captured from has changed.
    """

    def __init__(self, owner: FakeEngine) -> None:
        self.owner, self.profile, self.works = owner, -1, True
        self.version, self.flushed = 0, False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

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
        self.version += 1
        return name in self.owner.specs

    def execute_async_v3(self, stream: int) -> bool:
        assert self.owner.cuda.capturing is None or self.flushed, "no step has run since the shapes changed"
        captured = self.owner.cuda.capturing is not None
        at, version = dict(self.addresses), self.version if captured else None
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
        feed = {n: tensor(n).copy() for n in given}
        rows: Any = ...
        if owner.by_index:
            rows = feed.pop("rows")
            assert len({*rows.tolist()}) == len(rows)
            feed = {n: x[rows] if n.startswith("past.") else x for n, x in feed.items()}
        results = owner.graph(feed)
        for spec, result in zip(owner.outputs, results, strict=True):
            tensor(spec.name)[rows if spec.name.startswith("present.") else ...] = result


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
            ExecutionContextAllocationStrategy=types.SimpleNamespace(ON_PROFILE_CHANGE="on profile change"),
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


def play(backend: Backend) -> Iterator[tuple[str, np.ndarray]]:
    """Results of ragged prefill, decode, parked, reset and copied rows, and reopening."""
    random = np.random.default_rng(1)
    with backend:
        for rows in (3, 2):
            backend.open(rows)
            for step in range(12):
                chunk = 1 if step % 3 == 2 else int(random.integers(1, 5))
                if step == 5:
                    backend.reset_rows([1])
                if step == 7:
                    backend.copy_row(1, 0)
                new = random.integers(0, chunk + 1, rows)
                logits = backend.step(random.integers(0, 32, (rows, chunk)), new)
                yield f"logits {step}", logits[new > 0]
                for row in range(rows):
                    yield from ((f"{n} {step}", x) for n, x in backend.read_row(row).tensors.items())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An empty folder for a graph's weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder
