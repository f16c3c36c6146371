"""Files that commands read and write besides bundles and kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..bundle.files import write_atomically
from ..errors import UsageError


def read_text(path: str) -> str:
    """The UTF-8 text of a file, or of stdin for ``-``: line ends as they are, without a byte order mark.

    Raises:
        UsageError: missing, unreadable or not UTF-8.
    """
    if path == "-" and sys.stdin is None:
        raise UsageError("cannot read -: stdin is closed")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}") from error


def write(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; raises :class:`UsageError` where that is impossible."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str | Path | None, figures: dict[str, Any]) -> None:
    """:func:`write` ``figures`` as JSON; nothing for None."""
    if path is not None:
        write(path, (json.dumps(figures, indent=1) + "\n").encode())
