"""The operator for ONNX Runtime's CPU provider: its build into the cache, and the graphs that it can run.

The sources are those of ``ops_ort``, which ship with the package. The library registers a kernel for
``less::LessAttention``, which wins over the operator's body in the graph. It is compiled for this machine's processor.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.resources
import platform
import re
from pathlib import Path

from ..bundle.files import scratch_folder
from ..contract import Contract
from ..errors import EngineError
from ..less.policies import Policy
from ..progress import Progress
from . import cache, compiler

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


def library(*, progress: Progress | None = None) -> Path:
    """The library, from the cache or built into it, which takes some seconds.

    Raises:
        EngineError: there is no C++ compiler, it fails, or the cache cannot be written or is another user's.
    """
    host = compiler.find()
    if host is None:
        raise EngineError("the operator needs a C++ compiler: install g++")
    target = cache.cache_folder() / "operators" / _key(host) / LIBRARY
    if digest := cache.stored(target):
        cache.record(digest)
        return target
    if progress is not None:
        progress.say("compiling the operator for ONNX Runtime (once)")
    try:
        with scratch_folder(target.parent) as folder:
            compile_library(folder / LIBRARY, host)
            cache.store(folder / LIBRARY, target)
    except OSError as error:
        raise EngineError(
            f"cannot write the operator to {target.parent}: {error.strerror or error} "
            "(set LESS_EXPORT_CACHE to another folder)"
        ) from error
    return target


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


def _key(host: str) -> str:
    """Key of everything that the library depends on: sources, compiler and processor."""
    digest = hashlib.sha256()
    for path in sorted(sources().iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    facts = (host, compiler.version(host), platform.machine(), _processor(), *_COMPILE, *_LINK)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What this machine's processor can do, where the system says so."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return " ".join(sorted(found[1].split())) if found else platform.processor()
