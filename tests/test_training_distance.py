"""Training for layers with a largest distance: on unrotated queries and keys, with the outputs of rotated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export import open_bundle
from less_export.config import ExportConfig
from less_export.contract import LayerSpec, Policy
from less_export.evaluation import perplexity
from less_export.evaluation.subject import open_subject
from less_export.evaluation.variants import Variant
from less_export.hf import rotary as probes
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.rotary import arranged
from less_export.hf.weights import bare_model
from less_export.less import rotary, simulate
from less_export.less.feature_maps import Kernels
from less_export.plan import exact_layer
from less_export.training import attention, fit, initialisation, job
from less_export.training.additions import Addition

from . import bundles
from .oracle import frequencies_of
from .test_training_runtime import loaded, validation
from .training_support import LENGTH, QUICK, model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]

LAYER = LayerSpec(4, 2, 8, 0.4, Policy.H2O, 5, 6, 0, True, 11, 3, None, max_distance=60)
TABLE = rotary.table(torch.from_numpy(frequencies_of(LAYER)), 64)


def activations(tokens: int) -> torch.Tensor:
    return torch.randn(2, 8, tokens, 8, generator=torch.Generator().manual_seed(0))


def test_evictions_are_those_of_rotated_queries_and_keys() -> None:
    """And what the kernels read is not rotated."""
    x, addition = activations(40), Addition(torch.eye(32), None, None, torch.nn.Identity())
    turned = torch.cat([simulate.turned(x[:, :6], TABLE), x[:, 6:]], 1)
    targets = torch.zeros(2, 40, 32)
    mine = fit.prepare(x, targets, LAYER, addition, "cpu", None, TABLE)
    theirs = fit.prepare(turned, targets, replace(LAYER, max_distance=None), addition, "cpu")
    assert torch.equal(mine.evicted_at, theirs.evicted_at)
    for name in ("out", "total"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.q, x[:, :4])
    queries = torch.arange(12, 40)
    masses = [initialisation.true_mass(p.q, p.k, LAYER, p.evicted_at, queries, p.rotary) for p in (mine, theirs)]
    torch.testing.assert_close(*masses, rtol=1e-4, atol=1e-4)


def test_fitting_computes_the_operators_output_beyond_the_clamp() -> None:
    layer, x = replace(LAYER, max_distance=9), activations(40)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(32, 12, generator=generator)
    addition = Addition(projection, None, None, torch.nn.Identity())
    prepared = fit.prepare(x, torch.zeros(2, 40, 12), layer, addition, "cpu", None, TABLE)
    feature_map = fit.begin(prepared, "exp", 3, 4, generator)
    q, k, v = x.split([4, 2, 2], 1)
    got, _ = prepared.predict(feature_map, torch.arange(40))
    want = simulate.attend(q, k, v, layer, (feature_map.log_phi(q), feature_map.psi(k)), 1, None, TABLE)
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2) @ projection, rtol=1e-4, atol=1e-4)


def test_mean_turn_is_the_mean_of_rotated_products() -> None:
    q, k = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(2))
    far = torch.arange(LAYER.capacity, 64)
    turned = rotary.rotate(k[:, None].expand(-1, len(far), -1), TABLE, -far)
    want = (q[:, None] * turned).sum(-1).mean(1)
    turn = initialisation.mean_turn(TABLE, LAYER)
    torch.testing.assert_close((q * (k @ turn.T)).sum(-1), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(initialisation.mean_turn(None, LAYER), torch.eye(8))


def test_full_caches_are_the_models_own(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    model, plan = loaded(folder, {})
    tables = probes.tables(probes.probe(bare_model(model.config, torch.float32)), LENGTH)
    ids = torch.arange(LENGTH) * 7 % 300
    positions = torch.arange(5, LENGTH - 1)
    caches, decoder = [exact_layer(s, LENGTH) for s in plan], LayerwiseDecoder(model, plan)
    with torch.no_grad():
        passed = decoder.run(ids[None], lambda call: attention.attend(*arranged(call, tables), caches, {}, {}), False)
        assert passed.last is not None
        got = decoder.log_probabilities(passed.last[0, positions])
        want = torch.log_softmax(model(input_ids=ids[None]).logits[0, positions], -1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_another_largest_distance_does_not_resume(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for far in (20, 30):
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, max_distance=far, steps=1)
    assert len(list(tmp_path.glob(".model.safetensors.*"))) == 2


def test_a_bundle_runs_kernels_that_were_trained_on_unrotated_ones(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 slots, past the clamp, through every stage; its streamed scores are those of the simulation."""
    folder, far = model_folder(tmp_path / "model"), 20
    file, reports = trained(
        folder, text, max_distance=far, slots="int8", layer_budgets="auto", end_to_end=True, tune_steps=4, steps=60
    )
    kernels = Kernels.load(file)
    assert kernels.provenance["rotated"] is False
    assert kernels.provenance["centring"]["rotated"] is False
    assert any(r.less < 0.95 * r.sparse for r in reports)
    budgets = kernels.provenance["layer_budgets"]
    options = {"budget": QUICK["budget"], "layer_budgets": budgets, "context": bundles.CONTEXT, "logits": "all"}
    bundle = bundles.bundle(folder, tmp_path / "b", kernels=file, max_distance=far, slots="int8", **options)
    subject = open_subject(str(bundle), ExportConfig(), None, whole_precision=True)
    assert {s.max_distance for s in subject.plan} == {far}
    ids, positions = validation(folder, text), torch.arange(LENGTH - 1)
    variant = Variant("less", subject.plan, subject.kernels)
    tables = subject.rotary_tables(subject.plan, LENGTH)
    simulated = perplexity.simulated(subject.model, ids, variant, 1, positions, rotary=tables)
    streamed = perplexity.streamed(open_bundle(bundle).backend, ids.numpy(), 1, list(range(LENGTH - 1)))
    np.testing.assert_allclose(simulated, streamed, rtol=1e-3, atol=2e-3)
