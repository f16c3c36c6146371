"""The TensorRT plugin library: its toolchain, its build into a cache, and the layers it can run.

The sources are those of ``plugins_trt``, which ship with the package. Building needs nvcc and a C++
compiler, TensorRT's headers but not TensorRT, and no GPU; the result is stored in a cache.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import importlib.resources
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.files import scratch_folder
from ..contract import Contract, LayerSpec
from ..dtypes import COMPUTE_DTYPES
from ..errors import EngineError, UsageError, install_hint, one_line
from ..native import cache, compiler
from ..progress import Progress, Silent
from .log import log_of

LIBRARY = "libless_plugins.so"
_INSTALL = install_hint("plugin")
_COMPILE = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all")
#: The first CUDA that compiles for every architecture of the default list.
_FIRST_CUDA = (12, 8)


@dataclass(frozen=True)
class Toolchain:
    """The tools that compile the plugin; ``cuda`` is nvcc's version like "13.0.88"."""

    nvcc: Path
    cuda: str
    host: str
    tensorrt_include: Path
    tensorrt: str

    @property
    def library_folders(self) -> list[Path]:
        """Folders of the static CUDA runtime (PyPI's packages have no lib64, where nvcc looks)."""
        return [f for f in (self.nvcc.parents[1] / "lib64", self.nvcc.parents[1] / "lib") if f.is_dir()]


def sources() -> Path:
    """The folder ``plugins_trt``."""
    return Path(str(importlib.resources.files("less_export.plugins_trt")))


def _listed(name: str) -> list[str]:
    lines = (sources() / name).read_text(encoding="utf-8").splitlines()
    return [x.strip() for x in lines if x.strip() and not x.startswith("#")]


def default_archs() -> tuple[str, ...]:
    """Architectures that are built by default, like "sm_89"."""
    return tuple(f"sm_{n}" for n in _listed("architectures.txt"))


def first_arch() -> int:
    """The oldest architecture that plugins and engines are built for, like 80."""
    return min(map(int, _listed("architectures.txt")))


def arch_name(text: str) -> str | None:
    """ "sm_89" of "sm_89", "sm89", "89" or "8.9"; None for anything else."""
    match = re.fullmatch(r"(?:sm_?)?(\d+?)\.?(\d)", text.strip().lower())
    return f"sm_{match[1]}{match[2]}" if match else None


def parse_archs(text: str | None) -> tuple[str, ...]:
    """Architectures of an option: "sm_89", "89" or "8.9", several with commas; ``None`` or "all" for the default."""
    if text is None or text.strip().lower() == "all":
        return default_archs()
    archs = []
    for item in text.split(","):
        arch = arch_name(item)
        if arch is None or int(arch.removeprefix("sm_")) < first_arch():
            raise UsageError(
                f"the plugin cannot be built for '{item.strip()}': give architectures from sm_{first_arch()} on"
            )
        archs.append(arch)
    return tuple(dict.fromkeys(archs))


# ------------------------------------------------------------------ the toolchain


def toolchain() -> Toolchain:
    """nvcc, a C++ compiler and TensorRT's headers.

    Raises:
        EngineError: one of them is missing, or nvcc is too old; the message says where it was searched for.
    """
    nvcc = next((p for p in _nvcc_places() if p.is_file()), None)
    if nvcc is None:
        raise EngineError(f"the plugin needs nvcc, which is neither in CUDA_HOME nor on PATH: {_INSTALL}")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", output)
    if version is None:
        raise EngineError(f"{nvcc} reports no version: {_INSTALL}")
    if (int(version[1]), int(version[2])) < _FIRST_CUDA:
        needed = ".".join(map(str, _FIRST_CUDA))
        raise EngineError(
            f"{nvcc} is from CUDA {version[1]}.{version[2]}, the plugin needs {needed} or newer: {_INSTALL}"
        )
    host = compiler.find()
    if host is None:
        raise EngineError("the plugin needs a C++ compiler: install g++")
    headers = tensorrt_include()
    return Toolchain(nvcc, version[0][1:], host, headers, _tensorrt_version(headers))


def tensorrt_include() -> Path:
    """The folder of NvInfer.h; raises :class:`EngineError` if it is not found."""
    headers = next((p for p in _header_places() if (p / "NvInfer.h").is_file()), None)
    if headers is None:
        raise EngineError(
            f"the plugin needs TensorRT's headers: set TENSORRT_INCLUDE_DIR to the folder of NvInfer.h, or {_INSTALL}"
        )
    return headers


