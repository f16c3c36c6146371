"""The tokens of many sequences at once: penalties, bias, processors, log probabilities, and the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, UsageError
from .sampling import SamplingParams, require_finite, sample

Logits = npt.NDArray[np.float32]


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
    """Chooses the tokens of one sequence, one after the other.

    Args:
        params: how to choose.
        rng: what draws.
        prompt: tokens before the first choice, which the repetition penalty counts.
    """

    def __init__(self, params: SamplingParams, rng: np.random.Generator, prompt: Iterable[int] = ()) -> None:
        self._params = params
        self._rng = rng
        self._prompt = np.unique(np.fromiter(prompt, np.int64)) if params.repetition_penalty != 1 else None
        self._counts: Counter[int] = Counter()
        self._bias = (
            (np.fromiter(params.logit_bias, np.int64), np.fromiter(params.logit_bias.values(), np.float32))
            if params.logit_bias
            else None
        )
        self._penalises = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._processors = [p.start() if hasattr(p, "start") else p for p in params.processors]
        self._listeners = [p.chosen for p in self._processors if hasattr(p, "chosen")]
        self.adjusts = bool(self._penalises or self._bias is not None or self._processors)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the choice is the highest logit and nothing else is asked."""
        return self._params.temperature == 0 and not self.adjusts and self._params.logprobs is None

    def choose(self, logits: Logits, token_ids: Sequence[int]) -> Choice:
        """The token after ``token_ids``, the new ones so far, by its ``logits`` [V].

        Raises:
            BackendError: the highest logit is NaN or infinite. UsageError: no token is left to choose.
        """
        require_finite(logits.max())
        adjusted = self._adjusted(logits, token_ids) if self.adjusts else logits
        token = sample(adjusted, self._params, self._rng)
        if self._penalises:
            self._counts[token] += 1
        for told in self._listeners:
            told(token)
        asked = self._params.logprobs
        return Choice(token, None if asked is None else token_logprobs(logits, token, asked))

    def _adjusted(self, logits: Logits, token_ids: Sequence[int]) -> Logits:
        logits, params = logits.copy(), self._params
        if self._penalises:
            ids = np.fromiter(self._counts, np.int64)
            if self._prompt is not None:
                seen = np.union1d(self._prompt, ids)
                scores, penalty = logits[seen], np.float32(params.repetition_penalty)
                logits[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if self._bias is not None:
            logits[self._bias[0]] += self._bias[1]
        for process in self._processors:
            replaced = process(token_ids, logits)
            logits = logits if replaced is None else np.asarray(replaced, np.float32)
        if not np.isfinite(logits.max()):
            raise UsageError("logit_bias or a logits processor leaves no token to choose")
        return logits


def choose_all(
    logits: Logits, samplers: Sequence[Sampler], token_ids: Sequence[Sequence[int]]
) -> list[Choice | Exception]:
    """The next tokens of all sequences by their logits [B, V], or what went wrong with one of them."""
    if all(s.is_plain_greedy for s in samplers):
        tokens = logits.argmax(1)
        peaks = logits[np.arange(len(logits)), tokens]  # NaN where there is one
        return [_choice_or_error(int(t), p) for t, p in zip(tokens, peaks, strict=True)]
    results: list[Choice | Exception] = []
    for row, sampler, ids in zip(logits, samplers, token_ids, strict=True):
        try:
            results.append(sampler.choose(row, ids))
        except Exception as error:  # of this row only, whatever a processor raises
            results.append(error)
    return results


def token_logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Log probabilities of ``token`` and of the ``count`` most likely tokens by ``logits`` [V]."""
    peak = logits.max()
    total = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    count = min(count, len(logits))
    likely = np.argpartition(logits, -count)[-count:] if count else np.zeros(0, np.int64)
    likely = likely[np.lexsort((likely, -logits[likely]))]
    return TokenLogprobs(float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in likely))


def _choice_or_error(token: int, peak: np.float32) -> Choice | Exception:
    try:
        require_finite(peak)
    except BackendError as error:
        return error
    return Choice(token)
