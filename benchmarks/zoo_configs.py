"""Tiny configurations for the zoo: sizes by their usual names, and changes that single model types need."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig

from tests.families import VOCAB, WINDOW

#: Small values by transformers' usual names; each config gets those it has.
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW},
    **{"max_position_embeddings": 512, "initializer_range": 0.3, "init_std": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "is_decoder": True,  # encoders that can be decoders
    # halves of encoder-decoders
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 96),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    # latent attention; the head widths stay, because support depends on Dk = Dv
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
}  # fmt: skip

_GEMMA4 = {
    "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}  # fmt: skip
#: Values that a model type needs in addition or instead.
CHANGES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": {}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "glm4_moe_lite": {"qk_rope_head_dim": 64, "num_key_value_heads": 4},
    "got_ocr2": {"tie_word_embeddings": True},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": {"head_dim": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"head_dim": 192},
    "minicpm3": {"v_head_dim": 64},
    "mllama": {"cross_attention_layers": [1]},
    "modernbert-decoder": {"local_attention": WINDOW},
    "opt": {"word_embed_proj_dim": 64},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """The default config of a model type with every known size made small.

    If layers differ, there is one of each kind, and always at least two layers. A config that cannot be this small
    may raise any exception.
    """
    default = AutoConfig.for_model(model_type)
    kind = type(default)
    values = _shrunk(default)
    text_values = values
    for name in kind.sub_configs:
        sub = getattr(default, name, None)
        if sub is not None:
            values[name] = _shrunk(sub)
            if sub is default.get_text_config(decoder=True):
                text_values = values[name]
    text_values |= CHANGES.get(model_type, {})
    return kind(**values)


def _shrunk(default: Any) -> dict[str, Any]:
    """The keys of SMALL that a config has, under its own names, and one layer of each kind."""
    names = {f.name for f in fields(default)}
    own = default.attribute_map
    values = {own.get(n, n): v for n, v in SMALL.items() if own.get(n, n) in names}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds and "layer_types" in names:
        values["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        values[own.get("num_hidden_layers", "num_hidden_layers")] = len(values["layer_types"])
    return values
