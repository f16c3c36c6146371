"""The self-check of every export: correct exports pass, wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as tr
from torch import Tensor

import less_export
from less_export.config import ExportConfig
from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import ValidationError
from less_export.exporter import onnx_decode, onnx_nodes, onnx_op
from less_export.exporter.check import self_check, twin_config
from less_export.hf import decoder, weights
from less_export.hf.surgery import discover
from less_export.less import operators
from less_export.plan import plan_layers

from . import families

LLAMA, MISTRAL = families.small(), families.shallow("mistral")

# ------------------------------------------------------------------ correct exports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy", "rank", "compress"),
    [
        (LLAMA, "h2o", 4, False),
        (families.MAIN["gemma3"], "sink", 2, False),
        (MISTRAL, "tova", 4, True),
        (families.shallow("falcon_new"), "full", 0, False),
    ],
    ids=["llama-h2o", "gemma3-sink", "mistral-tova-compressed", "falcon-full"],
)
def test_passes_what_is_right(family: families.Make, policy: str, rank: int, compress: bool, tmp_path: Path) -> None:
    config = families.build(family).config
    layers = discover(weights.bare_model(config, torch.float32))
    budget = None if policy == "full" else "8"
    options = ExportConfig(policy=policy, budget=budget, compress_sliding=compress)
    ranks = {i: rank for i, x in enumerate(layers) if rank and (compress or not x.window)}
    before = config.to_json_string(use_diff=False)
    error = self_check(config, Contract(plan_layers(layers, options, 64, ranks), 97, "float32", 16, 2), tmp_path)
    assert 0 < error < 1e-5
    assert config.to_json_string(use_diff=False) == before


@pytest.mark.slow
def test_the_twin_has_two_layers_of_each_kind() -> None:
    size = {**families.ONE, "vocab_size": 97, "num_hidden_layers": 12, "head_dim": 16}
    sliding, full = "sliding_attention", "full_attention"
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    for config, kept in (
        (tr.Qwen3Config(**size), [0, 1]),
        (tr.SmolLM3Config(**size, no_rope_layers=[1, 1, 1, 0] * 3), [0, 1, 3, 7]),
        (tr.Gemma3TextConfig(**size, layer_types=[*[sliding] * 5, full] * 2), [0, 1, 5, 11]),
        # Given by numbers, not lists: three dense layers first; every third with experts, but not the sixth.
        (tr.Glm4MoeConfig(**size, **experts, n_routed_experts=16, first_k_dense_replace=3), [0, 1, 2, 3, 4]),
        (tr.Qwen3MoeConfig(**size, **experts, num_experts=16, decoder_sparse_step=3, mlp_only_layers=[5]), [*range(9)]),
        (
            tr.Gemma4TextConfig(**size, layer_types=[sliding, full] * 6, num_kv_shared_layers=5),
            [*range(4), *range(7, 11)],
        ),
    ):
        layers = discover(weights.bare_model(config, torch.float32))
        contract = Contract(plan_layers(layers, ExportConfig(budget="8"), 64, {}), 97, "float32", 16, 2)
        twin, indices = twin_config(config, contract)
        assert indices == kept
        assert [x.window > 0 for x in discover(weights.bare_model(twin, torch.float32))] == [
            layers[i].window > 0 for i in kept
        ]
        true, built = (_parts(c) for c in (config, twin))
        assert [true[i] for i in kept] == built
        assert getattr(twin, "no_rope_layers", [1, 1, 0, 0]) == [1, 1, 0, 0]
        assert getattr(twin, "num_kv_shared_layers", 4) == 4


def _parts(config: Any) -> list[list[str]]:
    """Names of every layer's parameters."""
    return [[n for n, _ in x.named_parameters()] for x in weights.bare_model(config, torch.float32).model.layers]


@pytest.mark.slow
def test_the_twin_has_few_experts(tmp_path: Path) -> None:
    routed = {"num_experts": 64, "num_experts_per_tok": 9, "moe_intermediate_size": 32}
    config = tr.Qwen3MoeConfig(**families.ONE, head_dim=16, **routed)
    layers = discover(weights.bare_model(config, torch.float32))
    contract = Contract(plan_layers(layers, ExportConfig(budget="8"), 64, {}), 97, "float32", 16, 2)
    assert twin_config(config, contract)[0].num_experts == 9
    assert config.num_experts == 64
    assert self_check(config, contract, tmp_path) < 1e-5


