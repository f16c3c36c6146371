"""Folders that the workers of pytest-xdist share, and files that one of them creates for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder for this test run, the same for all workers."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, which the first caller creates with ``make(path)`` while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marker = path.parent.with_name(f".{path.parent.name}.{path.name}")  # not in the same folder, which tests list
    with FileLock(f"{marker}.lock"):
        if not marker.exists():
            make(path)
            marker.touch()
    return path
