"""What every eviction policy provides."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...contract import Policy

if TYPE_CHECKING:
    import torch

Scoring = Literal["none", "accumulate", "last"]


@dataclass(frozen=True)
class Candidates:
    """What ``keep`` may look at; N = C slots followed by the T tokens of the chunk.

    live: [B, Hk, N] bool, the candidates that hold a token and may stay.
    position: [B, Hk, N] i32, -1 where empty.
    score: [B, Hk, N] f32, finite where live.
    end: [B, 1, 1] i32, the position of the next token (past_length + new_length).
    """

    live: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor
    end: torch.Tensor


class EvictionPolicy(abc.ABC):
    """One policy; stateless, the numbers come with the call."""

    code: ClassVar[Policy]
    #: Score a query leaves on what it saw: nothing, added up, or only the last valid query's.
    scoring: ClassVar[Scoring] = "none"

    @abc.abstractmethod
    def split(self, budget: int) -> tuple[int, int]:
        """``(heavy, recent)`` of a budget in tokens."""

    @abc.abstractmethod
    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        """[B, Hk, N] bool: which live candidates keep a slot (at most heavy + recent)."""

    @abc.abstractmethod
    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        """:meth:`keep` as ONNX nodes. ``op`` builds nodes, ``c`` has the fields of
        :class:`Candidates` as values, ``heavy``/``recent`` are i32 scalars, ``capacity`` an i64 [1]."""


class ScoredPolicy(EvictionPolicy):
    """Keeps the ``recent`` newest and then the highest scores; ties keep the lower index."""

    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        import torch

        rank = torch.where(c.position >= c.end - recent, torch.inf, c.score)
        rank = torch.where(c.live, rank, -torch.inf)
        best = torch.sort(rank, dim=-1, descending=True, stable=True).indices[..., : heavy + recent]
        chosen = torch.zeros_like(c.live).scatter(-1, best, True)
        return chosen & c.live

    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        # Finite stand-ins for +-inf: scores are sums of probabilities, and TensorRT sorts no infinities.
        newest = op.GreaterOrEqual(c.position, op.Sub(c.end, recent))
        rank = op.Where(newest, op.f32(3.0e38), c.score)
        rank = op.Where(c.live, rank, op.f32(-3.0e38))
        _, best = op.TopK(rank, capacity, axis=-1, largest=1, sorted=1, _outputs=2)
        zeros = op.Expand(op.f32(0.0), op.Shape(rank))
        ones = op.Expand(op.f32(1.0), op.Shape(best))
        chosen = op.Greater(op.ScatterElements(zeros, best, ones, axis=2), op.f32(0.5))
        return op.And(chosen, c.live)


class PositionalPolicy(EvictionPolicy):
    """Keeps by position alone; the budget holds whatever passes."""
