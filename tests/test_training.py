"""Training on tiny random models: it learns, and resumes where it stopped."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from less_export.errors import LessExportError, ModelError, UsageError
from less_export.hf import calibration, data
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.training import collect, fit, job

from .bundles import Run, refused
from .training_support import LENGTH, OPTIONS, model_folder, sliding_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]


def test_same_seed_same_kernels(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    files = []
    for seed in (3, 3, 4):
        trained(folder, text, seed=seed, steps=5)
        files.append(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    assert any(not torch.equal(files[0][n], files[2][n]) for n in files[0] if n in files[2])


def test_a_finished_layer_is_not_trained_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    whole, _ = trained(folder, text, steps=5)
    want = load_file(whole)
    whole.unlink()
    real, calls = fit.fit, []

    def interrupted(*args: Any) -> Any:
        calls.append(args[0].layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fit, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, text, steps=5)
    assert not whole.exists()
    monkeypatch.setattr(collect, "collect", None)  # the collected activations are reused
    trained(folder, text, steps=5)
    assert len(calls) == 3
    assert all(torch.equal(x, want[n]) for n, x in load_file(whole).items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.safetensors", "model.safetensors.md"]


def test_other_options_do_not_resume(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, steps=5)
    calls = []
    real = fit.fit
    monkeypatch.setattr(fit, "fit", lambda *args: calls.append(1) or real(*args))
    trained(folder, text, steps=5)
    assert calls == []
    trained(folder, text, steps=6)
    assert len(calls) == 2


def test_layers_that_lose_are_switched_off(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    real, fitted = fit.fit, []

    def worse(*args: Any) -> Any:
        feature_map, errors = real(*args)
        fitted.append(feature_map)
        return feature_map, replace(errors, less=errors.sparse + 0.1) if len(fitted) == 2 else errors  # layer 1

    monkeypatch.setattr(fit, "fit", worse)
    with pytest.warns(UserWarning, match=r"layers \[1\]: the low-rank term does not pay"):
        file, reports = trained(folder, text)
    kernels = Kernels.load(file)
    assert [r.used for r in reports] == [True, False]
    assert list(kernels.layers) == [0]
    assert kernels.provenance["layers"]["1"]["used"] is False
    assert [r.slots for r in reports] == [kernels.slots[0], kernels.slots[1]]
    assert reports[1].slots > reports[0].slots == 8, "the bytes of the state are slots"


def test_provenance(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    file, reports = trained(folder, text, steps=5, layers="1")
    facts = Kernels.load(file).provenance
    assert facts["model"] == "model"
    assert len(facts["model_sha256"]) == 64
    assert (facts["policy"], facts["slots"]) == ("h2o", {"0": [4, 4], "1": [4, 4]})
    assert facts["data"][0]["name"] == "text.txt"
    assert facts["sequences"]["length"] == LENGTH
    assert facts["sequences"]["shares"] == {"text.txt": 9}
    assert (facts["torch"], facts["device"]) == (torch.__version__, "cpu")
    (report,) = reports
    assert facts["layers"] == {"1": {n: v for n, v in vars(report).items() if n != "layer"}}


def test_sliding_layers_stay_exact_unless_compressed(text: Path, tmp_path: Path) -> None:
    folder = sliding_folder(tmp_path / "model")
    _, reports = trained(folder, text, steps=5)
    assert [r.layer for r in reports] == [1]
    _, reports = trained(folder, text, steps=5, compress_sliding=True)
    assert [r.layer for r in reports] == [0, 1]
    with pytest.raises(UsageError, match="layer 0 evicts nothing"):
        trained(folder, text, layers="0")


# ------------------------------------------------------------------ what a user can get wrong


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00A", "not UTF-8"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"Alice", "fewer than one sequence of 48"),
        (b"Alice was tired of sitting. " * 5, "need two"),
    ],
)
def test_bad_text(content: bytes, says: str, source: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    refused(run("train", source, "--data", file, "--out", tmp_path / "k.safetensors", *OPTIONS), says)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


def test_bad_options(source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    def train(*arguments: object) -> Any:
        return run("train", source, "--data", text, "--out", tmp_path / "k.safetensors", *arguments)

    refused(train("--budget", 60, "--seq-len", 60), "shorter than the budget of 60 tokens")
    refused(train("--layers", "0-9"), "--layers 0-9: layer 2 evicts nothing or does not exist")
    refused(train("--layers", "0-99999999999"), "--layers 0-99999999999: layer 2 evicts nothing or does not exist")
    refused(train("--layers", "1-0"), "--layers 1-0: 1-0 is reversed, write 0-1")
    for layers in ("a", "", "0-", "0,", "9" * 5000):
        refused(train(f"--layers={layers}"), "not a list like 0-7,9")
    for seed in ("99999999999999999999999", "-1"):
        refused(train(f"--seed={seed}"), "--seed must be between 0 and 9223372036854775807")
    refused(train("--steps", "-1"), "--steps must be at least 0")
    refused(train("--policy", "full"), "invalid choice")
    refused(train("--device", "tpu9"), "--device tpu9 cannot be used")
    refused(train("--device", "meta"), "--device meta cannot be used")
    refused(run("train", source, "--data", tmp_path / "none", "--out", tmp_path / "k"), "No such file")
    refused(run("train", source, "--data", tmp_path, "--out", tmp_path / "k"), "holds no .txt file")
    refused(run("train", source, "--data", text, "--out", tmp_path), "is a folder")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_activations_names_the_layer(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="the input of layer 1 holds NaN or inf"):
        trained(folder, text)
    (left,) = (p for p in tmp_path.iterdir() if p.name != "model")
    assert [p.name for p in left.iterdir()] == ["layer_0.safetensors"]  # the layer below is finished


def test_the_command(source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "k.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run("train", source, "--data", text, "--out", out, *OPTIONS)
    assert result.code == 0, result.err
    assert "layer 1" in result.err
    assert out.name in result.out
    assert json.dumps(Kernels.load(out).provenance)


def test_without_text_the_shipped_one_is_used(source: Path, tmp_path: Path, run: Run) -> None:
    result = run("train", source, "--out", tmp_path / "k.safetensors", *OPTIONS)
    assert result.code == 0, result.err
    assert "training on the text that ships with less-export" in result.err
    (facts,) = Kernels.load(tmp_path / "k.safetensors").provenance["data"]
    assert facts["name"] == "calibration"


# ------------------------------------------------------------------ parts


def test_shares_of_mixed_text() -> None:
    sources = [data.Source("a", "a" * 1000), data.Source("b", "b" * 30), data.Source("c", "c" * 1000)]
    corpus = data.sequences(sources, lambda t: [ord(c) for c in t], 1, 12, 11, seed=0)
    assert {n: corpus.origin.count(n) for n in "abc"} == {"a": 5, "b": 3, "c": 4} or {
        n: corpus.origin.count(n) for n in "abc"
    } == {"a": 4, "b": 3, "c": 5}
    assert corpus.ids.shape == (12, 11)
    assert bool((corpus.ids[:, 0] == 1).all())
    for row, name in zip(corpus.ids, corpus.origin, strict=True):
        assert set(row[1:].tolist()) == {ord(name)}


def test_a_local_dataset(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("Alice", "a cat")))
    (source,) = data.read([f"hf:{tmp_path}:train"])
    assert source.text == "Alice\na cat"
    (tmp_path / "data.jsonl").write_text(json.dumps({"words": "Alice"}) + "\n")
    with pytest.raises(UsageError, match="no column 'text'"):
        data.read([f"hf:{tmp_path}"])
    with pytest.raises(UsageError, match="cannot be loaded"):
        data.read([f"hf:{tmp_path}/none"])


def test_wikitext_is_put_back_to_plain_text() -> None:
    raw = " = = Robert Boulter = = \n \n He was 24 @-@ year old , and ( in 2000 ) won 1 @,@ 000 prizes . \n"
    assert data.plain(raw) == "Robert Boulter\nHe was 24-year old, and (in 2000) won 1,000 prizes. \n"
    assert data.plain("a , b") == "a , b"


def test_special_tokens_that_are_written_in_a_text_are_named(text: Path, tmp_path: Path, run: Run) -> None:
    folder = model_folder(tmp_path / "model")
    token, *_ = tokens = data.special_tokens(resolve(str(folder)).tokenizer())
    assert len(token) > 2
    raw = tmp_path / "raw.txt"
    raw.write_text(f"{token} {text.read_text()} {token}")
    says = rf"raw.txt contains special tokens of the model: {re.escape(token)} \(2 times\); remove them, unless"
    with pytest.warns(UserWarning, match=says):
        trained(folder, raw, steps=0)
    with pytest.warns(UserWarning, match=says):
        calibration.calibrate(str(folder), tmp_path / "c.safetensors", [str(raw)], seqs=2, seq_len=LENGTH)
    options = ("--seqs", 2, "--seq-len", LENGTH, "--positions", 8, "--budget", 8, "--compare", "full")
    assert re.search(says, run("eval", folder, "--data", raw, *options).err)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.warn_of_special_tokens(data.read([str(text)]), tokens)


def test_shipped_texts_do_not_overlap() -> None:
    calibration, held_out = data.shipped("calibration").text, data.shipped("held_out").text
    assert len(calibration) > 700_000
    lines = {x for x in calibration.splitlines() if len(x) > 75}
    assert not [x for x in held_out.splitlines() if len(x) > 75 and x in lines]


def test_a_loss_that_explodes_is_an_error(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(fit.Fit, "rate_at", lambda self, step: float("nan"))
    with pytest.raises(LessExportError, match="the loss became nan in step 1"):
        trained(folder, text)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
