"""The TensorRT plugin library: its toolchain, its build into a cache, and the layers it can run.

The sources are those of ``plugins_trt``, which ship with the package. Building needs nvcc and a C++
compiler, TensorRT's headers but not TensorRT, and no GPU; the result is stored in a cache.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import Contract
from ..errors import EngineError, install_hint, one_line
from ..native import cache, nvcc
from ..native.nvcc import default_archs
from ..progress import Progress
from .log import log_of

LIBRARY = "libless_plugins.so"
_INSTALL = install_hint("plugin")


@dataclass(frozen=True)
class Toolchain(nvcc.Tools):
    """The tools that compile the plugin, and TensorRT's headers with their version."""

    tensorrt_include: Path
    tensorrt: str


# ------------------------------------------------------------------ the toolchain


def toolchain() -> Toolchain:
    """nvcc, a C++ compiler and TensorRT's headers.

    Raises:
        EngineError: one of them is missing, or nvcc is too old; the message says where it was searched for.
    """
    tools, headers = nvcc.find("plugin"), tensorrt_include()
    return Toolchain(tools.nvcc, tools.cuda, tools.host, headers, _tensorrt_version(headers))


def tensorrt_include() -> Path:
    """The folder of NvInfer.h; raises :class:`EngineError` if it is not found."""
    headers = next((p for p in _header_places() if (p / "NvInfer.h").is_file()), None)
    if headers is None:
        raise EngineError(
            f"the plugin needs TensorRT's headers: set TENSORRT_INCLUDE_DIR to the folder of NvInfer.h, or {_INSTALL}"
        )
    return headers


def _header_places() -> Iterator[Path]:
    if os.environ.get("TENSORRT_INCLUDE_DIR"):
        yield Path(os.environ["TENSORRT_INCLUDE_DIR"])
        return
    machine = os.uname().machine
    yield from map(Path, (f"/usr/include/{machine}-linux-gnu", "/usr/include", "/usr/local/tensorrt/include"))
    spec = importlib.util.find_spec("kernel_lens")  # not imported: it needs triton
    for folder in spec.submodule_search_locations or () if spec else ():
        yield Path(folder) / "include" / "tensorrt"


def _tensorrt_version(headers: Path) -> str:
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    values = dict(re.findall(r"#define (\w+) (\w+)", text))
    numbers = [values.get(f"NV_TENSORRT_{part}", "?") for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(values.get(n, n) for n in numbers)


# ------------------------------------------------------------------ building


def library(archs: Sequence[str] = (), *, progress: Progress | None = None) -> Path:
    """The plugin library for ``archs`` (default: all), from the cache or built into it.

    Processes that build the same library at the same time each compile it; one of the results stays.

    Raises:
        EngineError: no toolchain, or it fails.
    """
    archs = tuple(archs) or default_archs()
    tools = toolchain()
    target = cache.cache_folder() / "plugins" / _key(tools, archs) / LIBRARY
    if found := cache.known(target):
        return found
    if target.exists() and progress is not None:
        progress.say("the plugin in the cache is not as it was stored: building it again")
    with cache.building("plugin", target) as folder:
        compile_library(folder / LIBRARY, archs, tools, progress=progress)
        cache.store(folder / LIBRARY, target)
    return target


def _key(tools: Toolchain, archs: Sequence[str]) -> str:
    """Key of everything that the library depends on: sources, compilers, headers, architectures."""
    patterns = ("src/*", "include/*", "*.txt", "*.map")
    files = [p for pattern in patterns for p in sorted(nvcc.kernels().glob(pattern))]
    return nvcc.key(tools, archs, files, tools.tensorrt)


def compile_library(out: Path, archs: Sequence[str], tools: Toolchain, *, progress: Progress | None = None) -> None:
    """Compile the plugin to ``out``; object files are left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """
    base = nvcc.kernels()
    sources = tuple(base / name for name in nvcc.listed("sources.txt"))
    plugin = nvcc.Product(
        "plugin", LIBRARY, sources, (base / "include",), (tools.tensorrt_include,), base / "exports.map"
    )
    nvcc.compile_library(out, plugin, archs, tools, progress=progress)


# ------------------------------------------------------------------ layers it can run


def check_layers(path: Path, contract: Contract) -> None:
    """Raise :class:`EngineError` for a contract with a layer that the plugin in ``path`` cannot run."""
    for index, layer in enumerate(contract.layers):
        if reason := nvcc.why_unsupported(path, layer, contract.dtype):
            raise EngineError(
                f"the plugin cannot run layer {index} ({reason}): --no-plugin builds from standard operators"
            )


# ------------------------------------------------------------------ in TensorRT

#: Name of a TensorRT module -> the library that its registry holds, and its handle.
_loaded: dict[str, tuple[Path, Any]] = {}
_ErrorSink = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
#: Call-backs that the libraries hold; they must not be garbage collected.
_sinks: dict[str, Any] = {}


def load(module: Any, path: Path) -> None:
    """Register the library's operators with a TensorRT, once; it replaces another build of them.

    Their errors go to the flavour's log. ``path`` is absolute: see :func:`less_export.tensorrt.trust.find`.

    Raises:
        EngineError: the library cannot be loaded, the driver is too old for it, or operators of that name are
            registered already.
    """
    if module.__name__ not in _sinks:
        _sinks[module.__name__] = _ErrorSink(lambda text: log_of(module).error(text.decode(errors="replace")))
    try:
        opened = ctypes.CDLL(os.fspath(path))
        opened.lessOnError(_sinks[module.__name__])
    except (OSError, AttributeError) as error:
        raise EngineError(f"cannot load the plugin {path}: {one_line(error)}") from None
    if reason := nvcc.why_unusable(opened):
        raise EngineError(f"cannot use the plugin {path}: {reason}")
    registry, held = module.get_plugin_registry(), _loaded.get(module.__name__)
    if held is not None:
        if held[0] == path:
            return
        registry.deregister_library(held[1])  # its code stays loaded: engines may use it
        del _loaded[module.__name__]
    handle = registry.load_library(os.fspath(path))
    if handle is None:
        raise EngineError(f"cannot load the plugin {path}: is another one loaded in this process?")
    _loaded[module.__name__] = (path, handle)
