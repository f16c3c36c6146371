"""Marks for test cases that not every run takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values for ``parametrize``; ``scripts/test --quick`` takes only those in ``quick``."""
    return _marked(pytest.mark.slow, values, quick)


def exhaustive_but(values: Iterable[Any], *usual: Any) -> list[Any]:
    """Values for ``parametrize``; those that are not in ``usual`` run with ``-m exhaustive`` only."""
    return _marked(pytest.mark.exhaustive, values, usual)


def some_of(values: Iterable[Any], every: int = 3) -> list[Any]:
    """Values for ``parametrize``: the first of every ``every``; the others run with ``-m exhaustive`` only."""
    listed = list(values)
    return exhaustive_but(listed, *listed[::every])


def _marked(mark: pytest.MarkDecorator, values: Iterable[Any], but: tuple[Any, ...]) -> list[Any]:
    def case(value: Any) -> Any:
        several = value if isinstance(value, tuple) else (value,)
        return value if value in but else pytest.param(*several, marks=mark)

    return [case(v) for v in values]
