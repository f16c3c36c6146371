"""The CUDA kernels of ``plugins_trt`` compiled for the host, as an implementation that the oracle can drive.

``library()`` builds them once for all workers and runs, until the sources change. Emulated kernels are slow, so tests
take small shapes.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import hashlib
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch

from less_export.contract import LayerSpec

from .oracle import CENTRING, SCALES, STATE, STATE_SCALES, TOKENS, TURNING, layer_of, table_of
from .scenarios import Normal, Run
from .sharing import once

PLUGIN = Path(__file__).parents[1] / "plugins_trt"
SOURCES = ("less_attention.cu", "less_attention_decode.cu", "less_attention_prefill.cu")
LENGTHS = ("past_length", "new_length")
#: The input that gives the rows of the state by index.
ROWS = "rows"
#: Floating-point tensors that are float32 in every compute dtype.
WIDE = ("log_phi_q", "score", "h", "z", *SCALES, *STATE_SCALES, *CENTRING, *TURNING)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Thread orders of the emulation: see cuda_emu.h.
ORDERS = range(7)


class _Shape(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int32)
        for n in (
            *("dtype", "batch", "query_heads", "kv_heads", "chunk", "head_dim", "slots", "rank", "slot_bits"),
            *("distances", "rotary", "state_bits", "state_rows"),
        )
    ]


class _Rules(ctypes.Structure):
    _fields_ = [
        ("scale", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ["policy", "heavy", "recent", "window", "absorb"]),
        ("decay", ctypes.c_float),
        ("max_distance", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, layer: LayerSpec) -> _Rules:
        return cls(*layer.attributes().values(), layer.max_distance or 0)


class _Tensors(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_void_p)
        for n in (
            *(*TOKENS, *STATE, *SCALES, *STATE_SCALES, *LENGTHS, *CENTRING, *TURNING, ROWS),
            *("out", *(f"present_{n}" for n in (*STATE, *SCALES, *STATE_SCALES))),
        )
    ]


def input_names(layer: LayerSpec, by_index: bool = False) -> tuple[str, ...]:
    """Inputs of a layer's node, in the operator's order; state without its prefix. ``by_index`` adds rows."""
    state = tuple(f.name for f in layer.state_fields)
    constants = (CENTRING if layer.int8 else ()) + (TURNING if layer.max_distance else ())
    return (*TOKENS, *state, *LENGTHS, *constants, *((ROWS,) if by_index else ()))


def cuda_include() -> Path:
    """CUDA's headers: of a toolkit, or of the PyPI packages."""
    roots = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    roots += ["/usr/local/cuda", *(f"{p}/nvidia/cu13" for p in sys.path)]
    return next(Path(r) / "include" for r in roots if (Path(r) / "include/cuda_runtime_api.h").is_file())


