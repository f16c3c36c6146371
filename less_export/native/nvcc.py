"""The CUDA compiler of this machine, and libraries of the CUDA kernels of ``plugins_trt``."""

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

from ..contract import LayerSpec
from ..dtypes import COMPUTE_DTYPES
from ..errors import EngineError, UsageError, install_hint
from ..progress import Progress, Silent
from . import cache, compiler

_COMPILE = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all")
_LINK = "--exclude-libs=ALL,-z,nodelete,--no-undefined"
#: The first CUDA that compiles for every architecture of the default list.
_FIRST_CUDA = (12, 8)
#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_COMPUTE_CAPABILITY = (75, 76)


@dataclass(frozen=True)
class Tools:
    """nvcc, its version like "13.0.88", and the C++ compiler that it calls."""

    nvcc: Path
    cuda: str
    host: str

    @property
    def library_folders(self) -> list[Path]:
        """Folders of the static CUDA runtime (PyPI's packages have no lib64, where nvcc looks)."""
        return [f for f in (self.nvcc.parents[1] / "lib64", self.nvcc.parents[1] / "lib") if f.is_dir()]


@dataclass(frozen=True)
class Product:
    """A library: its name in messages, its file, its sources in order, folders of headers, and how long it takes.

    ``files``: all that it is compiled from, for its key in the cache.
    """

    name: str
    file: str
    sources: tuple[Path, ...]
    include: tuple[Path, ...]
    system: tuple[Path, ...] = ()
    exports: Path | None = None
    takes: str = "a minute or two per architecture"
    files: tuple[Path, ...] = ()


def kernels() -> Path:
    """The folder ``plugins_trt``."""
    return Path(str(importlib.resources.files("less_export.plugins_trt")))


def listed(name: str) -> list[str]:
    """The lines of a list in ``plugins_trt``."""
    lines = (kernels() / name).read_text(encoding="utf-8").splitlines()
    return [x.strip() for x in lines if x.strip() and not x.startswith("#")]


# ------------------------------------------------------------------ architectures


def default_archs() -> tuple[str, ...]:
    """Architectures that are built by default, like "sm_89"."""
    return tuple(f"sm_{n}" for n in listed("architectures.txt"))


def first_arch() -> int:
    """The oldest architecture that plugins and engines are built for, like 80."""
    return min(map(int, listed("architectures.txt")))


def arch_name(text: str) -> str | None:
    """ "sm_89" of "sm_89", "sm89", "89" or "8.9"; None for anything else."""
    match = re.fullmatch(r"(?:sm_?)?(\d+?)\.?(\d)", text.strip().lower())
    return f"sm_{match[1]}{match[2]}" if match else None


def parse_archs(text: str | None, name: str = "plugin") -> tuple[str, ...]:
    """Architectures of an option: "sm_89", "89" or "8.9", several with commas; ``None`` or "all" for the default.

    Raises:
        UsageError: an unknown one, or one that is too old for the library ``name``.
    """
    if text is None or text.strip().lower() == "all":
        return default_archs()
    archs = []
    for item in text.split(","):
        arch = arch_name(item)
        if arch is None or int(arch.removeprefix("sm_")) < first_arch():
            raise UsageError(
                f"the {name} cannot be built for '{item.strip()}': give architectures from sm_{first_arch()} on"
            )
        archs.append(arch)
    return tuple(dict.fromkeys(archs))


def gpu_arch() -> str | None:
    """The architecture of the first GPU, like "sm_89"; None without one, or without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, _COMPUTE_CAPABILITY, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"sm_{numbers[0].value}{numbers[1].value}"


def arch_of_this_gpu(name: str) -> str:
    """The architecture of the first GPU, for the library ``name``.

    Raises:
        EngineError: no GPU, or one that is too old.
    """
    arch = gpu_arch()
    if arch is None:
        raise EngineError("no CUDA driver, or no GPU: run nvidia-smi")
    if int(arch.removeprefix("sm_")) < first_arch():
        raise EngineError(f"the {name} is for GPUs from sm_{first_arch()} on, this one is {arch}")
    return arch


# ------------------------------------------------------------------ the toolchain


def find(name: str) -> Tools:
    """nvcc and a C++ compiler, for the library ``name``.

    Raises:
        EngineError: one of them is missing, or nvcc is too old; the message says where it was searched for.
    """
    install = install_hint("plugin")
    nvcc = next((p for p in places() if p.is_file()), None)
    if nvcc is None:
        raise EngineError(f"the {name} needs nvcc, which is neither in CUDA_HOME nor on PATH: {install}")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", output)
    if version is None:
        raise EngineError(f"{nvcc} reports no version: {install}")
    if (int(version[1]), int(version[2])) < _FIRST_CUDA:
        needed = ".".join(map(str, _FIRST_CUDA))
        raise EngineError(
            f"{nvcc} is from CUDA {version[1]}.{version[2]}, the {name} needs {needed} or newer: {install}"
        )
    host = compiler.find()
    if host is None:
        raise EngineError(f"the {name} needs a C++ compiler: install g++")
    return Tools(nvcc, version[0][1:], host)


def places() -> Iterator[Path]:
    """Where nvcc may be, in order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path).resolve()
    yield Path("/usr/local/cuda/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")  # the namespace of PyPI's packages
    for folder in spec.submodule_search_locations or () if spec else ():
        yield Path(folder) / "cu13" / "bin" / "nvcc"


