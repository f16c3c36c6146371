"""Differences between decoders (rotary kinds, norms, biases, experts, ...), each against Hugging Face.

Every model is exported once, with random kernels and 24 slots: up to 24 tokens nothing is evicted and it must be
the Hugging Face model, afterwards ONNX Runtime must agree with the torch reference. That the variant is at work
at all is told by taking it out of the Hugging Face model, whose logits then change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from less_export.config import ExportConfig
from less_export.contract import Contract
from less_export.exporter.check import twin_config, twin_graph
from less_export.hf import recipes
from less_export.hf.decoder import LessDecoder, fresh_state
from less_export.hf.sources import described
from less_export.hf.surgery import discover
from less_export.less.feature_maps import Kernels
from less_export.plan import plan_layers
from less_export.runtime.ort import OrtBackend

from . import families
from .families import BUDGET, WINDOW, differences, evicted, feed, relative, text
from .marks import some_of

#: Relative tolerance of results that differ only in the order of float32 sums, in one model and between two.
ROUNDING, FLOOR = 2e-5, 5e-6
STEPS = (11, 8, 1, 1, 1, 1, 1)
AFTER = (16, 7, 1, 1, 1)
assert sum(STEPS) == BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("family", some_of({**families.OTHERS, **families.VARIANTS}))
def test_is_the_hugging_face_model_until_it_evicts(family: str, tmp_path: Path) -> None:
    checkpoint = families.save(family, tmp_path / "model")
    model = families.load(checkpoint)
    kernels = families.kernels(model, tmp_path / "kernels.safetensors")
    tiny = families.export(checkpoint, tmp_path / "x", budget=str(BUDGET), kernels=kernels, logits="all")
    ids = text(2, sum(STEPS) + sum(AFTER))
    expected, own_error = families.truth(model, ids[:, :BUDGET])
    torch_backend, ort = tiny.backend("torch", 2), tiny.backend("ort", 2)
    before = [np.concatenate(feed(backend, ids, STEPS), 1) for backend in (torch_backend, ort)]
    assert max(relative(x, expected) for x in before) <= max(2 * own_error, FLOOR)
    after = [np.concatenate(feed(backend, ids, AFTER), 1) for backend in (torch_backend, ort)]
    assert relative(after[1], after[0]) < ROUNDING
    assert max(differences(ort, torch_backend).values()) < ROUNDING
    assert evicted(ort) >= sum(AFTER)


# ------------------------------------------------------------------ recipes


def narrow(recipe: recipes.Recipe) -> PreTrainedModel:
    """Two layers of each kind of a recipe's model, 16 wide in each of at most eight heads, with small windows."""
    config, _ = twin_config(described(recipe), recipe.contract())
    text, layer = config.get_text_config(), recipe.layers()[0]
    kv_heads = min(layer.kv_heads, 2)
    heads = min(layer.query_heads // layer.kv_heads, 4) * kv_heads
    sizes = {"hidden_size": 16 * heads, "intermediate_size": 96, "num_attention_heads": heads, "initializer_range": 0.3}
    for name, value in {**sizes, "num_key_value_heads": kv_heads, "head_dim": 16}.items():
        if vars(text).get(name) is not None:
            setattr(text, name, value)
    return families.build(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", some_of(recipes.names()))
def test_a_narrow_twin_of_every_recipe_is_the_hugging_face_model(name: str, tmp_path: Path) -> None:
    # At full width: benchmarks/bench_full_width.py.
    recipe = recipes.load(name)
    assert recipe is not None
    model = narrow(recipe)
    attention_layers = discover(model)
    assert {x.window > 0 for x in attention_layers} == {x.window > 0 for x in recipe.layers()}
    layers = plan_layers(attention_layers, ExportConfig(policy="full"), 64, {})
    contract = Contract(layers, model.config.get_text_config().vocab_size, "float32", 16, 2, "all")
    ids, sizes = text(2, 40), [16, 13, 1, 1, 9]
    expected, _ = families.truth(model, ids)

    decoder = LessDecoder(model, contract, Kernels({}, {}))
    past, state, logits = torch.zeros(2, dtype=torch.int32), fresh_state(contract, 2), []
    with torch.no_grad():
        for chunk in torch.from_numpy(ids).split(sizes, 1):
            new = torch.full_like(past, chunk.shape[1])
            out, *state = decoder(chunk, past, new, state)
            past, logits = past + new, [*logits, out]
    assert relative(torch.cat(logits, 1), expected) < ROUNDING

    ir.save(twin_graph(model, model.config, contract, Kernels({}, {}), tmp_path), tmp_path / "x.onnx")
    backend = OrtBackend(contract, tmp_path / "x.onnx", threads=1)
    backend.open(2)
    assert relative(np.concatenate(feed(backend, ids, sizes), 1), expected) < ROUNDING


# ------------------------------------------------------------------ the variants are at work

Without = Callable[[PreTrainedModel], PreTrainedModel]


def rebuilt(model: PreTrainedModel, changes: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """The weights in a model with a changed configuration, and the names of tensors that stay random."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config).eval()
    missing, _ = other.load_state_dict(model.state_dict(), strict=False)
    return other, list(missing)


def configured(**changes: Any) -> Without:
    """The same weights under a changed configuration."""

    def changed(model: PreTrainedModel) -> PreTrainedModel:
        other, missing = rebuilt(model, changes)
        assert not missing
        return other

    return changed


def with_its_own_keys_and_values(model: PreTrainedModel) -> PreTrainedModel:
    other, missing = rebuilt(model, {"num_kv_shared_layers": 0})
    assert {n.split(".")[-2] for n in missing} == {"k_proj", "v_proj", "k_norm"}
    return other


def without_qk_norm(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "q_norm"):
            module.q_norm = module.k_norm = nn.Identity()
    return other


def with_a_head_of_its_own(model: PreTrainedModel) -> PreTrainedModel:
    other, _ = rebuilt(model, {"tie_word_embeddings": False})
    nn.init.normal_(other.lm_head.weight)
    return other


_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_MANY = 512
WITHOUT: dict[str, tuple[str, Without]] = {
    "llama3 scaling": ("llama3_rope", configured(rope_parameters=_PLAIN)),
    "yarn": ("yarn_rope", configured(rope_parameters=_PLAIN)),
    "linear scaling and theta by layer": (
        "rope_per_layer_kind",
        configured(rope_parameters={"sliding_attention": _PLAIN, "full_attention": _PLAIN}),
    ),
    "theta by layer": (
        "gemma3", configured(rope_parameters={"sliding_attention": _PLAIN, "full_attention": _PLAIN}),
    ),
    "partial rotary (StableLM)": (
        "stablelm", configured(rope_parameters={**_PLAIN, "partial_rotary_factor": 1.0}),
    ),
    "partial rotary (Phi)": ("phi", configured(rope_parameters={**_PLAIN, "partial_rotary_factor": 1.0})),
    "no rotary on some layers": ("smollm3", configured(no_rope_layers=[1, 1])),
    "norms of each head (Qwen3)": ("qwen3", without_qk_norm),
    "norms over all heads (OLMo2)": ("olmo2", without_qk_norm),
    "norms over all heads (OLMoE)": ("olmoe", without_qk_norm),
    "attention bias": ("attention_bias", configured(attention_bias=False)),
    "tied embeddings": ("tied_embeddings", with_a_head_of_its_own),
    "parallel blocks (GPT-NeoX)": ("gpt_neox", configured(use_parallel_residual=False)),
    "scaled logits (Granite)": ("granite", configured(logits_scaling=1.0)),
    "scaled attention (Granite)": ("granite", configured(attention_multiplier=0.25)),
    "scaled residuals (Granite)": ("granite", configured(residual_multiplier=1.0)),
    "scaled logits (Cohere)": ("cohere", configured(logit_scale=1.0)),
    "final softcap": ("gemma2", configured(final_logit_softcapping=None)),
    "alternating sliding layers (Gemma 2)": ("gemma2", configured(sliding_window=_MANY)),
    "alternating sliding layers (Gemma 3)": ("gemma3", configured(sliding_window=_MANY)),
    "alternating sliding layers (Cohere 2)": ("cohere2", configured(sliding_window=_MANY)),
    "keys and values of another layer (Gemma 4)": ("gemma4", with_its_own_keys_and_values),
    "experts (Mixtral)": ("mixtral", configured(num_experts_per_tok=1)),
    "experts (Qwen3)": ("qwen3_moe", configured(num_experts_per_tok=1)),
    "experts (OLMoE)": ("olmoe", configured(num_experts_per_tok=1)),
    "experts (GLM-4)": ("glm4_moe", configured(num_experts_per_tok=1)),
}  # fmt: skip


@pytest.mark.parametrize("variant", WITHOUT)
def test_the_variant_changes_the_logits(variant: str) -> None:
    # If it did not, the tests above and test_export would pass without it.
    family, without = WITHOUT[variant]
    model = families.build(family)
    ids = torch.from_numpy(text(2, BUDGET))
    assert BUDGET > WINDOW
    with torch.no_grad():
        changed, expected = (m(input_ids=ids, use_cache=False).logits for m in (without(model), model))
    assert relative(changed, expected) > 50 * ROUNDING
