"""The two allowed outcomes of bad input: a result, or a refusal in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import event

from less_export.errors import LessExportError

T = TypeVar("T")


def refused_or(read: Callable[[], T]) -> T | None:
    """The result of ``read``, or None if it refuses with a one-line error. Other exceptions fail the test."""
    try:
        value = read()
    except LessExportError as error:
        reason = str(error)
    else:
        event("accepted")
        return value
    assert len(reason.splitlines()) == 1, reason
    event("refused")
    return None
