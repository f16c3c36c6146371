"""Files that are whole or absent: temporary names, renames, links and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and rename it: the file is whole or as it was before."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder next to ``beside`` (same file system, so that renames work), removed at the end."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link the file behind ``source`` (links followed) to ``target``; copy where that is impossible.

    Returns True when it had to copy.
    """
    real = source.resolve()
    try:
        os.link(real, target)
        return False
    except OSError:
        shutil.copyfile(real, target)
        return True


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
