"""lm-evaluation-harness: its tasks through ``eval``, its own command line, and scores computed independently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from less_export import open_bundle
from less_export.cli import lm_eval
from less_export.errors import UsageError
from less_export.evaluation.harness import LessLM

from . import bundles
from .bundles import Run, refused

pytest_plugins = ["tests.bundles"]

ROOT = Path(__file__).parents[1]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["a cat", "her sister by the bank"]
metric_list:
  - metric: acc
"""
ITEMS = [{"question": "Alice was tired of sitting by", "answer": 1}, {"question": "once upon a time,", "answer": 0}]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task whose data is a local file; its tag, a group, and a task without data."""
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    local = TASK.format(name="less_local", data=tmp_path / "items.jsonl")
    (folder / "local.yaml").write_text(f"{local}tag: less_tag\n")
    (folder / "group.yaml").write_text("group: less_group\ntask: [less_local]\n")
    (folder / "lost.yaml").write_text(TASK.format(name="less_lost", data=tmp_path / "none.jsonl"))
    return folder


@pytest.fixture(scope="module")
def model(plain: Path) -> LessLM:
    return LessLM(str(plain))


def log_probability(model: LessLM, context: list[int], continuation: list[int]) -> float:
    """One row alone: the context in one chunk, then token by token."""
    backend = model._scorer.backend
    backend.open(1)
    total = 0.0
    for piece, target in zip([context, *([t] for t in continuation)], continuation, strict=False):
        logits = backend.step(np.array([piece]), np.array([len(piece)]))[0, 0]
        total += float(torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1)[target])
    return total


# ------------------------------------------------------------------ the model


def test_scores_of_ragged_batches(model: LessLM) -> None:
    g = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(2, 300, (n,), generator=g).tolist(), torch.randint(2, 300, (m,), generator=g).tolist())
        for n, m in ((3, 4), (9, 1), (14, 20))
    ]
    scores = [score for score, _ in model._scorer.score(pairs)]
    np.testing.assert_allclose(scores, [log_probability(model, c, t) for c, t in pairs], rtol=1e-4)


def test_rolling_scores_the_whole_text_after_bos(model: LessLM) -> None:
    texts = [bundles.PROMPT, "a cat", ""]
    scores = model.loglikelihood_rolling([SimpleNamespace(args=(t,)) for t in texts])
    assert model.prefix_token_id == 0
    ids = [model.tok_encode(t, add_special_tokens=False) for t in texts]
    assert len(ids[0]) > 12  # more than the slots
    np.testing.assert_allclose(scores, [log_probability(model, [0], i) for i in ids], rtol=1e-4)


def test_generation_until(model: LessLM, plain: Path) -> None:
    def until(**options: Any) -> str:
        (text,) = model.generate_until([SimpleNamespace(args=(bundles.PROMPT, options))])
        return text

    (want,) = open_bundle(plain).generate([bundles.PROMPT], max_new_tokens=12)
    assert until(max_gen_toks=12) == want.text
    stop = want.text[5:7]
    before = want.text[: want.text.index(stop)]
    assert until(max_gen_toks=12, until=stop) == until(max_gen_toks=12, until=["", stop]) == before
    assert until(max_gen_toks=12, temperature=2.0) == want.text  # without do_sample
    sampled = {until(max_gen_toks=12, temperature=2.0, do_sample=True) for _ in range(4)}
    assert len(sampled) > 1


def test_threads_are_for_onnx_runtime(plain: Path) -> None:
    LessLM(str(plain), threads=1)
    for options, says in (({"threads": "many"}, "whole number"), ({"backend": "torch", "threads": 1}, "leave it out")):
        with pytest.raises(UsageError, match=says):
            LessLM(str(plain), **options)


# ------------------------------------------------------------------ eval --task lm-eval


@pytest.mark.slow
def test_a_local_task(run: Run, plain: Path, model: LessLM, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    right = 0
    for item in ITEMS:
        question = str(item["question"])
        context = model.tok_encode(question)
        rest = [model.tok_encode(question + c)[len(context) :] for c in (" a cat", " her sister by the bank")]
        right += int(np.argmax([log_probability(model, context, r) for r in rest])) == item["answer"]
    for name in ("less_local", "less_tag", "less_group"):  # the group aggregates nothing
        result = run("eval", plain, "--task", "lm-eval", name, task, "--json", out)
        assert result.code == 0, result.err
        scores = json.loads(out.read_text())["scores"]
        assert list(scores) == ["less_local"]
        assert scores["less_local"]["acc,none"] == right / 2
        assert "acc,none" in result.out


@pytest.mark.slow
def test_what_a_user_can_get_wrong(run: Run, source: Path, plain: Path, task: Path) -> None:
    refused(run("eval", plain, "--task", "lm-eval", "no_such_task"), "has no task")
    lost = run("eval", plain, "--task", "lm-eval", "less_lost", task)
    assert lost.code == 1
    assert lost.err.splitlines()[-1].startswith("less-export: error: task less_lost cannot be loaded (")
    assert "Traceback" not in lost.err
    refused(run("eval", source, "--task", "lm-eval", "less_local", task), "runs bundles")
    refused(run("eval", plain, "--task", "lm-eval", "less_local", task, "--seqs", 0), "--seqs must be at least 1")


# ------------------------------------------------------------------ the harness's own command line


@pytest.mark.slow
def test_our_errors_are_one_line(
    tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "less_local", "--include_path", str(task)]
    for arguments, says in ((f"bundle={tmp_path / 'none'}", "none does not exist"), ("backend=ort", "bundle=DIR")):
        monkeypatch.setattr(sys, "argv", ["less-lm-eval", "--model", "less", "--model_args", arguments, *options])
        assert lm_eval.main() == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("less-export: error: ")
        assert says in last


@pytest.mark.slow
def test_less_lm_eval_knows_less_and_the_others(
    plain: Path, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks", "less_local", "--include_path", str(task)]
    for arguments in (["less", "--model_args", f"bundle={plain}"], ["dummy"]):
        monkeypatch.setattr(sys, "argv", ["less-lm-eval", "--model", *arguments, *options])
        assert lm_eval.main() == 0
        assert "|less_local|" in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_file_brings_the_model_into_lm_eval(plain: Path, tmp_path: Path) -> None:
    """The installed ``lm_eval`` in its own process; the line under ``metadata`` is that of the docs."""
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    line = "model: !function less_export.evaluation.harness.LessLM"
    assert f"`{line}`" in (ROOT / "docs/howto/evaluate.md").read_text()
    folder = tmp_path / "tasks"
    folder.mkdir()
    definition = TASK.format(name="less_local", data=tmp_path / "items.jsonl") + f"metadata:\n  {line}\n"
    (folder / "local.yaml").write_text(definition)
    options = ["--model", "less", "--model_args", f"bundle={plain}", "--tasks", str(folder), "--output_path", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *options], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "|less_local|" in done.stdout


@pytest.mark.slow
def test_the_entry_point_becomes_the_model() -> None:
    """As in versions with the entry point group ``lm_eval.models``: loaded by name, on demand."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert points == {"less": f"{LessLM.__module__}:{LessLM.__name__}"}
    code = (
        "from importlib.metadata import EntryPoint\nfrom lm_eval.api.registry import get_model, model_registry\n"
        f"model_registry.register('less', target=EntryPoint('less', {points['less']!r}, 'lm_eval.models'))\n"
        "assert get_model('less').__name__ == 'LessLM'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
