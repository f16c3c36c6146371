"""The CUDA kernels of ``plugins_trt`` compiled for the host, as an implementation that the oracle can drive.

Emulated kernels are slow: a test takes small shapes, and the library is built once per session and flags.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from less_export.contract import LayerSpec

from .oracle import Run

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins_trt"
KERNELS = ("less_attention.cu", "less_attention_decode.cu", "less_attention_prefill.cu")
#: The operator's tensors, in the order of the C struct and of the op: (name, shape, dtype).
INPUTS = ("q", "k", "v", "log_phi_q", "psi_k")
STATE = ("key", "value", "psi", "score", "position", "h", "z")
LENGTHS = ("past_length", "new_length")
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in "dtype batch query_heads kv_heads chunk head_dim slots rank".split()]


class _Rules(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_float), *((n, ctypes.c_int32) for n in "policy heavy recent window absorb".split())]


class _Tensors(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in (*INPUTS, *STATE, *LENGTHS, "out", *(f"present_{n}" for n in STATE))]


def cuda_include() -> Path:
    """CUDA's headers: of a toolkit, or of the PyPI packages."""
    places = [Path(os.environ[n]) / "include" for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    places += [Path("/usr/local/cuda/include")]
    places += [Path(p) / "nvidia/cu13/include" for p in __import__("sys").path]
    return next(p for p in places if (p / "cuda_runtime_api.h").is_file())


def compile_host(sources: Sequence[Path], out: Path, *flags: str, kernels: Path = PLUGIN / "src") -> None:
    """Build a shared library from CUDA sources with g++ and the emulation header."""
    command = ["g++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-x", "c++"]
    command += ["-include", str(PLUGIN / "emulation/cuda_emu.h")]
    command += [f"-I{p}" for p in (PLUGIN / "include", kernels, PLUGIN / "src")]
    command += ["-isystem", str(cuda_include()), *flags, *map(str, sources), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


@functools.cache
def folder() -> Path:
    """A folder of this session."""
    keep = tempfile.TemporaryDirectory(prefix="less-emulation-")
    functools.cache(lambda: keep)()
    import atexit

    atexit.register(keep.cleanup)
    return Path(keep.name)


@functools.cache
def library() -> Path:
    """The kernels as a host library."""
    out = folder() / "libless_emulated.so"
    compile_host([PLUGIN / "emulation/host_step.cpp", *(PLUGIN / "src" / k for k in KERNELS)], out)
    return out


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.less_why_unsupported.restype = ctypes.c_char_p
    return lib


def shape_of(layer: LayerSpec, dtype: str, batch: int, chunk: int) -> _Shape:
    heads = (layer.query_heads, layer.kv_heads)
    return _Shape(list(TORCH).index(dtype), batch, *heads, chunk, layer.head_dim, layer.capacity, layer.rank)


def emulated_run(layer: LayerSpec, dtype: str = "float32", in_place: bool = True, path: Path | None = None) -> Run:
    """The kernels on arrays (float32 holds 16-bit values, as in test_ops); state in place or in new memory."""
    lib = load(path or library())
    wide = {3, 8, 10, 11}  # log_phi_q, past_score, past_h, past_z stay float32
    rules = _Rules(*layer.attributes().values())
    offset = len(INPUTS)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
        for i, t in enumerate(tensors):
            tensors[i] = t.to(TORCH[dtype]) if t.is_floating_point() and i not in wide else t.clone()
        batch, chunk = tensors[1].shape[0], tensors[1].shape[2]
        past = tensors[offset : offset + len(STATE)]
        present = past if in_place else [torch.full_like(x, -7) for x in past]
        out = torch.full_like(tensors[0], math.nan)
        addresses = [t.data_ptr() for t in (*tensors, out, *present)]
        status = lib.less_host_step(
            ctypes.byref(shape_of(layer, dtype, batch, chunk)), ctypes.byref(rules), ctypes.byref(_Tensors(*addresses))
        )
        assert status == 0, status
        return [t.float().numpy() if t.is_floating_point() else t.numpy() for t in (out, *present)]

    return run
