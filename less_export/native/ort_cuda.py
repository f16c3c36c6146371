"""The operator for ONNX Runtime's CUDA provider: its build into the cache, and the graphs that it can run.

The sources are those of ``ops_ort`` and the kernels of ``plugins_trt``, which ship with the package. Building needs
nvcc and a C++ compiler, no GPU. The library registers a kernel for ``less::LessAttention``, which wins over the
operator's body in the graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from ..contract import Contract
from ..errors import EngineError, one_line
from ..progress import Progress
from . import nvcc, ort_operator

LIBRARY = "libless_ort_cuda.so"
_NAME = "operator for CUDA"
#: What the operator takes of the plugin's sources besides its kernels.
_KERNELS = ("src/library_facts.cpp",)


def why_unsupported(contract: Contract) -> str | None:
    """Why the operator cannot run a graph, as far as its library need not be asked; ``None`` if it may."""
    return ort_operator.foreign_policy(contract)


def why_layers_unsupported(path: Path, contract: Contract) -> str | None:
    """Why the library ``path`` cannot run a layer of a graph; ``None`` if it can.

    Raises:
        EngineError: the library cannot be loaded, or not run with this machine's driver.
    """
    try:
        unusable = nvcc.why_unusable(ctypes.CDLL(str(path)))
        reasons = [nvcc.why_unsupported(path, layer, contract.dtype) for layer in contract.layers]
    except (OSError, AttributeError) as error:
        raise EngineError(f"cannot load the operator {path}: {one_line(error)}") from None
    if unusable:
        raise EngineError(f"cannot use the operator {path}: {unusable}")
    return next((f"layer {i}: {reason}" for i, reason in enumerate(reasons) if reason), None)


def library_for_this_gpu() -> Path:
    """The library for the first GPU, or for all, from the cache.

    Raises:
        EngineError: no GPU, or one that the kernels are not for, or the cache has no such library.
    """
    arch = nvcc.arch_of_this_gpu("operator")
    made, folder = product(), ort_operator.folder()
    found = nvcc.cached(made, folder, (arch,)) or nvcc.cached(made, folder, nvcc.default_archs())
    if found is None:
        raise EngineError(f"run less-export build-operator --cuda --gpu-arch {arch}, which takes minutes, once")
    return found


def library(archs: Sequence[str] = (), *, progress: Progress | None = None) -> Path:
    """The library for ``archs`` (default: all), from the cache or built into it, which takes minutes.

    See :func:`less_export.native.nvcc.library`.
    """
    return nvcc.library(product(), ort_operator.folder(), archs, progress)


def product() -> nvcc.Product:
    """What the library is compiled from."""
    ours, kernels = ort_operator.sources(), nvcc.kernels()
    sources = [kernels / n for n in nvcc.listed("sources.txt") if n in _KERNELS or n.endswith(".cu")]
    sources += [*sorted((ours.parent / "cuda").glob("*.cpp")), ours / "node.cpp"]
    folders = (ours, ours.parent / "cuda", kernels / "src", kernels / "include")
    files = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]
    return nvcc.Product(
        _NAME,
        LIBRARY,
        sources=tuple(sources),
        include=(ours, kernels / "include"),
        files=(*files, kernels / "sources.txt"),
    )
