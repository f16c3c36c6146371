"""Bad input: one line, exit code 1, no partial bundle, and existing files untouched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, Gemma3ForCausalLM, Gemma3TextConfig

from less_export.bundle import files
from less_export.bundle.artifact import FORMAT_VERSION, MANIFEST, Manifest
from less_export.contract import Heads
from less_export.less.feature_maps import random_kernels

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused, resign

pytest_plugins = ["tests.bundles"]

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint_copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for tests that damage it."""
    return bundles.copy(source, tmp_path / "mine")


Fails = Callable[..., None]


@pytest.fixture
def fails(run: Run, place: Path) -> Fails:
    """``fails(model, says, *arguments)``: an export over ``out`` and one to a new name fail and change nothing."""

    def call(model: object, says: str, *arguments: object, after: int = 0) -> None:
        before = bundles.snapshot(place)
        for out in ("out", "new", "deep/er/new", "x.onnx"):
            result = run(model, "--out", place / out, *QUICK_OPTIONS, *arguments)
            refused(result, says, after=after)
            assert result.out == ""  # and no prompt is shown
            assert bundles.snapshot(place) == before, out

    return call


# ------------------------------------------------------------------ MODEL


def test_unknown_models(fails: Fails, tmp_path: Path) -> None:
    fails("lama2-7b", "did you mean llama2-7b? MODEL is a recipe (")
    fails("gemma3", "did you mean gemma3-")
    fails("zzz", "unknown model 'zzz': MODEL is a recipe (")
    fails(tmp_path / "nowhere", "unknown model")
    fails("./nowhere", "unknown model")
    fails(__file__, "is a file, not a checkpoint folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "has no config.json")


CONFIGS: dict[str, tuple[Callable[[str], str], str]] = {
    "no JSON": (lambda t: t[:-20], "not a valid JSON file"),
    "no text": (lambda t: "\udcff", "not a valid JSON file"),
    "empty": (lambda t: "", "not a valid JSON file"),
    "a list": (lambda t: "[]", "model_type"),
    "null": (lambda t: "null", "cannot read the configuration"),
    "unknown type": (lambda t: t.replace('"llama"', '"lama"'), "model type `lama`"),
    "an encoder": (
        lambda t: t.replace('"llama"', '"vit"'),
        "transformers cannot build a decoder from this config.json",
    ),
    "a word for a number": (lambda t: t.replace('"hidden_size": 32', '"hidden_size": "x"'), "hidden_size"),
    "no heads": (lambda t: t.replace('"num_attention_heads": 4', '"num_attention_heads": 0'), "configuration"),
    "other heads": (lambda t: t.replace('"num_attention_heads": 4', '"num_attention_heads": 3'), "multiple"),
    "other width": (lambda t: t.replace('"hidden_size": 32', '"hidden_size": 64'), "belong to different models"),
    "own code": (
        lambda t: t.replace('"model_type": "llama"', '"model_type": "own", "auto_map": {"AutoConfig": "own.C"}'),
        "contains custom code",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str, fails: Fails, checkpoint_copy: Path) -> None:
    damage, says = CONFIGS[name]
    text = (checkpoint_copy / "config.json").read_text()
    assert damage(text) != text
    (checkpoint_copy / "config.json").write_bytes(damage(text).encode(errors="surrogateescape"))
    fails(checkpoint_copy, says)


@pytest.mark.slow
def test_an_encoder_with_a_head(tmp_path: Path) -> None:
    """transformers prints a remark when the model is created."""
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    arguments = [sys.executable, "-m", "less_export.cli.main", "bert", "--out", "b"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    refused(bundles.Result(done.returncode, done.stdout, done.stderr), "attention is not causal")


@pytest.mark.slow
def test_quantised_by_nothing(fails: Fails, checkpoint_copy: Path, run: Run, tmp_path: Path, quick: None) -> None:
    bundles.edit_json(checkpoint_copy / "config.json", quantization_config={"bits": 4})
    fails(checkpoint_copy, "is quantised (by a method that config.json does not name)")
    bundles.edit_json(checkpoint_copy / "config.json", quantization_config={})
    assert run(checkpoint_copy, "--out", tmp_path / "b", *QUICK_OPTIONS).code == 0


def test_weights_are_never_random(fails: Fails, checkpoint_copy: Path) -> None:
    """transformers fills in random values for missing weights, and only warns."""
    bundles.edit_json(checkpoint_copy / "config.json", num_hidden_layers=3)
    fails(checkpoint_copy, "lacks model.layers.2.self_attn.q_proj.weight (and 8 more)")


def _header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "corrupt or truncated"),
    "cut length": (lambda d: d[:5], "corrupt or truncated"),
    "cut header": (lambda d: d[:200], "invalid header length"),
    "cut data": (lambda d: d[:-1], "file not fully covered"),
    "random": (lambda d: np.random.default_rng(0).bytes(4000), "corrupt or truncated"),
    "header is no JSON": (lambda d: d[:8] + b"x" + d[9:], "corrupt or truncated"),
    "header is a list": (lambda d: struct.pack("<Q", 2) + b"[]", "corrupt or truncated"),
    "no offsets": (lambda d: _header(d, lambda h: h["lm_head.weight"].pop("data_offsets")), "data_offsets"),
    "other shape": (
        lambda d: _header(d, lambda h: h["lm_head.weight"].update(shape=[9, 9])),
        "invalid shape, data type, or offset",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_safetensors(name: str, fails: Fails, checkpoint_copy: Path) -> None:
    damage, says = FILES[name]
    whole = (checkpoint_copy / WEIGHTS).read_bytes()
    (checkpoint_copy / WEIGHTS).unlink()
    (checkpoint_copy / WEIGHTS).write_bytes(damage(whole))
    fails(checkpoint_copy, says)


def test_missing_weight_files(fails: Fails, tmp_path: Path) -> None:
    sharded = bundles.checkpoint(tmp_path / "sharded", shard_size="60KB")
    shards = sorted(sharded.glob("model-*"))
    assert len(shards) > 1
    shards[1].unlink()
    fails(sharded, f"{shards[1].name} is missing")
    (sharded / "model.safetensors.index.json").write_text("{}")
    fails(sharded, "not a usable index")
    for file in sharded.glob("model*"):
        file.unlink()
    fails(sharded, "no .safetensors file")
    (sharded / "pytorch_model.bin").write_bytes(b"x")
    fails(sharded, "no .safetensors file (convert pytorch .bin files to safetensors first)")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(name: str, fails: Fails, checkpoint_copy: Path) -> None:
    (checkpoint_copy / name).write_text("{")
    fails(checkpoint_copy, "cannot read the tokenizer of")


def test_gguf(fails: Fails, source: Path, tmp_path: Path) -> None:
    """Truncated anywhere: in the metadata, the tensor table or the data (test_commands exports a whole one)."""
    fails(tmp_path / "none.gguf", "does not exist")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"no gguf at all")
    fails(cut, "is not a GGUF file")
    whole = bundles.gguf_file(tmp_path / "whole.gguf", source).read_bytes()
    for size in (4, 20, 500, len(whole) - len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        fails(cut, f"cannot read the configuration of {cut}: ")
    cut.write_bytes(whole.replace(b"llama", b"lamas"))
    fails(cut, "GGUF model with architecture lamas is not supported")


# ------------------------------------------------------------------ options


def test_budgets(fails: Fails, source: Path) -> None:
    fails(source, "--budget 0 leaves no token of a context of 256", "--budget", "0")
    fails(source, "--budget 257 is more than the context of 256 tokens", "--budget", "257")
    fails(source, "more than the context of 64", "--budget", "65", "--context", "64")
    fails(source, "neither a number", "--budget", "lots")
    fails(source, "drop --budget", "--budget", "5", "--policy", "full")
    fails(source, "the model has 2", "--num-hidden-layers", "3")


def test_dtypes(fails: Fails, source: Path, tmp_path: Path) -> None:
    fails(source, "have no bfloat16", "--dtype", "bfloat16")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3TextConfig(vocab_size=64, head_dim=16, num_key_value_heads=1, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    fails(tmp_path / "gemma", "Gemma overflows float16", "--dtype", "float16", "--target", "ort")
    fails(tmp_path / "gemma", "Gemma overflows float16", "--dtype", "float16", "--target", "trt")


def test_kernel_files(fails: Fails, source: Path, kernel_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    random_kernels([Heads(4, 2, 16)] * 2, [0, 1], 3, 6).save(path)
    fails(source, "kernels of another model: layer 0", "--kernels", path)
    random_kernels([Heads(4, 2, 8)] * 3, [0, 1, 2], 3, 6).save(path)
    fails(source, "kernels for layer 2, but the model has 2 layers", "--kernels", path)
    path.write_bytes(kernel_file.read_bytes()[:-5])
    fails(source, "not a usable kernel file", "--kernels", path)
    fails(source, "no kernel file", "--kernels", tmp_path / "none")
    fails(source, "holds no LESS kernels", "--kernels", source / WEIGHTS)
    fails(source, "--rank 4, but the kernels of layer 0 have rank 3", "--kernels", kernel_file, "--rank", "4")


def test_out(run: Run, source: Path, place: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("mine")
    (place / "folder.onnx").mkdir()
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine")
    (place / "foreign").mkdir()
    (place / "foreign" / MANIFEST).write_text("{}")
    (place / "config.json").write_text("{}")
    monkeypatch.chdir(place)
    before = bundles.snapshot(place)
    for out, says in {
        "file": "is a file",
        "file/b": "cannot write",
        "/proc/none/b": "cannot write",
        "full": "holds notes.txt",
        "foreign": "which does not belong to a bundle",
        "config.onnx": "would replace config.json",
        "out/model.onnx": "is inside a bundle",
        "out/engine.plan": "is inside a bundle",
        ".": "names no folder",
        "": "names no folder",
    }.items():
        refused(run(source, "--out", out, *QUICK_OPTIONS), says)
        assert bundles.snapshot(place) == before, out
    refused(run(source, "--out", "x.onnx", "--target", "both", *QUICK_OPTIONS), "one graph")
    refused(run(source, "--out", "x.plan", "--target", "ort", *QUICK_OPTIONS), "drop --target")
    refused(run(source, "--out", "x", "--engine", *QUICK_OPTIONS), "--engine needs --target")
    assert bundles.snapshot(place) == before


# ------------------------------------------------------------------ opening


DAMAGED = ["model.onnx", "model.trt.onnx", "kernels.safetensors", "tokenizer.json"]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture
def broken(kernelled: Path, tmp_path: Path) -> Path:
    """A bundle, for tests that damage it."""
    return bundles.copy(kernelled, tmp_path / "broken")


@pytest.mark.parametrize("name", [*DAMAGED, WEIGHTS, MANIFEST])
def test_flipped_and_missing(name: str, broken: Path, run: Run) -> None:
    whole = (broken / name).read_bytes()
    for at in (40, len(whole) // 2, -1):
        flip(broken / name, at)
        if name == WEIGHTS and at != 40:  # after the header: only --full detects it
            assert run("info", broken).code == 0
            refused(run("check", broken, "--full"), f"{name} is damaged (its hash")
        elif name == MANIFEST:
            refused(run("info", broken), str(broken / MANIFEST), "export again")
        else:
            for arguments in (["info", broken], ["generate", broken, "--prompt", "x"], ["check", broken]):
                refused(run(*arguments), f"{name} is damaged", "export again, or copy the bundle again")
        (broken / name).write_bytes(whole)
    for content in (whole[:-1], whole + b"x", b""):
        (broken / name).write_bytes(content)
        refused(run("info", broken), name)
    (broken / name).unlink()
    refused(run("info", broken), "has no manifest.json" if name == MANIFEST else f"{name} is missing")


def test_damaged_plan(tmp_path: Path, run: Run, single: Path) -> None:
    """A plan (here just a file of bytes) is hashed like a graph."""
    data = json.loads(single.with_name("x.json").read_text())
    manifest = Manifest.parse(json.dumps(data).encode(), "x")
    (tmp_path / "x.plan").write_bytes(b"ftrt" * 100)
    (tmp_path / "x.tokenizer.json").write_bytes(single.with_name("x.tokenizer.json").read_bytes())
    plan = dataclasses.replace(
        manifest.artifacts[0], kind="plan", file="x.plan", sha256=files.sha256(tmp_path / "x.plan")
    )
    (tmp_path / "x.json").write_bytes(dataclasses.replace(manifest, artifacts=(plan,), weights=()).dump())
    assert run("info", tmp_path / "x.plan").code == 0
    flip(tmp_path / "x.plan", 77)
    refused(run("generate", tmp_path / "x.plan", "--prompt", "x"), "x.plan is damaged")


def test_manifests(broken: Path, run: Run) -> None:
    file = broken / MANIFEST
    good = json.loads(file.read_text())
    data = json.loads(file.read_text())
    data["settings"]["budget"] = "99"
    file.write_text(json.dumps(data))
    refused(run("info", broken), "was changed after the export")
    file.write_text(json.dumps(good | {"format_version": FORMAT_VERSION + 1}))
    refused(run("info", broken), f"has format {FORMAT_VERSION + 1}, written by a newer less-export: upgrade")
    for text in ("", "[]", "null", '"x"', "{}", json.dumps({"format_version": 1})):
        file.write_text(text)
        refused(run("info", broken), "is not a usable manifest")
    file.write_text(json.dumps(good))
    assert run("info", broken).code == 0


def test_no_bundle_at_all(run: Run, source: Path, tmp_path: Path) -> None:
    for arguments in (["info"], ["check"], ["generate", "--prompt", "x"]):
        refused(run(*arguments, source), "has no manifest.json", "give a bundle folder")
        refused(run(*arguments, tmp_path / "none"), "none does not exist")
        refused(run(*arguments, tmp_path / "none.plan"), "none.plan does not exist")


def test_graph_of_another_manifest(broken: Path, plain: Path, run: Run) -> None:
    shutil.copyfile(plain / "model.onnx", broken / "model.onnx")
    resign(broken)
    refused(run("generate", broken, "--prompt", "x"), "model.onnx", "export again")


def test_runtime_is_missing(run: Run, plain: Path, fails: Fails, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(run("generate", plain, "--prompt", "x"), "ONNX Runtime cannot be imported", "'less-export[cpu]'")
    refused(run("generate", plain, "--prompt", "x", "--backend", "trt"), "no engine.plan")
    monkeypatch.setattr("tests.test_faults.QUICK_OPTIONS", ())
    fails(source, "needs ONNX Runtime: pip install 'less-export[cpu]', or --no-validate")
