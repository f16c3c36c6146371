"""Penalties, bias, min-p, processors and log probabilities, against their definitions in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_export.errors import BackendError, UsageError
from less_export.runtime.generate import Generator
from less_export.runtime.sampler import Choice, Sampler, choose_all, token_logprobs
from less_export.runtime.sampling import SamplingParams, sample

from .test_generate import VOCAB, HashBackend, after, contract, expected, ids, scores, scripted

RNG = np.random.default_rng(0)


def choose(logits: Sequence[float], prompt: Sequence[int] = (), tokens: Sequence[int] = (), **params: Any) -> int:
    """The greedy choice after ``tokens``, which the same sampler chose before."""
    sampler = Sampler(SamplingParams(**params), RNG, prompt)
    for at, token in enumerate(tokens):
        forced = np.full(len(logits), -1e9, np.float32)
        forced[token] = 1e9
        assert next_token(sampler, forced, tokens[:at]) == token
    return next_token(sampler, np.array(logits, np.float32), tokens)


def next_token(sampler: Sampler, logits: np.ndarray, tokens: Sequence[int]) -> int:
    """The choice of one sequence alone."""
    (choice,) = choose_all(logits[None], [sampler], [tokens])
    assert isinstance(choice, Choice), choice
    return choice.token_id


def adjusted(logits: Sequence[float], prompt: Sequence[int], tokens: Sequence[int], p: SamplingParams) -> list[float]:
    """The definition: repetition over prompt and text; presence and frequency over the text; bias."""
    out = []
    for token, x in enumerate(logits):
        if token in {*prompt, *tokens}:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        count = list(tokens).count(token)
        x -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        out.append(x + (p.logit_bias or {}).get(token, 0))
    return out


@given(
    logits=st.lists(st.integers(-24, 24).map(lambda n: n / 4), min_size=5, max_size=5),
    prompt=st.lists(st.integers(0, 4), max_size=4),
    tokens=st.lists(st.integers(0, 4), max_size=5),
    penalties=st.tuples(*(st.sampled_from(x) for x in ([1.0, 2.0, 0.5], [0.0, 1.0, -2.0], [0.0, 0.5]))),
    bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-100, 1.5, 3])),
)
def test_adjustments(
    logits: list[float], prompt: list[int], tokens: list[int], penalties: tuple[float, ...], bias: dict[int, float]
) -> None:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    params = dict(zip(names, penalties, strict=True), logit_bias=bias)
    want = adjusted(logits, prompt, tokens, SamplingParams(**params))
    assert choose(logits, prompt, tokens, **params) == want.index(max(want))  # quarters: exact in float32


@pytest.mark.parametrize(("min_p", "allowed"), [(0.0, {0, 1, 2, 3}), (0.3, {0, 1, 2}), (0.6, {0, 1}), (1.0, {0})])
def test_min_p(min_p: float, allowed: set[int]) -> None:
    logits, rng = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32)), np.random.default_rng(1)
    params = SamplingParams(temperature=1.0, min_p=min_p)
    assert {sample(logits, params, rng) for _ in range(300)} == allowed
    params = SamplingParams(temperature=1.0, top_k=3, min_p=min_p)
    assert {sample(logits, params, rng) for _ in range(300)} == allowed & {0, 1, 2}


@pytest.mark.parametrize("size", [700, 5000, 50_000])
@pytest.mark.parametrize("kind", ["wide", "peaked", "ties"])
def test_large_vocabularies_are_cut_exactly(size: int, kind: str) -> None:
    """Shortcuts for large vocabularies leave the tokens that sorting all of them leaves."""
    rng = np.random.default_rng(size)
    logits = (rng.standard_normal(size) * (8 if kind == "peaked" else 1)).astype(np.float32)
    logits = np.round(logits * 2) / 2 if kind == "ties" else logits
    order = np.argsort(-logits, kind="stable")
    weight = np.exp(logits.astype(float) - float(logits.max()))
    cuts = ((5, 1.0, 0.0), (170, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.95, 0.0), (90, 0.8, 0.0))
    for top_k, top_p, min_p in (*cuts, (0, 1.0, 0.0), (0, 1.0, 0.01), (0, 0.95, 0.01), (170, 0.95, 0.2)):
        kept = order[: top_k or None]
        share = np.cumsum(weight[kept]) / weight[kept].sum()
        kept = kept[: int((share < top_p - 1e-12).sum()) + 1]
        kept = kept[weight[kept] >= min_p * weight.max()]
        if not top_k and top_p == 1:
            kept = np.sort(kept)
        params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
        total = np.cumsum(weight[kept])
        likely = np.flatnonzero(weight[kept] > 1e-9 * total[-1])  # of others, rounding decides
        for place in likely[[0, len(likely) // 2, -1]]:

            class Draw:
                def random(self, number: float = float((total[place] - weight[kept[place]] / 2) / total[-1])) -> float:
                    return number

            assert sample(logits, params, Draw()) == kept[place], (params, place)  # type: ignore[arg-type]


#: What a row may ask for; the sizes of vocabularies are below and above the blocks and tiles of the sampler.
REQUESTS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.01, 0.7, 1.0, 30.0]),
        "top_k": st.sampled_from([0, 0, 1, 7, 200, 30_000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.001, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "logit_bias": st.one_of(st.none(), st.dictionaries(st.integers(0, 4), st.sampled_from([-5.0, 2.5]))),
        "logprobs": st.sampled_from([None, None, 0, 3, 100]),
        "seed": st.integers(0, 2**40),
    }
)


@given(
    size=st.sampled_from([5, 700, 40_000]),
    rows=st.lists(st.tuples(REQUESTS, st.sampled_from(["wide", "flat", "ties", "masked", "broken"])), min_size=1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_a_row_gets_what_it_gets_alone(size: int, rows: list[tuple[dict[str, Any], str]], seed: int) -> None:
    """Whatever the other rows ask for: tokens, log probabilities to the last bit, and errors."""
    noise = np.random.default_rng(seed)
    batch, alone = ([Sampler(p := SamplingParams(**r), p.generator(0), [0, 3]) for r, _ in rows] for _ in range(2))
    texts: list[list[int]] = [[] for _ in rows]
    for _ in range(3):
        logits = noise.standard_normal((len(rows), size)).astype(np.float32)
        for values, (_, kind) in zip(logits, rows, strict=True):
            values *= {"flat": 0.1, "wide": 6}.get(kind, 2)
            if kind == "ties":
                values[:] = np.round(values)
            if kind == "masked":
                values[noise.random(size) < 0.7] = -np.inf
                values[1] = 0
            if kind == "broken":
                values[size // 2] = np.nan
        before = logits.copy()
        together = choose_all(logits, batch, texts)
        assert np.array_equal(logits, before, equal_nan=True)
        for row, choice in enumerate(together):
            (want,) = choose_all(logits[row : row + 1], [alone[row]], [texts[row]])
            if isinstance(choice, Exception):
                assert (type(choice), str(choice)) == (type(want), str(want))
                assert isinstance(choice, BackendError) == (rows[row][1] == "broken")
                continue
            assert choice == want
            assert logits[row, choice.token_id] > -np.inf
            texts[row].append(choice.token_id)


def test_log_probabilities() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0], np.float32)
    total = math.log(sum(math.exp(x) for x in (1, 3, 2)))
    got, none, every = token_logprobs(np.stack([logits] * 3), [3, 1, 1], [3, 0, 99])
    assert got.logprob == pytest.approx(2 - total)
    assert [i for i, _ in got.top] == [1, 3, 0]
    assert [p for _, p in got.top] == pytest.approx([3 - total, 2 - total, 1 - total])
    assert none.top == ()
    assert [i for i, _ in every.top] == [1, 3, 0, 2]


def test_log_probabilities_of_a_generation() -> None:
    """They are the model's own, whatever penalties and temperature do to the choice."""
    prompt = [1, 2, 3]
    (result,) = Generator(HashBackend(contract())).generate(
        [prompt], max_new_tokens=4, logprobs=2, temperature=2.0, seed=1, frequency_penalty=5.0
    )
    assert result.logprobs is not None
    hashed = 0
    for token in prompt:
        hashed = after(hashed, token)
    for token, reported in zip(result.token_ids, result.logprobs, strict=True):
        logits = scores(hashed).astype(float)
        table = logits - math.log(np.exp(logits).sum())
        assert reported.logprob == pytest.approx(table[token], abs=1e-5)
        assert [i for i, _ in reported.top] == np.argsort(-table)[:2].tolist()
        hashed = after(hashed, token)
    assert Generator(HashBackend(contract())).generate([prompt], max_new_tokens=1)[0].logprobs is None