# ------------------------------------------------------------------ building


def digest(files: Sequence[Path], *facts: str) -> str:
    """A key of files and facts, for folders of the cache."""
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(f"{path.name}\0".encode() + path.read_bytes())
    hashed.update(repr(facts).encode())
    return hashed.hexdigest()[:20]


def key(tools: Tools, archs: Sequence[str], files: Sequence[Path] = (), *facts: str) -> str:
    """Key of everything that a library depends on: compilers, architectures, sources, and other facts."""
    host = compiler.version(tools.host)
    return digest(files, tools.cuda, *facts, os.uname().machine, tools.host, host, *archs, *_COMPILE, _LINK)


def compile_library(
    out: Path, product: Product, archs: Sequence[str], tools: Tools, *, progress: Progress | None = None
) -> None:
    """Compile a library to ``out``; object files are left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """
    progress, name = progress or Silent(), product.name
    numbers = [a.removeprefix("sm_") for a in archs]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    ends = sorted({min(numbers, key=int), max(numbers, key=int)}, key=int)  # PTX: see architectures.txt
    targets += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ends]
    nvcc = [str(tools.nvcc), "-ccbin", tools.host, *_COMPILE]
    paths = [x for folder in product.include for x in ("-I", str(folder))]
    paths += [x for folder in product.system for x in ("-isystem", str(folder))]
    count, cores = len(product.sources), os.cpu_count() or 1

    def compile_one(source: Path) -> str:
        object_file = out.parent / f"{source.name}.o"
        device = [*targets, "--threads", str(min(len(targets), cores))] if source.suffix == ".cu" else []
        argv = [*nvcc, *paths, *device, "-c", str(source), "-o", str(object_file)]
        compiler.run(argv, name, f"{source.parent.name}/{source.name}")
        return str(object_file)

    progress.say(f"compiling the {name} for {', '.join(archs)} (once; {product.takes})")
    with concurrent.futures.ThreadPoolExecutor(min(count, cores)) as pool:
        running = [pool.submit(compile_one, source) for source in product.sources]
        try:
            for finished, done in enumerate(concurrent.futures.as_completed(running), 1):
                done.result()
                progress.say(f"compiling the {name} for {', '.join(archs)}: {finished} of {count} files done")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    objects = [r.result() for r in running]
    progress.say(f"linking the {name}")
    script = f"--version-script={product.exports}," if product.exports else ""
    folders = [f"-L{f}" for f in tools.library_folders]
    link = [*nvcc, "-shared", "-cudart=static", *folders, "-Xlinker", script + _LINK, *objects, "-o", str(out)]
    compiler.run(link, name, product.file)


# ------------------------------------------------------------------ in the cache


def cached(product: Product, folder: Path, archs: Sequence[str]) -> Path | None:
    """The library for ``archs`` in a folder of the cache: of this machine's toolchain, else of whatever one.

    Raises:
        EngineError: the cache is another user's, or cannot be read.
    """
    try:
        own = [_place(product, folder, archs, find(product.name))]
    except EngineError:
        own = []
    others = sorted(folder.glob(f"{digest(product.files, *archs)}-*/{product.file}"))
    return cache.first_known(folder, [*own, *others])


def library(product: Product, folder: Path, archs: Sequence[str], progress: Progress | None) -> Path:
    """The library for ``archs`` (none: the default), from a folder of the cache or built into it.

    Raises:
        EngineError: no toolchain, or it fails, or the cache cannot be written or is another user's.
    """
    archs = tuple(archs) or default_archs()
    if found := cached(product, folder, archs):
        return found
    tools = find(product.name)
    target = _place(product, folder, archs, tools)
    with cache.building(product.name, target) as scratch:
        compile_library(scratch / product.file, product, archs, tools, progress=progress)
        cache.store(scratch / product.file, target)
    return target


def _place(product: Product, folder: Path, archs: Sequence[str], tools: Tools) -> Path:
    return folder / f"{digest(product.files, *archs)}-{key(tools, archs)}" / product.file


# ------------------------------------------------------------------ layers they can run


def why_unsupported(path: Path, layer: LayerSpec, dtype: str) -> str | None:
    """Why the kernels of the library ``path`` cannot run a layer that computes in ``dtype``; ``None`` if it can."""
    ask = ctypes.CDLL(os.fspath(path)).lessWhyUnsupported
    ask.restype = ctypes.c_char_p
    sizes = (layer.query_heads, layer.kv_heads, layer.head_dim, layer.capacity, layer.rank)
    values = (*layer.attributes().values(), 8 if layer.int8 else 0, layer.state_bits)
    attributes = [ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int32(x) for x in values]
    reason = ask(*(ctypes.c_int32(int(n)) for n in (COMPUTE_DTYPES.index(dtype), *sizes)), *attributes)
    return reason.decode() if reason else None


def why_unusable(library: ctypes.CDLL) -> str | None:
    """Why an open library cannot run on this machine's driver; ``None`` if it can, or there is no driver."""
    if not hasattr(library, "lessWhyUnusable"):  # built by an older version
        return None
    library.lessWhyUnusable.restype = ctypes.c_char_p
    reason = library.lessWhyUnusable()
    return reason.decode() if reason else None
