"""Policies that keep everything a model would see: sliding windows, and the full cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Candidates, LayerNumbers, PositionalPolicy, least_onnx

if TYPE_CHECKING:
    import torch


class _Lossless(PositionalPolicy):
    """Whatever is live stays."""

    evicts = False
    takes_one_slot = True

    def split(self, budget: int) -> tuple[int, int]:
        return 0, budget

    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        return c.live

    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        return c.live

    def taken_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, ticks: Any) -> Any:
        return least_onnx(op, c, c.position, ticks)


class Window(_Lossless):
    """A layer that slides by design: ``live`` already ends at the window, and all of it stays."""

    name = "window"
    code = 3
    choosable = False  # what a sliding layer gets by itself
    unseen = 1

    def why_impossible(self, layer: LayerNumbers) -> str | None:
        if layer.window == layer.recent and not layer.absorb:
            return None
        return "window keeps its window and absorbs nothing"


class Full(_Lossless):
    """Everything stays; more tokens than slots are an error of the caller."""

    name = "full"
    code = 4
    keeps_all = True

    def why_impossible(self, layer: LayerNumbers) -> str | None:
        if layer.window == 0 and layer.heavy == 0 and not layer.absorb:
            return None
        return "full evicts and absorbs nothing"
