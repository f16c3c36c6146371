"""The kernel that chooses tokens against the sampler of the host, for the same drawn numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.errors import BackendError, UsageError
from less_export.native import sampler as device
from less_export.runtime.sampler import Choice, Sampler, choose_all
from less_export.runtime.sampling import SamplingParams

from . import sample_emulation as emulated
from .emulation import ORDERS
from .sample_emulation import picks, row_of

pytestmark = pytest.mark.slow

#: top_k, top_p and min_p.
CUTS = (
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (40, 0.9, 0.0),
    (1500, 1.0, 0.0),
    (1500, 0.7, 0.05),
    (10**9, 1.0, 0.0),
    (0, 1e-9, 0.0),
    (0, 0.5, 0.0),
    (0, 0.95, 0.0),
    (0, 1.0, 0.02),
    (0, 1.0, 1.0),
    (0, 0.9, 0.1),
    (50, 0.95, 0.01),
)
NUMBERS = (0.0, 0.3, 0.71, 1 - 2**-53)


class Draw:
    """A generator of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def by_host(
    logits: np.ndarray, params: SamplingParams, number: float, prompt: Sequence[int] = (), text: Sequence[int] = ()
) -> int:
    """The choice of the host; NO_CHOICE where it refuses."""
    chooser = Sampler(params, Draw(number), prompt)  # type: ignore[arg-type]
    for token in text:
        chooser.chosen(token)
    (choice,) = choose_all(logits[None], [chooser], [text])
    if isinstance(choice, BackendError | UsageError):
        return device.NO_CHOICE
    assert isinstance(choice, Choice), choice
    return choice.token_id


