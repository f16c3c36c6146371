"""A cache of its own for the tests of trust."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that does not exist yet."""
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "own"))
    monkeypatch.delenv("LESS_EXPORT_PLUGIN", raising=False)
    return tmp_path / "own"
