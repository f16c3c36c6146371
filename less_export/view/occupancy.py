"""Which tokens of a sequence still have a slot, with which score, and how much the low-rank state has absorbed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import Contract
from ..runtime.backend import Backend
from ..runtime.tokenizer import Tokenizer

#: The only fields that are read: keys, values and the low-rank state are a hundred times as large.
_FIELDS = ("position", "score", "z")


@dataclass(frozen=True)
class LayerOccupancy:
    """Of one layer: ``position`` [Hk, C] i32 (-1: empty), ``score`` [Hk, C] f32, ``mass`` [Hk] f32: the sum of z."""

    position: npt.NDArray[np.int32]
    score: npt.NDArray[np.float32]
    mass: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Occupancy:
    """What a row holds after ``length`` tokens."""

    length: int
    layers: tuple[LayerOccupancy, ...]

    @classmethod
    def read(cls, backend: Backend, row: int) -> Occupancy:
        """Copy what is needed of a row, on the thread that steps."""
        layers: list[dict[str, Any]] = backend.read_fields(row, _FIELDS)
        return cls(
            int(backend.past_length[row]),
            tuple(LayerOccupancy(s["position"], s["score"], s["z"].sum(-1, dtype=np.float32)) for s in layers),
        )

    def held(self) -> npt.NDArray[np.int64]:
        """In how many pairs of a layer and a head each position has a slot: [length]."""
        positions = [s.position.ravel() for s in self.layers]
        every = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        return np.bincount(every[every >= 0], minlength=self.length)


class Pieces:
    """The text of every token of a growing sequence; of a character in several tokens, with its last one."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else tokenizer.stream()
        self.texts: list[str] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take more tokens."""
        for token_id in token_ids:
            if self._tokenizer is None or self._stream is None:
                self.texts.append(f"{token_id} ")
            else:
                special = self._tokenizer.special_texts.get(token_id)
                self.texts.append(self._stream.push(token_id) if special is None else special)


def view(
    occupancy: Occupancy, contract: Contract, texts: list[str], *, first: int = 0, layers: Collection[int] = ()
) -> dict[str, Any]:
    """What ``view.js`` shows, ready for JSON.

    Args:
        texts: of the tokens from position ``first`` on; those before are not known.
        layers: those whose positions and scores are wanted, which most of the data are.

    Returns:
        ``tokens``, ``first``, ``length``; ``held`` and ``pairs``: by token, in how many of the pairs of a layer and a
        head it has a slot; ``held_before``: the sum of these over the tokens before ``first``; ``state_bytes`` and
        ``full_bytes``; and ``layers``, each with its ``policy``, ``slots``, ``window``, ``absorbs``, and by head:
        ``held`` slots, ``mass``, and ``positions`` with ``scores`` if they are wanted, else None.
    """
    held = occupancy.held()
    described = [
        {
            "policy": spec.policy.name,
            "slots": spec.capacity,
            "window": spec.window,
            "absorbs": spec.absorb,
            "heads": [_head(layer, head, index in layers) for head in range(spec.kv_heads)],
        }
        for index, (spec, layer) in enumerate(zip(contract.layers, occupancy.layers, strict=True))
    ]
    return {
        "tokens": texts[: occupancy.length - first],
        "first": first,
        "length": occupancy.length,
        "held": held[first : first + len(texts)].tolist(),
        "held_before": int(held[:first].sum()),
        "pairs": sum(s.kv_heads for s in contract.layers),
        "state_bytes": contract.state_bytes(),
        "full_bytes": contract.full_cache_bytes(occupancy.length),
        "layers": described,
    }


def _head(layer: LayerOccupancy, head: int, detailed: bool) -> dict[str, Any]:
    taken = layer.position[head] >= 0
    facts: dict[str, Any] = {"held": int(taken.sum()), "mass": _number(layer.mass[head])}
    if not detailed:
        return {**facts, "positions": None, "scores": None}
    order = np.argsort(layer.position[head][taken])
    scores = layer.score[head][taken][order]
    return {**facts, "positions": layer.position[head][taken][order].tolist(), "scores": [_number(x) for x in scores]}


def _number(value: np.floating) -> float:
    """A figure with the digits that a reader can use, and that JSON has."""
    return float(f"{value:.4g}") if np.isfinite(value) else 0.0
