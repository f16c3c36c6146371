"""Choose tokens from logits: greedy, or with temperature, top-k, top-p and min-p as in Hugging Face."""

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
#: Blocks of a row whose maxima bound its highest logits from below.
_BLOCKS = 512
#: Tokens whose weights are computed at a time: those of some rows stay in the CPU's cache.
_TILE = 1 << 14

Logits = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]
#: Changes the logits of one sequence.
LogitsProcessor = Callable[[Sequence[int], Logits], Logits | None]


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
            is_shift(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or more, not {shown(self.temperature)}",
        )
        object.__setattr__(self, "temperature", float(self.temperature))
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


def sample(logits: Logits, params: SamplingParams, rng: np.random.Generator) -> int:
    """Choose a token from ``logits`` [V] f32; -inf forbids a token.

    Raises:
        BackendError: the highest logit is NaN or infinite.
    """
    (token,) = sample_all(logits[None], [params], [rng])
    if isinstance(token, BackendError):
        raise token
    return token


def sample_all(
    logits: Logits, params: Sequence[SamplingParams], rngs: Sequence[np.random.Generator]
) -> list[int | BackendError]:
    """Choose a token for each row of ``logits`` [B, V] f32; -inf forbids a token.

    The order is that of Hugging Face: temperature, top-k, then top-p among the remaining tokens, then min-p. Exactly
    ``top_k`` tokens remain (the lowest ids among equal ones), and always at least one.

    Returns:
        tokens, or an error where the highest logit is NaN or infinite.
    """
    if all(p.temperature == 0 for p in params):
        highest = logits.argmax(1)
        peaks = logits[np.arange(len(logits)), highest]  # NaN where there is one
        return [int(t) if np.isfinite(x) else not_finite(x) for t, x in zip(highest, peaks, strict=True)]
    vocab, maxima = logits.shape[1], block_maxima(logits)
    peaks = maxima.max(1)
    alive = {i: p for i, p in enumerate(params) if np.isfinite(peaks[i])}
    top_k = {i: p.top_k for i, p in alive.items() if 0 < p.top_k < vocab}
    # Without top_k, the weights of all tokens are needed, unless min_p alone says which tokens remain.
    whole = [i for i, p in alive.items() if p.temperature > 0 and i not in top_k and (p.top_p < 1 or p.min_p == 0)]
    temperatures = [params[i].temperature for i in whole]
    sums = dict(zip(whole, weight_sums(logits, whole, peaks, temperatures), strict=True)) if whole else {}
    tokens: list[int | BackendError] = []
    for i, (row, peak, p, rng) in enumerate(zip(logits, peaks, params, rngs, strict=True)):
        if i not in alive:
            tokens.append(not_finite(peak))
        elif p.temperature == 0:
            tokens.append(_highest(row, maxima[i]))
        elif i in sums and p.top_p == 1:
            tokens.append(_draw_from_all(row, peak, p.temperature, sums[i], rng))
        else:
            total = float(sums[i].sum()) if i in sums else None
            # All tokens lighter than the tail together weigh less than 1 - top_p: the nucleus is among the others.
            tail = 0.0 if total is None else (1 - p.top_p) * total / vocab
            if i in top_k:
                floor = floor_of_highest(row, maxima[i], p.top_k)
            else:
                floor = _logit(max(tail, p.min_p), peak, p.temperature)
            kept = tokens_above(row, maxima[i], floor)
            tokens.append(int(kept[_draw(row[kept], peak, p, top_k.get(i), total, rng)]))
    return tokens


def not_finite(peak: np.floating) -> BackendError:
    """What is wrong with logits whose highest one is not a number."""
    return BackendError(f"the model produced {peak} logits: check its weights and its dtype")


def block_maxima(logits: Logits) -> Logits:
    """The highest logit of each block of each row of ``logits`` [B, V]: [B, blocks]; NaN where there is one."""
    vocab = logits.shape[1]
    return np.maximum.reduceat(logits, np.arange(0, vocab, _block_size(vocab)), axis=1)


def _highest(row: Logits, maxima: Logits) -> int:
    """The token of a row [V] with the highest logit, the lowest id among equal ones."""
    size = _block_size(len(row))
    start = int(maxima.argmax()) * size
    return start + int(row[start : start + size].argmax())