@pytest.mark.slow
def test_a_checked_export_holds_nothing_of_the_check(tmp_path: Path, nothing_left: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    phases: list[str] = []
    bundle = less_export.export(str(checkpoint), tmp_path / "bundle", budget="8", progress=phases.append)
    assert any("checking" in w for w in phases)
    assert {p.name for p in bundle.iterdir()} == {
        "manifest.json", "model.onnx", "model.safetensors", "kernels.safetensors"
    }  # fmt: skip


# ------------------------------------------------------------------ wrong exports

Patch = pytest.MonkeyPatch


def _attribute(patch: Patch, name: str, change: Callable[[Any, ir.Value], ir.Value]) -> None:
    original = onnx_nodes.Nodes.attribute

    def attribute(op: Any, key: str) -> ir.Value:
        value = original(op, key)
        return change(op, value) if key == name else value

    patch.setattr(onnx_nodes.Nodes, "attribute", attribute)


def wrong_scale(patch: Patch) -> None:
    _attribute(patch, "scale", lambda op, scale: op.Mul(scale, op.f32(1.01)))


def dropped_window(patch: Patch) -> None:
    _attribute(patch, "window", lambda op, _: op.i32(0))


def wider_window(patch: Patch) -> None:
    _attribute(patch, "window", lambda op, window: op.Add(window, op.i32(1)))


def wrong_causal_bound(patch: Patch) -> None:
    original = onnx_op._general

    def general(body: onnx_op.Body, x: SimpleNamespace) -> Any:
        op, present = original(body, x)
        causal = next(n for n in op.nodes if n.op_type == "LessOrEqual")
        causal.op_type = "Less"  # a token no longer sees itself
        return op, present

    patch.setattr(onnx_op, "_general", general)


def lowrank_term_left_out(patch: Patch) -> None:
    original = onnx_op._attend
    patch.setattr(onnx_op, "_attend", lambda op, x, s, mean: original(op, x, s, None))


def lowrank_term_left_out_of_single_tokens(patch: Patch) -> None:
    patch.setattr(onnx_decode, "_with_state", lambda s, logits, share, out, means: out)


def another_slot_for_single_tokens(patch: Patch) -> None:
    patch.setattr(type(Policy.H2O), "taken_onnx", type(Policy.SINK).taken_onnx)


def another_eviction(patch: Patch) -> None:
    patch.setattr(type(Policy.H2O), "keep_onnx", type(Policy.SINK).keep_onnx)


def swapped_kv_heads(patch: Patch) -> None:
    def swapped(layer: LayerSpec, tokens: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
        q, k, v, *features = tokens
        return operators.run(layer, (q, k.flip(1), v.flip(1), *features), *rest)

    patch.setattr(decoder, "operators", SimpleNamespace(run=swapped))


def swapped_weights(patch: Patch) -> None:
    original = weights.locate

    def locate(*args: Any) -> tuple[dict[str, Any], list[str]]:
        names, missing = original(*args)
        gates = {n: n.replace("gate_proj", "up_proj") for n in names if "gate_proj" in n}
        assert gates
        return {**names, **{gate: names[up] for gate, up in gates.items()}}, missing

    patch.setattr(weights, "locate", locate)


HUGGING_FACE, REFERENCE = "eager Hugging Face", "the torch reference"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "family", "against"),
    [
        (wrong_scale, LLAMA, HUGGING_FACE),
        (wrong_causal_bound, LLAMA, HUGGING_FACE),
        (swapped_kv_heads, LLAMA, HUGGING_FACE),
        (swapped_weights, LLAMA, HUGGING_FACE),
        (wider_window, MISTRAL, HUGGING_FACE),
        (dropped_window, MISTRAL, HUGGING_FACE),
        (lowrank_term_left_out, LLAMA, REFERENCE),
        (lowrank_term_left_out_of_single_tokens, LLAMA, REFERENCE),
        (another_slot_for_single_tokens, LLAMA, REFERENCE),
        (another_eviction, LLAMA, REFERENCE),
    ],
    ids=lambda x: getattr(x, "__name__", "").strip("<>"),
)
def test_stops_what_is_wrong(
    family: families.Make,
    defect: Callable[[Patch], None],
    against: str,
    tmp_path: Path,
    nothing_left: Path,
    monkeypatch: Patch,
) -> None:
    checkpoint = families.save(family, tmp_path / "model")
    kernels = None
    if against == REFERENCE:
        kernels = families.kernels(families.load(checkpoint), tmp_path / "kernels.safetensors")
    defect(monkeypatch)
    with pytest.raises(ValidationError, match=rf"differs from {against} by .* at tokens \d+\.\.\d+"):
        less_export.export(
            str(checkpoint), nothing_left / "bundle", budget="8", kernels=kernels, slots="model", max_distance="none"
        )
