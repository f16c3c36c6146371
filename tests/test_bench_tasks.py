"""The benchmark of tasks: examples and items of a file, scores by hand, and rows that are kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from less_export.config import ExportConfig
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import random_kernels
from less_export.less.memory import layer_bytes

from . import bundles

pytest_plugins = ["tests.bundles"]

QUERIES = ("Alice was", "Once upon", "a cat", "her sister", "tired of", "the bank")
CHOICES = ["sitting on the bank.", "a time."]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("bench_tasks")


def log_probabilities(lm: Any, context: str, answers: list[str]) -> list[float]:
    requests = [Instance("loglikelihood", {}, (context, f" {answer}"), i) for i, answer in enumerate(answers)]
    return [value for value, _ in lm.loglikelihood(requests)]


def test_items_come_after_the_examples(
    bench: ModuleType, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"query": q, "choices": CHOICES, "gold": i % 2} for i, q in enumerate(QUERIES)]
    (tmp_path / "copa.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setitem(bench.TASKS["copa"], "num_fewshot", 2)
    lm = bench.Counting(str(plain))
    found = bench.run(lm, "copa", tmp_path, 3)
    begin = "".join(f"{x['query']} {x['choices'][x['gold']]}\n\n" for x in items[:2])
    values = np.array([log_probabilities(lm, begin + x["query"], CHOICES) for x in items[2:5]])
    answers = [x["gold"] for x in items[2:5]]
    np.testing.assert_allclose(found["gold"], values[np.arange(3), answers], atol=1e-3)
    among = values - np.logaddexp.reduce(values, 1)[:, None]
    np.testing.assert_allclose(found["among"], among[np.arange(3), answers], atol=1e-3)
    assert found["right"] == (values.argmax(1) == answers).astype(int).tolist()


def test_the_word_that_lambada_asks_for_follows_a_space(
    bench: ModuleType, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"context": q, "continuation": f"word{i}"} for i, q in enumerate(QUERIES)]
    (tmp_path / "lambada_openai.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setitem(bench.TASKS["lambada_openai"], "num_fewshot", 2)
    lm = bench.Counting(str(plain))
    found = bench.run(lm, "lambada_openai", tmp_path, 2)
    begin = "Alice was word0\n\nOnce upon word1\n\n"
    want = [log_probabilities(lm, begin + x["context"], [x["continuation"]])[0] for x in items[2:4]]
    np.testing.assert_allclose(found["gold"], want, atol=1e-3)


def test_a_task_without_choices_is_right_if_greedy_decoding_gives_it(bench: ModuleType) -> None:
    samples = [{"filtered_resps": [(-1.25, True)]}, {"filtered_resps": [(-2.0, False)]}]
    assert bench.scores("lambada_openai", samples) == {"right": [1, 0], "gold": [-1.25, -2.0]}


def test_rows_are_kept(bench: ModuleType, tmp_path: Path) -> None:
    out, file = tmp_path / "tasks.json", {"rows": []}
    facts = {"model": "m", "kernels": "a", "task": "copa", "kind": "less", "limit": 5}

    def add(value: int, **changes: Any) -> None:
        bench.measured(out, file, {**facts, **changes}, lambda: {"value": value})

    add(1)
    add(2)
    add(3, kernels="b")
    add(4, limit=9)
    rows = json.loads(out.read_text())["rows"]
    assert {(r["kernels"], r["limit"], r["value"]) for r in rows} == {("a", 9, 4), ("b", 5, 3)}


def test_both_caches_take_the_same_bytes(bench: ModuleType, source: Path) -> None:
    """And a layer without kernels has the slots that training gave it in both."""
    kernels = random_kernels(bundles.HEADS, [1], 3, 6)
    kernels.provenance["slots"] = {"0": [12, 13], "1": [10, 10]}
    plan = open_model(resolve(str(source)), ExportConfig(policy="h2o", budget="20", context=bundles.CONTEXT)).plan
    found = bench.budgets(plan, kernels, "float32")
    assert found["less"] == found["fewer"] == {0: 25, 1: 20}
    assert found["sparse"][0] == 25
    less = bench.replace(plan[1], absorb=True, rank=3, capacity=20)
    slots = found["sparse"][1]
    assert layer_bytes(plan[1], "float32", slots - 1) < layer_bytes(less, "float32")
    assert layer_bytes(less, "float32") <= layer_bytes(plan[1], "float32", slots)


def test_articles(bench: ModuleType, tmp_path: Path) -> None:
    """The instruction of the paper's prompts is left out."""
    prompt = f"{bench.BEFORE_ARTICLE}A cat sat.{bench.AFTER_ARTICLE}"
    lines = [{"article": prompt, "summary_gt": "A cat."}, {"text": "Two cats.", "summary": "Cats."}, {}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert bench.articles(tmp_path / "x.jsonl", 2) == [("A cat sat.", "A cat."), ("Two cats.", "Cats.")]


def test_summaries(bench: ModuleType, plain: Path) -> None:
    found = bench.summaries(plain, [(bundles.PROMPT, "a cat"), ("Once upon", "a time")], 1)
    assert list(found["rouge"]) == ["rouge1", "rouge2", "rougeL"]
    assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 1 for values in found["rouge"].values())
    assert found["tokens"] > 12
