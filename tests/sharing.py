"""What one worker of pytest-xdist makes for all: folders that they share, and files that are made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this run of the tests, the same one for all workers."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, which the first to ask for it makes with ``make(path)`` while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marker = path.parent.with_name(f".{path.parent.name}.{path.name}")  # not beside it: tests list those folders
    with FileLock(f"{marker}.lock"):
        if not marker.exists():
            make(path)
            marker.touch()
    return path
