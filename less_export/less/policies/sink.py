"""Sinks (StreamingLLM, arXiv 2309.17453; the paper's Lambda masking): the first tokens and the newest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Candidates, PositionalPolicy, least_onnx

if TYPE_CHECKING:
    import torch

#: Attention sinks that StreamingLLM (section 3.2) found sufficient.
SINKS = 4


class Sink(PositionalPolicy):
    name = "sink"
    code = 2
    takes_one_slot = True
    leaves = "position"

    def split(self, budget: int) -> tuple[int, int]:
        heavy = min(SINKS, budget - 1)
        return heavy, budget - heavy

    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        return c.live & ((c.position < heavy) | (c.position >= c.end - recent))

    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        first = op.Less(c.position, heavy)
        newest = op.GreaterOrEqual(c.position, op.Sub(c.end, recent))
        return op.And(c.live, op.Or(first, newest))

    def taken_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, ticks: Any) -> Any:
        sinks = op.Less(c.position, heavy)
        return least_onnx(op, c, op.Where(sinks, op.i32(2**31 - 1), c.position), ticks)