def row_of_kind(kind: str, size: int, seed: int) -> np.ndarray:
    """Logits: near one another, far apart, with many equal ones, with forbidden tokens, or all equal."""
    rng = np.random.default_rng((seed, size))
    logits = rng.standard_normal(size) * {"peaked": 8, "flat": 0.05}.get(kind, 2)
    if kind == "ties":
        logits = np.round(logits * 2) / 2
        logits[rng.random(size) < 0.1] = -0.0
    if kind == "masked":
        logits[rng.random(size) < 0.7] = -np.inf
        logits[size // 2] = 1
    return np.zeros(size, np.float32) if kind == "equal" else logits.astype(np.float32)


KINDS = ("wide", "peaked", "flat", "ties", "masked", "equal")


def requests() -> Iterator[SamplingParams]:
    for (top_k, top_p, min_p), temperature in zip(CUTS, itertools.cycle((1.0, 0.6)), strict=False):
        yield SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def compare(logits: np.ndarray, asked: Sequence[tuple[SamplingParams, float, int]], path: Path | None = None) -> None:
    """Parameters, number and row of logits."""
    got = picks(logits, [row_of(p, u, r) for p, u, r in asked], path=path)
    for token, (params, number, row) in zip(got, asked, strict=True):
        assert token == by_host(logits[row], params, number), (params, number, row)


def each_once(count: int, seed: int, path: Path | None = None) -> None:
    """Every request on ``count`` logits of every kind, with numbers that take turns."""
    logits = np.stack([row_of_kind(k, count, seed) for k in KINDS])
    turns = itertools.cycle(NUMBERS[:3] if count > 1000 else NUMBERS)
    compare(logits, [(p, next(turns), r) for p in requests() for r in range(len(KINDS))], path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_host_chooses_the_same(size: int, seed: int) -> None:
    each_once(size, seed)


def check_longer_than_the_list(path: Path | None = None) -> None:
    """More tokens than fit into the list of the kernel, and rows that are not asked for."""
    logits = np.stack([row_of_kind(k, 6000, 11) for k in ("wide", "flat", "equal")])
    cuts: list[dict[str, Any]] = [{"top_p": 0.95}, {"top_k": 5000}, {"min_p": 0.5}, {"top_k": 9}, {"top_p": 0.02}]
    compare(logits, [(SamplingParams(temperature=1.0, **c), 0.77, r) for c in cuts for r in (2, 1)], path)


def test_more_tokens_than_the_list_holds() -> None:
    check_longer_than_the_list()


def test_a_vocabulary_of_32_000() -> None:
    logits = np.stack([row_of_kind(k, 32_000, 2) for k in KINDS])
    every = [(p, u, r) for p in requests() for u, r in zip((0.2, 0.5, 0.9), (0, 1, 3), strict=True)]
    some = [(p, 0.4, r) for p in [*requests()][::4] for r in (2, 4, 5)]
    compare(logits, every + some)


def test_a_vocabulary_of_262_144() -> None:
    logits = row_of_kind("wide", 262_144, 3)[None]
    cuts: list[dict[str, Any]] = [{}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.05}]
    compare(logits, [(SamplingParams(temperature=1.0, **c), 0.37, 0) for c in cuts])


def check_edges(kind: str, path: Path | None = None) -> None:
    """A number just inside of either end of a token's share gives that token."""
    logits = row_of_kind(kind, 300, 4)
    asked = []
    for params in (SamplingParams(temperature=1.3), SamplingParams(temperature=1.3, top_k=200, top_p=0.98)):
        weight = np.exp((logits.astype(float) - logits.max()) / 1.3)
        order = np.arange(300)
        if params.top_k:
            order = np.argsort(-logits, kind="stable")[:200]
            share = np.cumsum(weight[order]) / weight[order].sum()
            order = order[: int((share < 0.98).sum()) + 1]
        ends = np.cumsum(weight[order]) / weight[order].sum()
        for place in range(0, len(order), 23):
            begin = ends[place - 1] if place else 0.0
            for number in (begin + 1e-9, ends[place] - 1e-9):
                asked.append((params, number, 0))
                assert by_host(logits, params, number) == order[place]
    compare(logits[None], asked, path)


@pytest.mark.parametrize("kind", ["wide", "ties"])
def test_edges_of_every_token(kind: str) -> None:
    check_edges(kind)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-30, 0.01, 30.0, 1e9, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.stack([row_of_kind(k, 70, 5) for k in KINDS] + [np.linspace(-3e38, 3e38, 70, dtype=np.float32)])
    cuts: list[dict[str, Any]] = [{}, {"top_k": 9}, {"top_p": 0.4}, {"min_p": 0.5}]
    asked = [
        (SamplingParams(temperature=temperature, **c), u, r)
        for c in cuts
        for r, u in enumerate((0.1, 0.83, 0.4, 0.6, 0.9, 0.3, 0.5))
    ]
    compare(logits, asked)


def check_greedy(path: Path | None = None) -> None:
    logits = row_of_kind("ties", 5000, 6)
    logits[[4000, 17, 1041, 4999]] = 100
    zeros = np.full((2, 40), -1, np.float32)
    zeros[0, [9, 30]], zeros[1, [9, 30]] = (0.0, -0.0), (-0.0, 0.0)
    greedy = row_of(SamplingParams(), 0, 0)
    assert picks(logits[None], [greedy], path=path) == [17]
    assert picks(zeros, [greedy, row_of(SamplingParams(), 0, 1)], path=path) == [9, 9]


def test_greedy_is_the_first_of_the_highest() -> None:
    check_greedy()


def check_no_choice(params: SamplingParams, path: Path | None = None) -> None:
    logits = np.zeros((6, 2000), np.float32)
    logits[0, 1999], logits[1, 3], logits[2, 1030], logits[3] = np.nan, np.inf, -np.nan, -np.inf
    logits[4, :-1] = -np.inf
    got = picks(logits, [row_of(params, 0.5, r) for r in range(6)], path=path)
    assert got == [by_host(x, params, 0.5) for x in logits]
    assert [t == device.NO_CHOICE for t in got] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("cut", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_what_is_no_number_is_no_choice(cut: dict[str, Any]) -> None:
    check_no_choice(SamplingParams(**cut))


def check_penalties(temperature: float, path: Path | None = None) -> None:
    """Of several rows with histories of their own, over a few tokens; the kernel counts its choices."""
    size, rng = 50, np.random.default_rng(7)
    named: list[dict[str, float]] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4},
        {"repetition_penalty": 0.7, "presence_penalty": -0.3, "frequency_penalty": 0.123},
        {},
    ]
    all_params = [SamplingParams(temperature=temperature, top_k=20, **n) for n in named]
    prompts = [rng.integers(0, size, 12).tolist() for _ in all_params]
    texts: list[list[int]] = [[] for _ in all_params]
    histories = np.zeros((7, size), np.uint32)
    histories[5:] = 0x7FFFFFFF
    for row, prompt in enumerate(prompts):
        histories[row, prompt] = device.PROMPT
    for _ in range(8):
        logits = rng.standard_normal((5, size)).astype(np.float32)
        numbers = rng.random(5)
        rows = [
            row_of(p, u, r, r if n else -1) for r, (p, u, n) in enumerate(zip(all_params, numbers, named, strict=True))
        ]
        for row, token in enumerate(picks(logits, rows, histories, path)):
            assert token == by_host(logits[row], all_params[row], numbers[row], prompts[row], texts[row])
            texts[row].append(token)
    for row, text in enumerate(texts[:4]):
        assert [int(x) & 0x7FFFFFFF for x in histories[row]] == [text.count(t) for t in range(size)]
    assert (histories[5:] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties(temperature: float) -> None:
    check_penalties(temperature)


def test_a_choice_does_not_depend_on_the_others() -> None:
    logits = np.stack([row_of_kind(k, 3000, 8) for k in KINDS])
    rows = [row_of(p, 0.6, r) for p in [*requests()][::4] for r in range(len(KINDS))]
    together = picks(logits, rows)
    assert [picks(logits, [r])[0] for r in rows[::4]] == together[::4]
    assert picks(logits, rows[::-1]) == together[::-1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_choice_does_not_depend_on_the_order_of_threads(order: int) -> None:
    logits = np.stack([row_of_kind(k, 3000, 9) for k in KINDS])
    rows = [row_of(p, u, r) for p in [*requests()][::5] for r, u in enumerate((0.1, 0.5, 0.7, 0.9, 0.2, 0.4))]
    want = picks(logits, rows)
    emulated.set_order(order)
    try:
        assert picks(logits, rows) == want
    finally:
        emulated.set_order(0)


def test_the_distribution() -> None:
    """Chi-square of 500 choices among 8 tokens: 24.3 is its 0.1% point for 7 degrees of freedom."""
    logits = np.array([[0.0, 1.0, 2.0, 1.5, 0.5, -1.0, 2.0, 0.2]], np.float32)
    rng, counts = np.random.default_rng(10), 500

    def distance(temperature: float) -> float:
        params = SamplingParams(temperature=temperature)
        got = Counter(picks(logits, [row_of(params, u, 0) for u in rng.random(counts)]))
        share = np.exp(logits[0] / 0.8)
        want = counts * share / share.sum()
        return float(sum((got[i] - w) ** 2 / w for i, w in enumerate(want)))

    assert distance(0.8) < 24.3
    assert distance(1.5) > 50
