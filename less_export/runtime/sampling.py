"""Choose a token from logits: greedy, or with temperature, top-k and top-p as in Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, UsageError, one_line


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Args:
        temperature: 0 is greedy (the lowest id among equal highest logits), and ignores top_k and top_p.
        top_k: sample from the k most likely tokens; 0 means all.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to top_p; 1 means all.
        seed: the same seed, prompt and index in the list of prompts give the same tokens; None is random.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: strings that end a text, which then stops before them; may be a single string. Special tokens
            count with their own text here, though texts leave them out.
        ignore_eos: continue past the model's end-of-sequence tokens.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def require(ok: bool, why: str) -> None:
            if not ok:
                raise UsageError(why)

        def shown(value: object) -> str:
            return one_line(value, 60)

        stop: Any = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        require(
            isinstance(stop, Iterable) and not isinstance(stop, bytes | bytearray | Mapping),
            f"stop must be a string or a list of strings, not {type(stop).__name__}",
        )
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)

        def is_integer(value: object) -> bool:
            return isinstance(value, int | np.integer) and not isinstance(value, bool)

        def is_number(value: object) -> bool:
            return is_integer(value) or (isinstance(value, float | np.floating) and math.isfinite(value))

        require(
            is_number(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or more, not {shown(self.temperature)}",
        )
        require(
            is_integer(self.top_k) and self.top_k >= 0,
            f"top_k must be 0 (off) or a whole number, not {shown(self.top_k)}",
        )
        require(is_number(self.top_p) and 0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {shown(self.top_p)}")
        require(
            self.seed is None or (is_integer(self.seed) and self.seed >= 0),
            f"seed must be a whole number from 0, not {shown(self.seed)}",
        )
        require(
            is_integer(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, not {shown(self.max_new_tokens)}",
        )
        require(all(isinstance(s, str) and s for s in stop), "stop strings must be strings that are not empty")
        require(
            isinstance(self.ignore_eos, bool | np.bool_),
            f"ignore_eos must be True or False, not {shown(self.ignore_eos)}",
        )

    def with_overrides(self, **overrides: Any) -> SamplingParams:
        """A copy with some fields replaced; raises :class:`UsageError` for an unknown name."""
        names = [f.name for f in fields(self)]
        for name in overrides:
            if name not in names:
                raise UsageError(f"unknown sampling option '{one_line(name, 60)}': choose from {', '.join(names)}")
        return replace(self, **overrides)

    def generator(self, row: int) -> np.random.Generator:
        """Random number generator of prompt ``row``; it does not depend on the other prompts."""
        return np.random.default_rng(None if self.seed is None else (self.seed, row))


def sample(logits: npt.NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """Choose a token from ``logits`` [V] f32; -inf forbids a token.

    The order is that of Hugging Face: temperature, top-k, then top-p among the remaining tokens. Exactly
    ``top_k`` tokens remain (the lowest ids among equal ones), and always at least one.

    Raises:
        BackendError: the highest logit is NaN or infinite.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        raise BackendError(f"the model produced {peak} logits: check its weights and its dtype")
    if params.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):
        weight = np.exp((logits.astype(np.float64) - float(peak)) / params.temperature)
    tokens = np.arange(len(weight))
    if 0 < params.top_k < len(weight):
        threshold = np.partition(weight, -params.top_k)[-params.top_k]
        tokens = _by_weight(weight, np.flatnonzero(weight >= threshold))[: params.top_k]
    if params.top_p < 1:
        tokens = _nucleus(weight, tokens, params.top_p)
    cumulative = np.cumsum(weight[tokens])
    # random() is at most 1 - 2^-53, so the product is below the total: the chosen token always has weight.
    return int(tokens[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _nucleus(weight: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], top_p: float) -> npt.NDArray[np.int64]:
    """The smallest set of ``tokens``, heaviest first, whose share of the total is at least ``top_p``."""
    total = weight[tokens].sum()
    # All tokens lighter than this together weigh less than 1 - top_p, so none of them is in the nucleus.
    # This avoids sorting a whole vocabulary (262,144 for Gemma).
    tokens = tokens[weight[tokens] >= total * (1 - top_p) / len(tokens)]
    tokens = _by_weight(weight, tokens)
    cumulative = np.cumsum(weight[tokens])
    return tokens[: int(np.searchsorted(cumulative, top_p * total, side="left")) + 1]


def _by_weight(weight: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``tokens``, heaviest first; equal ones keep their order."""
    return tokens[np.argsort(-weight[tokens], kind="stable")]
