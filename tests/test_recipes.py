"""Recipes: their facts describe the models of the hub, and a checkpoint must be what its recipe says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from less_export.cli.recipes import recipe_figures
from less_export.cli.tables import size
from less_export.contract import Heads
from less_export.errors import ModelError
from less_export.hf import recipes, sources
from less_export.hf.recipes import Recipe
from less_export.hf.sources import described
from less_export.hf.surgery import discover
from less_export.hf.weights import bare_model
from less_export.less.feature_maps import random_kernels

from .bundles import Run, refused

pytest_plugins = ["tests.bundles"]

#: Parameters of the hub's checkpoints; of gemma3-4b without its vision tower.
PARAMETERS = {
    "falcon-7b": 6_921_720_704,
    "gemma3-1b": 999_885_952,
    "gemma3-270m": 268_098_176,
    "gemma3-4b": 3_880_263_168,
    "granite-3.3-2b": 2_533_539_840,
    "llama2-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "olmo2-7b": 7_298_617_344,
    "phi3-mini-4k": 3_821_079_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
}


def recipe(name: str, **architecture: Any) -> Recipe:
    """A recipe with some facts changed."""
    original = recipes.load(name)
    assert original is not None
    own = None if "num_hidden_layers" in architecture else original.layer_budgets
    return dataclasses.replace(original, architecture=original.architecture | architecture, layer_budgets=own)


def parameters(r: Recipe) -> int:
    return sum(p.numel() for p in bare_model(described(r), torch.float32).parameters())


def test_all_are_tested() -> None:
    assert sorted(PARAMETERS) == recipes.names()


@pytest.mark.parametrize("name", PARAMETERS)
def test_facts_make_the_model(name: str) -> None:
    one, two = (parameters(recipe(name, num_hidden_layers=n)) for n in (1, 2))
    whole = recipe(name)
    assert one + (whole.architecture["num_hidden_layers"] - 1) * (two - one) == PARAMETERS[name]
    config = described(whole)
    assert set(whole.architecture) <= {f.name for f in dataclasses.fields(config)} | {"model_type", *recipes.REWRITTEN}
    few = recipe(name, num_hidden_layers=whole.architecture.get("sliding_window_pattern", 2))
    assert discover(bare_model(described(few), torch.float32)) == few.layers()


def test_memory() -> None:
    llama = recipe("llama2-7b")
    contract = llama.contract()
    assert {(s.policy.name, s.heavy, s.recent, s.rank) for s in contract.layers} == {("h2o", 102, 102, 8)}
    slots = 204 * (2 * (128 + 4) + 8 + 8)  # key and value with their scales, psi, score, position
    low_rank = 8 * (2 * 128 + 4 + 4)  # means, their scale, z
    assert contract.state_bytes() == 32 * 32 * (slots + low_rank)
    assert contract.full_cache_bytes(4096) == 2 << 30
    maps = random_kernels([Heads(32, 32, 128)], [0], llama.rank, llama.hidden)
    assert llama.kernel_bytes() == 32 * maps.nbytes()
    gemma = recipe("gemma3-1b").contract()  # 22 layers see 512 tokens, the other 4 everything
    assert gemma.full_cache_bytes(4096) == (22 * 512 + 4 * 4096) * 2 * 256 * 2
    assert [i for i, s in enumerate(gemma.layers) if s.absorb] == [5, 11, 17, 23]
    phi = recipe("phi3-mini-4k").contract()
    assert {(s.policy.name, s.capacity, s.window, s.absorb) for s in phi.layers} == {("h2o", 204, 2047, True)}
    assert phi.full_cache_bytes(32768) == 32 * 2047 * 2 * 32 * 96 * 2


def test_memory_at_the_papers_budgets() -> None:
    for name, context in (("llama2-7b", 4096), ("llama2-13b", 4096), ("falcon-7b", 2048)):
        r = recipe(name)
        assert r.context == context
        memory = recipe_figures(r)["memory"]
        heads = sum(x.kv_heads for x in r.layers())
        width, low_rank = r.layers()[0].head_dim, r.rank * (2 * r.layers()[0].head_dim + 8)
        slots = {"2%": context // 50 // 2 * 2, "5%": context // 20 // 2 * 2, "10%": context // 10 // 2 * 2}
        expected = {b: heads * (n * (2 * (width + 4) + r.rank + 8) + low_rank) for b, n in slots.items()}
        assert memory["state_bytes_at_budget"] == expected
        assert memory["state_bytes"] == expected["5%"]


@pytest.mark.parametrize(
    ("name", "within"),
    [("falcon-7b", ["2048"]), ("llama2-7b", ["2048", "4096"]), ("gemma3-1b", ["2048", "4096", "32768"])],
)
def test_full_caches_are_marked_beyond_the_models_positions(name: str, within: list[str], run: Run) -> None:
    (figures,) = (r for r in json.loads(run("recipes", "--json").out) if r["name"] == name)
    full = figures["memory"]["full_cache_bytes"]
    contract = recipe(name).contract()
    assert full == {str(n): contract.full_cache_bytes(n) for n in (2048, 4096, 32768)}
    out = run("recipes").out
    (row,) = (line for line in out.splitlines() if line.split()[:1] == [name])
    assert [f"{size(full[n])}{'' if n in within else '*'}" in row for n in full] == [True] * 3
    assert row.count("*") == 3 - len(within)
    assert "*: more tokens than the model has positions." in out


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama2-7b", {"num_hidden_layers": 33}, "num_hidden_layers = 33, the recipe 32"),
        ("llama3.1-8b", {"rope_theta": 5e5 + 1}, "500001.0"),
        ("llama3.1-8b", {"rope_scaling": None}, "'rope_type': 'default'"),
        ("gemma3-1b", {"sliding_window_pattern": 2}, "layer_types = "),
        ("mistral-7b", {"sliding_window": 4096}, "sliding_window = 4096, the recipe None"),
        ("smollm3-3b", {"no_rope_layer_interval": 2}, "no_rope_layer_interval = 2, the recipe 4"),
        ("qwen3-8b", {"tie_word_embeddings": True}, "tie_word_embeddings = True, the recipe False"),
    ],
)
def test_checkpoint_of_another_model(
    name: str, changes: dict[str, Any], says: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "hub", tmp_path / "out"
    monkeypatch.setattr(sources, "_download", lambda hub, patterns: folder)
    described(recipe(name)).save_pretrained(folder)
    assert sources.resolve(name).folder == folder
    described(recipe(name, **changes)).save_pretrained(folder)
    refused(run(name, "--out", out), "is not the model of recipe", says)
    assert not out.exists()


def test_facts_that_make_no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="recipe llama2-7b does not describe a model of transformers"):
        described(recipe("llama2-7b", model_type="lama"))


def test_facts_of_another_architecture() -> None:
    with pytest.raises(ModelError, match=r"^recipe llama2-7b .*: architecture.multi_query is not a key of Llama"):
        described(recipe("llama2-7b", multi_query=True))


def test_what_is_refused_is_not_downloaded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 mini with 128k: the refusal of longrope must not download 8 GB of weights."""
    downloads: list[list[str]] = []

    def snapshot_download(hub: str, allow_patterns: list[str]) -> str:
        downloads.append(allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = described(recipe("phi3-mini-4k", max_position_embeddings=131072, num_hidden_layers=2)).to_dict()
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config |= {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 4096}
    del config["rope_parameters"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    result = run("microsoft/Phi-3-mini-128k-instruct", "--out", tmp_path / "out")
    refused(result, "rotary embedding 'longrope' depends on the longest row")
    assert downloads == [sources._SMALL_FILES]
    assert not (tmp_path / "out").exists()
