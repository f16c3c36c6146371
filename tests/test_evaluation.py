"""Perplexity by simulation and by streaming, fair baselines, intervals, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from less_export import open_bundle
from less_export.config import ExportConfig
from less_export.contract import Heads, LayerSpec, Policy
from less_export.errors import UsageError
from less_export.evaluation import perplexity, statistics, variants
from less_export.evaluation import run as run_module
from less_export.evaluation.subject import open_subject
from less_export.hf.surgery import discover, less_attention
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.plan import plan_layers

from . import bundles, families
from .bundles import Run, refused

pytest_plugins = ["tests.bundles"]

LENGTH = 40
NONE = Kernels({}, {})
#: A cache without what has tests of its own: int8 slots and distances.
PLAIN = ExportConfig(budget="12", slots="model", max_distance="none")
PLAIN_OPTIONS = ("--slots", "model", "--max-distance", "none")
SPEC = LayerSpec(8, 2, 128, 0.1, Policy.H2O, 25, 25, 0, True, 50, 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    vocabulary = bundles.PROMPT.split()
    picks = torch.randint(len(vocabulary), (900,), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text(" ".join(vocabulary[i] for i in picks))
    return file


# ------------------------------------------------------------------ simulation and streaming


@pytest.mark.parametrize("chunk", [1, 9])
@pytest.mark.parametrize("kind", variants.KINDS)
def test_the_simulation_is_the_stream(kind: variants.Kind, chunk: int, source: Path, kernel_file: Path) -> None:
    subject = open_subject(str(source), PLAIN, kernel_file, True)
    (variant,) = variants.build([kind], subject.plan, subject.kernels, LENGTH, "float32")
    ids = torch.randint(2, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(10, LENGTH - 1, 3)
    simulated = perplexity.simulated(subject.model, ids, variant, chunk, positions)
    backend = subject.backend(variant, "torch", 2, chunk)
    streamed = perplexity.streamed(backend, ids.numpy(), chunk, positions.tolist())
    assert simulated.shape == (3, len(positions))
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)


def test_a_bundle_streams_what_is_simulated(streaming: Path) -> None:
    subject = open_subject(str(streaming), ExportConfig(), None, True)
    (variant,) = variants.build(["less"], subject.plan, subject.kernels, LENGTH, "float32")
    assert subject.exported(variant)
    ids = torch.randint(2, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13, LENGTH - 1)
    simulated = perplexity.simulated(subject.model, ids, variant, 1, positions)
    streamed = perplexity.streamed(subject.backend(variant, "ort", 2, 1), ids.numpy(), 1, positions.tolist())
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_full_is_hugging_face(family: str) -> None:
    """Sliding, SDPA and mixture-of-experts decoders included."""
    model = families.build(family).eval()
    plan = plan_layers(discover(model), ExportConfig(budget="12"), 256, {})
    (variant,) = variants.build(["full"], plan, NONE, LENGTH, "float32")
    ids = torch.randint(3, families.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    want = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    got = perplexity.simulated(model, ids, variant, 1, torch.arange(LENGTH - 1))
    np.testing.assert_allclose(got[0], want.numpy(), rtol=1e-3, atol=1e-3)


def test_chunks_that_an_artifact_does_not_take(kernelled: Path) -> None:
    backend = open_bundle(kernelled).backend
    with pytest.raises(UsageError, match="--logits all"):
        perplexity.streamed(backend, np.zeros((1, 8), np.int64), 4, [5])
    with pytest.raises(UsageError, match="--chunk 17 is more than the 16 that the bundle accepts"):
        perplexity.streamed(backend, np.zeros((1, 40), np.int64), 17, [5])


# ------------------------------------------------------------------ fair baselines


def test_the_baseline_gets_every_byte_back() -> None:
    """By hand: H and z in f32, psi in the slots, against a token's K, V, score and position."""
    added = 2 * (8 * 128 * 4 + 8 * 4 + 50 * 8 * 2)
    token = 2 * (2 * 128 * 2 + 4 + 4)
    assert variants.extra_tokens(SPEC, "bfloat16") == -(-added // token) == 10
    kernels = random_kernels([Heads(8, 2, 128)], [0], 8, 4)
    built = {v.kind: v for v in variants.build(variants.KINDS, [SPEC], kernels, 1024, "bfloat16")}
    less, baseline = built["less"], built["sparse+bytes"]
    assert less.state_bytes("bfloat16") == added + 50 * token
    assert baseline.state_bytes("bfloat16") == 60 * token >= less.state_bytes("bfloat16")
    assert [(v.plan[0].heavy, v.plan[0].recent) for v in built.values()] == [
        (0, 1024), (25, 25), (27, 27), (30, 30), (30, 30), (25, 25)
    ]  # fmt: skip
    assert built["full"].plan[0].policy is Policy.FULL


def test_sinks_stay_sinks_and_windows_windows() -> None:
    sink = replace(SPEC, policy=Policy.SINK, heavy=4, recent=46)
    window = LayerSpec(8, 2, 128, 0.1, Policy.WINDOW, 0, 64, 64, False, 64, 1)
    own = replace(SPEC, heavy=10, recent=40)
    (grown,) = variants.build(["sparse+4"], [sink, window, own], NONE, 1024, "float32")
    assert [(s.heavy, s.recent) for s in grown.plan] == [(4, 50), (0, 64), (10, 44)]
    compressed = replace(SPEC, window=64)
    (full,) = variants.build(["full"], [compressed, window], NONE, 1024, "float32")
    assert full.plan == (replace(window, policy=Policy.WINDOW), window)


def test_less_without_kernels_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer has kernels"):
        variants.build(["less"], [replace(SPEC, absorb=False, rank=1)], NONE, 64, "float32")


# ------------------------------------------------------------------ figures


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3.0, 0.2, 64)
    nll = np.repeat(rows[:, None], 5, 1)
    interval = statistics.perplexity(nll)
    assert interval.value == pytest.approx(np.exp(rows.mean()))
    width = 1.96 * rows.std() / 8 * interval.value
    assert interval.low is not None
    assert interval.high is not None
    assert interval.high - interval.value == pytest.approx(width, rel=0.2)
    assert interval.value - interval.low == pytest.approx(width, rel=0.2)