def floor_of_highest(row: Logits, maxima: Logits, count: int) -> np.float32:
    """A floor that the ``count`` highest logits of a row [V] reach, and few others that are not equal to it.

    As many blocks have a maximum that reaches the ``count``-th highest maximum, and so do as many logits. This avoids
    partitioning a whole vocabulary (262,144 for Gemma).
    """
    few = count <= len(row) // _block_size(len(row)) // 4
    return np.partition(maxima if few else row, -count)[-count]


def tokens_above(row: Logits, maxima: Logits, floor: np.float32) -> npt.NDArray[np.int64]:
    """Tokens of a row [V] whose logits reach a floor, in order of their ids."""
    blocks = np.flatnonzero(maxima >= floor)
    if len(blocks) > len(maxima) // 32:  # then one pass over the row is faster
        return np.flatnonzero(row >= floor)
    size = _block_size(len(row))
    return np.concatenate([start + np.flatnonzero(row[start : start + size] >= floor) for start in blocks * size])


def weight_sums(logits: Logits, rows: Sequence[int], peaks: Logits, temperatures: Sequence[float]) -> Weights:
    """Sums [rows, tiles] of the weights of each tile of some rows of ``logits`` [B, V], relative to the peaks [B]."""
    peak, temperature = peaks[rows, None], np.array(temperatures)[:, None]
    starts = range(0, logits.shape[1], _TILE)
    return np.stack([_weights(logits[rows, s : s + _TILE], peak, temperature).sum(1) for s in starts], 1)


def _block_size(vocab: int) -> int:
    return -(-vocab // _BLOCKS)


def _weights(logits: Logits, peak: Any, temperature: Any) -> Weights:
    """Weights of tokens relative to that of the peak."""
    with np.errstate(over="ignore"):
        weight = np.subtract(logits, peak, dtype=np.float64)
        weight /= temperature
        return np.exp(weight, out=weight)


def _logit(weight: float, peak: np.float32, temperature: float) -> np.float32:
    """The logit of a weight relative to that of the peak, or a little less."""
    with np.errstate(over="ignore"):
        logit = np.float64(peak) + np.float64(temperature) * (np.log(weight) - 1e-9)
        return np.nextafter(np.float32(logit), np.float32(-np.inf))


def _draw_from_all(
    logits: Logits, peak: np.float32, temperature: float, sums: Weights, rng: np.random.Generator
) -> int:
    """Draw among all tokens, in order of their ids: first a tile by the ``sums`` of its weights, then a token of it."""
    ends = np.cumsum(sums)
    number = rng.random() * ends[-1]
    tile = int(np.searchsorted(ends, number, side="right"))
    start = tile * _TILE
    inside = np.cumsum(_weights(logits[start : start + _TILE], peak, temperature))
    number -= ends[tile] - sums[tile]
    # The sums differ by rounding; between 0 and the last one, a number finds a token with weight.
    number = np.clip(number, 0, np.nextafter(inside[-1], 0))
    return start + int(np.searchsorted(inside, number, side="right"))


def _draw(
    logits: Logits,
    peak: np.float32,
    params: SamplingParams,
    top_k: int | None,
    total: float | None,
    rng: np.random.Generator,
) -> int:
    """Draw one of the tokens that have ``logits`` [N], in order of their ids; returns its place.

    Logits are sorted without their places, which numpy does many times faster than with them. A place follows from
    the logit and its rank among equal ones.

    Args:
        top_k: how many tokens remain; None is all.
        total: the weight that ``top_p`` is a share of; None is that of the ``top_k`` tokens.
    """
    if top_k is None and params.top_p == 1:
        weight = _weights(logits, peak, params.temperature)
        kept = np.flatnonzero(weight >= params.min_p * weight.max())
        cumulative = np.cumsum(weight[kept])
        return int(kept[_place(cumulative, rng)])
    ranked = -np.sort(-logits)[:top_k]
    weight = _weights(ranked, peak, params.temperature)
    cumulative = np.cumsum(weight)
    if params.top_p < 1:
        wanted = params.top_p * (weight.sum() if total is None else total)
        cumulative = cumulative[: np.searchsorted(cumulative, wanted) + 1]
    if params.min_p > 0:
        cumulative = cumulative[: np.count_nonzero(weight >= params.min_p * weight[0])]
    rank = _place(cumulative, rng)
    return int(np.flatnonzero(logits == ranked[rank])[rank - np.count_nonzero(ranked > ranked[rank])])


def _place(cumulative: Weights, rng: np.random.Generator) -> int:
    """Draw by cumulative weights: random() is at most 1 - 2^-53, so the place always has weight."""
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
