"""The plugin class on host memory: TensorRT's interfaces from the creator to ``enqueue``, driven from Python.

The class is compiled as it is; the harness stands in for TensorRT and the CUDA runtime, and the kernels are
the emulated ones (see ``emulation.py``).
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from less_export.contract import LayerSpec
from less_export.exporter import onnx_op
from less_export.native import nvcc
from less_export.tensorrt import plugin

from . import emulation
from .emulation import DTYPES, PLUGIN, WIDE
from .oracle import TOKENS, table_of
from .scenarios import Run
from .sharing import once

FIELDS = (
    *("scale", "policy", "heavy", "recent", "window", "absorb", "decay"),
    *("slot_bits", "state_bits", "max_distance", "rows_by_index"),
)
#: Inputs and outputs of a layer without int8 slots and a largest distance.
INPUTS, OUTPUTS = 14, 8
#: nvinfer1::DataType and nvinfer1::PluginFieldType.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7, torch.int8: 2, torch.int32: 3, torch.int64: 8}
FIELD_TYPES = {"f32": (1, ctypes.c_float), "f64": (2, ctypes.c_double), "i32": (5, ctypes.c_int32)}
FIELD_TYPES["i64"] = (10, ctypes.c_int64)


def input_dtypes(layer: LayerSpec, dtype: torch.dtype, by_index: bool = False) -> list[torch.dtype]:
    """The inputs' dtypes, where q has ``dtype``."""
    integers = ("position", *emulation.LENGTHS, emulation.ROWS)
    fixed = dict.fromkeys(WIDE, torch.float32) | dict.fromkeys(integers, torch.int32)
    if layer.int8:
        fixed |= {"key": torch.int8, "value": torch.int8}
    if layer.state16:
        fixed |= {"psi": torch.int8, "h": torch.int8}
    return [fixed.get(name, dtype) for name in emulation.input_names(layer, by_index)]


class Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("n", ctypes.c_int32))


class Tensor(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("type", "format", "rank")),
        ("dims", ctypes.c_int64 * 5),
    )


@functools.cache
def harness() -> ctypes.CDLL:
    """The harness, the plugin's own sources and the emulated kernels, in one library."""
    kernels, headers = emulation.library(), plugin.tensorrt_include()
    folder = emulation.compiled("harness", str(kernels), (headers / "NvInferVersion.h").read_text())
    library = once(folder / "libplugin_harness.so", lambda path: compile_harness(path, kernels, headers))
    return prepared(ctypes.CDLL(str(library)))


