"""What every eviction policy provides, and the registry of policies.

Torch and ONNX belong to the callers of a policy: importing this package imports neither.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ...errors import UsageError

if TYPE_CHECKING:
    import torch

Scoring = Literal["none", "accumulate", "last"]
#: More than the slots of a layer, and exact in float32: slots less this number are negative and in order.
_BEFORE_ALL = 1 << 23


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


class LayerNumbers(Protocol):
    """The numbers of a :class:`~less_export.contract.LayerSpec` that a policy may restrict."""

    @property
    def heavy(self) -> int: ...

    @property
    def recent(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def absorb(self) -> bool: ...


class EvictionPolicy(abc.ABC):
    """One policy; stateless, the numbers come with the call. :func:`register` makes it known."""

    #: Name in options, manifests and messages (lower-case letters, digits and hyphens).
    name: ClassVar[str]
    #: The operator's ``policy`` attribute; this package uses 0 to 99.
    code: ClassVar[int]
    #: Score a query leaves on what it saw (nothing, added up, or only the last valid query's).
    scoring: ClassVar[Scoring] = "none"
    #: Whether a user may ask for it by name.
    choosable: ClassVar[bool] = True
    #: Whether tokens lose their slots while the model would still see them.
    evicts: ClassVar[bool] = True
    #: Whether no token ever leaves; then the capacity is the longest sequence, and there is no budget to split.
    keeps_all: ClassVar[bool] = False
    #: Number of recent tokens where the policy leaves no choice.
    fixed_recent: ClassVar[int | None] = None
    #: Whether :meth:`keep_onnx` takes TopK of the capacity, whose K TensorRT limits.
    uses_topk: ClassVar[bool] = False
    #: Whether one new token always takes the slot that :meth:`taken_onnx` finds, and no other token loses its slot.
    takes_one_slot: ClassVar[bool] = False
    #: What the token that leaves has the least of when one token comes at a time, of several the last in slot order:
    #: ``"score"``, of all but the ``recent`` newest, or ``"position"``, of all but those and the first ``heavy``. None
    #: for any other rule.
    leaves: ClassVar[Literal["score", "position"] | None] = None
    #: Slots that may hold tokens which the next query of a sliding layer no longer sees.
    unseen: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Another ``keep_onnx`` than that of a parent takes another slot, and another ``keep`` has another rule."""
        if "keep_onnx" in vars(cls) and "taken_onnx" not in vars(cls):
            cls.takes_one_slot = False
        if "keep" in vars(cls) and "leaves" not in vars(cls):
            cls.leaves = None

    def __repr__(self) -> str:
        return f"<policy {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:  # copying and unpickling return the registered policy
        return by_name, (self.name,)

    @abc.abstractmethod
    def split(self, budget: int) -> tuple[int, int]:
        """``(heavy, recent)`` of a budget in tokens."""

    @abc.abstractmethod
    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        """[B, Hk, N] bool: which live candidates keep a slot: at most heavy + recent, and all while they fit."""

    @abc.abstractmethod
    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        """:meth:`keep` as ONNX nodes. ``op`` builds nodes, ``c`` has the fields of
        :class:`Candidates` as values, ``heavy``/``recent`` are i32 scalars, ``capacity`` an i64 [1]."""

    def taken_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, ticks: Any) -> Any:
        """The slot that one new token takes in a layer without a window, i64 [B, Hk, 1]: an empty one, the first of
        them, or that of the token that :meth:`keep` does not keep.

        ``c`` has the fields of :class:`Candidates` for the slots alone, ``ticks`` are i64 [C], the slots' numbers.
        Only policies with ``takes_one_slot`` need it; graphs of others take the general way.
        """
        raise NotImplementedError

    def why_impossible(self, layer: LayerNumbers) -> str | None:
        """Why a layer cannot have these numbers; None where it can."""
        return None

    def oldest(self, end: torch.Tensor, window: int) -> torch.Tensor:
        """The oldest position that survives in a layer whose queries see ``window`` > 0 positions.

        ``end`` is the position of the next query, which sees itself and ``window - 1`` tokens before it; tokens
        that it no longer sees leave, except ``unseen`` of them.
        """
        return end - window + (1 - self.unseen)

    def oldest_onnx(self, op: Any, end: Any, window: Any) -> Any:
        """:meth:`oldest` as ONNX nodes; all values are i32."""
        return op.Add(op.Sub(end, window), op.i32(1 - self.unseen))