@functools.cache
def folder() -> Path:
    """A temporary folder, deleted when the process ends."""
    path = tempfile.mkdtemp(prefix="less-emulation-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _compiler(*flags: str) -> list[str]:
    command = ["g++", "-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-x", "c++"]
    command += ["-include", str(PLUGIN / "emulation/cuda_emu.h"), f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]
    return [*command, "-isystem", str(cuda_include()), *flags]


def compile_source(source: Path, out: Path, *flags: str) -> None:
    """One CUDA source as a host library of its own."""
    done = subprocess.run(
        [*_compiler("-O1", *flags), "-shared", str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


def build(
    out: Path,
    *flags: str,
    sources: Path = PLUGIN / "src",
    reuse: Path | None = None,
    interface: str = "host_step.cpp",
) -> None:
    """Compile the kernels and an interface to them for the host into ``out``, a library (.so) or a program.

    The object files are written beside it.
    ``sources`` may hold changed copies. ``reuse`` is a library built before with the same flags: objects of it
    are taken for what is not in ``sources``.
    """
    common = _compiler(*flags)
    out.parent.mkdir(parents=True, exist_ok=True)
    objects, running = [], []
    for part in (*(sources / s for s in SOURCES), PLUGIN / "emulation" / interface):
        target = out.with_name(f"{part.stem}.o")
        if reuse is not None and (part.parent != sources or not part.is_file()):
            target = reuse.with_name(target.name)
        else:
            command = [*common, "-c", str(part), "-o", str(target)]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(str(target))
    errors = "".join(p.communicate()[1] for p in running)
    assert not errors, errors
    assert not any(p.returncode for p in running)
    kind = ["-shared"] if out.suffix == ".so" else []
    subprocess.run(["g++", *kind, *flags, *objects, "-o", str(out)], check=True)


@functools.cache
def compiled(*facts: str) -> Path:
    """A folder for builds of the plugin's sources; ``facts`` are the other inputs of the build.

    It is in the cache that LESS_EXPORT_CACHE names, or else deleted when the process ends.
    """
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(subprocess.check_output(["g++", "--version"]))
    digest.update((cuda_include() / "cuda_runtime_api.h").read_bytes())
    for source in sorted(
        p for d in ("src", "include", "emulation", "sampler", "tests") for p in (PLUGIN / d).iterdir()
    ):
        digest.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ["LESS_EXPORT_CACHE"]) if "LESS_EXPORT_CACHE" in os.environ else folder()
    return cache / "emulation" / digest.hexdigest()[:20]


def cached_build(name: str, *flags: str, interface: str = "host_step.cpp") -> Path:
    """The result of :func:`build` with these flags, built once."""
    return once(compiled(*flags, interface) / name, lambda path: build(path, *flags, interface=interface))


def library() -> Path:
    """All the kernels, or the library that LESS_EMULATION_LIBRARY names."""
    if "LESS_EMULATION_LIBRARY" in os.environ:
        return Path(os.environ["LESS_EMULATION_LIBRARY"])
    return cached_build("libless_emulated.so", "-O1")


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.less_why_unsupported.restype = ctypes.c_char_p
    return lib


def set_order(order: int, path: Path | None = None) -> None:
    """Set the thread order of later launches."""
    load(path or library()).less_host_set_order(order)


def set_blocks(wanted: int, path: Path | None = None) -> None:
    """Set the blocks of a decode launch: 1 keeps every head in one block, 512 is the kernels' own value."""
    load(path or library()).less_host_set_blocks(wanted)


def set_short_chunk(tokens: int, path: Path | None = None) -> None:
    """Set the longest chunk that takes the kernels of short chunks: 64 is the kernels' own value, 0 stands for none."""
    load(path or library()).less_host_set_short_chunk(tokens)


def launches(path: Path | None = None) -> int:
    """Kernels launched so far."""
    return int(load(path or library()).less_host_launches())


def prefetches(tensor: torch.Tensor) -> list[int]:
    """How often the last launch prefetched each of a tensor's lines of 128 bytes."""
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    lines = range(start - start % 128, start + size, 128)
    return [int(load(library()).less_host_prefetches(ctypes.c_void_p(line))) for line in lines]


def why_unsupported(layer: LayerSpec, dtype: str = "float16", **changes: int) -> str:
    """The launcher's reason to refuse a layer, or ""; ``changes`` are numbers that differ from the layer's."""
    rules, shape = _Rules.of(layer), _shape(layer, dtype, 1, 1)
    for name, value in changes.items():
        setattr(shape if hasattr(shape, name) else rules, name, value)
    reason = load(library()).less_why_unsupported(ctypes.byref(shape), ctypes.byref(rules))
    return reason.decode() if reason else ""


def _shape(layer: LayerSpec, dtype: str, batch: int, chunk: int, state_rows: int = 0) -> _Shape:
    sizes = (layer.query_heads, layer.kv_heads, chunk, layer.head_dim, layer.capacity, layer.rank)
    table = table_of(layer).shape if layer.max_distance else (0, 0)
    return _Shape(
        list(DTYPES).index(dtype), batch, *sizes, 8 if layer.int8 else 0, *table, layer.state_bits, state_rows
    )


def emulated(
    layer: LayerSpec,
    dtype: str = "float32",
    in_place: bool = True,
    path: Path | None = None,
    by_index: bool = False,
    watch: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
) -> Run:
    """Run the kernels on arrays; float32 holds 16-bit values as in ``test_ops.torch_run``.

    With ``by_index``, the last array is ``rows``, and the state has any number of rows. ``watch`` gets the tensors of a
    launch by name after it.
    """
    lib, rules = load(path or library()), _Rules.of(layer)
    names = input_names(layer, by_index)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
        for i, (name, t) in enumerate(zip(names, tensors, strict=True)):
            tensors[i] = t.to(DTYPES[dtype]) if t.is_floating_point() and name not in WIDE else t.clone()
        batch, chunk = tensors[1].shape[0], tensors[1].shape[2]
        past = tensors[len(TOKENS) : len(TOKENS) + len(layer.state_fields)]
        present = past if in_place else [torch.full_like(x, -7) for x in past]
        out = torch.full_like(tensors[0], math.nan)
        shape = _shape(layer, dtype, batch, chunk, past[0].shape[0] if by_index else 0)
        if recording is not None:
            numbers = (*bytes(shape), *bytes(rules))
            recording.write(bytes(numbers) + b"".join(_raw(t) for t in tensors))
        presents = dict(zip((f"present_{f.name}" for f in layer.state_fields), present, strict=True))
        named = {**dict(zip(names, tensors, strict=True)), "out": out, **presents}
        pointers = _Tensors(**{n: t.data_ptr() for n, t in named.items()})
        status = lib.less_host_step(ctypes.byref(shape), ctypes.byref(rules), ctypes.byref(pointers))
        assert status == 0, f"less_host_step says {status}"
        watch(named)
        return [t.float().numpy() if t.is_floating_point() else t.numpy() for t in (out, *present)]

    return run


#: File that records the inputs of all launches for emulation/replay.cpp; None to record nothing.
recording: IO[bytes] | None = None


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def rounded(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Round to the values of ``dtype``."""
    return lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[dtype]).float().numpy()


def normal(dtype: str, logit: float = 1.5, log_phi: tuple[float, float] = (-4.0, 3.0)) -> Normal:
    """Gaussian tokens of a dtype."""
    return Normal(logit, log_phi, rounded(dtype))


def fails(check: Callable[[], object], seconds: int) -> bool:
    """Whether a check of kernels with a fault fails, in a process of its own, as they hang or crash.

    It also fails if it takes more than ``seconds`` of processor time, which others on the machine do not lengthen. One
    that takes none for long is an error of the test.
    """
    process = multiprocessing.get_context("fork").Process(target=_work, args=(check, seconds))
    process.start()
    process.join(60 * seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the check neither ends nor takes processor time")
    return process.exitcode != 0


def _work(check: Callable[[], object], seconds: int) -> None:
    faulthandler.disable()  # a deadlock aborts, as expected; the exit code shows it
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        check()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kernel_layer(policy: str, capacity: int, head_dim: int, group: int, rank: int, kv_heads: int = 2) -> LayerSpec:
    """A layer with the budget split as the policy does; rank 1 absorbs nothing."""
    split = {"h2o": capacity // 2, "tova": capacity - 1, "sink": min(4, capacity - 1)}
    heavy = split.get(policy, 0)
    window = capacity if policy == "window" else 0
    heads = (group * kv_heads, kv_heads)
    return layer_of(policy, heavy, capacity - heavy, window, rank > 1, heads, head_dim, rank)
