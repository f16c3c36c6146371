"""Random checkpoints: true shape, complete or absent, written once, and exported like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

from less_export import open_bundle
from less_export.bundle.artifact import Bundle
from less_export.cli.ending import FAILED, INTERRUPTED
from less_export.config import ExportConfig
from less_export.errors import UsageError
from less_export.hf import random_checkpoint, recipes, sources, weight_files, weights
from less_export.hf.sources import described

from . import bundles, families
from .bundles import QUICK_OPTIONS, Run, generated, refused

pytest_plugins = ["tests.bundles"]

_SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_NARROW = {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4, "max_position_embeddings": 256}
#: Recipe that the tiny one is based on, and changes in addition to its sizes.
_KINDS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {},  # biases
    "gemma3-1b": {"sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},  # tied, 1 + w
    "olmo2-7b": {},  # norms of queries and keys
    "phi3-mini-4k": {"sliding_window": 8, "pad_token_id": 0},  # fused projections
    "falcon-7b": {},  # layer norms with biases
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``tiny(kind, **facts)`` replaces all recipes by one, "tiny", of a few kilobytes."""

    def put(kind: str, **facts: Any) -> None:
        recipe = recipes.load(kind)
        assert recipe is not None
        sizes = {k: v for k, v in (_SIZES | _NARROW).items() if k in recipe.architecture}
        facts = recipe.architecture | sizes | _KINDS[kind] | facts
        tiny_recipe = dataclasses.replace(recipe, name="tiny", architecture=facts, context=64, chunk=16, budget="50%")
        monkeypatch.setattr(recipes, "names", lambda: ["tiny"])
        monkeypatch.setattr(recipes, "_files", lambda: {"tiny": None})
        monkeypatch.setattr(recipes, "load", lambda name: tiny_recipe if name == "tiny" else None)

    return put


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}


def write(folder: Path, config: Any, seed: int = 0) -> Path:
    random_checkpoint.write(config, folder, seed)
    return folder


def llama(**changes: Any) -> tr.LlamaConfig:
    return tr.LlamaConfig(**{**_SIZES, **_NARROW, "dtype": torch.bfloat16, "initializer_range": 0.02, **changes})


# ------------------------------------------------------------------ contents


@pytest.mark.parametrize("kind", _KINDS)
def test_hugging_face_loads_it(
    kind: str, tiny: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_checkpoint, "_SHARD", 20_000)
    tiny(kind)
    source = random_checkpoint.random_source("tiny", ExportConfig(random_weights=True), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"weights are random, 0.00 GB written to .*tiny-random$"):
        source.fetch()
    assert source.folder == tmp_path / "tiny-random"
    assert len(list(source.folder.glob("model-*-of-*.safetensors"))) > 2
    model, report = tr.AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert model.dtype == torch.bfloat16
    stored = tensors(source.folder)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    index = json.loads((source.folder / "model.safetensors.index.json").read_text())
    assert (index["metadata"]["total_size"], sorted(index["weight_map"])) == (size, sorted(stored))
    assert sorted(map(id, model.parameters())) == sorted(id(model.get_parameter(n)) for n in stored)  # tied ones once
    fresh = type(model)(model.config)
    for name, tensor in stored.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, fresh.get_parameter(name).detach().to(tensor.dtype)), name
    logits = model(torch.arange(40)[None]).logits[0].float()
    assert bool(logits.isfinite().all())
    assert logits.std() > 0.01
    assert len(set(logits.argmax(-1).tolist())) > 5


def test_values_are_normal_and_no_two_alike(tmp_path: Path) -> None:
    stored = tensors(write(tmp_path / "c", llama(hidden_size=256, head_dim=64, initializer_range=0.05)))
    matrices = [t.float() for t in stored.values() if t.ndim > 1]
    values = torch.cat([m.flatten() for m in matrices])
    assert abs(float(values.std()) - 0.05) < 1e-3
    assert abs(float(values.mean())) < 1e-3
    assert abs(float((values / values.std()).pow(4).mean()) - 3) < 0.1
    rows = [row for m in matrices for row in m[:, :32].unique(dim=0)]
    assert len(torch.stack(rows).unique(dim=0)) == sum(len(m) for m in matrices)


def test_more_than_a_block_has_no_equal_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "_BLOCK", 1009)
    stored = tensors(write(tmp_path / "c", llama(dtype=torch.float32)))
    table = stored["model.embed_tokens.weight"]  # three times around
    assert len(table.unique(dim=0)) == len(table)
    assert int(torch.linalg.matrix_rank(table)) == 32
    assert abs(float(table.std()) - 0.02) < 2e-3


def test_seeds(tmp_path: Path) -> None:
    one, same, other = (tensors(write(tmp_path / f"{i}", llama(), seed)) for i, seed in enumerate((1, 1, 2)))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if one[n].ndim > 1)