def least_onnx(op: Any, c: Any, key: Any, ticks: Any) -> Any:
    """The first empty slot, or the last of those with the least ``key`` [B, Hk, C], which is not negative."""
    # ONNX Runtime has no ArgMin for CUDA, and would copy the state of every layer to the host for it.
    empty = op.CastLike(op.Sub(ticks, op.ints(_BEFORE_ALL)), key)
    rank = op.Where(c.live, key, empty)
    least = op.Equal(rank, op.ReduceMin(rank, op.ints(2), keepdims=1))
    return op.ReduceMax(op.Where(least, ticks, op.ints(0)), op.ints(2), keepdims=1)


class ScoredPolicy(EvictionPolicy):
    """Keeps the ``recent`` newest and then the highest scores; ties keep the lower index."""

    uses_topk = True
    takes_one_slot = True
    leaves = "score"

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

    def taken_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, ticks: Any) -> Any:
        newest = op.GreaterOrEqual(c.position, op.Sub(c.end, recent))
        return least_onnx(op, c, op.Where(newest, op.f32(3.0e38), c.score), ticks)


class PositionalPolicy(EvictionPolicy):
    """Keeps by position alone; the budget holds whatever passes."""


# ------------------------------------------------------------------ the registry

_REGISTERED: dict[str, EvictionPolicy] = {}
# No underscore: "NAME_lowrank" is the overload of the policy's body with a low-rank term.
_NAME = re.compile(r"[a-z][a-z0-9-]*")


def register(policy: EvictionPolicy) -> EvictionPolicy:
    """Make a policy known by its name and code, and return it.

    Exports, bundles and ``less_export.less.simulate`` find it from then on. Opening a bundle that uses it takes
    the same registration; the TensorRT plugin knows only the policies of this package.

    Raises:
        UsageError: the name or the code is taken, or is not a valid one.
    """
    if not _NAME.fullmatch(policy.name):
        raise UsageError(f"policy name '{policy.name}' must be lower-case letters, digits and hyphens")
    if not 0 <= policy.code < 2**31:
        raise UsageError(f"policy '{policy.name}' has code {policy.code}: it must be from 0 to 2**31 - 1")
    for other in registered():
        if policy.name == other.name:
            raise UsageError(f"policy '{policy.name}' is already registered: choose another name")
        if policy.code == other.code:
            raise UsageError(
                f"policy '{policy.name}' has code {policy.code}, which is that of '{other.name}': choose another code"
            )
    _REGISTERED[policy.name] = policy
    return policy


def unregister(policy: EvictionPolicy) -> None:
    """Forget a registered policy."""
    if _REGISTERED.get(policy.name) is not policy:
        raise UsageError(f"policy '{policy.name}' is not registered")
    del _REGISTERED[policy.name]


def registered() -> Iterator[EvictionPolicy]:
    """Every registered policy, those of this package first."""
    return iter(tuple(_REGISTERED.values()))


def choosable(*, evicting: bool = False) -> tuple[str, ...]:
    """Names that a user may give as ``--policy``; with ``evicting``, only of policies that evict."""
    return tuple(p.name for p in registered() if p.choosable and (p.evicts or not evicting))


def by_name(name: str) -> EvictionPolicy:
    """The policy of a name in any case; raises :class:`UsageError` for an unknown one."""
    policy = _REGISTERED.get(name.lower())
    if policy is None:
        raise UsageError(f"unknown policy '{name}': choose one of {', '.join(_REGISTERED)}")
    return policy


def by_code(code: int) -> EvictionPolicy:
    """The policy of an operator's ``policy`` attribute; raises :class:`UsageError` for an unknown one."""
    for policy in registered():
        if policy.code == code:
            return policy
    raise UsageError(f"no policy has code {code}: register it before running the model")