def test_processors_see_the_tokens_and_decide() -> None:
    seen: list[list[int]] = []

    def only(token_ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append(list(token_ids))
        allowed = np.full_like(logits, -np.inf)
        allowed[len(token_ids)] = 0
        return allowed

    def forbid(token_ids: Sequence[int], logits: np.ndarray) -> None:
        logits[expected([5], 1)[0]] = -np.inf

    generator = Generator(HashBackend(contract()))
    assert generator.generate([[5]], max_new_tokens=3, processors=[only])[0].token_ids == (0, 1, 2)
    assert seen == [[], [0], [0, 1]]
    second = int(np.argsort(-scores(after(0, 5)))[1])
    assert generator.generate([[5]], max_new_tokens=1, processors=(forbid,))[0].token_ids == (second,)
    assert generator.generate([[5]], max_new_tokens=1)[0].token_ids == expected([5], 1)


def test_what_goes_wrong_in_a_row_stays_there() -> None:
    def fail(token_ids: Sequence[int], logits: np.ndarray) -> None:
        raise ZeroDivisionError

    rows: list[dict[str, Any]] = [
        {},
        {"processors": [fail]},
        {"processors": [lambda t, x: x - np.inf]},
        {"temperature": 1.0, "seed": 1},
    ]
    logits = np.zeros((5, 4), np.float32)
    logits[:, 2] = 1
    logits[4, 1] = np.nan
    samplers = [Sampler(SamplingParams(**p), np.random.default_rng(1)) for p in [*rows, {}]]
    first, raised, empty, drawn, broken = choose_all(logits, samplers, [[]] * 5)
    assert first.token_id == 2  # type: ignore[union-attr]
    assert isinstance(raised, ZeroDivisionError)
    assert isinstance(empty, UsageError)
    assert drawn.token_id == sample(logits[3], SamplingParams(temperature=1.0), np.random.default_rng(1))  # type: ignore[union-attr]
    assert isinstance(broken, BackendError)
    plain = choose_all(logits[[0, 4]], [samplers[0], samplers[4]], [[], []])
    assert plain[0].token_id == 2  # type: ignore[union-attr]
    assert isinstance(plain[1], BackendError)


def test_stop_token_ids() -> None:
    (result,) = scripted(ids("abcd")).generate([[0]], stop_token_ids=ids("c"))
    assert (result.text, result.finish_reason, result.token_ids) == ("ab", "stop", tuple(ids("abc")))
    (result,) = scripted(ids("abcd")).generate([[0]], stop_token_ids=ids("c"), ignore_eos=True, max_new_tokens=2)
    assert (result.text, result.finish_reason) == ("ab", "length")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_p": 1.5}, "min_p must lie in"),
        ({"repetition_penalty": 0}, "repetition_penalty must lie in"),
        ({"presence_penalty": "x"}, "presence_penalty must be a number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a number"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must map token ids"),
        ({"logit_bias": {1: 1e39}}, "logit_bias must map token ids"),
        ({"presence_penalty": 10**40}, "presence_penalty must be a number"),
        ({"logit_bias": [1]}, "logit_bias must map token ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "must lie in 0..39"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be a list"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
        ({"stop_token_ids": [-1]}, "must lie in 0..39"),
        ({"logprobs": 101}, r"logprobs must be a whole number in 0\.\.100"),
        ({"logprobs": True}, "logprobs must be"),
        ({"processors": [3]}, "processors must be a list of functions"),
    ],
)
def test_impossible_options(options: dict[str, Any], match: str) -> None:
    backend = HashBackend(contract())
    with pytest.raises(UsageError, match=match):
        Generator(backend).generate([[1]], **options)
    assert backend.calls == []