def test_few_values_get_no_interval() -> None:
    """Of five, all have the same sign by chance more often than once in twenty."""
    interval = statistics.mean(np.arange(5.0))
    assert interval == statistics.Interval(2.0)
    assert interval.text(".1f") == "2.0"
    interval = statistics.mean(np.arange(6.0))
    assert interval.low is not None
    assert interval.text(".0f").startswith("2 [")


def test_share_of_the_gap() -> None:
    rng = np.random.default_rng(0)
    full = np.log(rng.uniform(30, 40, (32, 1)))
    baseline, less = full + np.log(1.5), full + np.log(1.2)
    share = statistics.share_of_gap(full, baseline, less)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx((0.6, 0.6, 0.6))
    same, worse = (statistics.share_of_gap(full, baseline, x) for x in (baseline, full + np.log(1.8)))
    assert same is not None
    assert worse is not None
    assert same.value == 0 > worse.value
    assert statistics.share_of_gap(full, full, less) is None
    assert statistics.share_of_gap(full, full - 1e-6, less) is None


def test_means_of_some_tokens() -> None:
    values = np.arange(24.0).reshape(6, 4)
    chosen = values % 2 == 0
    some = statistics.mean_of_some(values, chosen)
    assert some is not None
    assert some.value == pytest.approx(11)
    assert some.low is not None
    assert some.high is not None
    assert some.low < 11 < some.high
    assert statistics.mean_of_some(values, np.zeros((6, 4), bool)) is None
    whole = statistics.mean_of_some(values, np.ones((6, 4), bool))
    assert whole == statistics.mean(values.mean(1))


def test_copied_tokens() -> None:
    """The pair 5, 6 returns after exactly 30 tokens, and the pair 6, 7 of the start after more; 8, 9 too early."""
    tokens = [5, 6, 7, *range(100, 127), 5, 6, 8, 9, 8, 9, 6, 7]
    positions = np.arange(len(tokens) - 1)
    found = statistics.copied(np.array([tokens, tokens[::-1]]), positions)
    assert positions[found[0]].tolist() == [30, 36]
    assert found.shape == (2, 37)


def test_divergences_are_those_of_whole_distributions(source: Path, kernel_file: Path) -> None:
    """Against the definition, from the logits of both caches over all positions."""
    subject = open_subject(str(source), PLAIN, kernel_file, False)
    kinds = variants.build(["full", "sparse", "less"], subject.plan, subject.kernels, LENGTH, "float32")
    ids = torch.from_numpy(np.random.default_rng(3).integers(2, 300, (5, LENGTH)))
    positions = torch.arange(20, LENGTH - 1, 3)
    rows: list[int] = []
    scores = perplexity.compared(subject.model, ids, kinds, 1, positions, rows.append, lambda _: ())
    assert sum(rows) == 15
    log_p = []
    for variant in kinds:
        with less_attention(subject.model, perplexity.attention(variant, 1)), torch.no_grad():
            log_p.append(torch.log_softmax(subject.model(input_ids=ids, use_cache=False).logits.double(), -1))
    assert scores[0].divergence is None
    for found, other in zip(scores[1:], log_p[1:], strict=True):
        want = (log_p[0].exp() * (log_p[0] - other)).sum(-1)[:, positions]
        assert found.divergence == pytest.approx(want.numpy(), abs=1e-6)
        assert float(want.mean()) > 1e-4


