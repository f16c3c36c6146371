"""Which weights of a checkpoint folder are exported, and in which dtypes: what transformers would load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from less_export import open_bundle
from less_export.errors import ModelError
from less_export.hf import sources, weight_files

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused
from .test_downloads import HUB, SHARDS, SINGLE, Hub, hub, put  # noqa: F401  (hub is a fixture)

pytest_plugins = ["tests.bundles"]

INDEX = "model.safetensors.index.json"
IDS = [0, *range(40, 60)]


def greedy(model: Any, count: int = 8) -> list[int]:
    ids = list(IDS)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(IDS) :]


def transformers(folder: Path) -> list[int]:
    """What transformers continues :data:`IDS` with."""
    return greedy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def exported(folder: Path, out: Path) -> list[int]:
    """What an export of the folder, in which nothing is evicted, continues :data:`IDS` with."""
    bundle = open_bundle(bundles.bundle(folder, out, policy="full"))
    return list(bundle.generate([IDS], max_new_tokens=8, ignore_eos=True)[0].token_ids)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return bundles.copy(source, tmp_path / "model")


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights with which the model answers something else: the layers swapped."""
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    tensors = load_file(folder / SINGLE)
    found = {n: next((s for s in swap if s in n), "") for n in tensors}
    return {n.replace(found[n], swap.get(found[n], "")): t for n, t in tensors.items()}


# ------------------------------------------------------------------ which files


def put_single(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / name, {"format": "pt"})