def _nvcc_places() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path).resolve()
    yield Path("/usr/local/cuda/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")  # the namespace of PyPI's packages
    for folder in spec.submodule_search_locations or () if spec else ():
        yield Path(folder) / "cu13" / "bin" / "nvcc"


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
    if digest := cache.stored(target):
        cache.record(digest)
        return target
    if target.exists() and progress is not None:
        progress.say("the plugin in the cache is not as it was stored: building it again")
    try:
        with scratch_folder(target.parent) as folder:
            compile_library(folder / LIBRARY, archs, tools, progress=progress)
            cache.store(folder / LIBRARY, target)
    except OSError as error:
        raise EngineError(
            f"cannot write the plugin to {target.parent}: {error.strerror or error} "
            "(set LESS_EXPORT_CACHE to another folder)"
        ) from error
    return target


def _key(tools: Toolchain, archs: Sequence[str]) -> str:
    """Key of everything that the library depends on: sources, compilers, headers, architectures."""
    digest = hashlib.sha256()
    names = [p for pattern in ("src/*", "include/*", "*.txt", "*.map") for p in sorted(sources().glob(pattern))]
    for path in names:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    host = compiler.version(tools.host)
    facts = (tools.cuda, tools.tensorrt, os.uname().machine, tools.host, host, *archs, *_COMPILE)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def compile_library(out: Path, archs: Sequence[str], tools: Toolchain, *, progress: Progress | None = None) -> None:
    """Compile the plugin to ``out``; object files are left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """
    base, progress = sources(), progress or Silent()
    numbers = [a.removeprefix("sm_") for a in archs]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    ends = sorted({min(numbers, key=int), max(numbers, key=int)}, key=int)  # PTX: see architectures.txt
    targets += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ends]
    nvcc = [str(tools.nvcc), "-ccbin", tools.host, *_COMPILE]
    paths = ["-I", str(base / "include"), "-isystem", str(tools.tensorrt_include)]
    names, cores = _listed("sources.txt"), os.cpu_count() or 1

    def compile_one(name: str) -> str:
        object_file = out.parent / f"{Path(name).name}.o"
        device = [*targets, "--threads", str(min(len(targets), cores))] if name.endswith(".cu") else []
        compiler.run([*nvcc, *paths, *device, "-c", str(base / name), "-o", str(object_file)], "plugin", name)
        return str(object_file)

    progress.say(f"compiling the plugin for {', '.join(archs)} (once; a minute or two per architecture)")
    with concurrent.futures.ThreadPoolExecutor(min(len(names), cores)) as pool:
        running = [pool.submit(compile_one, n) for n in names]
        try:
            for count, done in enumerate(concurrent.futures.as_completed(running), 1):
                done.result()
                progress.say(f"compiling the plugin for {', '.join(archs)}: {count} of {len(names)} files done")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    objects = [r.result() for r in running]
    progress.say("linking the plugin")
    options = f"--version-script={base / 'exports.map'},--exclude-libs=ALL,-z,nodelete,--no-undefined"
    folders = [f"-L{f}" for f in tools.library_folders]
    link = [*nvcc, "-shared", "-cudart=static", *folders, "-Xlinker", options, *objects, "-o", str(out)]
    compiler.run(link, "plugin", LIBRARY)


# ------------------------------------------------------------------ layers it can run


def why_unsupported(path: Path, layer: LayerSpec, dtype: str) -> str | None:
    """Why the plugin in ``path`` cannot run a layer that computes in ``dtype``; ``None`` if it can."""
    ask = ctypes.CDLL(os.fspath(path)).lessWhyUnsupported
    ask.restype = ctypes.c_char_p
    sizes = (layer.query_heads, layer.kv_heads, layer.head_dim, layer.capacity, layer.rank)
    values = (*layer.attributes().values(), 8 if layer.int8 else 0, layer.state_bits)
    attributes = [ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int32(x) for x in values]
    reason = ask(*(ctypes.c_int32(int(n)) for n in (COMPUTE_DTYPES.index(dtype), *sizes)), *attributes)
    return reason.decode() if reason else None


def why_unusable(library: ctypes.CDLL) -> str | None:
    """Why an open plugin library cannot run on this machine's driver; ``None`` if it can, or there is no driver."""
    if not hasattr(library, "lessWhyUnusable"):  # built by an older version
        return None
    library.lessWhyUnusable.restype = ctypes.c_char_p
    reason = library.lessWhyUnusable()
    return reason.decode() if reason else None


def check_layers(path: Path, contract: Contract) -> None:
    """Raise :class:`EngineError` for a contract with a layer that the plugin in ``path`` cannot run."""
    for index, layer in enumerate(contract.layers):
        if reason := why_unsupported(path, layer, contract.dtype):
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
    if reason := why_unusable(opened):
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