# ------------------------------------------------------------------ the command

OPTIONS = ("--seqs", 3, "--seq-len", LENGTH, "--positions", 8)
MODEL_OPTIONS = (*OPTIONS, *PLAIN_OPTIONS)


def test_a_model(run: Run, source: Path, kernel_file: Path, text: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "e.json", tmp_path / "e.png"
    other = tmp_path / "other.txt"
    other.write_text("a cat " * 300)
    arguments = ("--kernels", kernel_file, "--budget", 12, "--budgets", "8,16", "--out-of-domain", other)
    result = run("eval", source, "--data", text, *arguments, *MODEL_OPTIONS, "--json", out, "--plot", picture)
    assert result.code == 0, result.err
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 2 * 3 * 5
    assert {r["sequences"] for r in data["rows"]} == {3}
    assert {r["domain"] for r in data["rows"]} == {"in", "out"}
    less = [r for r in data["rows"] if r["kind"] == "less"]
    assert all(set(r["share"]) == {"sparse", "sparse+4", "sparse+bytes"} for r in less)
    assert all(r["perplexity"]["low"] is None for r in data["rows"])  # three sequences get no interval
    assert all((r["divergence"] is None) == (r["kind"] == "full") for r in data["rows"])
    for row in less:
        assert set(row["change"]) == set(row["share"])
        sparse = next(
            r for r in data["rows"] if (r["text"], r["budget"], r["kind"]) == (row["text"], row["budget"], "sparse")
        )
        difference = row["divergence"]["value"] - sparse["divergence"]["value"]
        assert row["change"]["sparse"]["value"] == pytest.approx(difference)
    assert "KL(full cache || cache)" in result.out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "sparse+bytes" in result.out


def test_a_simulation_adds_the_full_cache(
    run: Run, source: Path, kernel_file: Path, text: Path, tmp_path: Path
) -> None:
    """Without it there is nothing that divergences are from."""
    arguments = ("--kernels", kernel_file, "--budget", 12, "--compare", "sparse,less", "--json", tmp_path / "e.json")
    assert run("eval", source, "--data", text, *arguments, *OPTIONS).code == 0
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [r["kind"] for r in rows] == ["full", "sparse", "less"]
    assert [r["divergence"] is not None for r in rows] == [False, True, True]


def test_positions_begin_where_the_first_layer_evicts(
    run: Run, source: Path, kernel_file: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = perplexity.compared, []
    monkeypatch.setattr(perplexity, "compared", lambda *args: seen.append(args[4].tolist()) or real(*args))
    arguments = ("--kernels", kernel_file, "--budget", 12, "--layer-budgets", "1:20", "--compare", "sparse,less")
    options = ("--positions", LENGTH, "--json", tmp_path / "e.json")
    assert run("eval", source, "--data", text, *arguments, *OPTIONS, *options).code == 0
    assert seen == [list(range(13, LENGTH - 1))]


def test_a_bundle_on_onnx_runtime(run: Run, streaming: Path, text: Path, tmp_path: Path) -> None:
    def rows(*arguments: object) -> dict[str, Any]:
        file = tmp_path / "e.json"
        assert run("eval", streaming, "--data", text, *OPTIONS, "--json", file, *arguments).code == 0
        return {r["kind"]: r for r in json.loads(file.read_text())["rows"]}

    simulated, streamed = rows(), rows("--backend", "ort")
    assert streamed["less"]["how"] == "streamed, ort"
    assert streamed["full"]["how"] == "simulated"
    assert streamed["less"]["perplexity"]["value"] == pytest.approx(simulated["less"]["perplexity"]["value"], rel=1e-4)
    chunked = rows("--backend", "ort", "--chunk", 7)
    want = rows("--chunk", 7)["less"]["perplexity"]["value"]
    assert chunked["less"]["perplexity"]["value"] == pytest.approx(want, rel=1e-4)
    assert want != pytest.approx(simulated["less"]["perplexity"]["value"], rel=1e-4)


def test_where_there_is_no_gap_there_is_no_share(
    run: Run, source: Path, kernel_file: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [perplexity.Scores(np.full((6, 8), x)) for x in (2.0, 1.9, 1.8)]
    monkeypatch.setattr(perplexity, "compared", lambda *_: results)
    options = ("--kernels", kernel_file, "--budget", 12, "--compare", "less,full,sparse", "--json", tmp_path / "e.json")
    result = run("eval", source, "--data", text, *options, *OPTIONS)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "e.json").read_text())["rows"][2]["share"] == {"sparse": None}
    assert "6.05 [6.05, 6.05]" in result.out
    assert result.out.count("[") == 3  # three perplexities


def test_what_is_named_twice_is_evaluated_once(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    options = ("--compare", "sparse,full,sparse", "--budget", 8, "--budgets", "8,16,16", "--json", tmp_path / "e.json")
    assert run("eval", source, "--data", text, *options, *OPTIONS).code == 0
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [(r["budget"], r["kind"]) for r in rows] == [
        ("8 tokens", "full"), ("8 tokens", "sparse"), ("16", "full"), ("16", "sparse"),
    ]  # fmt: skip


def test_fewer_sequences_than_asked_for(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:400])
    arguments = ("--compare", "full", "--budget", 8, "--seq-len", LENGTH, "--json", tmp_path / "e.json")
    result = run("eval", source, "--data", short, *arguments, "--seqs", 100000)
    (row,) = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert 1 < row["sequences"] < 20
    assert f"warning: short.txt has {row['sequences']} sequences of 40 tokens, not 100000" in result.err
    assert "100000" not in result.out


def test_refused_before_anything_is_evaluated(
    run: Run, source: Path, streaming: Path, kernelled: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_scores", lambda *_: pytest.fail("evaluated"))
    refused(run("eval", streaming, "--data", text, *OPTIONS, "--backend", "trt"), "no engine.plan", after=1)
    refused(run("eval", kernelled, "--data", text, *OPTIONS, "--backend", "ort", "--chunk", 4), "--logits all", after=1)
    refused(
        run("eval", streaming, "--data", text, *OPTIONS, "--backend", "ort", "--chunk", 17),
        "--chunk 17 is more than the 16 that the bundle accepts", after=1,
    )  # fmt: skip
    plain_ = ("eval", source, "--data", text, "--compare", "full", "--budget", 8, *OPTIONS)
    refused(run(*plain_, "--plot", "/none/x.png"), "cannot write /none/x.png: No such file")
    refused(run(*plain_, "--plot", text.parent / "x.doc"), "must end in one of", ".png")
    refused(run(*plain_, "--json", text.parent), "Is a directory")
    refused(run(*plain_, "--data", text, text.parent / "none.txt"), "cannot read --data", "none.txt")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("perplexity", ["--max-new-tokens 8"]),
        ("summarize", ["--plot x.png", "--budgets 8", "--out-of-domain held_out", "--positions 8", "--seq-len 99"]),
        ("lm-eval less_local", ["--compare full", "--chunk 4", "--kernels k", "--policy h2o", "--budget 5%",
                                "--no-compress-sliding", "--data held_out", "--context 8"]),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_a_task_does_not_use(task: str, options: list[str], run: Run, plain: Path) -> None:
    for option in options:
        name = option.split()[0].replace("--no-", "--")
        refused(run("eval", plain, "--task", *task.split(), *option.split()), f"{task.split()[0]} does not use {name}")


@pytest.mark.slow
def test_what_a_user_can_get_wrong(run: Run, source: Path, streaming: Path, text: Path) -> None:
    refused(
        run("eval", source, "--data", text, "--compare", "less", "--budget", 8, *MODEL_OPTIONS), "no layer has", after=1
    )
    refused(run("eval", source, "--data", text, "--compare", "best", *OPTIONS), "unknown 'best'")
    refused(run("eval", source, "--data", text, "--budget", 39, *MODEL_OPTIONS), "--seq-len 40 ends before", after=1)
    refused(run("eval", source, "--data", text, "--backend", "ort", *MODEL_OPTIONS), "runs bundles", after=1)
    refused(run("eval", streaming, "--data", text, "--budget", 8), "is a bundle, whose cache is fixed", after=1)
    refused(run("eval", source, "--data", text, "--seqs", 0), "--seqs must be at least 1")
    refused(run("eval", source, "--data", text, "--compare", "", *OPTIONS), "--compare: unknown ''")
    refused(run("eval", source, "--data", text, "--budgets", "", *OPTIONS), "--budgets names an empty budget")
    refused(run("eval", source, "--task", "perplexity", "summarize"), "choose perplexity, summarize, or lm-eval TASK")
    refused(run("eval", source, "--task", "poetry"), "choose perplexity, summarize, or lm-eval TASK")
    refused(run("eval", streaming, "--data", text, "--task", "summarize"), "is not a .jsonl file")


def test_kernels_evaluated_on_their_training_text(
    source: Path, text: Path, kernel_file: Path, tmp_path: Path, run: Run
) -> None:
    from less_export.hf import data

    kernels = Kernels.load(kernel_file)
    (facts,) = (s.facts() for s in data.read([str(text)]))
    Kernels(kernels.layers, {"model": "x", "data": [facts]}).save(tmp_path / "k.safetensors")
    arguments = ("--kernels", tmp_path / "k.safetensors", "--budget", 12, "--compare", "less")
    result = run("eval", source, "--data", text, *arguments, *OPTIONS)
    assert "trained on text.txt" in result.err