@pytest.mark.parametrize("family", ["mixtral", "opt", "qwen3_moe", "glm4_moe", "gemma4"])
def test_every_name_is_found(family: str, tmp_path: Path) -> None:
    config = (families.FAMILIES | families.VARIANTS)[family]().config
    config.dtype = torch.float32
    folder = write(tmp_path / family, config)
    bare = weights.bare_model(config, torch.float32)
    assert weights.locate(bare, weight_files.checkpoint_files(folder))[1] == []
    stored, fresh = tensors(folder), type(bare)(config)
    buffers = {n for n, _ in fresh.named_buffers() if n in fresh.state_dict()}
    assert bool(buffers) == (family in ("glm4_moe", "gemma4"))
    assert all(torch.equal(stored[n], fresh.get_buffer(n)) for n in buffers)


# ------------------------------------------------------------------ layers


def test_few_layers_are_the_first(tiny: Callable[..., None], tmp_path: Path) -> None:
    tiny("gemma3-1b")
    for count, kinds in ((1, "s"), (2, "ss"), (3, "ssf"), (4, "ssfs")):
        config = ExportConfig(random_weights=True, num_hidden_layers=count, seed=3)
        source = random_checkpoint.random_source("tiny", config, tmp_path / "out")
        source.fetch()
        assert source.folder.name == f"tiny-random-{count}-layers-seed-3"
        assert "".join(x[0] for x in tr.AutoConfig.from_pretrained(source.folder).layer_types) == kinds
        assert len({n.split(".")[2] for n in tensors(source.folder) if ".layers." in n}) == count


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_export_twice(tiny: Callable[..., None], run: Run, tmp_path: Path, quick: None) -> None:
    tiny("gemma3-1b")
    arguments = ("tiny", "--random-weights", *QUICK_OPTIONS, "--num-hidden-layers", 2)
    first = run(*arguments, "--out", tmp_path / "b")
    assert first.code == 0, first.err
    says = "the first 2 layers all slide: use --num-hidden-layers 3 or more, layer 2 is the first that does not"
    assert first.err.count(says) == 1
    folder = tmp_path / "tiny-random-2-layers"
    assert f"less-export: warning: the weights are random, 0.00 GB written to {folder}" in first.err
    assert "ships no tokenizer: generate will take token ids only" in first.err
    before = contents(folder)
    again = run(*arguments, "--out", tmp_path / "x.onnx", "--policy", "full", "--logits", "all")
    assert again.code == 0, again.err
    assert f"taken from {folder}" in again.err
    assert contents(folder) == before
    for name in ("b/model.safetensors", "x.model.safetensors"):
        assert (tmp_path / name).stat().st_ino == before["model.safetensors"][0]
    manifest = Bundle.open(tmp_path / "b", full=True).manifest
    assert (manifest.model["name"], manifest.settings["random_weights"]) == ("tiny", True)
    model = tr.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(0))
    backend = open_bundle(tmp_path / "x.onnx").backend
    backend.open(1)
    got = np.concatenate([backend.step(x.numpy(), np.array([x.shape[1]])) for x in ids.split(16, 1)], 1)
    assert families.relative(got, model(ids).logits.detach().numpy()) < 1e-4
    refused(run("generate", tmp_path / "b", "--prompt", "Hi"), "need a tokenizer")


