"""The library that chooses tokens on a GPU: its build into the cache, and how it is called.

The sources are those of ``plugins_trt/sampler``, which ship with the package. Building needs nvcc and a C++ compiler,
neither TensorRT nor a GPU, and takes seconds per architecture.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import EngineError, one_line
from ..progress import Progress
from . import cache, nvcc

LIBRARY = "libless_sampler.so"
_NAME = "sampler"
#: kLessSampleInterface of sample.h, which the declarations below follow.
_INTERFACE = 1
#: LessSampleRow.
ROW = np.dtype(
    [
        *((n, np.float64) for n in ("uniform", "temperature", "top_p", "min_p")),
        *((n, np.int32) for n in ("top_k", "logits", "history")),
        *((n, np.float32) for n in ("repetition", "presence", "frequency")),
    ]
)
#: Largest vocabulary.
MAX_VOCAB = 1 << 19
#: Of an entry of a history: the token is in the prompt.
PROMPT = 0x8000_0000
#: A pick: the highest logit is NaN or infinite.
NO_CHOICE = -1
#: lessSample: logits, size of the vocabulary, rows, their number, histories, picks, stream. Returns a cudaError_t.
Sample = Callable[[int, int, int, int, int, int, int], int]


def load(path: Path) -> Sample:
    """``lessSample`` of a library.

    Raises:
        EngineError: the library cannot be loaded, is of another version, or does not run with this machine's driver.
    """
    try:
        opened = ctypes.CDLL(os.fspath(path))
        interface, sample, why = opened.lessSampleInterface, opened.lessSample, opened.lessSampleWhyUnusable
    except (OSError, AttributeError) as error:
        raise EngineError(f"cannot load the sampler {path}: {one_line(error)}") from None
    if (found := interface()) != _INTERFACE:
        raise EngineError(f"cannot use the sampler {path}: it has interface {found}, not {_INTERFACE}: build it again")
    why.restype = ctypes.c_char_p
    if reason := why():
        raise EngineError(f"cannot use the sampler {path}: {reason.decode()}")
    address = ctypes.c_void_p
    sample.argtypes = [address, ctypes.c_int64, address, ctypes.c_int32, address, address, address]
    sample.restype = ctypes.c_int32
    called: Sample = sample
    return called


def library_for_this_gpu(progress: Progress | None = None) -> Path:
    """The library for the first GPU, from the cache or built into it.

    Raises:
        EngineError: no GPU, or one that it is not for; or it is not in the cache and cannot be built.
    """
    arch = nvcc.gpu_arch()
    if arch is None:
        raise EngineError("no CUDA driver, or no GPU: run nvidia-smi")
    if int(arch.removeprefix("sm_")) < nvcc.first_arch():
        raise EngineError(f"the sampler is for GPUs from sm_{nvcc.first_arch()} on, this one is {arch}")
    return cached((arch,)) or cached(nvcc.default_archs()) or library((arch,), progress=progress)


def cached(archs: Sequence[str]) -> Path | None:
    """The library for ``archs`` in the cache, of whatever toolchain.

    Raises:
        EngineError: the cache is another user's, or cannot be read.
    """
    try:
        return next((p for p in sorted(_folder().glob(f"{_content(archs)}-*/{LIBRARY}")) if cache.known(p)), None)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"cannot read {_folder()}: {reason} (set LESS_EXPORT_CACHE to another folder)") from error


def library(archs: Sequence[str] = (), *, progress: Progress | None = None) -> Path:
    """The library for ``archs`` (default: all), from the cache or built into it.

    Raises:
        EngineError: no toolchain, or it fails, or the cache cannot be written or is another user's.
    """
    archs = tuple(archs) or nvcc.default_archs()
    if found := cached(archs):
        return found
    tools = nvcc.find(_NAME)
    target = _folder() / f"{_content(archs)}-{nvcc.key(tools, archs)}" / LIBRARY
    with cache.building(_NAME, target) as folder:
        compile_library(folder / LIBRARY, archs, tools, progress=progress)
        cache.store(folder / LIBRARY, target)
    return target


def compile_library(out: Path, archs: Sequence[str], tools: nvcc.Tools, *, progress: Progress | None = None) -> None:
    """Compile the library to ``out``; the object file is left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """
    base = nvcc.kernels()
    include = tuple(base / name for name in ("sampler", "src", "include"))
    product = nvcc.Product(_NAME, LIBRARY, (base / "sampler" / "sample.cu",), include, takes="seconds")
    nvcc.compile_library(out, product, archs, tools, progress=progress)


def _folder() -> Path:
    """Where the cache has samplers."""
    return cache.cache_folder() / "samplers"


def _content(archs: Sequence[str]) -> str:
    """Key of the sources and architectures."""
    base = nvcc.kernels()
    own = sorted(p for p in (base / "sampler").iterdir() if p.is_file())
    return nvcc.digest([*own, base / "src" / "device.cuh", base / "include" / "less_attention.h"], *archs)
