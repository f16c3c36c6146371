"""Choose a token from logits: greedy, or with temperature, top-k, top-p and min-p as in Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, UsageError, one_line

#: Most alternatives that ``logprobs`` reports.
MAX_LOGPROBS = 100
#: Thresholds, each a sixteenth of the one before, that are tried to separate the nucleus from a long tail.
_THRESHOLDS = 6
#: Blocks whose maxima bound the top-k tokens from below.
_BLOCKS = 512

#: Changes the logits of one sequence.
LogitsProcessor = Callable[[Sequence[int], npt.NDArray[np.float32]], npt.NDArray[np.float32] | None]


class ProcessorSource(Protocol):
    """Makes a processor for each sequence, where one has a memory of its sequence."""

    def start(self) -> LogitsProcessor:
        """A processor for a new sequence. If it has a method ``chosen(token_id)``, it is told every choice at once."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Args:
        temperature: 0 is greedy (the lowest id among equal highest logits), and ignores top_k, top_p and min_p.
        top_k: sample from the k most likely tokens; 0 means all.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to top_p; 1 means all.
        seed: the same seed, prompt and index in the list of prompts give the same tokens; None is random.
        max_new_tokens: maximum number of new tokens per prompt.
        stop: strings that end a text, which then stops before them; may be a single string. Special tokens
            count with their own text here, though texts leave them out.
        ignore_eos: continue past the model's end-of-sequence tokens.
        min_p: of what top_k and top_p leave, drop tokens less likely than min_p times the most likely one; 0 is off.
        repetition_penalty: divides positive logits of tokens of the prompt and the text so far by this, and multiplies
            negative ones; 1 is off.
        presence_penalty: subtracted from the logits of tokens of the text so far.
        frequency_penalty: subtracted from the logits of tokens of the text so far, once for each time they occur.
        logit_bias: added to the logits of these token ids.
        stop_token_ids: tokens that end a text, which leaves them out; not affected by ignore_eos.
        logprobs: report the log probability of every token, and those of this many most likely ones (0 or more), by
            the model's own distribution: before temperature, penalties, bias and processors. None is off.
        processors: functions ``processor(token_ids, logits)``, called in this order before every token, after penalties
            and bias, with the new tokens so far and the logits [V] f32 of the next one. They change these in place
            (-inf forbids a token) or return others. A :class:`ProcessorSource` in the place of one makes one for each
            sequence, such as a :class:`~less_export.runtime.structured.Grammar`.

    Penalties, bias and processors come before the temperature, also where that is 0.

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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    processors: tuple[LogitsProcessor | ProcessorSource, ...] = ()

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

        def is_shift(value: Any) -> bool:  # of a logit: float32 holds the result
            return is_number(value) and abs(value) <= 1e30

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
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, f"min_p must lie in [0, 1], not {shown(self.min_p)}")
        require(
            is_number(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty must lie in 0.01..100 (1 is off), not {shown(self.repetition_penalty)}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(is_shift(value), f"{name} must be a number (0 is off), not {shown(value)}")
        bias: Any = self.logit_bias
        require(
            bias is None or (isinstance(bias, Mapping) and all(is_integer(i) and is_shift(b) for i, b in bias.items())),
            "logit_bias must map token ids (whole numbers) to numbers",
        )
        stop_ids: Any = self.stop_token_ids
        require(
            isinstance(stop_ids, list | tuple | set | frozenset | np.ndarray) and all(map(is_integer, stop_ids)),
            "stop_token_ids must be a list of token ids (whole numbers)",
        )
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in stop_ids))
        require(
            self.logprobs is None or (is_integer(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            f"logprobs must be a whole number in 0..{MAX_LOGPROBS}, or None, not {shown(self.logprobs)}",
        )
        processors: Any = self.processors
        require(
            isinstance(processors, list | tuple) and all(callable(getattr(p, "start", p)) for p in processors),
            "processors must be a list of functions of the new token ids and the logits",
        )
        object.__setattr__(self, "processors", tuple(processors))

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
    require_finite(peak)
    if params.temperature == 0:
        return int(logits.argmax())
    tokens = _top(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    chosen = logits if tokens is None else logits[tokens]
    with np.errstate(over="ignore"):
        weight = np.exp((chosen.astype(np.float64) - float(peak)) / params.temperature)
    if tokens is not None:
        order = np.argsort(-weight, kind="stable")[: params.top_k]
        tokens, weight = tokens[order], weight[order]
    if params.top_p < 1:
        places = _nucleus(weight, params.top_p)
        tokens, weight = places if tokens is None else tokens[places], weight[places]
    if params.min_p > 0:
        places = np.flatnonzero(weight >= params.min_p * weight.max())
        tokens, weight = places if tokens is None else tokens[places], weight[places]
    cumulative = np.cumsum(weight)
    # random() is at most 1 - 2^-53, so the product is below the total: the chosen token always has weight.
    place = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return place if tokens is None else int(tokens[place])


def require_finite(peak: np.floating) -> None:
    """Raise :class:`BackendError` unless the highest logit is a number."""
    if not np.isfinite(peak):
        raise BackendError(f"the model produced {peak} logits: check its weights and its dtype")


def _top(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Tokens in order of their ids among which are the ``count`` most likely ones; few others, unless logits are equal.

    The logits of as many blocks as ``count`` reach the ``count``-th highest maximum of a block, and so do those of at
    least ``count`` tokens. This avoids partitioning a whole vocabulary (262,144 for Gemma).
    """
    size = -(-len(logits) // _BLOCKS)
    if count <= len(logits) // size // 4:
        maxima = np.maximum.reduceat(logits, np.arange(0, len(logits), size))
        threshold = np.partition(maxima, -count)[-count]
    else:
        threshold = np.partition(logits, -count)[-count]
    return np.flatnonzero(logits >= threshold)


def _nucleus(weight: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Places of the smallest set, heaviest first, whose share of the total is at least ``top_p``."""
    total = weight.sum()
    wanted = top_p * total
    # Either of two sets contains the nucleus and avoids sorting a whole vocabulary: the tokens above a threshold, if
    # their weights reach the share; or those that are not so light that together they weigh less than 1 - top_p.
    threshold = float(weight.max())
    for _ in range(_THRESHOLDS):
        threshold /= 16
        heavy = np.flatnonzero(weight >= threshold)
        if weight[heavy].sum() >= wanted * (1 + 1e-9):
            break
    else:
        heavy = np.flatnonzero(weight >= total * (1 - top_p) / len(weight))
    places = heavy[np.argsort(-weight[heavy], kind="stable")]
    cumulative = np.cumsum(weight[places])
    return places[: int(np.searchsorted(cumulative, wanted, side="left")) + 1]