@pytest.mark.slow
def test_folder_without_weights(run: Run, source: Path, tmp_path: Path, quick: None) -> None:
    shutil.copytree(source, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    result = run(tmp_path / "mine", "--random-weights", "--out", tmp_path / "b", *QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert "no tokenizer" not in result.err
    assert tensors(tmp_path / "mine-random").keys() == tensors(source).keys()
    assert generated(run, tmp_path / "b", "--prompt", bundles.PROMPT)


def test_hub_id_without_its_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    monkeypatch.setattr(sources, "_download", lambda *arguments: downloads.append(arguments) or source)
    random_source = random_checkpoint.random_source("org/mine", ExportConfig(random_weights=True), tmp_path / "out")
    assert downloads == [("org/mine", sources._SMALL_FILES)]
    assert (random_source.folder, random_source.name) == (tmp_path / "mine-random", "mine")
    random_source.fetch()  # nothing from the hub
    assert len(downloads) == 1
    assert tensors(random_source.folder).keys() == tensors(source).keys()


def test_taken_with_a_folder_of_the_tokenizer_and_another_version(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "additional_chat_templates").mkdir()

    for made in (True, False):
        assert random_checkpoint.write(llama(), tmp_path / "c", tokenizer=Tokenizer())[1] == made
        bundles.edit_json(tmp_path / "c" / "config.json", transformers_version="0.0")
    bundles.edit_json(tmp_path / "c" / "config.json", rms_norm_eps=0.5)
    with pytest.raises(UsageError, match="not the random checkpoint that this command makes"):
        random_checkpoint.write(llama(), tmp_path / "c", tokenizer=Tokenizer())


@pytest.mark.parametrize("there", ["another", "nothing", "half"])
def test_another_checkpoint_in_its_place(there: str, tiny: Callable[..., None], run: Run, tmp_path: Path) -> None:
    tiny("qwen2.5-7b")
    folder = tmp_path / "tiny-random"
    if there == "another":
        write(folder, llama())
    elif there == "nothing":
        folder.mkdir()
    else:
        (write(folder, described(recipes.load("tiny"))) / "model.safetensors").unlink()  # type: ignore[arg-type]
    before = contents(folder)
    result = run("tiny", "--random-weights", "--out", tmp_path / "b")
    refused(result, "tiny-random is not the random checkpoint that this command makes: remove it")
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-random"]


@pytest.mark.parametrize(
    ("error", "says"),
    [(OSError(28, "No space left on device"), "No space left on device; nothing was left"), (KeyboardInterrupt(), "")],
)
def test_nothing_is_left_half_written(
    error: BaseException,
    says: str,
    tiny: Callable[..., None],
    run: Run,
    nothing_left: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny("qwen2.5-7b")
    monkeypatch.setattr(random_checkpoint, "_SHARD", 20_000)
    save = random_checkpoint.save_file

    def fails(content: Any, path: Path, metadata: Any) -> None:
        if "-00002-" in path.name:
            raise error
        save(content, path, metadata)

    monkeypatch.setattr(random_checkpoint, "save_file", fails)
    result = run("tiny", "--random-weights", "--out", nothing_left / "b")
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    refused(result, says or "interrupted; nothing was left behind", after=2, code=code)


def test_what_stays_is_said(
    tiny: Callable[..., None], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("qwen2.5-7b")
    folder = tmp_path / "tiny-random"
    for error, says in ((KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left"), "No space left")):

        def fails(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("less_export.exporter.graphs.trace", fails)
        result = run("tiny", "--random-weights", "--out", tmp_path / "b", *QUICK_OPTIONS)
        assert result.code == (INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED)
        assert result.err.endswith(f"{says}; nothing but the random checkpoint {folder} was left behind\n")
        assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
def test_a_damaged_shard(tiny: Callable[..., None], run: Run, tmp_path: Path, quick: None) -> None:
    tiny("qwen2.5-7b")
    arguments = ("tiny", "--random-weights", "--out", tmp_path / "b", *QUICK_OPTIONS)
    folder = write(tmp_path / "tiny-random", described(recipes.load("tiny")))  # type: ignore[arg-type]
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(run(*arguments), f"{shard} is corrupt or truncated: remove {folder} to have it written again")
    shutil.rmtree(folder)
    assert run(*arguments).code == 0


def test_refused_before_anything_is_written(
    tiny: Callable[..., None],
    run: Run,
    source: Path,
    nothing_left: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny("qwen2.5-7b")

    def fails(*arguments: object, model: object = "tiny", says: str) -> None:
        refused(run(model, "--random-weights", "--out", nothing_left / "b", *arguments), says)

    fails("--num-hidden-layers", 5, says="--num-hidden-layers 5: the model has 4")
    gguf = bundles.gguf_file(tmp_path / "m.gguf", source)
    fails(model=gguf, says="give a recipe or a folder with config.json")
    families.MAIN["llama"]().config.save_pretrained(tmp_path / "long")
    bundles.edit_json(
        tmp_path / "long" / "config.json",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )
    fails(model=tmp_path / "long", says="rotary embedding 'dynamic'")
    model = tr.AutoModelForCausalLM.from_config(described(recipes.load("tiny")))  # type: ignore[arg-type]
    kernels = families.kernels(model, tmp_path / "k.safetensors", rank=4)
    fails("--kernels", tmp_path / "none.safetensors", says="none.safetensors")
    fails("--kernels", kernels, "--rank", 8, says="--rank 8, but the kernels of layer 0 have rank 4")
    fails("--dtype", "bfloat16", says="ONNX Runtime's CPU kernels have no bfloat16")
    fails("--budget", 1000, says="--budget 1000 is more than the context")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime.quantization.neural_compressor.weight_only", None)
        fails("--weights", "int4", says="--weights needs ONNX Runtime")
    families.MAIN["gemma3"]().config.save_pretrained(tmp_path / "gemma")
    fails("--dtype", "float16", model=tmp_path / "gemma", says="Gemma overflows float16")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda _: usage)
    fails(says="the random checkpoint takes 0.0 GB")
    out = nothing_left / "tiny-random"
    refused(run("tiny", "--random-weights", "--out", out), "is where the random checkpoint goes")
