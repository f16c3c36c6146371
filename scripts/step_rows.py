"""Writes the rows of every step to the file that $LESS_STEP_ROWS names: imported by a server before its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from less_export.runtime.backend import Backend


def largest(path: Path) -> int:
    """The most rows that one step ran."""
    return max(map(int, path.read_text(encoding="utf-8").split()))


def _record(path: str) -> None:
    step = Backend.step

    def recorded(self: Backend, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        with open(path, "a", encoding="utf-8") as log:
            log.write(f"{len(input_ids)}\n")
        return step(self, input_ids, *args, **kwargs)

    Backend.step = recorded  # type: ignore[method-assign]


if path := os.environ.get("LESS_STEP_ROWS"):
    _record(path)
