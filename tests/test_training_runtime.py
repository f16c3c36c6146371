"""Errors that training reports are those of the operator with its kernels, token by token; a bundle agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, PreTrainedModel

from less_export import open_bundle
from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.evaluation import perplexity
from less_export.hf import data
from less_export.hf.surgery import AttentionCall, discover, less_attention
from less_export.less import reference
from less_export.less.feature_maps import FeatureMap, Kernels
from less_export.plan import plan_layers
from less_export.testing import empty_state
from less_export.training import job

from . import bundles
from .marks import slow_but
from .training_support import LENGTH, QUICK, model_folder, sliding_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]


def loaded(folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, tuple[LayerSpec, ...]]:
    """The model and the plan of its cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    cache_options = {n: v for n, v in options.items() if n in ("policy", "compress_sliding")}
    cache = ExportConfig(budget=QUICK["budget"], slots=QUICK["slots"], **cache_options)
    return model, plan_layers(discover(model), cache, bundles.CONTEXT, dict.fromkeys(range(2), QUICK["rank"]))


def validation(folder: Path, text: Path) -> Tensor:
    """The sequence [1, LENGTH] that a quick training of :func:`trained` uses for validation."""
    encode, bos = data.encoder(AutoTokenizer.from_pretrained(folder))
    return data.sequences(data.read([str(text)]), encode, bos, QUICK["seqs"] + 1, LENGTH, 0).ids[-1:]


def full(call: AttentionCall, window: int) -> Tensor:
    """Attention over all visible tokens."""
    at = torch.arange(LENGTH)
    mask = (at <= at[:, None]) & (at > at[:, None] - (window or LENGTH))
    return torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, mask, scale=call.scale, enable_gqa=True
    )


def stream(spec: LayerSpec, call: AttentionCall, feature_map: FeatureMap | None) -> Tensor:
    """The layer's attention, computed by the operator one token a step; plain eviction without kernels."""
    if feature_map is None:
        spec = replace(spec, absorb=False, rank=1)
        log_phi, psi = torch.zeros_like(call.q[..., :1]), torch.zeros_like(call.k[..., :1])
    else:
        log_phi, psi = feature_map.log_phi(call.q), feature_map.psi(call.k)
    state, outs = empty_state(spec, 1, poison=True), []
    for t in range(LENGTH):
        piece = [x[:, :, t : t + 1] for x in (call.q, call.k, call.v, log_phi, psi)]
        lengths = torch.tensor([t], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        out, *state = reference.less_attention(*piece, *state, *lengths, **spec.attributes())
        outs.append(out)
    return torch.cat(outs, 2)


def added(model: PreTrainedModel, index: int, x: Tensor) -> Tensor:
    """What a layer's attention output adds to the residual stream."""
    layer = model.model.layers[index]
    out = layer.self_attn.o_proj(x.transpose(1, 2).flatten(2))
    return layer.post_attention_layernorm(out) if isinstance(model, Gemma3ForCausalLM) else out


@torch.no_grad()
def assert_errors(
    folder: Path, text: Path, file: Path, reports: tuple[job.LayerReport, ...], options: dict[str, Any]
) -> None:
    """Assert that both errors of every layer are those of the operator on the validation sequence: what it adds while
    the layers below it run with their kernels, against what it adds with full caches."""
    model, plan = loaded(folder, options)
    kernels, ids = Kernels.load(file), validation(folder, text)
    clean, seen = dict[int, Tensor](), dict[int, AttentionCall]()

    def whole(call: AttentionCall) -> Tensor:
        clean[call.layer] = full(call, plan[call.layer].window)
        return clean[call.layer]

    def compressed(call: AttentionCall) -> Tensor:
        seen[call.layer] = call
        if not plan[call.layer].policy.evicts:
            return full(call, plan[call.layer].window)
        return stream(plan[call.layer], call, kernels.layers.get(call.layer))

    for handler in (whole, compressed):
        with less_attention(model, handler):
            model(input_ids=ids, position_ids=torch.arange(LENGTH)[None], use_cache=False)
    assert set(kernels.layers) == {r.layer for r in reports if r.used}
    for r in reports:
        true = added(model, r.layer, clean[r.layer])
        errors = {None: r.sparse, **({kernels.layers[r.layer]: r.less} if r.used else {})}
        for feature_map, stated in errors.items():
            difference = added(model, r.layer, stream(plan[r.layer], seen[r.layer], feature_map)) - true
            first = plan[r.layer].capacity + 1
            error = difference[:, first:].pow(2).sum() / true[:, first:].pow(2).sum()
            assert float(error) == pytest.approx(stated, rel=1e-3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), *slow_but([(4, 1), (4, 4)])])
@pytest.mark.parametrize("policy", slow_but(["h2o", "sink", "tova"], "h2o"))
def test_training_helps_and_its_errors_are_the_runtimes(
    heads: int, kv_heads: int, policy: str, text: Path, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", heads, kv_heads)
    file, reports = trained(folder, text, policy=policy)
    assert [r.layer for r in reports] == [0, 1]
    assert all(r.less < r.start or r.less < r.sparse for r in reports)
    assert any(r.less < 0.9 * r.sparse for r in reports)
    assert_errors(folder, text, file, reports, {"policy": policy})


@pytest.mark.slow
def test_the_papers_parametrisation(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    file, reports = trained(folder, text, parametrisation="paper", hidden=32, steps=80)
    assert Kernels.load(file).parametrisation == "paper"
    assert any(r.less < r.start for r in reports)
    assert any(r.less < 0.95 * r.sparse for r in reports)
    assert_errors(folder, text, file, reports, {})


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["h2o", "sink", "tova"])
@pytest.mark.parametrize("parametrisation", ["exp", "paper"])
def test_sliding_layers_with_the_policy(policy: str, parametrisation: str, text: Path, tmp_path: Path) -> None:
    folder = sliding_folder(tmp_path / "model")
    options = {"policy": policy, "compress_sliding": True}
    file, reports = trained(folder, text, parametrisation=parametrisation, **options)
    assert [r.layer for r in reports] == [0, 1]
    assert any(r.used for r in reports)
    assert_errors(folder, text, file, reports, options)


@pytest.mark.slow
@pytest.mark.parametrize("parametrisation", ["exp", "paper"])
def test_a_bundle_runs_the_trained_kernels(parametrisation: str, text: Path, tmp_path: Path) -> None:
    """ONNX Runtime, one token a step, against Hugging Face's model whose attention is the operator."""
    folder = model_folder(tmp_path / "model")
    file, _ = trained(folder, text, parametrisation=parametrisation)
    out = bundles.bundle(folder, tmp_path / "bundle", kernels=file, budget=QUICK["budget"], logits="all")
    model, plan = loaded(folder, {})
    kernels, ids = Kernels.load(file), validation(folder, text)

    def handler(call: AttentionCall) -> Tensor:
        return stream(plan[call.layer], call, kernels.layers.get(call.layer))

    with torch.no_grad(), less_attention(model, handler):
        logits = model(input_ids=ids, position_ids=torch.arange(LENGTH)[None], use_cache=False).logits[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    backend = open_bundle(out).backend
    got = perplexity.streamed(backend, ids.numpy(), 1, list(range(LENGTH - 1)))
    np.testing.assert_allclose(got[0], want.numpy(), rtol=1e-4, atol=1e-4)
