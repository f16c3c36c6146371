"""Marks for test cases that ``scripts/test --quick`` skips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values for ``parametrize``, marked slow except for those in ``quick``."""

    def case(value: Any) -> Any:
        several = value if isinstance(value, tuple) else (value,)
        return value if value in quick else pytest.param(*several, marks=pytest.mark.slow)

    return [case(v) for v in values]
