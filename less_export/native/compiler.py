"""The C++ compiler of this machine."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import EngineError

_LOG = logging.getLogger(__name__)


def find() -> str | None:
    """Path of the first of g++, c++ and clang++ on PATH; None if there is none."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def version(compiler: str) -> str:
    """What the compiler says of its version.

    Raises:
        EngineError: it cannot be run.
    """
    argv = [compiler, "-dumpfullversion", "-dumpversion"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        raise EngineError(f"cannot run {compiler}: {error.strerror or error}") from error


def run(argv: Sequence[str | Path], library: str, file: str) -> None:
    """Compile or link ``file`` of ``library``, as messages call them; the log has the whole output.

    Raises:
        EngineError: the compiler fails; the message is its first error.
    """
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    _LOG.debug("%s\n%s%s", " ".join(map(str, argv)), result.stdout, result.stderr)
    if result.returncode:
        lines = [x for x in (result.stderr + result.stdout).splitlines() if x.strip()]
        why = next((x for x in lines if "error" in x or "fatal" in x), lines[0] if lines else "no reason given")
        raise EngineError(f"the {library} cannot be compiled ({file}): {why.strip()[:300]}")
