"""Policies that forget nothing a model would see: sliding windows, and the full cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...contract import Policy
from .base import Candidates, PositionalPolicy

if TYPE_CHECKING:
    import torch


class Window(PositionalPolicy):
    """A layer that slides anyway: ``live`` already ends at the window."""

    code = Policy.WINDOW

    def split(self, budget: int) -> tuple[int, int]:
        return 0, budget

    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        return c.live

    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        return c.live


class Full(Window):
    """Everything stays; one token more than there are slots is an error of the caller."""

    code = Policy.FULL
