"""Perplexity by simulation and by streaming, fair baselines, intervals, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from less_export import open_bundle
from less_export.config import ExportConfig, plan_layers
from less_export.contract import LayerSpec, Policy
from less_export.errors import UsageError
from less_export.evaluation import perplexity, statistics, variants
from less_export.evaluation.subject import open_subject
from less_export.feature_maps import Heads, Kernels, random_kernels
from less_export.surgery import discover
from less_export.training import collect

from . import bundles, families
from .bundles import HEADS, Run, refused

pytest_plugins = ["tests.bundles"]

LENGTH = 40
SPEC = LayerSpec(8, 2, 128, 0.1, Policy.H2O, 25, 25, 0, True, 50, 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = bundles.PROMPT.split()
    picks = torch.randint(len(words), (900,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text(" ".join(words[i] for i in picks))
    return file


@pytest.fixture(scope="module")
def streaming(source: Path, kernel_file: Path, made: Path) -> Path:
    """A bundle with kernels that gives the logits of every token: 12 slots."""
    return bundles.bundle(source, made / "streaming", kernels=kernel_file, logits="all")


# ------------------------------------------------------------------ simulation and streaming


@pytest.mark.parametrize("chunk", [1, 9])
@pytest.mark.parametrize("kind", variants.KINDS)
def test_the_simulation_is_the_stream(kind: variants.Kind, chunk: int, source: Path, kernel_file: Path) -> None:
    subject = open_subject(str(source), ExportConfig(budget="12"), kernel_file, True)
    (variant,) = variants.build([kind], subject.plan, subject.kernels.layers, LENGTH, "float32")
    ids = torch.randint(2, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(10, LENGTH - 1, 3)
    simulated = perplexity.simulated(subject.model, ids, variant, chunk, positions)
    backend = subject.backend(variant, "torch", 2, chunk)
    streamed = perplexity.streamed(backend, ids.numpy(), chunk, positions.tolist())
    assert simulated.shape == (3, len(positions))
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)


def test_a_bundle_streams_what_is_simulated(streaming: Path) -> None:
    subject = open_subject(str(streaming), ExportConfig(), None, True)
    (variant,) = variants.build(["less"], subject.plan, subject.kernels.layers, LENGTH, "float32")
    assert subject.exported(variant)
    ids = torch.randint(2, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13, LENGTH - 1)
    simulated = perplexity.simulated(subject.model, ids, variant, 1, positions)
    streamed = perplexity.streamed(subject.backend(variant, "ort", 2, 1), ids.numpy(), 1, positions.tolist())
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_full_is_hugging_face(family: str) -> None:
    """Sliding, SDPA and mixture-of-experts decoders included; and every layer's output projection is found."""
    model = families.build(family).eval()
    plan = plan_layers(discover(model), ExportConfig(budget="12"), 256, {})
    (variant,) = variants.build(["full"], plan, {}, LENGTH, "float32")
    ids = torch.randint(3, families.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    want = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    got = perplexity.simulated(model, ids, variant, 1, torch.arange(LENGTH - 1))
    np.testing.assert_allclose(got[0], want.numpy(), rtol=1e-3, atol=1e-3)
    found = collect.output_projections(model, plan)
    assert [found[i].shape[0] for i in sorted(found)] == [s.query_heads * s.head_dim for s in plan]


def test_chunks_need_all_logits(kernelled: Path) -> None:
    backend = open_bundle(kernelled).backend
    with pytest.raises(UsageError, match="--logits all"):
        perplexity.streamed(backend, np.zeros((1, 8), np.int64), 4, [5])


# ------------------------------------------------------------------ fair baselines


def test_the_baseline_gets_every_byte_back() -> None:
    """By hand: H and z in f32, psi in the slots, against a token's K, V, score and position."""
    added = 2 * (8 * 128 * 4 + 8 * 4 + 50 * 8 * 2)
    token = 2 * (2 * 128 * 2 + 4 + 4)
    assert variants.extra_tokens(SPEC, "bfloat16") == -(-added // token) == 10
    maps = random_kernels([Heads(8, 2, 128)], [0], 8, 4).layers
    built = {v.kind: v for v in variants.build(variants.KINDS, [SPEC], maps, 1024, "bfloat16")}
    less, baseline = built["less"], built["sparse+bytes"]
    assert less.state_bytes("bfloat16") == added + 50 * token
    assert baseline.state_bytes("bfloat16") == 60 * token >= less.state_bytes("bfloat16")
    assert [(v.plan[0].heavy, v.plan[0].recent) for v in built.values()] == [
        (0, 1024), (25, 25), (27, 27), (30, 30), (25, 25)
    ]  # fmt: skip
    assert built["full"].plan[0].policy is Policy.FULL


def test_sinks_stay_sinks_and_windows_windows() -> None:
    sink = replace(SPEC, policy=Policy.SINK, heavy=4, recent=46)
    window = LayerSpec(8, 2, 128, 0.1, Policy.WINDOW, 0, 64, 64, False, 64, 1)
    own = replace(SPEC, heavy=10, recent=40)
    (grown,) = variants.build(["sparse+4"], [sink, window, own], {}, 1024, "float32")
    assert [(s.heavy, s.recent) for s in grown.plan] == [(4, 50), (0, 64), (10, 44)]
    compressed = replace(SPEC, window=64)
    (full,) = variants.build(["full"], [compressed, window], {}, 1024, "float32")
    assert full.plan == (replace(window, policy=Policy.WINDOW), window)


def test_less_without_kernels_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer has kernels"):
        variants.build(["less"], [replace(SPEC, absorb=False, rank=1)], {}, 64, "float32")


# ------------------------------------------------------------------ figures


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3.0, 0.2, 64)
    nll = np.repeat(rows[:, None], 5, 1)
    found = statistics.perplexity(nll)
    assert found.value == pytest.approx(np.exp(rows.mean()))
    width = 1.96 * rows.std() / 8 * found.value
    assert found.high - found.value == pytest.approx(width, rel=0.2)
    assert found.value - found.low == pytest.approx(width, rel=0.2)


def test_share_of_the_gap() -> None:
    rng = np.random.default_rng(0)
    full = np.log(rng.uniform(30, 40, (32, 1)))
    baseline, less = full + np.log(1.5), full + np.log(1.2)
    found = statistics.share_of_gap(full, baseline, less)
    assert (found.value, found.low, found.high) == pytest.approx((0.6, 0.6, 0.6))
    assert statistics.share_of_gap(full, baseline, baseline).value == 0
    assert statistics.share_of_gap(full, baseline, full + np.log(1.8)).value < 0


# ------------------------------------------------------------------ the command

WORDS = ("--seqs", 3, "--seq-len", LENGTH, "--positions", 8)


def test_a_model(run: Run, source: Path, kernel_file: Path, text: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "e.json", tmp_path / "e.png"
    other = tmp_path / "other.txt"
    other.write_text("a cat " * 300)
    words = ("--kernels", kernel_file, "--budget", 12, "--budgets", "8,16", "--out-of-domain", other)
    result = run("eval", source, "--data", text, *words, *WORDS, "--json", out, "--plot", picture)
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 2 * 3 * 5
    assert {r["domain"] for r in data["rows"]} == {"in", "out"}
    less = [r for r in data["rows"] if r["kind"] == "less"]
    assert all(set(r["share"]) == {"sparse", "sparse+4", "sparse+bytes"} for r in less)
    assert all(r["perplexity"]["low"] <= r["perplexity"]["value"] <= r["perplexity"]["high"] for r in data["rows"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "sparse+bytes" in result.out


def test_a_bundle_on_onnx_runtime(run: Run, streaming: Path, text: Path, tmp_path: Path) -> None:
    def rows(*words: object) -> dict[str, Any]:
        file = tmp_path / "e.json"
        assert run("eval", streaming, "--data", text, *WORDS, "--json", file, *words).code == 0
        return {r["kind"]: r for r in json.loads(file.read_text())["rows"]}

    simulated, streamed = rows(), rows("--backend", "ort")
    assert streamed["less"]["how"] == "streamed, ort"
    assert streamed["full"]["how"] == "simulated"
    assert streamed["less"]["perplexity"]["value"] == pytest.approx(simulated["less"]["perplexity"]["value"], rel=1e-4)
    chunked = rows("--backend", "ort", "--chunk", 7)
    want = rows("--chunk", 7)["less"]["perplexity"]["value"]
    assert chunked["less"]["perplexity"]["value"] == pytest.approx(want, rel=1e-4)
    assert want != pytest.approx(simulated["less"]["perplexity"]["value"], rel=1e-4)


def test_what_a_user_can_get_wrong(run: Run, source: Path, streaming: Path, text: Path) -> None:
    refused(run("eval", source, "--data", text, "--compare", "less", "--budget", 8, *WORDS), "no layer has", after=1)
    refused(run("eval", source, "--data", text, "--compare", "best", *WORDS), "unknown 'best'")
    refused(run("eval", source, "--data", text, "--budget", 39, *WORDS), "--seq-len 40 ends before", after=1)
    refused(run("eval", source, "--data", text, "--backend", "ort", *WORDS), "runs bundles", after=1)
    refused(run("eval", streaming, "--data", text, "--budget", 8), "is a bundle, whose cache is fixed", after=1)
    refused(run("eval", source, "--data", text, "--seqs", 0), "--seqs must be at least 1")
    plot = run("eval", source, "--data", text, "--compare", "full", "--budget", 8, *WORDS, "--plot", "/none/x.png")
    refused(plot, "cannot write /none/x.png", after=2)
    refused(run("eval", source, "--task", "poetry"), "choose perplexity, summarize, or lm-eval TASK")
    refused(run("eval", streaming, "--data", text, "--task", "summarize"), "no jsonl")


def test_kernels_flatter_themselves_on_their_own_text(
    source: Path, text: Path, kernel_file: Path, tmp_path: Path, run: Run
) -> None:
    from less_export.training import data

    kernels = Kernels.load(kernel_file)
    (facts,) = (s.facts() for s in data.read([str(text)]))
    Kernels(kernels.layers, {"model": "x", "data": [facts]}).save(tmp_path / "k.safetensors")
    words = ("--kernels", tmp_path / "k.safetensors", "--budget", 12, "--compare", "less")
    result = run("eval", source, "--data", text, *words, *WORDS)
    assert "trained on text.txt" in result.err


def test_summaries(run: Run, plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    items = [{"text": bundles.PROMPT, "summary": "a cat sat"}, {"text": "Once upon a time", "summary": "time"}]
    file.write_text("\n".join(map(json.dumps, items)))
    out = tmp_path / "s.json"
    words = ("--task", "summarize", "--data", file, "--max-new-tokens", 8, "--json", out)
    assert run("eval", plain, *words).code == 0
    figures = json.loads(out.read_text())
    assert set(figures["scores"]) == {"rouge1", "rouge2", "rougeL"}
    assert all(0 <= x <= 1 for x in figures["scores"].values())
    (first, _) = figures["summaries"]
    (want,) = open_bundle(plain).generate([f"{bundles.PROMPT}\n\nSummary:"], max_new_tokens=8, stop=("\n",))
    assert first == want.text
    assert len(HEADS) == 2


# ------------------------------------------------------------------ lm-evaluation-harness

TASK = """
task: less_local
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


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A multiple-choice task whose data is a local file."""
    items = [{"question": "Alice was tired of sitting by", "answer": 1}, {"question": "once upon a time,", "answer": 0}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local.yaml").write_text(TASK.format(data=tmp_path / "items.jsonl"))
    return folder


def test_the_harness_runs_a_local_task(run: Run, plain: Path, task: Path, tmp_path: Path) -> None:
    from less_export.evaluation.harness import LessLM

    out = tmp_path / "scores.json"
    result = run("eval", plain, "--task", "lm-eval", "less_local", task, "--json", out)
    assert result.code == 0, result.err
    model = LessLM(str(plain))
    encode = model.tok_encode
    right = 0
    for question, answer in (("Alice was tired of sitting by", 1), ("once upon a time,", 0)):
        choices = [" a cat", " her sister by the bank"]
        scores = [
            log_probability(model, encode(question), encode(question + c)[len(encode(question)) :]) for c in choices
        ]
        right += int(np.argmax(scores)) == answer
    assert json.loads(out.read_text())["scores"]["acc,none"] == right / 2
    refused(run("eval", plain, "--task", "lm-eval", "no_such_task"), "knows no task")


@pytest.mark.slow
def test_the_harness_finds_the_model_by_name(
    plain: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line of lm-evaluation-harness itself, as ``less-lm-eval`` starts it."""
    from less_export.evaluation import harness

    words = ["--model", "less", "--model_args", f"bundle={plain}", "--tasks", "less_local"]
    monkeypatch.setattr(sys, "argv", ["less-lm-eval", *words, "--include_path", str(task)])
    harness.main()
    assert "|less_local|" in capsys.readouterr().out


def log_probability(model: Any, context: list[int], continuation: list[int]) -> float:
    """One row by itself: the context in one chunk, then token by token."""
    backend = model._scorer.backend
    backend.open(1)
    total = 0.0
    for piece, target in zip([context, *([t] for t in continuation)], continuation, strict=False):
        logits = backend.step(np.array([piece]), np.array([len(piece)]))[0, 0]
        total += float(torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1)[target])
    return total


def test_scores_of_ragged_batches(plain: Path) -> None:
    from less_export.evaluation.harness import LessLM

    model = LessLM(str(plain))
    g = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(2, 300, (n,), generator=g).tolist(), torch.randint(2, 300, (m,), generator=g).tolist())
        for n, m in ((3, 4), (9, 1), (14, 20))
    ]
    found = [score for score, _ in model._scorer.score(pairs)]
    np.testing.assert_allclose(found, [log_probability(model, c, t) for c, t in pairs], rtol=1e-4)
