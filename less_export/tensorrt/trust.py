"""Native code that bundles need: whether it may be loaded, and loading exactly the bytes that were checked.

Code is a plugin library that a manifest names, or a plan that carries one (TensorRT calls it host code). Without
``trust_code`` it must have been built on this machine, or be named by LESS_EXPORT_PLUGIN. The hash in a manifest says
which code a plan needs, and is never a reason to load it: whoever wrote the code wrote the hash too.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from ..bundle.files import sha256
from ..contract import PLUGIN_VERSION
from ..errors import EngineError
from ..native import cache

_ALLOW = "allow it with --trust-code (trust_code=True) if you trust its source"
#: Descriptors of the sealed libraries by hash. They stay open: the loader knows a library by the name of its file.
_sealed: dict[str, int] = {}


@dataclass(frozen=True)
class PluginFacts:
    """A manifest's description of a plan's plugin: it is ``inside`` the plan, or in the ``library`` with this hash.

    ``rows_by_index``: the plan takes rows of the state by index; otherwise a step has the rows of the state in order.
    """

    library: str
    sha256: str
    version: str
    inside: bool
    rows_by_index: bool = False

    @classmethod
    def of(cls, path: Path, inside: bool, rows_by_index: bool = False) -> PluginFacts:
        return cls(os.fspath(path.absolute()), sha256(path), PLUGIN_VERSION, inside, rows_by_index)


def find(facts: PluginFacts, trust_code: bool = False) -> Path:
    """The library that a plan was built with: where it was then, or the one that LESS_EXPORT_PLUGIN names.

    Returns:
        The path of a sealed copy in memory. Its bytes are those that were hashed, whatever happens to the file.

    Raises:
        EngineError: it is missing, has been replaced by another one, or may not be loaded.
    """
    named = os.environ.get("LESS_EXPORT_PLUGIN")
    path = Path(named or facts.library).absolute()  # the loader would search its own path for a bare name
    cure = "build the engine again, or set LESS_EXPORT_PLUGIN to the library that it was built with"
    try:
        code = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise EngineError(f"cannot read the plugin {path}: {error.strerror or error}") from error
    if code is None:
        raise EngineError(f"the plugin of this engine is missing ({path}): {cure}")
    if hashlib.sha256(code).hexdigest() != facts.sha256:
        raise EngineError(f"{path} is not the plugin that this engine was built with (its hash differs): {cure}")
    if not (named or trust_code or cache.is_known(facts.sha256)):
        raise EngineError(
            f"the engine needs native code, the library {path} (sha256 {facts.sha256}), which this machine did not "
            f"build: build the engine here, set LESS_EXPORT_PLUGIN to a library of your own, or {_ALLOW}"
        )
    return _seal(code, facts.sha256)


def refuse_unknown_plan(path: Path, data: bytes | mmap.mmap) -> None:
    """Refuse a plan with code inside that this machine did not build; ``data`` is what will be loaded.

    Raises:
        EngineError: says which file, and how to allow it.
    """
    digest = hashlib.sha256(data).hexdigest()
    if not cache.is_known(digest):
        raise EngineError(
            f"the plan {path} (sha256 {digest}) carries native code, and this machine did not build it: build the "
            f"engine here, or {_ALLOW}"
        )


def _seal(code: bytes, digest: str) -> Path:
    """A file in memory with this content, which nobody can change; the same one for the same hash."""
    import fcntl  # not on every system that runs ONNX Runtime

    if digest not in _sealed:
        handle = os.memfd_create("less-plugin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(handle, "wb", closefd=False) as file:
            file.write(code)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
        _sealed[digest] = handle
    # Not /proc/self: TensorRT-RTX loads what plans carry under such names, and the loader would return that library.
    return Path(f"/proc/{os.getpid()}/fd/{_sealed[digest]}")
