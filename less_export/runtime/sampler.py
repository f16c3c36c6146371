"""The tokens of many sequences at once: penalties, bias, processors, log probabilities, and the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, UsageError
from .sampling import (
    Logits,
    SamplingParams,
    block_maxima,
    floor_of_highest,
    not_finite,
    sample_all,
    tokens_above,
)

NOTHING_LEFT = "logit_bias or a logits processor leaves no token to choose"


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of a token, and the most likely tokens with theirs, the most likely one first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A chosen token; ``logprobs`` if the parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """How the tokens of one sequence are chosen, one after the other, and what it remembers of them.

    Args:
        params: how to choose.
        rng: what draws.
        prompt: tokens before the first choice, which the repetition penalty counts.

    ``count`` is the number of choices so far. What penalties need, if there are any, is in ``prompt``, ids in ascending
    order, and in ``counts``, how often each token was chosen.
    """

    def __init__(self, params: SamplingParams, rng: np.random.Generator, prompt: Iterable[int] = ()) -> None:
        self.params = params
        self.rng = rng
        self.prompt = np.unique(np.fromiter(prompt if params.repetition_penalty != 1 else (), np.int64))
        self.counts: Counter[int] = Counter()
        self.count = 0
        self._bias = (
            (np.fromiter(params.logit_bias, np.int64), np.fromiter(params.logit_bias.values(), np.float32))
            if params.logit_bias
            else None
        )
        penalties = (params.repetition_penalty - 1, params.presence_penalty, params.frequency_penalty)
        self.penalises = any(penalties)
        self._processors = [p.start() if hasattr(p, "start") else p for p in params.processors]
        self._listeners = [p.chosen for p in self._processors if hasattr(p, "chosen")]
        self.adjusts = bool(self.penalises or self._bias is not None or self._processors)

    def adjust(self, logits: Logits, token_ids: Sequence[int]) -> None:
        """Change the ``logits`` [V] of the token after ``token_ids``, the new ones so far, as the parameters ask.

        Raises:
            BackendError: the highest logit is NaN or infinite.
        """
        if not np.isfinite(peak := logits.max()):
            raise not_finite(peak)
        params = self.params
        if self.penalises:
            ids = np.fromiter(self.counts, np.int64)
            if params.repetition_penalty != 1:
                seen = np.concatenate((self.prompt, ids))  # a token that is there twice is written twice
                scores, penalty = logits[seen], np.float32(params.repetition_penalty)
                logits[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
            counts = np.fromiter(self.counts.values(), np.float32)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        for process in self._processors:
            replaced = process(token_ids, logits)
            if replaced is not None:
                logits[:] = replaced

    def chosen(self, token: int) -> None:
        """Remember a choice, and tell the processors that listen."""
        self.count += 1
        if self.penalises:
            self.counts[token] += 1
        for told in self._listeners:
            told(token)


class KeptLogits(Protocol):
    """Logits [B, V] that a backend keeps on its device, where they may be chosen from."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> KeptLogits: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]: ...

    def choose(self, samplers: Sequence[Sampler], token_ids: Sequence[Sequence[int]]) -> list[Choice | Exception]:
        """As :func:`less_export.runtime.sampler.choose_all`."""


def choose_all(
    logits: Logits | KeptLogits, samplers: Sequence[Sampler], token_ids: Sequence[Sequence[int]]
) -> list[Choice | Exception]:
    """The tokens after ``token_ids``, the new ones of each sequence so far, by the ``logits`` [B, V] of all of them.

    Returns:
        choices, or what went wrong with a sequence: BackendError if its highest logit is NaN or infinite, UsageError
        if no token is left to choose, or whatever a processor raised.
    """
    if not isinstance(logits, np.ndarray):
        return logits.choose(samplers, token_ids)
    errors = dict[int, Exception]()
    adjusted = logits.copy() if any(s.adjusts for s in samplers) else logits
    for row, sampler in enumerate(samplers):
        if sampler.adjusts:
            try:
                sampler.adjust(adjusted[row], token_ids[row])
            except Exception as error:  # of this row only, whatever a processor raises
                errors[row] = error
                adjusted[row] = np.nan  # nothing is drawn
    tokens = sample_all(adjusted, [s.params for s in samplers], [s.rng for s in samplers])
    results: list[Choice | Exception] = []
    for row, (token, sampler) in enumerate(zip(tokens, samplers, strict=True)):
        try:
            if row in errors:
                raise errors[row]
            if isinstance(token, BackendError):
                raise UsageError(NOTHING_LEFT) if sampler.adjusts else token
            sampler.chosen(token)
            results.append(Choice(token))
        except Exception as error:
            results.append(error)
    asked = {
        row: (choice.token_id, sampler.params.logprobs)
        for row, (choice, sampler) in enumerate(zip(results, samplers, strict=True))
        if isinstance(choice, Choice) and sampler.params.logprobs is not None
    }
    if asked:
        theirs = logits if len(asked) == len(logits) else logits[[*asked]]
        for row, report in zip(asked, token_logprobs(theirs, *zip(*asked.values(), strict=True)), strict=True):
            results[row] = Choice(asked[row][0], report)
    return results


def token_logprobs(logits: Logits, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of a token of each row of ``logits`` [B, V], and of the most likely tokens of the row.

    Args:
        tokens: a token of each row.
        counts: how many of the most likely tokens; the lowest ids among equally likely ones.
    """
    maxima = block_maxima(logits)
    peaks = maxima.max(1)
    sums = [np.exp(row - peak).sum(dtype=np.float64) for row, peak in zip(logits, peaks, strict=True)]
    totals = peaks + np.log(sums)
    reports = []
    for row, blocks, total, token, asked in zip(logits, maxima, totals, tokens, counts, strict=True):
        count = min(asked, len(row))
        likely = tokens_above(row, blocks, floor_of_highest(row, blocks, max(count, 1)))
        likely = likely[np.argsort(-row[likely], kind="stable")[:count]]
        top = tuple((int(i), float(row[i] - total)) for i in likely)
        reports.append(TokenLogprobs(float(row[token] - total), top))
    return reports
