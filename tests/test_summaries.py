"""Summaries of every cache, their scores, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from less_export import open_bundle
from less_export.evaluation import summarize

from . import bundles
from .bundles import HEADS, Run, refused
from .test_evaluation import PLAIN_OPTIONS

pytest_plugins = ["tests.bundles"]


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    file = tmp_path / "s.jsonl"
    items = [{"text": bundles.PROMPT, "summary": "a cat sat"}, {"text": "Once upon a time", "summary": "time"}]
    file.write_text("\n".join(map(json.dumps, items)))
    return file


def summaries(run: Run, target: Path, articles: Path, *arguments: object) -> dict[str, Any]:
    """Rows by cache, with eight tokens for each item."""
    out = articles.parent / "s.json"
    arguments = ("--task", "summarize", "--data", articles, "--max-new-tokens", 8, "--json", out, *arguments)
    result = run("eval", target, *arguments)
    assert result.code == 0, result.err
    results = json.loads(out.read_text())
    assert results["items"] == 2
    return {r["cache"]: r for r in results["rows"]}


def test_summaries_of_a_bundle(run: Run, plain: Path, articles: Path) -> None:
    rows = summaries(run, plain, articles)
    (row,) = rows.values()
    assert (row["cache"], row["backend"]) == ("as exported", "ort")
    assert set(row["scores"]) == {"rouge1", "rouge2", "rougeL"}
    assert all(0 <= x["value"] <= 1 and x["low"] is x["high"] is None for x in row["scores"].values())
    (want,) = open_bundle(plain).generate([f"{bundles.PROMPT}\n\nSummary:"], max_new_tokens=8)
    assert row["texts"][0] == want.text.strip().splitlines()[0].strip()
    assert len(HEADS) == 2


def test_the_summary_is_the_first_line_that_is_not_empty(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = open_bundle(plain)
    answers = ["\n\n A cat sat. \nIt was a mat.", "\n"]
    monkeypatch.setattr(generator, "generate", lambda *_: [SimpleNamespace(text=text) for text in answers])
    scores, texts = summarize.rouge(generator, [("one", "A cat sat."), ("two", "A cat sat.")], 8)
    assert texts == ("A cat sat.", "")
    assert scores["rouge1"].tolist() == [1.0, 0.0]


def test_summaries_of_every_cache(run: Run, source: Path, kernel_file: Path, streaming: Path, articles: Path) -> None:
    """A bundle and its model agree on all backends; the full cache equals Hugging Face's."""
    names = "full,sparse,sparse+bytes,less"
    bundle = summaries(run, streaming, articles, "--compare", names)
    assert {n: r["backend"] for n, r in bundle.items()} == {**dict.fromkeys(names.split(","), "torch"), "less": "ort"}
    arguments = ("--kernels", kernel_file, "--budget", 12, "--chunk", 16, *PLAIN_OPTIONS)
    model = summaries(run, source, articles, "--compare", names, *arguments)
    assert {r["backend"] for r in model.values()} == {"torch"}
    for name in ("full", "sparse", "less"):  # sparse+bytes counts 16 bits a value for a model, 32 for the bundle
        assert model[name]["texts"] == bundle[name]["texts"]
    assert len({tuple(r["texts"]) for r in model.values()}) > 1
    assert summaries(run, source, articles, *arguments).keys() == {"less"}
    hf, tokenizer = LlamaForCausalLM.from_pretrained(source), bundles.tokenizer()
    ids = tokenizer(f"{bundles.PROMPT}\n\nSummary:", return_tensors="pt").input_ids
    made = hf.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert model["full"]["texts"][0] == tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]


def test_summaries_that_cannot_be(run: Run, source: Path, plain: Path, articles: Path) -> None:
    arguments = ("--task", "summarize", "--data", articles)
    refused(run("eval", plain, *arguments, "--seqs", 0), "--seqs must be at least 1")
    refused(run("eval", plain, *arguments, "--compare", ""), "--compare: unknown ''")
    refused(run("eval", plain, *arguments, "--max-new-tokens", 0), "max_new_tokens must be")
    refused(run("eval", plain, *arguments, "--chunk", 4), "is a bundle, whose cache is fixed: drop --chunk")
    refused(run("eval", plain, *arguments, "--kernels", "k"), "drop --kernels")
    refused(run("eval", source, *arguments, "--backend", "ort", *PLAIN_OPTIONS), "runs bundles", after=1)
    refused(run("eval", plain, *arguments, "--compare", "full,less"), "no layer has kernels", after=1)
    trt = run("eval", plain, *arguments, "--compare", "full,sparse", "--backend", "trt")
    refused(trt, "no engine.plan", after=1)
