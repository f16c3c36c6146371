"""Tiny random decoders by name, as real transformers classes, and how tests export and drive them.

Weights are large (initializer_range 0.3) so that attention is far from uniform, and norms and biases are
random too, so that no two tensors of a model can be mistaken for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers as tr
from transformers import PreTrainedModel

import less_export
from less_export.bundle.artifact import Bundle
from less_export.contract import Policy
from less_export.hf.surgery import discover
from less_export.less import state16
from less_export.less.feature_maps import random_kernels
from less_export.runtime.backend import Backend
from less_export.runtime.open import load_backend

VOCAB, WINDOW, BUDGET, CONTEXT, CHUNK, ROWS, RANK = 97, 10, 24, 64, 16, 3, 4

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
_WIDTH: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.3, **_IDS,
}  # fmt: skip
_BASE: dict[str, Any] = {**_WIDTH, "intermediate_size": 96, "max_position_embeddings": 512}
_GQA = {**_BASE, "num_key_value_heads": 2}
#: A decoder with GQA and a single layer, the quickest to trace.
ONE = {**_GQA, "num_hidden_layers": 1}
_TWO = {**_GQA, "num_hidden_layers": 2}
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 512, "initializer_range": 0.3, **_IDS,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4,
    "max_position_embeddings": 512, "word_embed_proj_dim": 64, "init_std": 0.3, **_IDS,
}  # fmt: skip

Make = Callable[[], PreTrainedModel]

#: The basic families, by number of layers; Gemma 3 always has one layer of each kind.
MAIN: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda n=2: tr.LlamaForCausalLM(tr.LlamaConfig(**_GQA, num_hidden_layers=n)),
    "qwen3": lambda n=2: tr.Qwen3ForCausalLM(tr.Qwen3Config(**_GQA, num_hidden_layers=n, head_dim=32)),
    "gemma3": lambda n=2: tr.Gemma3ForCausalLM(
        tr.Gemma3TextConfig(
            **_BASE, num_hidden_layers=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "mistral": lambda n=2: tr.MistralForCausalLM(
        tr.MistralConfig(**_GQA, num_hidden_layers=n, sliding_window=WINDOW)
    ),
    "phi3": lambda n=2: tr.Phi3ForCausalLM(tr.Phi3Config(**_GQA, num_hidden_layers=n)),
    "gpt_neox": lambda n=2: tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**_BASE, num_hidden_layers=n)),
    "falcon_mqa": lambda n=2: tr.FalconForCausalLM(
        tr.FalconConfig(**_WIDTH, num_hidden_layers=n, multi_query=True)
    ),
    "falcon_new": lambda n=2: tr.FalconForCausalLM(
        tr.FalconConfig(**_WIDTH, num_hidden_layers=n, num_kv_heads=2, new_decoder_architecture=True)
    ),
}  # fmt: skip

#: More families that trace and agree; two layers where these differ.
OTHERS: dict[str, Make] = {
    "qwen2": lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**ONE)),
    "gemma2": lambda: tr.Gemma2ForCausalLM(
        tr.Gemma2Config(
            **_TWO, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=None, sliding_window=WINDOW
        )
    ),
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(**_GPT2)),
    "opt": lambda: tr.OPTForCausalLM(tr.OPTConfig(**OPT, num_hidden_layers=1)),
    "olmo2": lambda: tr.Olmo2ForCausalLM(tr.Olmo2Config(**ONE)),
    "granite": lambda: tr.GraniteForCausalLM(
        tr.GraniteConfig(**ONE, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=3.0)
    ),
    "smollm3": lambda: tr.SmolLM3ForCausalLM(tr.SmolLM3Config(**_TWO, no_rope_layer_interval=2)),
    "stablelm": lambda: tr.StableLmForCausalLM(tr.StableLmConfig(**ONE)),
    "phi": lambda: tr.PhiForCausalLM(tr.PhiConfig(**ONE)),
    "cohere": lambda: tr.CohereForCausalLM(tr.CohereConfig(**ONE)),
    "mixtral": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**ONE, num_local_experts=4, sliding_window=None)),
    "qwen3_moe": lambda: tr.Qwen3MoeForCausalLM(
        tr.Qwen3MoeConfig(**ONE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
}  # fmt: skip

FAMILIES: dict[str, Make] = {**MAIN, **OTHERS}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **values}


#: Features of single decoders, each in the smallest model that has it.
VARIANTS: dict[str, Make] = {
    "llama3_rope": lambda: tr.LlamaForCausalLM(
        tr.LlamaConfig(
            **ONE,
            rope_parameters=_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        )
    ),
    "yarn_rope": lambda: tr.LlamaForCausalLM(
        tr.LlamaConfig(**ONE, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=128))
    ),
    "rope_per_layer_kind": lambda: tr.Gemma3ForCausalLM(  # as Gemma 3 from 4B on
        tr.Gemma3TextConfig(
            **_TWO, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": _rope("default"), "full_attention": _rope("linear", rope_theta=1e6, factor=8.0),
            },
        )
    ),
    "attention_bias": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**ONE, attention_bias=True)),
    "tied_embeddings": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**ONE, tie_word_embeddings=True)),
    "glm": lambda: tr.GlmForCausalLM(tr.GlmConfig(**ONE, head_dim=16)),  # rotates half of each head, interleaved
    "gpt_bigcode": lambda: tr.GPTBigCodeForCausalLM(tr.GPTBigCodeConfig(**_GPT2)),  # MQA, learned positions
    "cohere2": lambda: tr.Cohere2ForCausalLM(  # no rotary embedding in full layers
        tr.Cohere2Config(**_TWO, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
    ),
    "gemma4": lambda: tr.Gemma4ForCausalLM(  # the last layer uses keys and values of the previous one
        tr.Gemma4TextConfig(
            **_TWO, head_dim=16, global_head_dim=32, sliding_window=WINDOW, num_kv_shared_layers=1,
            layer_types=["full_attention", "full_attention"], vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=16,
        )
    ),
    "olmoe": lambda: tr.OlmoeForCausalLM(tr.OlmoeConfig(**ONE, num_experts=4, num_experts_per_tok=2)),
    "glm4_moe": lambda: tr.Glm4MoeForCausalLM(  # first layer dense, then a shared expert and routed ones
        tr.Glm4MoeConfig(
            **_TWO, head_dim=16, use_qk_norm=True, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        )
    ),
}  # fmt: skip


def small(**changes: Any) -> Make:
    """A Llama with one layer, the quickest to trace."""
    return lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**{**ONE, **changes}))


def shallow(family: str) -> Make:
    """The family with one layer of each kind."""
    return functools.partial(MAIN[family], 1) if family in MAIN else OTHERS[family]


def build(family: str | Make, seed: int = 0) -> PreTrainedModel:
    """The model in f32, eager; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = ({**FAMILIES, **VARIANTS}[family] if isinstance(family, str) else family)().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    assert model.config._attn_implementation == "eager"
    return model


