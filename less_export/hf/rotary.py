"""What positions do to the queries and keys of each layer, measured by running a bare model.

A layer may turn pairs of channels by angles that are proportional to the position (RoPE, arXiv 2104.09864), whatever
its module is called, which channels it pairs, and how it scales frequencies. The probe runs the decoder without its
weights on a few tokens at many positions, compares q and k with those at position 0, and finds pairs and frequencies.
What does not fit is refused by name: positions that scale queries, tables that are added to embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..less.rotary import RotaryTable, table, table_of
from . import compat
from .surgery import AttentionCall, learned_positions, less_attention
from .weightless import without_weights

#: Tokens that are run at every position, and most heads that are looked at: each gives a sample of every channel.
_TOKENS, _HEADS = 2, 16
#: Positions at which angles double: there a product with a frequency is exact in float32, and so is the angle.
_DOUBLING = tuple(2**n for n in range(21))
#: Further positions, at which pairs and frequencies have to hold as well.
_OTHERS = (3, 7, 100, 1_000, 5_001, 12_345, 70_001, 131_071, 1_000_003)
#: Differences that are rounding: relative to the largest query, and radians relative to the angle.
_ROUNDING, _ANGLE_ROUNDING = 2e-5, 2.0**-21
#: Error of a pair's angle, in radians.
_ANGLE_ERROR = 2e-7
#: What two channels' squares may leave of each other's changes if they are a pair.
_UNPAIRED = 1e-2


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its queries and keys.

    first, second: channels of each pair, ``z = x[first] + i x[second]``, which turns by ``exp(i * position *
    frequency)``; frequencies in radians per token. head_dim: channels of a head.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequencies: tuple[float, ...]
    head_dim: int

    @property
    def order(self) -> tuple[int, ...] | None:
        """Channels in half-split order, the rotated ones first; None if they are in that order."""
        turned = (*self.first, *self.second)
        order = (*turned, *sorted(set(range(self.head_dim)) - set(turned)))
        return None if order == tuple(range(self.head_dim)) else order

    def is_kind(self, other: Rotation, positions: Tensor) -> bool:
        """Whether both are the same but for the errors of a probe at ``positions``."""
        if (self.first, self.second, self.head_dim) != (other.first, other.second, other.head_dim):
            return False
        difference = np.subtract(self.frequencies, other.frequencies)
        return bool((np.abs(difference) <= 2 * _frequency_error(positions)).all())


def tables(rotations: Sequence[Rotation | None], length: int) -> tuple[RotaryTable, ...]:
    """A table of distances below ``length`` for every kind among the layers' ``rotations``."""
    kinds: dict[Rotation, list[int]] = {}
    for layer, rotation in enumerate(rotations):
        if rotation is not None:
            kinds.setdefault(rotation, []).append(layer)
    return tuple(
        RotaryTable(tuple(layers), r.order, table(torch.tensor(r.frequencies, dtype=torch.float64), length))
        for r, layers in kinds.items()
    )


def arranged(call: AttentionCall, rotary: Sequence[RotaryTable]) -> tuple[AttentionCall, Tensor | None]:
    """The call of a model at position 0, its queries and keys in the order of its table, and the table's angles.

    Without a table for its layer, the call as it is, and None.
    """
    kind = table_of(rotary, call.layer)
    if kind is None:
        return call, None
    return replace(call, q=kind.arranged(call.q), k=kind.arranged(call.k)), kind.angles.to(call.q.device)


