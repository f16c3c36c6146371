"""A bundle of format 1, as its release wrote it (tests/data/format1): it opens, and computes what it computed then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from less_export import open_bundle
from less_export.bundle.artifact import Bundle
from less_export.tensorrt import engine

from .bundles import PROMPT
from .conftest import PLUGIN_ARCH

BUNDLE = Path(__file__).parent / "data" / "format1"
#: What it generated, greedily and past its end-of-text tokens.
TOKENS = (192, 171, 11, 155, 222, 171, 148, 72, 192, 148, 192, 222, 169, 6, 267, 181, 192, 222, 169, 148, 222, 169)
TOKENS += (167, 220)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_it_generates_what_it_did(bundle: Path, backend: str) -> None:
    generator = open_bundle(bundle, backend=backend)
    (result,) = generator.generate([PROMPT], max_new_tokens=len(TOKENS), temperature=0, ignore_eos=True)
    assert result.token_ids == TOKENS
    assert result.prompt_tokens == 43


def test_its_scores_never_fade() -> None:
    for artifact in Bundle.open(BUNDLE).manifest.artifacts:
        assert {s.score_half_life for s in artifact.contract.layers} == {None}


def test_an_engine_is_built_from_its_graph(bundle: Path, plugin_library: Path, tmp_path: Path) -> None:
    """The nodes of version 1 of the operator have no decay."""
    artifact = Bundle.open(bundle).artifact("trt")
    assert artifact is not None
    info = engine.build_plan(
        (bundle / artifact.file).read_bytes(), artifact.contract, out=tmp_path / "engine.plan", weights_dir=bundle,
        gpu_arch=PLUGIN_ARCH, library=plugin_library,
    )  # fmt: skip
    assert info.plugin_layers == 2
