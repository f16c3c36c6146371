"""Items longer than a bundle takes: lm-evaluation-harness's own model, with the same limit, gives the same results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from less_export.errors import UsageError
from less_export.evaluation.harness import LessLM

from . import bundles

pytest_plugins = ["tests.bundles"]

#: Tokens that the bundle ``single`` takes.
LIMIT = 32
TEXT = bundles.PROMPT * 3


@pytest.fixture(scope="module")
def less(single: Path) -> LessLM:
    return LessLM(str(single))


@pytest.fixture(scope="module")
def own(source: Path) -> HFLM:
    """The harness's model of the same decoder: the first layer of ``source``."""
    model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=1).eval()
    return HFLM(pretrained=model, tokenizer=bundles.tokenizer(), max_length=LIMIT, batch_size=1, device="cpu")


def items(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_the_limit(less: LessLM, plain: Path) -> None:
    assert less.max_length == LIMIT
    assert less.max_gen_toks == 256
    assert LessLM(str(plain)).max_length is None


def test_loglikelihood(less: LessLM, own: HFLM) -> None:
    ids = less.tok_encode(TEXT)
    assert len(ids) > 3 * LIMIT
    lengths = [
        (1, 1),
        (LIMIT - 1, 2),
        (LIMIT, 1),
        (LIMIT, 2),
        (LIMIT + 1, 1),
        (60, 5),
        (40, LIMIT),
        (3, LIMIT),
        (1, LIMIT),
    ]
    pairs = [(None, ids[i : i + n], ids[i + n : i + n + m]) for i, (n, m) in enumerate(lengths)]
    with pytest.warns(UserWarning, match=r"5 of 9 items are longer than the 32 tokens that this bundle takes"):
        got = less._loglikelihood_tokens(pairs)
    want = own._loglikelihood_tokens(pairs, disable_tqdm=True)
    np.testing.assert_allclose([g for g, _ in got], [w for w, _ in want], rtol=1e-4)
    assert [g for _, g in got] == [w for _, w in want]


def test_loglikelihood_of_texts(less: LessLM, own: HFLM) -> None:
    requests = items("loglikelihood", (TEXT, " on a cat"), ("", " Alice was"), ("Once", " upon"))
    with pytest.warns(UserWarning, match="1 of 3 items"):
        got = less.loglikelihood(requests)
    want = own.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([g for g, _ in got], [w for w, _ in want], rtol=1e-4)


def test_rolling(less: LessLM, own: HFLM, recwarn: pytest.WarningsRecorder) -> None:
    ids = less.tok_encode(TEXT)
    decode = bundles.tokenizer().decode
    texts = [
        TEXT,
        bundles.PROMPT,
        "a",
        *(decode(ids[:n]) for n in (LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 2 * LIMIT + 1)),
    ]
    requests = items("loglikelihood_rolling", *((t,) for t in texts))
    got = less.loglikelihood_rolling(requests)
    np.testing.assert_allclose(got, own.loglikelihood_rolling(requests, disable_tqdm=True), rtol=1e-4)
    assert less.loglikelihood_rolling(items("loglikelihood_rolling", ("",))) == [0.0]
    assert not [w for w in recwarn if "bundle takes" in str(w.message)]


@pytest.mark.parametrize("count", [1, 8, LIMIT - 1])
def test_generation(count: int, less: LessLM, own: HFLM) -> None:
    contexts = [TEXT, bundles.PROMPT, "Once", bundles.tokenizer().decode(less.tok_encode(TEXT)[: LIMIT - count])]
    options = {"until": ["zzz"], "max_gen_toks": count, "do_sample": False}
    requests = items("generate_until", *((c, dict(options)) for c in contexts))
    with pytest.warns(UserWarning, match="items are longer"):
        got = less.generate_until(requests)
    assert got == own.generate_until(
        items("generate_until", *((c, dict(options)) for c in contexts)), disable_tqdm=True
    )


def test_other_names_of_the_limit(less: LessLM) -> None:
    def generated(**options: Any) -> int:
        (text,) = less.generate_until([SimpleNamespace(args=("Once", options))])
        return len(less.tok_encode(text))

    assert generated(max_new_tokens=4) == generated(max_tokens=4) == generated(max_completion_tokens=4) == 4
    assert generated(max_gen_toks=2, max_new_tokens=4, max_tokens=6) == 2
    assert generated(max_gen_toks=None, max_new_tokens=3) == 3


def test_what_cannot_be_cut_is_refused_first(less: LessLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(less._scorer.backend), "step", lambda *_: pytest.fail("an item ran"))
    long = less.tok_encode(TEXT)
    with pytest.raises(UsageError, match=r"^an item has 33 tokens to score, and this bundle takes 32: export with"):
        less._loglikelihood_tokens([(None, [1], [2]), (None, long, long[: LIMIT + 1])])
    for options in ({}, {"max_gen_toks": LIMIT}):
        requests = items("generate_until", ("Once", {"max_gen_toks": 2}), ("Once", options))
        with pytest.raises(UsageError, match=r"^a task generates up to (256|32) tokens, and this bundle takes 32 with"):
            less.generate_until(requests)


def test_an_evicting_bundle_takes_all(plain: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = LessLM(str(plain))
    long = bundles.PROMPT * 8
    assert len(model.tok_encode(long)) > bundles.CONTEXT
    whole, part = (model.loglikelihood_rolling(items("loglikelihood_rolling", (t,)))[0] for t in (long, TEXT))
    assert whole < part
    model.loglikelihood(items("loglikelihood", (long, " a cat")))
    model.generate_until(items("generate_until", (long, {"max_gen_toks": 2})))
    assert not [w for w in recwarn if "bundle takes" in str(w.message)]