def compile_harness(out: Path, kernels: Path, headers: Path) -> None:
    names = [*(n for n in nvcc.listed("sources.txt") if n.endswith(".cpp")), "tests/plugin_harness.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-Wall", "-Wextra"]
    command += [
        "-Wno-deprecated-declarations",
        "-fsanitize=undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-sanitize=vptr",
    ]
    command += ["-I", str(PLUGIN / "include"), "-I", str(PLUGIN / "src"), "-isystem", str(emulation.cuda_include())]
    command += ["-isystem", str(headers), *(str(PLUGIN / n) for n in names), str(kernels)]
    command += ["-Wl,-Bsymbolic"]  # the harness's CUDA runtime, not one that a CUDA build of torch has loaded
    command += [f"-Wl,-rpath,{kernels.parent}", "-ldl", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


def prepared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """A harness library with its functions' return types declared."""
    for name in ("plugin_create", "plugin_round_trip", "plugin_clone", "plugin_attach"):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("plugin_text", "harness_log"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.plugin_workspace.restype = ctypes.c_int64
    lib.harness_start()
    return lib


def log() -> str:
    """Log messages of the plugin since the last call."""
    return str(harness().harness_log().decode())


class Plugin:
    """One plugin object with the methods of the C++ class, which return an error code on refusal."""

    def __init__(self, handle: int | None) -> None:
        self.handle = handle

    def __del__(self) -> None:
        if self.handle:
            harness().plugin_destroy(ctypes.c_void_p(self.handle))

    @classmethod
    def create(cls, fields: Sequence[tuple[str, Any, str]], runtime: bool = False) -> Plugin:
        """Create from (name, value or None, key of FIELD_TYPES) triples."""
        kept: list[Any] = []
        array = (Field * len(fields))()
        for place, (name, value, kind) in zip(array, fields, strict=True):
            number, ctype = FIELD_TYPES[kind]
            kept.append(None if value is None else ctype(value))
            data = None if value is None else ctypes.cast(ctypes.byref(kept[-1]), ctypes.c_void_p)
            place.name, place.data, place.type, place.n = name.encode(), data, number, 1
        return cls(harness().plugin_create(array, len(fields), int(runtime)))

    @classmethod
    def of(cls, layer: LayerSpec, integers: str = "i32", floats: str = "f32", by_index: bool = False) -> Plugin:
        values = onnx_op.node_attributes(layer) | ({"rows_by_index": 1} if by_index else {})
        plugin = cls.create([(n, v, floats if isinstance(v, float) else integers) for n, v in values.items()])
        assert plugin.handle, log()
        return plugin

    def call(self, name: str, *args: Any) -> Any:
        return getattr(harness(), f"plugin_{name}")(ctypes.c_void_p(self.handle), *args)

    def texts(self) -> list[str]:
        lines = iter(lambda: self.call("text", len(values)), None)
        values: list[str] = []
        for text in lines:
            values.append(text.decode())
        return values

    def round_trip(self) -> Plugin:
        return Plugin(self.call("round_trip"))

    def attach(self) -> Plugin:
        return Plugin(self.call("attach"))

    def tensors(self, name: str, described: Sequence[Tensor], outputs: int | None = None) -> int:
        """Call a method that takes all inputs and outputs."""
        array, outputs = (Tensor * len(described))(*described), outputs or int(self.call("outputs"))
        return int(self.call(name, array, len(described) - outputs, outputs))


def describe(dtype: torch.dtype, shape: Sequence[int], form: int = 0) -> Tensor:
    return Tensor(TYPES[dtype], form, len(shape), (ctypes.c_int64 * 5)(*shape))


def described(layer: LayerSpec, dtype: torch.dtype, batch: int, chunk: int, rows: int | None = None) -> list[Tensor]:
    """All inputs and outputs of a layer; ``rows`` of the state, of which a step names those that it runs."""
    hq, hk, d, c, r = layer.query_heads, layer.kv_heads, layer.head_dim, layer.capacity, layer.rank
    tokens = [(hq, chunk, d), (hk, chunk, d), (hk, chunk, d), (hq, chunk, r), (hk, chunk, r)]
    state = [(hk, c, d), (hk, c, d), (hk, c, r), (hk, c), (hk, c), (hk, r, layer.state_width), (hk, r)]
    state += [(hk, c), (hk, c)] if layer.int8 else []
    state += [(hk, r)] if layer.state16 else []
    constants = [(hk, d), (hk, d)] if layer.int8 else []
    constants += [table_of(layer).shape] if layer.max_distance else []
    held = batch if rows is None else rows
    shapes = [*((batch, *s) for s in tokens), *((held, *s) for s in state), (batch,), (batch,), *constants]
    shapes += [] if rows is None else [(batch,)]
    kinds = input_dtypes(layer, dtype, rows is not None)
    inputs = [describe(kind, s) for kind, s in zip(kinds, shapes, strict=True)]
    return [*inputs, inputs[0], *inputs[len(tokens) : len(tokens) + len(state)]]


def plugin_run(
    plugin_: Plugin,
    layer: LayerSpec,
    dtype: str,
    in_place: bool = True,
    device: str = "cpu",
    by_index: bool = False,
) -> Run:
    """``onShapeChange`` and ``enqueue`` on arrays; the workspace has the size that the plugin asked for.

    With ``by_index``, the last array is ``rows``, and the state has any number of rows.
    """

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        kinds = input_dtypes(layer, DTYPES[dtype], by_index)
        given = [torch.from_numpy(np.ascontiguousarray(a)).to(k) for a, k in zip(arrays, kinds, strict=True)]
        given = [x.clone().to(device) for x in given]
        batch, chunk = given[1].shape[0], given[1].shape[2]
        past = given[len(TOKENS) : len(TOKENS) + len(layer.state_fields)]
        present = past if in_place else [torch.full_like(x, -7) for x in past]
        results = [torch.full_like(given[0], math.nan), *present]
        tensors = described(layer, DTYPES[dtype], batch, chunk, len(past[0]) if by_index else None)
        assert plugin_.tensors("shape_change", tensors) == 0, log()
        size = plugin_.tensors("workspace", tensors)
        store = torch.full((size + 256,), 0xFF, dtype=torch.uint8, device=device)
        start = store.data_ptr() + -store.data_ptr() % 256
        status = enqueue(plugin_, tensors, given, results, start)
        assert status == 0, log()
        return [t.float().cpu().numpy() if t.is_floating_point() else t.cpu().numpy() for t in results]

    return run


def enqueue(
    plugin_: Plugin,
    tensors: Sequence[Tensor],
    given: Sequence[Any],
    results: Sequence[Any],
    workspace: int | None,
    stream: int = 0,
) -> int:
    """The plugin's ``enqueue``; ``stream`` is a cudaStream_t."""
    array = (Tensor * len(tensors))(*tensors)

    def pointers(values: Sequence[Any]) -> Any:
        return (ctypes.c_void_p * len(values))(*(None if v is None else v.data_ptr() for v in values))

    call: Callable[..., Any] = plugin_.call
    places = (pointers(given), pointers(results), ctypes.c_void_p(workspace), ctypes.c_void_p(stream))
    return int(call("enqueue", array, len(given), len(results), *places))
