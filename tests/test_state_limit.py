"""Past the length that kernels were trained at, the state weighs as much as it did there, on every path."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export.config import ExportConfig
from less_export.contract import Heads
from less_export.evaluation import perplexity, variants
from less_export.evaluation.subject import open_subject
from less_export.less.feature_maps import Kernels, random_kernels, weight_limit

from . import bundles
from .bundles import Run

pytest_plugins = ["tests.bundles"]

LENGTH, TRAINED = 60, 20


@pytest.fixture
def kernels(kernel_file: Path, tmp_path: Path) -> Path:
    """Kernels that were trained on sequences of TRAINED tokens."""
    loaded = Kernels.load(kernel_file)
    for feature_map in loaded.layers.values():
        feature_map.length = TRAINED
    loaded.save(tmp_path / "kernels.safetensors")
    return tmp_path / "kernels.safetensors"


def test_what_log_phi_loses() -> None:
    lost = weight_limit(torch.tensor([[0, 19, 39], [2**31 - 1, 20, 79]], dtype=torch.int32), 20)
    assert (lost.dtype, lost.shape) == (torch.float32, (2, 1, 3, 1))
    want = [[0, 0, -math.log(2)], [-math.log(2**31 / 20), -math.log(21 / 20), -math.log(4)]]
    torch.testing.assert_close(lost[:, 0, :, 0], torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parametrisation", ["exp", "paper"])
def test_features_of_a_sequence(parametrisation: str) -> None:
    """Whatever a query reads, a state of n tokens weighs no more than one of TRAINED tokens."""
    (feature_map,) = random_kernels([Heads(4, 2, 8)], [0], 3, 16, parametrisation).layers.values()
    q, k = torch.randn(2, 4, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
    free, psi = feature_map.features(q, k)
    feature_map.length = TRAINED
    log_phi, same = feature_map.features(q, k)
    assert torch.equal(psi, same)
    assert torch.equal(log_phi[:, :, :TRAINED], free[:, :, :TRAINED])
    tokens = torch.arange(1, LENGTH + 1.0)[:, None]
    weights = tokens * torch.exp(log_phi.double() - free.double())
    torch.testing.assert_close(weights, tokens.clamp(max=TRAINED).double().expand_as(weights), rtol=1e-5, atol=0)


def test_the_length_is_in_the_file(kernels: Path, kernel_file: Path) -> None:
    assert {m.length for m in Kernels.load(kernels).layers.values()} == {TRAINED}
    assert {m.length for m in Kernels.load(kernel_file).layers.values()} == {None}


@pytest.mark.parametrize("chunk", [1, 9])
def test_the_simulation_is_the_stream(chunk: int, source: Path, kernels: Path, kernel_file: Path) -> None:
    config = ExportConfig(budget="12", slots="model", max_distance="none")
    ids = torch.randint(2, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    positions, found = torch.arange(10, LENGTH - 1), []
    for file in (kernels, kernel_file):
        subject = open_subject(str(source), config, file, True)
        (variant,) = variants.build(["less"], subject.plan, subject.kernels, LENGTH, "float32")
        simulated = perplexity.simulated(subject.model, ids, variant, chunk, positions)
        streamed = perplexity.streamed(
            subject.backend(variant, "torch", 2, chunk), ids.numpy(), chunk, positions.tolist()
        )
        np.testing.assert_allclose(simulated, streamed, rtol=1e-4)
        found.append(simulated)
    within = TRAINED - 10
    np.testing.assert_allclose(found[0][:, :within], found[1][:, :within], rtol=1e-6)
    assert np.abs(found[0] - found[1])[:, within:].max() > 1e-3


def test_a_bundle_follows(source: Path, kernels: Path, tmp_path: Path, run: Run) -> None:
    """The graph on ONNX Runtime, far past the trained length, against the torch reference."""
    out = bundles.bundle(source, tmp_path / "bundle", kernels=kernels, logits="all")
    result = run("check", out)
    assert result.code == 0, result.err
    subject = open_subject(str(out), ExportConfig(), None, True)
    (variant,) = variants.build(["less"], subject.plan, subject.kernels, LENGTH, "float32")
    ids = torch.randint(2, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(13, LENGTH - 1)
    simulated = perplexity.simulated(subject.model, ids, variant, 1, positions)
    streamed = perplexity.streamed(subject.backend(variant, "ort", 2, 1), ids.numpy(), 1, positions.tolist())
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)