def probe(model: PreTrainedModel) -> tuple[Rotation | None, ...]:
    """How every layer of a bare model turns its queries and keys; None for a layer that does not.

    Raises:
        UnsupportedModelError: positions enter the model in another way; names layer and reason.
    """
    limit = learned_positions(model)
    positions = torch.tensor([p for p in (0, *_DOUBLING, *_OTHERS) if limit is None or p < limit])
    samples: dict[int, list[Tensor]] = {}

    def record(call: AttentionCall) -> Tensor:
        samples[call.layer] = [_by_position(x, len(positions)) for x in (call.q, call.k, call.v)]
        return torch.zeros_like(call.q)

    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.linspace(0, vocabulary - 1, _TOKENS).long()
    decoder = getattr(model, model.base_model_prefix, model)
    try:
        with torch.no_grad(), compat.quiet_transformers(), less_attention(model, record), without_weights(model):
            hidden = decoder(
                input_ids=ids.repeat(len(positions))[None],
                position_ids=positions.repeat_interleave(_TOKENS)[None],
                use_cache=False,
            )[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(f"its positions cannot be probed ({reason})") from error
    rotations: list[Rotation | None] = []
    for layer, (q, k, v) in sorted(samples.items()):
        try:
            _refuse_other_positions(v, "values")
            rotation = _rotation(q, k, positions.double())
            rotations.append(
                next((r for r in rotations if rotation and r and r.is_kind(rotation, positions)), rotation)
            )
        except _OtherPositions as reason:
            learned = " (a table of positions)" if limit is not None else ""
            raise UnsupportedModelError(f"layer {layer}: {reason}{learned}") from None
    if not _same(_by_position(hidden[:, None], len(positions))):
        raise UnsupportedModelError(f"layer {len(samples) - 1}: positions enter the model beside its attention")
    return tuple(rotations)


class _OtherPositions(Exception):
    """What positions do to a layer besides turning its queries and keys."""


def _by_position(x: Tensor, positions: int) -> Tensor:
    """[1,H,T,D] -> samples f64 [positions, N, D]."""
    heads = x[0, :_HEADS].double().unflatten(1, (positions, _TOKENS))
    return heads.transpose(0, 1).flatten(1, 2)


def _same(x: Tensor) -> bool:
    """Whether samples are the same at all positions."""
    return bool(((x - x[0]).abs() <= _ROUNDING * x[0].abs().max()).all())


def _refuse_other_positions(x: Tensor, name: str) -> None:
    """Refuse vectors [P,N,D] whose length depends on the position, or values that do at all."""
    if not bool(x.isfinite().all()) or not bool(x[0].any()):
        raise _OtherPositions(f"its {name} are zero or not finite in the probe")
    if name == "values":
        if not _same(x):
            raise _OtherPositions("its values depend on the position")
    elif not _same(x.square().sum(-1, keepdim=True)):
        raise _OtherPositions(f"the size of its {name} depends on the position")


def _rotation(q: Tensor, k: Tensor, positions: Tensor) -> Rotation | None:
    """The rotation of samples f64 [P,N,D] at ``positions`` [P]."""
    for x, name in ((q, "queries"), (k, "keys")):
        _refuse_other_positions(x, name)
    moved = [((x - x[0]).abs() > _ROUNDING * x[0].abs().max()).any(0).any(0) for x in (q, k)]
    if not torch.equal(*moved):
        raise _OtherPositions("the position changes other channels of its queries than of its keys")
    channels = moved[0].nonzero()[:, 0]
    if not len(channels):
        return None
    first, second = _pairs(q[..., channels])
    if first is None or second is None:
        raise _OtherPositions("the position does more to its queries than turning pairs of channels")
    first, second = channels[first], channels[second]
    frequencies = _frequencies(_turns(q, first, second), positions)
    for x, name in ((q, "queries"), (k, "keys")):
        _verify(x, name, first, second, frequencies, positions)
    return Rotation(tuple(first.tolist()), tuple(second.tolist()), tuple(frequencies.tolist()), q.shape[-1])


def _pairs(x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The pairs of the channels of ``x`` [P,N,D], whose squares have a constant sum, the lower channel first."""
    change = (x[1:].square() - x[0].square()).flatten(0, 1)  # [., D]
    energy = change.square().sum(0)
    left = (energy[:, None] + energy + 2 * change.T @ change) / (energy[:, None] + energy)
    left.fill_diagonal_(float("inf"))
    least, partner = left.min(1)
    own = torch.arange(len(partner))
    if not bool((least < _UNPAIRED).all()) or not torch.equal(partner[partner], own):
        return None, None
    first = (own < partner).nonzero()[:, 0]
    return first, partner[first]


def _turns(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """By which complex number every pair was multiplied at every position: [P, pairs]."""
    z = torch.complex(x[..., first], x[..., second])
    return (z * z[0].conj()).sum(1) / z[0].abs().square().sum(0)


def _frequencies(turns: Tensor, positions: Tensor) -> Tensor:
    """Radians per token f64, from angles at doubling positions: each settles the next one's number of turns."""
    angles, frequencies = turns.angle(), torch.zeros(turns.shape[1], dtype=torch.float64)
    for angle, n in zip(angles, positions.tolist(), strict=True):
        if n in _DOUBLING:
            rest = angle - n * frequencies
            frequencies += torch.atan2(rest.sin(), rest.cos()) / n
    # Models compute frequencies in float32: the nearest of these is exact, if no other is as near.
    rounded = frequencies.float().double()
    return torch.where((rounded - frequencies).abs() <= _frequency_error(positions), rounded, frequencies)


def _frequency_error(positions: Tensor) -> float:
    """Error of a frequency from angles at these positions, in radians per token."""
    return _ANGLE_ERROR / max(n for n in positions.tolist() if n in _DOUBLING)


def _verify(x: Tensor, name: str, first: Tensor, second: Tensor, frequencies: Tensor, positions: Tensor) -> None:
    """Refuse samples [P,N,D] that the rotation does not explain."""
    z = torch.complex(x[..., first], x[..., second])
    angles = positions[:, None] * frequencies
    expected = z[0] * torch.polar(torch.ones_like(angles), angles)[:, None]
    error = (z - expected).abs()
    bound = _ROUNDING * x[0].abs().max() + z[0].abs() * _ANGLE_ROUNDING * angles.abs()[:, None]
    if not bool((error <= bound).all()):
        raise _OtherPositions(f"its {name} do not turn by angles that are proportional to the position")
