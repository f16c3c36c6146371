"""Perplexities and divergences with confidence intervals, the share of a gap that LESS closes, and copied tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Nll = npt.NDArray[np.float64]
RESAMPLES = 2000
#: Fewest values that get an interval: five have the same sign by chance alone more often than once in twenty.
FEWEST = 6


@dataclass(frozen=True)
class Interval:
    """A value and its 95% bootstrap interval, whose ends are None where there are fewer than :data:`FEWEST` values."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, form: str) -> str:
        """``value [low, high]``, each in the format ``form``, or the value alone."""
        if self.low is None or self.high is None:
            return format(self.value, form)
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def _draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _interval(value: float, draws: Nll, count: int) -> Interval:
    """The interval of a value of ``count`` sequences or items."""
    draws = draws[np.isfinite(draws)]
    if count < FEWEST or not len(draws):
        return Interval(float(value))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def perplexity(nll: Nll, seed: int = 0) -> Interval:
    """exp of the mean of nll [N,P]; resamples whole sequences, as the tokens of one are not independent."""
    rows = nll.mean(1)
    return _interval(np.exp(rows.mean()), np.exp(rows[_draws(len(rows), seed)].mean(1)), len(rows))


def mean(values: Nll, seed: int = 0) -> Interval:
    """Mean of values [N]; resamples them."""
    return _interval(values.mean(), values[_draws(len(values), seed)].mean(1), len(values))


def mean_of_some(values: Nll, chosen: npt.NDArray[np.bool_], seed: int = 0) -> Interval | None:
    """Mean of the ``chosen`` values [N,P]; resamples whole sequences. None if there are none."""
    sums, counts = np.where(chosen, values, 0).sum(1), chosen.sum(1)
    if not counts.any():
        return None
    draws = _draws(len(values), seed)
    with np.errstate(invalid="ignore"):
        return _interval(sums.sum() / counts.sum(), sums[draws].sum(1) / counts[draws].sum(1), len(values))


#: Tokens back from which a repeated pair of tokens counts as copied.
COPY_DISTANCE = 30


def copied(ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the tokens after ``positions`` [P] of sequences [N,L] repeat the end of a pair of tokens that began
    :data:`COPY_DISTANCE` or more tokens before: [N,P]. What a cache forgets shows there first."""
    repeats = np.zeros((len(ids), len(positions)), bool)
    for row, tokens in enumerate(ids.tolist()):
        pairs = list(itertools.pairwise(tokens))
        seen: dict[tuple[int, int], int] = {}
        for at, pair in enumerate(pairs):
            seen.setdefault(pair, at)
        repeats[row] = [at - seen[pairs[at]] >= COPY_DISTANCE for at in positions.tolist()]
    return repeats


def share_of_gap(full: Nll, baseline: Nll, less: Nll, seed: int = 0) -> Interval | None:
    """(baseline - less) / (baseline - full) in perplexity, with the same sequences resampled in all three.

    None if there is no gap to close: the baseline is no worse than full.
    """
    if baseline.mean() <= full.mean():
        return None
    draws = _draws(len(full), seed)

    def share(parts: list[Nll]) -> Nll:
        a, b, c = (np.exp(x) for x in parts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((b - c) / (b - a))

    rows = [x.mean(1) for x in (full, baseline, less)]
    value = share([np.asarray(x.mean()) for x in rows])
    return _interval(float(value), share([x[draws].mean(1) for x in rows]), len(full))
