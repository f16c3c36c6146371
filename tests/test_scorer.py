"""Scores of continuations: what contexts share is fed once, and each pair gets what it gets alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export import open_bundle
from less_export.evaluation.scorer import Scorer
from less_export.runtime.backend import Backend

from . import bundles
from .marks import slow_but
from .sharing import once

pytest_plugins = ["tests.bundles"]

CHUNK = 4
#: Slots are 12 of 256 unless all are kept: every context evicts.
CACHES: dict[str, dict[str, Any]] = {
    "less": {"kernels": None},
    "sink": {"policy": "sink"},
    "full": {"policy": "full", "context": 96},
}
Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", params=slow_but(CACHES, "less"))
def exported(request: pytest.FixtureRequest, source: Path, kernel_file: Path, shared: Path) -> Path:
    options = {**CACHES[request.param], "chunk": CHUNK, "max_batch": 3}
    if "kernels" in options:
        options["kernels"] = kernel_file
    return once(shared / f"scorer-{request.param}", lambda path: bundles.bundle(source, path, **options))


@pytest.fixture(params=[1, 3])
def scorer(request: pytest.FixtureRequest, exported: Path) -> Iterator[Scorer]:
    backend = open_bundle(exported, threads=1).backend
    backend.contract = dataclasses.replace(backend.contract, max_batch=request.param)
    with backend:
        yield Scorer(backend)


def words(seed: int, *lengths: int) -> list[list[int]]:
    return [np.random.default_rng([seed, n]).integers(2, 290, size).tolist() for n, size in enumerate(lengths)]


def alone(backend: Backend, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """In one row: the context in full chunks and a remainder, then token by token."""
    backend.open(1)
    cut = [context[i : i + CHUNK] for i in range(0, len(context), CHUNK)]
    logits = [backend.step([piece])[0, 0] for piece in cut][-1]
    total, greedy = 0.0, True
    for token, after in zip(continuation, [*continuation[1:], None], strict=True):
        values = logits.astype(np.float64)
        total += values[token] - np.logaddexp.reduce(values)
        greedy &= int(values.argmax()) == token
        if after is not None:
            logits = backend.step([[token]])[0, 0]
    return total, greedy


def same(scorer: Scorer, pairs: Pairs) -> None:
    got, want = scorer.score(pairs), [alone(scorer.backend, *pair) for pair in pairs]
    np.testing.assert_allclose([g for g, _ in got], [w for w, _ in want], rtol=1e-5)
    assert [g for _, g in got] == [w for _, w in want]


def fed(scorer: Scorer, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens that scoring the pairs feeds."""
    counts, step = [], scorer.backend.step

    def counted(ids: Any, new: Any = None, rows: slice | None = None) -> Any:
        counts.append(int(np.sum(new)))
        return step(ids, new, rows)

    with monkeypatch.context() as patch:
        patch.setattr(scorer.backend, "step", counted)
        scorer.score(pairs)
    return sum(counts)


def items(begin: list[int], seed: int = 1) -> Pairs:
    """Four items that begin alike, with two, three, one and four choices of different lengths, in mixed order."""
    contexts = [begin + rest for rest in words(seed, 9, 2, 17, 6)]
    lengths = ((1, 5), (3, 3, 1), (4,), (2, 6, 1, 4))
    pairs = [(context, choice) for context, sizes in zip(contexts, lengths, strict=True) for choice in words(7, *sizes)]
    return [pairs[i] for i in (3, 0, 7, 5, 1, 9, 2, 4, 8, 6)]


@pytest.mark.parametrize("length", [0, 3, 8, 26])
def test_scores_are_those_of_each_pair_alone(length: int, scorer: Scorer) -> None:
    same(scorer, items(words(3, length)[0]))


def test_contexts_that_begin_with_one_another(scorer: Scorer) -> None:
    """The shortest is a multiple of the chunk long: its last chunk is fed for its logits."""
    begin, more, choice = words(4, 16, 7, 3)
    same(scorer, [(begin, choice), (begin + more, choice), (begin + more[:4], choice[:1])])


def test_greedy_choices_are_found(scorer: Scorer) -> None:
    (context,) = words(5, 21)
    (answer,) = scorer.generate([context], max_new_tokens=4)
    best = list(answer.token_ids)
    pairs = [(context, best), (context, [*best[:3], best[3] ^ 1]), (context, best[:2])]
    assert [greedy for _, greedy in scorer.score(pairs)] == [True, False, True]
    same(scorer, pairs)


def test_small_calls(scorer: Scorer) -> None:
    (context, choice) = words(6, 9, 3)
    assert scorer.score([]) == []
    assert scorer.score([(context, [])]) == [(0.0, True)]
    same(scorer, [(context, choice)])
    same(scorer, [(context, choice)] * 5)


def test_what_is_shared_is_fed_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    (begin,) = words(3, 26)
    pairs = items(begin)
    shared = 24  # full chunks of what all begin with
    contexts = {tuple(context) for context, _ in pairs}
    want = shared + sum(len(c) - shared for c in contexts) + sum(len(choice) - 1 for _, choice in pairs)
    assert fed(scorer, pairs, monkeypatch) == want
    one = [(c, choice) for c, choice in pairs if c == pairs[0][0]]
    assert len(one) > 1
    assert fed(scorer, one, monkeypatch) == len(one[0][0]) + sum(len(choice) - 1 for _, choice in one)


def test_the_harness_order_and_memory(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are read only of contexts with several choices to feed: none where choices have one token."""
    contexts = words(8, 9, 5, 13)
    pairs = [(c, [token]) for token in (5, 9) for c in contexts]
    want = [alone(scorer.backend, *pair)[0] for pair in pairs]
    monkeypatch.setattr(scorer.backend, "read_row", lambda _: pytest.fail("a state was read"))
    np.testing.assert_allclose([g for g, _ in scorer.score(pairs)], want, rtol=1e-5)
