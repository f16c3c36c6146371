"""From logits to a token: greedy, or temperature, top-k and top-p as in Hugging Face."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature: 0 is greedy (the lowest index of the highest logits); then top_k and top_p are ignored.
    top_k: sample among the k most likely tokens; 0 is all.
    top_p: sample among the fewest most likely tokens whose probabilities reach top_p; 1 is all.
    seed: same seed, prompt and place in the list of prompts, same tokens; None differs every time.
    max_new_tokens: most tokens per prompt.
    stop: strings that end a text, which then stops before them; a single string is fine.
    ignore_eos: go on past the model's end-of-sequence tokens.

    Raises :class:`UsageError` for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)

        def require(ok: bool, why: str) -> None:
            if not ok:
                raise UsageError(why)

        def whole(value: object) -> bool:
            return isinstance(value, int | np.integer) and not isinstance(value, bool)

        def number(value: object) -> bool:
            return whole(value) or (isinstance(value, float | np.floating) and math.isfinite(value))

        require(
            number(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or more, not {self.temperature}",
        )
        require(
            whole(self.top_k) and self.top_k >= 0,
            f"top_k must be 0 (off) or a whole number, not {self.top_k}",
        )
        require(number(self.top_p) and 0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        require(
            self.seed is None or (whole(self.seed) and self.seed >= 0),
            f"seed must be a whole number from 0, not {self.seed}",
        )
        require(
            whole(self.max_new_tokens) and self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, not {self.max_new_tokens}",
        )
        require(all(isinstance(s, str) and s for s in stop), "stop strings must be texts that are not empty")

    def with_overrides(self, **overrides: Any) -> SamplingParams:
        """A copy with some fields replaced; raises :class:`UsageError` for a name that is none."""
        names = [f.name for f in fields(self)]
        for name in overrides:
            if name not in names:
                raise UsageError(f"unknown sampling option '{name}': choose from {', '.join(names)}")
        return replace(self, **overrides)

    def generator(self, row: int) -> np.random.Generator:
        """Random numbers of prompt ``row``, the same whatever runs beside it."""
        return np.random.default_rng(None if self.seed is None else (self.seed, row))


def sample(logits: npt.NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """Choose a token from ``logits`` [V] f32; -inf forbids a token.

    Order as in Hugging Face: temperature, top-k, then top-p among what is left. Exactly ``top_k`` tokens
    stay (of equal ones the lowest ids), and at least one always does.

    Raises:
        BackendError: the highest logit is NaN or infinite.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        raise BackendError(f"the model produced {peak} logits: its weights or its dtype are not right")
    if params.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):
        weight = np.exp((logits.astype(np.float64) - float(peak)) / params.temperature)
    tokens = np.arange(len(weight))
    if 0 < params.top_k < len(weight):
        least = np.partition(weight, -params.top_k)[-params.top_k]
        tokens = _by_weight(weight, np.flatnonzero(weight >= least))[: params.top_k]
    if params.top_p < 1:
        tokens = _nucleus(weight, tokens, params.top_p)
    reach = np.cumsum(weight[tokens])
    # random() is at most 1 - 2^-53, so the product stays below the total: always a token that weighs something.
    return int(tokens[np.searchsorted(reach, rng.random() * reach[-1], side="right")])


def _nucleus(weight: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], top_p: float) -> npt.NDArray[np.int64]:
    """The fewest of ``tokens``, heaviest first, that hold a share of at least ``top_p``."""
    total = weight[tokens].sum()
    # All tokens lighter than this together weigh less than 1 - top_p: none is in the nucleus, so a
    # vocabulary of 262,144 need not be sorted.
    tokens = tokens[weight[tokens] >= total * (1 - top_p) / len(tokens)]
    tokens = _by_weight(weight, tokens)
    reach = np.cumsum(weight[tokens])
    return tokens[: int(np.searchsorted(reach, top_p * total, side="left")) + 1]


def _by_weight(weight: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``tokens`` (ascending ids or already sorted), heaviest first; equal ones keep their order."""
    return tokens[np.argsort(-weight[tokens], kind="stable")]
