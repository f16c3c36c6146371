"""Inserting LESS into decoders: discovery and refusals; its removal is in test_surgery_removal.py."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from torch import Tensor

import less_export
from less_export.errors import UnsupportedModelError
from less_export.hf.surgery import (
    AttentionCall,
    AttentionLayer,
    discover,
    learned_positions,
    less_attention,
    on_interface,
)
from less_export.hf.weights import bare_model

from . import families
from .families import VOCAB, WINDOW

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------ discovery

_QUARTER = 0.25  # head_dim 16
FACTS: dict[str, list[AttentionLayer]] = {
    "llama": [AttentionLayer(4, 2, 16, _QUARTER, 0)] * 2,
    "qwen3": [AttentionLayer(4, 2, 32, 32**-0.5, 0)] * 2,
    "gemma3": [AttentionLayer(4, 1, 16, _QUARTER, w) for w in (WINDOW, 0)],
    "mistral": [AttentionLayer(4, 2, 16, _QUARTER, WINDOW)] * 2,
    "phi3": [AttentionLayer(4, 2, 16, _QUARTER, 0)] * 2,
    "gpt_neox": [AttentionLayer(4, 4, 16, _QUARTER, 0)] * 2,
    "falcon_mqa": [AttentionLayer(4, 1, 16, _QUARTER, 0)] * 2,
    "falcon_new": [AttentionLayer(4, 2, 16, _QUARTER, 0)] * 2,
    "qwen2": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "gemma2": [AttentionLayer(4, 2, 16, _QUARTER, w) for w in (WINDOW, 0)],
    "gpt2": [AttentionLayer(4, 4, 16, _QUARTER, 0)],
    "opt": [AttentionLayer(4, 4, 16, 1.0, 0)],  # scales its queries itself
    "olmo2": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "granite": [AttentionLayer(4, 2, 16, 0.3, 0)],
    "smollm3": [AttentionLayer(4, 2, 16, _QUARTER, 0)] * 2,
    "stablelm": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "phi": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "cohere": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "mixtral": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
    "qwen3_moe": [AttentionLayer(4, 2, 16, _QUARTER, 0)],
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_discovers_every_layer(family: str) -> None:
    config = families.build(family).config
    model = bare_model(config, torch.float32)  # without weights, as in an export
    assert list(discover(model)) == pytest.approx(FACTS[family])
    assert learned_positions(model) == (512 if family in ("gpt2", "opt") else None)
    assert on_interface(model) == (not family.startswith("falcon"))


def test_a_vision_tower_off_the_interface_does_not_matter() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**size, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": VOCAB}
    vision = {**size, "num_hidden_layers": 1, "mlp_dim": 32, "image_size": 64, "patch_size": 16, "output_channels": 32}
    config = tr.GotOcr2Config(text_config=text, vision_config=vision)
    assert discover(bare_model(config, torch.float32)) == (AttentionLayer(2, 1, 16, _QUARTER, 0),)


# ------------------------------------------------------------------ refusals

_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 48}
_BASE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **_HEADS}
GQA = {**_BASE, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
_FALCON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}

#: Features of real classes, and the texts of their refusals (layer or model, then reason).
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "own attention, on its own mask (GPT Neo)": (
        lambda: tr.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
        ),
        r"^layer 0: the model computes with its attention mask itself; its attention is neither on .*interface",
    ),
    "no attention through the interface (OpenAI GPT)": (
        lambda: tr.OpenAIGPTConfig(**_GPT),
        r"^OpenAIGPTLMHeadModel: 0 of 2 layers attend through .*attention of their own",
    ),
    "some attention through the interface (RecurrentGemma)": (
        lambda: tr.RecurrentGemmaConfig(
            **{**_BASE, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16, head_dim=8
        ),
        r"^RecurrentGemmaForCausalLM: 1 of 3 layers attend through the attention interface",
    ),
    "softcap (Gemma2)": (lambda: tr.Gemma2Config(**GQA, head_dim=8), r"^layer 0: attention softcap"),
    "learned sinks (GPT-OSS)": (
        lambda: tr.GptOssConfig(
            **{**GQA, "max_position_embeddings": 131072}, head_dim=8, num_local_experts=2, num_experts_per_tok=1
        ),
        r"^layer 0: learned attention sinks",
    ),
    "alibi (Falcon)": (lambda: tr.FalconConfig(**_FALCON, alibi=True), r"^layer 0: alibi"),
    "alibi (MPT)": (lambda: tr.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB), r"^layer 0: alibi"),
    "keys and values of different width (DeepSeek V3)": (
        lambda: tr.DeepseekV3Config(
            **GQA, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=2,
        ),
        r"^layer 0: keys and values differ in width \(Dk 8, Dv 4\)",
    ),
    "not causal (Llama)": (lambda: tr.LlamaConfig(**GQA, is_causal=False), r"^layer 0: attention is not causal"),
    "not causal (BERT)": (lambda: tr.BertConfig(**_BASE), r"^layer 0: attention is not causal"),
    "chunked mask (Llama 4)": (
        lambda: tr.Llama4TextConfig(**GQA, head_dim=8, num_local_experts=2, intermediate_size_mlp=48),
        r"^layer 0: its mask comes from create_chunked_causal_mask",
    ),
    "bidirectional (Gemma 3)": (
        lambda: tr.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8, use_bidirectional_attention=True),
        r"^layer 0: attention is not causal",
    ),
    "longrope (Phi-3)": (
        lambda: tr.Phi3Config(
            **GQA, pad_token_id=0, original_max_position_embeddings=32,
            rope_parameters={**_LONG, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
        r"^model\.rotary_emb: rotary embedding 'longrope' .*\(all layers\)",
    ),
    "dynamic rope (Llama)": (
        lambda: tr.LlamaConfig(**GQA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"^model\.rotary_emb: rotary embedding 'dynamic' .*\(all layers\)",
    ),
    "recurrent layers (Jamba)": (
        lambda: tr.JambaConfig(**GQA, num_experts=2), r"^the model has recurrent .*layers beside attention"
    ),
    "linear attention layers (Qwen3-Next)": (
        lambda: tr.Qwen3NextConfig(**GQA, head_dim=8, num_experts=2, num_experts_per_tok=1),
        r"^the model has recurrent .*layers beside attention",
    ),
    "linear attention (RWKV)": (
        lambda: tr.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        r"^RwkvForCausalLM takes no position_ids: it is recurrent, or",
    ),
    "tokens chosen by an indexer (GLM-5)": (
        lambda: tr.GlmMoeDsaConfig(**{**_BASE, "num_hidden_layers": 1}, n_routed_experts=2, num_experts_per_tok=1),
        r"^layer 0: the model edits its attention mask \(slices it\): not plain causal",
    ),
    "differential attention (DiffLlama)": (
        lambda: tr.DiffLlamaConfig(**GQA), r"^layer 0: attends more than once in a forward pass"
    ),
    "experts that are counted on the spot (JetMoE)": (
        lambda: tr.JetMoeConfig(
            **{**_BASE, "num_hidden_layers": 1}, kv_channels=8, num_local_experts=2, num_experts_per_tok=1
        ),
        r"^JetMoeForCausalLM does not run .*: it branches on the values of its tensors, which cannot be traced",
    ),
    "cross attention to images (Llama 3.2 Vision)": (
        lambda: tr.MllamaConfig(text_config={**GQA, "cross_attention_layers": [1], "pad_token_id": 0}),
        r"^MllamaForCausalLM: 1 of 2 layers attend .*; the others are recurrent, skipped, or use an attention of their",
    ),
    "alibi (Bloom)": (
        lambda: tr.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), r"^layer 0: alibi adds a bias"
    ),
    "relative positions (XLNet)": (
        lambda: tr.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48),
        r"^layer 0: attention adds a bias by the relative position of every token$",
    ),
    "relative positions (CpmAnt)": (
        lambda: tr.CpmAntConfig(
            vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2
        ),
        r"^layer 0: attention adds a bias by the relative position of every token$",
    ),
    "positions that do not start at 0 (RoBERTa)": (
        lambda: tr.RobertaConfig(**{**_BASE, "num_hidden_layers": 2}, is_decoder=True),
        r"^layer 0: positions are counted past the padding token's id, not from 0$",
    ),
    "no positions (Mamba)": (
        lambda: tr.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        r"^MambaForCausalLM takes no position_ids",
    ),
    "half of an encoder-decoder (BART)": (
        lambda: tr.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=4),
        r"^BartForCausalLM takes no position_ids: it is the decoder of an encoder-decoder and attends to the encoder$",
    ),
    "encoder and decoder (T5)": (
        lambda: tr.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        r"T5Config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", REFUSED)
def test_refuses_before_anything_is_written(cause: str, tmp_path: Path, nothing_left: Path) -> None:
    make, reason = REFUSED[cause]
    make().save_pretrained(tmp_path / "model")
    for out in ("bundle", "x.onnx"):
        with pytest.raises(UnsupportedModelError, match=reason) as refusal:
            less_export.export(str(tmp_path / "model"), nothing_left / out, budget="8")
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "gemma4_text", "glm4_moe", "gpt_oss", "llama4", "phimoe"])
def test_the_list_of_architectures_says_what_discovery_says(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tiny_config = importlib.import_module("zoo_configs").tiny_config
    rows = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())["rows"]
    (row,) = (r for r in rows if r["model_type"] == model_type)
    model = bare_model(tiny_config(model_type), torch.float32)
    if row["outcome"] == "supported":
        layers = [[x.query_heads, x.kv_heads, x.head_dim, x.window] for x in discover(model)]
        assert layers == row["layers"]
    else:
        with pytest.raises(UnsupportedModelError) as refusal:
            discover(model)
        assert (row["outcome"], row["reason"]) == ("refused", str(refusal.value))


def test_gptj_is_supported_where_its_attention_is_on_the_interface() -> None:
    """That is the case from transformers 5.24 on; before, GPT-J computes with its mask itself."""
    model = bare_model(tr.GPTJConfig(**_GPT, rotary_dim=4), torch.float32)
    if on_interface(model):
        assert discover(model) == (AttentionLayer(4, 4, 8, pytest.approx(8**-0.5), 0),) * 2
        assert learned_positions(model) == model.config.n_positions  # a table, but not a learned one
        return
    with pytest.raises(UnsupportedModelError, match=REFUSED["own attention, on its own mask (GPT Neo)"][1]):
        discover(model)


def test_refuses_a_bidirectional_overlay() -> None:
    # Gemma 3's mask function gets an overlay too; here its layers are declared causal, so only the mask shows it.
    config = tr.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8, use_bidirectional_attention=True)
    model = bare_model(config, torch.float32)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    with pytest.raises(UnsupportedModelError, match=r"layer 0: its causal mask is overlaid \(or_mask_function\)"):
        discover(model)


@pytest.mark.slow
def test_refuses_what_onnx_has_no_word_for(nothing_left: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    families.save(families.small(), tmp_path / "model")
    plain = tr.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        tr.models.llama.modeling_llama.LlamaMLP, "forward", lambda self, x: torch.special.erfinv(plain(self, x))
    )
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM cannot be written as ONNX: .*erf_?inv[^\n]*$"):
        less_export.export(str(tmp_path / "model"), nothing_left / "bundle", budget="8", validate=False)


def test_experts_in_a_loop_are_refused_or_right(tmp_path: Path) -> None:
    """torch 2.15 traces them for every size, older releases only for the size of the example."""
    config = tr.AriaTextConfig(**families.ONE, moe_num_experts=2, moe_topk=1)
    families.save(lambda: tr.AriaTextForCausalLM(config), tmp_path / "model")
    tiny, refusal = None, ""
    try:
        tiny = families.export(tmp_path / "model", tmp_path / "bundle", policy="full", context=64, logits="all")
    except UnsupportedModelError as error:
        refusal = str(error)
    if tiny is None:
        assert re.match("AriaTextForCausalLM cannot be traced .*: its code, such as a loop over experts,", refusal)
        assert not (tmp_path / "bundle").exists()
        return
    ids = families.text(2, 23)
    with torch.no_grad():
        expected = families.load(tmp_path / "model")(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    logits = np.concatenate(families.feed(tiny.backend("ort", 2), ids, (16, 1, 5, 1)), 1)
    assert families.relative(logits, expected) < 1e-5


def test_refuses_a_window_that_mask_and_attention_do_not_share() -> None:
    model = bare_model(families.build("gemma3").config, torch.float32)
    model.model.layers[0].self_attn.sliding_window = 3
    with pytest.raises(UnsupportedModelError, match=rf"^layer 0: its mask slides over {WINDOW} .*over 3"):
        discover(model)


# ------------------------------------------------------------------ what a handler gets


def test_handler_sees_unrepeated_heads_and_the_scale() -> None:
    for family in families.MAIN:
        model = families.build(family)
        calls: list[AttentionCall] = []

        def keep(call: AttentionCall, calls: list[AttentionCall] = calls) -> Tensor:
            calls.append(call)
            return call.q

        with torch.no_grad(), less_attention(model, keep):
            model(input_ids=torch.arange(3, 10)[None], position_ids=torch.arange(7)[None], use_cache=False)
        assert [c.layer for c in calls] == list(range(len(FACTS[family])))
        for call, layer in zip(calls, FACTS[family], strict=True):
            assert call.q.shape == (1, layer.query_heads, 7, layer.head_dim)
            assert call.k.shape == call.v.shape == (1, layer.kv_heads, 7, layer.head_dim)
            assert call.scale == pytest.approx(layer.scale)
            assert call.mask is None


def test_reason_of_a_model_that_does_not_run_is_one_line() -> None:
    model = bare_model(families.build("llama").config, torch.float32)
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(7, 7)
    with pytest.raises(UnsupportedModelError) as refusal:
        discover(model)
    assert re.match(r"LlamaForCausalLM does not run as a plain decoder: [^\n]+$", str(refusal.value))
