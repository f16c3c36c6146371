"""Log probabilities of given continuations, where what contexts share is fed once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..runtime.feeding import feed
from ..runtime.generate import Generator
from ..runtime.row_state import RowState

Context = tuple[int, ...]


@dataclass(eq=False)
class _Continuation:
    """A continuation as far as it was scored: ``scored`` of its tokens."""

    tokens: list[int]
    total: float = 0.0
    greedy: bool = True
    scored: int = 0

    @property
    def ended(self) -> bool:
        return self.scored >= len(self.tokens)

    def add(self, logits: npt.NDArray[np.float32]) -> None:
        """Score the next token by logits [V], if there is one."""
        if self.ended:
            return
        scores, token = logits.astype(np.float64), self.tokens[self.scored]
        peak = scores.max()
        self.total += float(scores[token] - peak - np.log(np.exp(scores - peak).sum()))
        self.greedy &= int(scores.argmax()) == token
        self.scored += 1


class Scorer(Generator):
    """Scores given continuations through the same steps that generate them."""

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log probability, and whether greedy decoding produces it.

        A context of several pairs is fed once, and so are the full chunks that all contexts begin with: a context is
        cut as if it was fed alone, so what its row evicts is the same. Besides the backend's rows, there are at most as
        many states as rows, and one of the beginning.
        """
        continuations = [_Continuation(list(tokens)) for _, tokens in pairs]
        by_context: dict[Context, list[_Continuation]] = {}
        for (context, _), continuation in zip(pairs, continuations, strict=True):
            by_context.setdefault(tuple(context), []).append(continuation)
        contexts = sorted(by_context, key=len, reverse=True)  # rows of a batch end together
        size = self.backend.contract.max_batch
        with self.backend.exclusive():
            shared = _shared(contexts, self.backend.contract.chunk)
            prefix = self._fed(contexts[0][:shared]) if shared else None
            for begin in range(0, len(contexts), size):
                batch = contexts[begin : begin + size]
                self._score([c[shared:] for c in batch], prefix, [by_context[c] for c in batch])
        return [(c.total, c.greedy) for c in continuations]

    def _fed(self, tokens: Context) -> RowState:
        """The state after ``tokens``."""
        self._start(1, None)
        self._prefill([list(tokens)])
        return self.backend.read_row(0)

    def _score(
        self, contexts: list[Context], prefix: RowState | None, continuations: list[list[_Continuation]]
    ) -> None:
        """Score the continuations of each context, which come after ``prefix``."""
        self._start(len(contexts), prefix)
        logits = self._prefill([list(c) for c in contexts])
        in_place: dict[int, _Continuation] = {}
        others: list[tuple[RowState, _Continuation]] = []
        for row, own in enumerate(continuations):
            for continuation in own:
                continuation.add(logits[row])
            left = sorted((c for c in own if not c.ended), key=lambda c: len(c.tokens), reverse=True)
            if left:
                in_place[row] = left[0]
            if len(left) > 1:
                state = self.backend.read_row(row)
                others += [(state, c) for c in left[1:]]
        self._follow(in_place)
        others.sort(key=lambda pair: len(pair[1].tokens), reverse=True)
        for begin in range(0, len(others), len(contexts)):
            rows = others[begin : begin + len(contexts)]
            for row, (state, _) in enumerate(rows):
                self.backend.write_row(row, state)
            self._follow({row: continuation for row, (_, continuation) in enumerate(rows)})

    def _follow(self, rows: dict[int, _Continuation]) -> None:
        """Feed and score what is left of the continuations, by row."""
        while rows := {row: c for row, c in rows.items() if not c.ended}:
            first, end = min(rows), max(rows) + 1
            pieces = [rows[row].tokens[rows[row].scored - 1 :][:1] if row in rows else [] for row in range(first, end)]
            logits = np.asarray(feed(self.backend, pieces, slice(first, end)))
            for row, continuation in rows.items():
                continuation.add(logits[row - first])


def _shared(contexts: Collection[Context], chunk: int) -> int:
    """How many tokens, a multiple of ``chunk``, several contexts begin with; each has at least one more, as its logits
    are needed."""
    if len(contexts) < 2:
        return 0
    first, last = min(contexts), max(contexts)  # what these share, those between them in the order share too
    most = min(map(len, contexts)) - 1
    common = next((i for i in range(most) if first[i] != last[i]), most)
    return max(common, 0) // chunk * chunk
