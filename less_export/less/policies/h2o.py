"""H2O (arXiv 2306.14048): heavy hitters by accumulated attention, and the newest tokens."""

from __future__ import annotations

from .base import ScoredPolicy


class H2O(ScoredPolicy):
    name = "h2o"
    code = 0
    scoring = "accumulate"

    def split(self, budget: int) -> tuple[int, int]:
        return budget // 2, budget - budget // 2
