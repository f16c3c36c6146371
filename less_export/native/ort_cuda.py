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
from . import cache, nvcc, ort_operator

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
    arch = nvcc.gpu_arch()
    if arch is None:
        raise EngineError("no CUDA driver, or no GPU: run nvidia-smi")
    if int(arch.removeprefix("sm_")) < nvcc.first_arch():
        raise EngineError(f"the operator is for GPUs from sm_{nvcc.first_arch()} on, this one is {arch}")
    found = cached((arch,)) or cached(nvcc.default_archs())
    if found is None:
        raise EngineError(f"run less-export build-operator --cuda --gpu-arch {arch}, which takes minutes, once")
    return found


def cached(archs: Sequence[str]) -> Path | None:
    """The library for ``archs`` in the cache: of this machine's nvcc, else of whatever toolchain.

    Raises:
        EngineError: the cache is another user's, or cannot be read.
    """
    places = ort_operator.folder().glob(f"{_content(archs)}-*/{LIBRARY}")
    try:
        own = [_place(nvcc.find(_NAME), archs)]
    except EngineError:
        own = []
    return ort_operator.first_known([*own, *sorted(places)])


def library(archs: Sequence[str] = (), *, progress: Progress | None = None) -> Path:
    """The library for ``archs`` (default: all), from the cache or built into it, which takes minutes.

    Raises:
        EngineError: no toolchain, or it fails, or the cache cannot be written or is another user's.
    """
    archs = tuple(archs) or nvcc.default_archs()
    if found := cached(archs):
        return found
    tools = nvcc.find(_NAME)
    target = _place(tools, archs)
    with cache.building(_NAME, target) as folder:
        compile_library(folder / LIBRARY, archs, tools, progress=progress)
        cache.store(folder / LIBRARY, target)
    return target


def compile_library(out: Path, archs: Sequence[str], tools: nvcc.Tools, *, progress: Progress | None = None) -> None:
    """Compile the operator to ``out``; object files are left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """
    ours, kernels = ort_operator.sources(), nvcc.kernels()
    sources = [kernels / n for n in nvcc.listed("sources.txt") if n in _KERNELS or n.endswith(".cu")]
    sources += [*sorted((ours.parent / "cuda").glob("*.cpp")), ours / "node.cpp"]
    product = nvcc.Product(_NAME, LIBRARY, tuple(sources), (ours, kernels / "include"))
    nvcc.compile_library(out, product, archs, tools, progress=progress)


def _place(tools: nvcc.Tools, archs: Sequence[str]) -> Path:
    return ort_operator.folder() / f"{_content(archs)}-{nvcc.key(tools, archs)}" / LIBRARY


def _content(archs: Sequence[str]) -> str:
    """Key of the sources and architectures."""
    ours, kernels = ort_operator.sources(), nvcc.kernels()
    folders = (ours, ours.parent / "cuda", kernels / "src", kernels / "include")
    files = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]
    return nvcc.digest([*files, kernels / "sources.txt"], *archs)
