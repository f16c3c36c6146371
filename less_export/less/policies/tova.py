"""TOVA (arXiv 2401.06104): evicts the token that the last query attended to least."""

from __future__ import annotations

from .base import LayerNumbers, ScoredPolicy


class Tova(ScoredPolicy):
    name = "tova"
    code = 1
    scoring = "last"
    fixed_recent = 1

    def split(self, budget: int) -> tuple[int, int]:
        return budget - 1, 1

    def why_impossible(self, layer: LayerNumbers) -> str | None:
        return None if layer.recent == 1 else "tova protects only the newest token"
