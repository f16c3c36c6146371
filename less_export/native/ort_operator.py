"""The operator for ONNX Runtime's CPU provider: its build into the cache, and the graphs that it can run.

The sources are those of ``ops_ort``, which ship with the package. The library registers a kernel for
``less::LessAttention``, which wins over the operator's body in the graph. It is compiled for this machine's processor.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import importlib.resources
import logging
import platform
import re
from pathlib import Path

from ..contract import Contract
from ..errors import EngineError, one_line
from ..less.policies import Policy
from ..progress import Progress, Spoken
from . import cache, compiler

_LOG = logging.getLogger(__name__)

LIBRARY = "libless_ort.so"
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden")
_LINK = ("-shared", "-Wl,-z,nodelete")
#: What each file may round in one go: products and sums of attention; nothing where integers are stored.
_CONTRACTION = {"attend.cpp": "-ffp-contract=fast"}
_NO_CONTRACTION = "-ffp-contract=off"
_POLICIES = (Policy.H2O, Policy.TOVA, Policy.SINK, Policy.WINDOW, Policy.FULL)


def sources() -> Path:
    """The folder ``ops_ort/src``."""
    return Path(str(importlib.resources.files("less_export.ops_ort"))) / "src"


def why_unsupported(contract: Contract) -> str | None:
    """Why the operator cannot run a graph; ``None`` if it can."""
    if contract.dtype != "float32":
        return f"it computes in float32, not {contract.dtype}"
    return foreign_policy(contract)


def foreign_policy(contract: Contract) -> str | None:
    """That a layer has a policy that no operator knows; ``None`` if there is none."""
    foreign = [layer.policy.name for layer in contract.layers if layer.policy not in _POLICIES]
    return f"it does not know policy {foreign[0]}" if foreign else None


def folder() -> Path:
    """Where the cache has operators."""
    return cache.cache_folder() / "operators"


def library(*, progress: Progress | None = None) -> Path:
    """The library, from the cache or built into it, which takes some seconds.

    One of another compiler's is taken, too. Processes that build it at the same time each compile it; one of the
    results stays.

    Raises:
        EngineError: there is neither a library nor a C++ compiler, the compiler fails, the cache cannot be written or
            is another user's, or the library cannot be loaded.
    """
    content, host = _content(), compiler.find()
    own = [] if host is None else [folder() / f"{content}-{_compiler_key(host)}" / LIBRARY]
    path = cache.first_known(folder(), [*own, *sorted(folder().glob(f"{content}-*/{LIBRARY}"))])
    if path is None:
        if host is None:
            raise EngineError("the operator needs a C++ compiler: install g++")
        (path,) = own
        (progress or Spoken(_LOG.info)).say("compiling the operator for ONNX Runtime (once)")
        with cache.building("operator", path) as scratch:
            compile_library(scratch / LIBRARY, host)
            cache.store(scratch / LIBRARY, path)
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"cannot load the operator {path}: {one_line(error)}") from None
    return path


def compile_library(out: Path, host: str) -> None:
    """Compile the operator to ``out`` with the compiler ``host``; object files are left beside it.

    Raises:
        EngineError: the compiler fails; the message is its first error (the log has the whole output).
    """

    def compile_one(path: Path) -> Path:
        target = out.parent / f"{path.name}.o"
        rounding = _CONTRACTION.get(path.name, _NO_CONTRACTION)
        compiler.run([host, *_COMPILE, rounding, "-c", path, "-o", target], "operator", path.name)
        return target

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sorted(sources().glob("*.cpp"))))
    compiler.run([host, *_LINK, *objects, "-o", out], "operator", LIBRARY)


def _content() -> str:
    """Key of the sources, of how they are compiled, and of the processor."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources().iterdir() if p.is_file()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(repr((platform.machine(), _processor(), *_COMPILE, *_LINK)).encode())
    return digest.hexdigest()[:20]


def _compiler_key(host: str) -> str:
    return hashlib.sha256(repr((host, compiler.version(host))).encode()).hexdigest()[:12]


def _processor() -> str:
    """What this machine's processor can do, where the system says so."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return " ".join(sorted(found[1].split())) if found else platform.processor()