def save(family: str | Make, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a checkpoint folder; ``options`` go to ``save_pretrained``."""
    build(family).to(dtype).save_pretrained(folder, **options)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The untouched Hugging Face model of a checkpoint, eager (experts too: grouped products do not support f64)."""
    options = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    return tr.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def kernels(model: PreTrainedModel, path: Path, rank: int = RANK, sliding: bool = False) -> Path:
    """Random kernels for the layers that evict (``sliding``: for all of them), saved to ``path``."""
    layers = discover(model)
    heads = [x.heads for x in layers]
    random_kernels(heads, [i for i, x in enumerate(layers) if sliding or not x.window], rank, 8).save(path)
    return path


class InDouble(torch.overrides.TorchFunctionMode):
    """Runs a model in float64 throughout: every cast to float32 in its code becomes one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{n: wide(x) for n, x in (kwargs or {}).items()})


def truth(model: PreTrainedModel, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], float]:
    """Logits [B,T,V] of the Hugging Face model in f64, and the relative error of its own f32 run."""
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        single = model(input_ids=tokens, use_cache=False).logits.double().numpy()
        model.double()
        try:
            with InDouble():
                exact = model(input_ids=tokens, use_cache=False).logits.numpy()
        finally:
            model.float()
    return exact, relative(single, exact)


def relative(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Largest difference relative to the largest expected value; NaN counts as infinite."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-9))
    return error if np.isfinite(error) else float("inf")


# ------------------------------------------------------------------ exported models


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and its bundle."""

    checkpoint: Path
    bundle: Path

    @property
    def opened(self) -> Bundle:
        return Bundle.open(self.bundle)

    def backend(self, name: str, rows: int = ROWS) -> Backend:
        """Open the bundle on a runtime with ``rows`` fresh rows."""
        options: dict[str, Any] = {"threads": 1} if name == "ort" else {}
        backend = load_backend(self.opened, name, **options)
        backend.open(rows)
        return backend


def export(checkpoint: Path, bundle: Path, **options: Any) -> Tiny:
    """Export without what has tests of its own: the self-check, int8 slots and distances."""
    quick = {"validate": False, "chunk": CHUNK, "max_batch": 8, "slots": "model", "max_distance": "none"}
    less_export.export(str(checkpoint), bundle, **{**quick, **options})
    return Tiny(checkpoint, bundle)


def text(rows: int, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Random token ids [rows, length]."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length))


def feed(backend: Backend, ids: npt.NDArray[np.int64], sizes: Sequence[int]) -> list[npt.NDArray[np.float32]]:
    """Feed the same ``sizes`` of tokens to every row; returns the logits of every step."""
    logits, at = [], int(backend.past_length[0])
    for size in sizes:
        logits.append(backend.step(ids[:, at : at + size]))
        at += size
    return logits


def feed_ragged(
    backend: Backend, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], rubbish: int = 0
) -> list[npt.NDArray[np.float32]]:
    """Feed row b ``lengths[step, b]`` of its tokens a step; padding holds ``rubbish``."""
    logits = []
    for new in lengths:
        chunk = np.full((len(new), max(int(new.max()), 1)), rubbish, np.int64)
        for row, count in enumerate(new):
            at = int(backend.past_length[row])
            chunk[row, :count] = ids[row, at : at + count]
        logits.append(backend.step(chunk, new))
    return logits


def differences(a: Backend, b: Backend, rows: Sequence[tuple[int, int]] | None = None) -> dict[str, float]:
    """Relative differences of two backends' states by field, over pairs of rows (default: the same rows).

    Tokens are matched by position; position sets that differ count as infinite.
    """
    worst: dict[str, float] = {}
    for row, other in rows or [(i, i) for i in range(a.batch)]:
        x, y = a.read_row(row), b.read_row(other)
        assert x.length == y.length
        for i, layer in enumerate(a.contract.layers):
            left = {n.rsplit(".", 1)[1]: t for n, t in x.tensors.items() if n.startswith(f"past.{i}.")}
            right = {n.rsplit(".", 1)[1]: t for n, t in y.tensors.items() if n.startswith(f"past.{i}.")}
            orders = [np.argsort(s["position"], -1, kind="stable") for s in (left, right)]
            held = np.take_along_axis(left["position"], orders[0], -1) >= 0
            for name in ("position", "key", "value", "psi", "score"):
                sides = []
                for state, order in zip((left, right), orders, strict=True):
                    index = order if state[name].ndim == 2 else order[..., None]
                    sides.append(np.take_along_axis(state[name], index, 1))
                if name == "position":
                    error = 0.0 if np.array_equal(*sides) else float("inf")
                else:
                    error = relative(sides[0][held], sides[1][held]) if held.any() else 0.0
                worst[name] = max(worst.get(name, 0.0), error)
            if layer.state16:
                for state in (left, right):
                    state["h"] = state16.absorbed(state["h"], state["h_scale"], state["z"])
            for name in ("h", "z") if layer.absorb else ():
                worst[name] = max(worst.get(name, 0.0), relative(left[name], right[name]))
    return worst


def evicted(backend: Backend, row: int = 0) -> int:
    """Tokens of a row that its layer with the most evictions no longer holds (0: nothing evicts)."""
    state, gone = backend.read_row(row), 0
    for i, layer in enumerate(backend.contract.layers):
        if layer.policy is not Policy.FULL:
            gone = max(gone, state.length - int((state.tensors[f"past.{i}.position"][0] >= 0).sum()))
    return gone