def put_shards(folder: Path, index: str, tensors: dict[str, torch.Tensor]) -> None:
    where = {n: SHARDS[i % 2] for i, n in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({n: tensors[n] for n in where if where[n] == shard}, folder / shard, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("stated", [None, "mine.safetensors", "mine.safetensors.index.json"])
def test_two_checkpoints_in_one_folder(stated: str | None, folder: Path, tmp_path: Path) -> None:
    """model.safetensors comes before an index, and what config.json names before both."""
    mine, other = load_file(folder / SINGLE), other_weights(folder)
    want = transformers(folder)
    if stated is None:
        put_shards(folder, INDEX, other)
    elif stated.endswith(".json"):
        put_single(folder, SINGLE, other)
        put_shards(folder, stated, mine)
    else:
        put_single(folder, SINGLE, other)
        put_shards(folder, INDEX, other)
        put_single(folder, stated, mine)
    bundles.edit_json(folder / "config.json", transformers_weights=stated)
    assert transformers(folder) == want
    assert exported(folder, tmp_path / "b") == want
    for name in (SINGLE, "mine.safetensors"):
        (folder / name).unlink(missing_ok=True)
    if stated != "mine.safetensors.index.json":
        put_shards(folder, INDEX, other)
        bundles.edit_json(folder / "config.json", transformers_weights=None)
        assert transformers(folder) != want
        assert exported(folder, tmp_path / "c") == transformers(folder)


@pytest.mark.parametrize(
    ("stated", "says"),
    [("../model.safetensors", "not in its folder"), ("pytorch_model.bin", "only safetensors"), (3, "only safetensors")],
)
def test_weights_that_config_json_may_not_name(stated: object, says: str, folder: Path) -> None:
    bundles.edit_json(folder / "config.json", transformers_weights=stated)
    with pytest.raises(ModelError, match=says):
        weight_files.checkpoint_files(folder)


def test_a_single_file_on_the_hub_comes_before_an_index(hub: Hub) -> None:  # noqa: F811
    put(hub, SINGLE, *SHARDS, index=SHARDS)
    assert hub.fetched() == {SINGLE}
    assert [p.name for p in weight_files.checkpoint_files(hub.cache)] == [SINGLE]


def test_the_file_that_config_json_names_is_fetched(hub: Hub) -> None:  # noqa: F811
    bundles.edit_json(hub.files / "config.json", transformers_weights="mine.safetensors")
    put(hub, SINGLE, "mine.safetensors", *SHARDS, index=SHARDS)
    assert hub.fetched() == {"mine.safetensors"}
    hub.reachable = False
    assert hub.fetched() == {"mine.safetensors"}


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights(name: str, folder: Path, run: Run, tmp_path: Path) -> None:
    (folder / name).write_text("{}")
    result = run(folder, "--out", tmp_path / "b", *QUICK_OPTIONS)
    refused(result, f"has an adapter beside its weights ({name})", "merge_and_unload", "move the adapter away")
    assert not (tmp_path / "b").exists()


def test_an_adapter_alone(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    refused(run(folder, "--out", tmp_path / "b"), f"{folder} is an adapter for org/base", "merge_and_unload")
    (folder / "adapter_config.json").write_text("[")
    refused(run(folder, "--out", tmp_path / "b"), f"{folder} is an adapter (adapter_config.json), not a whole model")


def test_an_adapter_on_the_hub(hub: Hub) -> None:  # noqa: F811
    (hub.files / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"^{HUB} has an adapter beside its weights"):
        sources.resolve(HUB)


def test_weights_of_another_name_beside_none_of_an_adapter(folder: Path) -> None:
    shutil.move(folder / SINGLE, folder / "weights.safetensors")
    (folder / "adapter_model-2.safetensors").write_bytes(b"x")
    assert [p.name for p in weight_files.checkpoint_files(folder)] == ["weights.safetensors"]


# ------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("config", ["stored", "float16"])
@pytest.mark.parametrize(
    "kind",
    [
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
    ],
    ids=str,
)
def test_dtypes_that_are_cast(
    kind: torch.dtype, config: str, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    scale = 1 if kind.is_floating_point else 10
    tensors = {n: (scale * t).to(kind) for n, t in load_file(folder / SINGLE).items()}
    if kind == torch.float64:  # which float32 cannot hold
        tensors = {n: t * (1 + 2.0**-30) for n, t in tensors.items()}
    put_single(folder, SINGLE, tensors)
    stored_as = str(kind).removeprefix("torch.") if kind == torch.float64 else None
    bundles.edit_json(folder / "config.json", dtype=stored_as if config == "stored" else config)
    assert exported(folder, tmp_path / "b") == transformers(folder)
    bundle = tmp_path / "b"
    stored = load_file(bundle / "converted.safetensors")
    assert {n: t.dtype for n, t in stored.items()} == dict.fromkeys(
        tensors, torch.bfloat16 if kind.itemsize == 1 and kind.is_floating_point else torch.float32
    )
    assert all(torch.equal(t, tensors[n].to(t.dtype)) for n, t in stored.items())
    assert not (bundle / SINGLE).exists()
    named = [str(w.message) for w in recwarn if "codes of a quantised weight" in str(w.message)]
    assert bool(named) == (not kind.is_floating_point)


def test_one_tensor_of_another_dtype(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / SINGLE)
    put_single(folder, SINGLE, {**tensors, name: tensors[name].double()})
    assert exported(folder, tmp_path / "b") == transformers(folder)
    assert load_file(tmp_path / "b" / "converted.safetensors").keys() == {name}
    assert (tmp_path / "b" / SINGLE).samefile(folder / SINGLE)


def test_tied_embeddings_of_another_dtype(tmp_path: Path) -> None:
    folder = bundles.checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    tensors = {n: t.double() for n, t in load_file(folder / SINGLE).items()}
    assert "lm_head.weight" not in tensors
    put_single(folder, SINGLE, tensors)
    assert exported(folder, tmp_path / "b") == transformers(folder)
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "converted.safetensors")


def test_a_dtype_that_no_weight_has(folder: Path, run: Run, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    put_single(folder, SINGLE, {**tensors, "lm_head.weight": tensors["lm_head.weight"].cfloat()})
    refused(run(folder, "--out", tmp_path / "b", *QUICK_OPTIONS), "'lm_head.weight' has dtype C64")


def test_codes_of_another_shape(folder: Path, run: Run, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    codes = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    put_single(folder, SINGLE, {**tensors, name: codes})
    refused(run(folder, "--out", tmp_path / "b", *QUICK_OPTIONS), f"'{name}' is [768, 1]", "different models")
