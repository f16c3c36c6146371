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
    arch = nvcc.arch_of_this_gpu(_NAME)
    return cached((arch,)) or cached(nvcc.default_archs()) or library((arch,), progress=progress)


def cached(archs: Sequence[str]) -> Path | None:
    """The library for ``archs`` in the cache; see :func:`less_export.native.nvcc.cached`."""
    return nvcc.cached(product(), _folder(), archs)


def library(archs: Sequence[str] = (), *, progress: Progress | None = None) -> Path:
    """The library for ``archs`` (default: all), from the cache or built into it.

    See :func:`less_export.native.nvcc.library`.
    """
    return nvcc.library(product(), _folder(), archs, progress)


def product() -> nvcc.Product:
    """What the library is compiled from."""
    base = nvcc.kernels()
    own = sorted(p for p in (base / "sampler").iterdir() if p.is_file())
    return nvcc.Product(
        _NAME,
        LIBRARY,
        sources=(base / "sampler" / "sample.cu",),
        include=tuple(base / name for name in ("sampler", "src", "include")),
        takes="seconds",
        files=(*own, base / "src" / "device.cuh", base / "include" / "less_attention.h"),
    )


def _folder() -> Path:
    """Where the cache has samplers."""
    return cache.cache_folder() / "samplers"
