"""Property tests of sampling, streamed text and stop strings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from less_export.errors import BackendError
from less_export.runtime.sampling import SamplingParams, sample
from less_export.runtime.stop_strings import StoppableText
from less_export.runtime.tokenizer import Tokenizer

from .test_text import KINDS, TEXT

# ------------------------------------------------------------------ sampling


class Draw:
    """A random generator with a known next number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


#: Multiples of 1/8 (so that ties are common), and -inf for forbidden tokens.
LOGITS = st.lists(st.one_of(st.integers(-30, 30).map(lambda n: n / 8), st.just(-math.inf)), min_size=1, max_size=12)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.3, 20),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)


def shares(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Probability of every token that may be drawn, by the definition: temperature, top k, top p."""
    peak = max(logits)
    weight = {i: math.exp((x - peak) / params.temperature) for i, x in enumerate(logits)}
    tokens = sorted(weight, key=lambda i: (-weight[i], i))[: params.top_k or None]
    total = math.fsum(weight[i] for i in tokens)
    nucleus: list[int] = []
    for token in tokens:
        reached = math.fsum(weight[i] for i in nucleus) / total
        assume(abs(reached - params.top_p) > 1e-9)  # otherwise rounding decides
        if reached < params.top_p or params.top_p == 1:
            nucleus.append(token)
    total = math.fsum(weight[i] for i in nucleus)
    return {i: weight[i] / total for i in nucleus if weight[i] / total > 1e-12}


@given(LOGITS, PARAMS)
@example([0.0] * 9, SamplingParams(temperature=1, top_k=4))
@example([-math.inf, 2.0, -math.inf], SamplingParams(temperature=20, top_k=2, top_p=0.9))
def test_sampled_shares(logits: list[float], params: SamplingParams) -> None:
    """Uniform numbers select each allowed token in proportion to its probability."""
    assume(max(logits) > -math.inf)
    want = shares(logits, params)
    values = np.array(logits, np.float32)
    order = [*want] if params.top_p < 1 or 0 < params.top_k < len(logits) else sorted(want)
    begin = 0.0
    for token in order:
        inside = want[token] * 1e-3
        for number in (begin + inside, begin + want[token] / 2, begin + want[token] - inside):
            assert sample(values, params, Draw(number)) == token
        begin += want[token]
    for number in (0.0, 1 - 2.0**-53):
        assert logits[sample(values, params, Draw(number))] > -math.inf
    event(f"{len(want)} of {len(logits)} tokens")


@given(LOGITS, PARAMS, st.integers(0, 2**63), st.integers(0, 7))
def test_sampling_is_repeatable(logits: list[float], params: SamplingParams, seed: int, row: int) -> None:
    assume(max(logits) > -math.inf)
    params = params.with_overrides(seed=seed)
    values = np.array(logits, np.float32)
    streams = [params.generator(row) for _ in range(2)]
    first, second = ([sample(values, params, rng) for _ in range(5)] for rng in streams)
    assert first == second


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), PARAMS, st.booleans(), st.floats(0, 1, exclude_max=True))
def test_any_logits_give_a_token_or_an_error(
    logits: list[float], params: SamplingParams, greedy: bool, number: float
) -> None:
    params = params.with_overrides(temperature=0) if greedy else params
    values = np.array(logits, np.float32)
    if not math.isfinite(values.max()):
        with pytest.raises(BackendError, match="logits") as caught:
            sample(values, params, Draw(number))
        assert "\n" not in str(caught.value)
        return
    token = sample(values, params, Draw(number))
    assert values[token] > -math.inf
    if greedy:
        assert token == min(i for i, x in enumerate(logits) if x == max(logits))


# ------------------------------------------------------------------ streamed text

TOKENIZERS = {kind: Tokenizer(make()) for kind, make in KINDS.items()}
#: Characters of one to four bytes, those of the tokenizers' merges often.
CHARACTERS = st.one_of(st.sampled_from(" theaor"), st.sampled_from(TEXT), st.characters(exclude_categories=["Cs"]))
TEXTS = st.text(CHARACTERS, max_size=30).filter(lambda text: "\ufffd" not in text)


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[Tokenizer, list[int], str]:
    """A tokenizer, tokens that may differ from its own choice, and their text."""
    kind = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer, text = TOKENIZERS[kind], draw(TEXTS)
    if kind == "byte-level":
        cuts = draw(st.sets(st.integers(1, 60)))
        letters = [tokenizer._tokenizer.id_to_token(i) for i in tokenizer.encode(text)]
        pieces = cut("".join(letters), cuts)  # a letter is a byte
        ids = [t.id for piece in pieces for t in tokenizer._tokenizer.model.tokenize(piece)]
    else:
        pieces = cut(tokenizer._tokenizer.normalizer.normalize_str(text), draw(st.sets(st.integers(1, 40))))
        ids = [t.id for piece in pieces for t in tokenizer._tokenizer.model.tokenize(piece)]
    for at in sorted(draw(st.sets(st.integers(0, 30), max_size=3)), reverse=True):
        if at <= len(ids):
            ids.insert(at, draw(st.sampled_from(sorted(tokenizer.special_texts))))
    return tokenizer, ids, text


def cut(text: str, at: set[int]) -> list[str]:
    ends = [*sorted(n for n in at if n < len(text)), len(text)]
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(split_texts(), st.integers(0, 30))
def test_streamed_text_is_the_decoded_text(split: tuple[Tokenizer, list[int], str], start: int) -> None:
    tokenizer, ids, text = split
    assert tokenizer.decode(ids) == text
    stream, so_far = tokenizer.stream(), ""
    for count, token in enumerate(ids, 1):
        so_far += stream.push(token)
        whole = tokenizer.decode(ids[:count])
        assert text.startswith(so_far)
        assert whole == so_far or "\ufffd" in whole  # nothing is held back unnecessarily
    assert so_far + stream.finish() == text
    # The same after a context, which may end anywhere but inside a character.
    head = tokenizer.decode(ids[:start])
    assume("\ufffd" not in head)
    stream = tokenizer.stream(ids[:start])
    assert head + "".join(map(stream.push, ids[start:])) + stream.finish() == text


@given(st.lists(st.integers(0, 400), max_size=30))
@example([256 + 3, 5, 400, 1])
def test_any_tokens_of_bytes_stream_as_they_decode(ids: list[int]) -> None:
    """Broken characters, special tokens and ids without a token included."""
    tokenizer = TOKENIZERS["byte-level"]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


# ------------------------------------------------------------------ stop strings


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """Text before the stop string that is complete first, the longest of several; None without one."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


def check_stop(tokenizer: Tokenizer, ids: Sequence[int], text: str, stop: Sequence[str]) -> None:
    """Streaming ends at the first token whose text holds a stop string, with the text before it."""
    want = before_stop(text, stop)
    row, got, done, used = StoppableText(tokenizer, [], tuple(stop)), "", False, 0
    while used < len(ids) and not done:
        piece, done = row.push(ids[used])
        got, used = got + piece, used + 1
        assert (text if want is None else want).startswith(got)  # nothing to take back
    if not done:
        got += row.finish()
    assert done == (want is not None)
    assert got == (text if want is None else want)
    if done:
        complete = (n for n in range(len(ids) + 1) if before_stop(tokenizer.decode(ids[:n]), stop) is not None)
        assert used == next(complete)
    event(f"stopped: {done}")


class Pieces(Tokenizer):
    """A tokenizer whose token i is a given piece of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.special_texts = {}

    def stream(self, context: Sequence[int] = ()) -> Pieces:  # type: ignore[override]
        return self

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


#: Two letters, so that stop strings overlap with the text, one another and themselves.
AB = st.text("ab", max_size=4)


@given(st.lists(AB, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_strings_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    check_stop(Pieces(pieces), range(len(pieces)), "".join(pieces), stop)


@given(split_texts(), st.data())
def test_stop_strings_in_tokens(split: tuple[Tokenizer, list[int], str], data: st.DataObject) -> None:
    """Stop strings from the text itself, and others; a token may hold the end of one, or part of a character."""
    tokenizer, ids, text = split
    inside = st.integers(0, max(len(text) - 1, 0)).flatmap(
        lambda a: st.integers(1, 6).map(lambda n: text[a : a + n] or "the")
    )
    stop = data.draw(st.lists(st.one_of(inside, st.sampled_from(["the", "\n", "é", "😀"])), min_size=1, max_size=3))
    check_stop(tokenizer, ids, text, stop)
