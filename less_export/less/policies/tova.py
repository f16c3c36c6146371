"""TOVA (arXiv 2401.06104): whatever the last query attended to least goes."""

from __future__ import annotations

from ...contract import Policy
from .base import ScoredPolicy


class Tova(ScoredPolicy):
    code = Policy.TOVA
    scoring = "last"

    def split(self, budget: int) -> tuple[int, int]:
        return budget - 1, 1
