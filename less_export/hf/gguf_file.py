"""What a GGUF file states beside what transformers' loader reads: honoured, refused or named.

The meaning of the keys is llama.cpp's. Rotary positions: angle = position * freq_base ** (-2 i / width), divided by the
factor of a linear scaling, by YaRN's, or by entry i of the tensor ``rope_freqs.weight`` (Llama 3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, UnsupportedModelError, one_line
from .compat import gguf_keys, gguf_reader, gguf_splits

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_FREQS, _LONG = "rope_freqs.weight", ("rope_factors_long.weight", "rope_factors_short.weight")
#: Attributes of configurations that hold the value of a key, by the key without its architecture.
_ATTRIBUTES = {
    "attention.key_length": ("head_dim", "global_head_dim"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.value_length": ("head_dim", "global_head_dim"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "vocab_size": ("vocab_size",),
}
#: Attributes that are set to the value of a key; transformers leaves those of the class, which are one model's.
_SET = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
#: Keys that change nothing, or that :func:`honour` reads.
_KNOWN = {
    "attention.causal", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear",
    "tensor_data_layout",
    *(f"rope.scaling.{n}" for n in ("attn_factor", "factor", "finetuned", "original_context_length", "type")),
    *(f"rope.scaling.yarn_{n}" for n in ("attn_factor", "beta_fast", "beta_slow", "ext_factor", "log_multiplier")),
}  # fmt: skip
#: Keys of YaRN that have no counterpart in a configuration, and the value that changes nothing.
_USUAL = {"attn_factor": 1, "yarn_attn_factor": 1, "yarn_ext_factor": 1, "yarn_log_multiplier": 0}
#: Pre-tokenizers that split as GPT-2's does, which transformers uses for all that it does not know.
_AS_GPT2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}
#: Pre-tokenizers that take digits apart and then split as GPT-2's does (llama.cpp, src/llama-vocab.cpp).
_DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
#: Llama 3's constants, for tables that several of them would explain.
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
#: Largest relative difference of a table that a scaling explains, to one that it makes.
_TABLE_ERROR = 1e-3


class GgufFile:
    """The metadata of a GGUF file.

    Raises:
        ModelError: a part of a split file, or no model (an adapter, a projector); the library's errors otherwise.
    """

    def __init__(self, path: Path) -> None:
        part = _PART.search(path.name)
        if part and int(part[2]) > 1:
            raise ModelError(_part(path, int(part[1]), int(part[2])))
        reader = gguf_reader(path)
        self._fields = reader.fields
        self._tensors = {t.name: t for t in reader.tensors}
        count = self.value("split.count") or 1
        if count > 1:
            raise ModelError(_part(path, int(self.value("split.no") or 0) + 1, int(count)))
        kind = self.value("general.type")
        if kind not in (None, "model"):
            raise ModelError(f"{path} holds no model: its general.type is {one_line(kind, 40)}")
        self.path = path
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """The value of a key that is no array; None where there is none."""
        field = self._fields.get(key)
        return None if field is None or len(field.types) != 1 else field.contents()

    def own(self, key: str) -> Any:
        """The value of a key of the file's architecture."""
        return self.value(f"{self.architecture}.{key}")

    def number(self, key: str) -> float | None:
        """The value of a key of the file's architecture, a positive number; None for 0, which states nothing.

        Raises:
            ModelError: another value.
        """
        value = self.own(key)
        if value is None or value == 0:
            return None
        if isinstance(value, bool | str) or not (math.isfinite(value) and value > 0):
            raise ModelError(f"{self.path.name}: {self.architecture}.{key} must be a positive number, not {value}")
        return float(value)

    def floats(self, name: str) -> npt.NDArray[np.float64] | None:
        """The values of a tensor in one dimension; None where there is none."""
        tensor = self._tensors.get(name)
        return None if tensor is None else np.asarray(tensor.data).astype(np.float64).reshape(-1)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file states a vocabulary."""
        return self.value("tokenizer.ggml.model") not in (None, "none", "no_vocab")

    def chat_templates(self) -> dict[str, str]:
        """Chat templates with names, beside the one without."""
        prefix = "tokenizer.chat_template."
        found = {key.removeprefix(prefix): self.value(key) for key in self._fields if key.startswith(prefix)}
        return {name: text for name, text in found.items() if isinstance(text, str)}

    def splits(self) -> tuple[bool, str | None]:
        """Whether the tokenizer takes digits apart before it splits as GPT-2's does, which transformers does not know;
        and the name of a pre-tokenizer that nobody knows."""
        kind = self.value("tokenizer.ggml.pre")
        if self.value("tokenizer.ggml.model") != "gpt2" or kind is None or kind in _AS_GPT2 | gguf_splits():
            return False, None
        return (True, None) if kind in _DIGITS_APART else (False, str(kind))

    def unread_tensors(self, names: Collection[str]) -> list[str]:
        """Tensors that are not loaded, by the ``names`` that are, with or without their last part."""
        known = {*names, _FREQS, *_LONG}
        return sorted(n for n in self._tensors if n not in known and n.removesuffix(".weight") not in known)

    def unread_keys(self, config: Any) -> list[str]:
        """Keys of the architecture that are in no way in ``config``."""
        read = gguf_keys(self.architecture)
        if read is None:
            return []
        found = []
        for key in self._fields:
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in read or name in _KNOWN or (name.startswith("expert_") and self.value(key) == 0):
                continue
            held = [
                _head_dim(config) if a == "head_dim" else getattr(config, a, None) for a in _ATTRIBUTES.get(name, ())
            ]
            if not any(_same(self.value(key), h) for h in held):
                found.append(key)
        return sorted(found)

    def eos_ids(self) -> list[int]:
        """Tokens that end a text beside the tokenizer's: the end of a turn, and of a message."""
        ids = [self.value(f"tokenizer.ggml.{n}_token_id") for n in ("eos", "eot", "eom")]
        return [int(i) for i in ids if i is not None]

    # ------------------------------------------------------------ rotary positions

    def honour(self, config: Any) -> None:
        """Set what the file states in ``config``, where transformers' loader drops it: sizes, and rotary positions.

        Raises:
            UnsupportedModelError: a scaling that no configuration expresses.
        """
        for key, attribute in _SET.items():
            value = self.number(key)
            held = getattr(config, attribute, None)
            if value is not None and held is not None and config.model_type != "gemma4_text":
                setattr(config, attribute, type(held)(value))
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, dict):
            return
        scaling = self._scaling(config)
        by_layer = {k: dict(v) for k, v in parameters.items() if isinstance(v, dict)}
        if not by_layer:
            config.rope_parameters = {**parameters, **self._base(), **self._width(config, parameters), **scaling}
            return
        # Gemma 3's layers that slide have a base of their own and no scaling.
        sliding = self.number("rope.freq_base_swa")
        for kind, own in by_layer.items():
            if kind == "full_attention":
                own |= {**(self._base() if config.model_type != "gemma4_text" else {}), **scaling}
            elif sliding is not None and kind == "sliding_attention":
                own["rope_theta"] = sliding
        config.rope_parameters = by_layer

    def _base(self) -> dict[str, float]:
        base = self.number("rope.freq_base")
        return {} if base is None else {"rope_theta": base}

    def _width(self, config: Any, parameters: dict[str, Any]) -> dict[str, float]:
        """The rotated part of each head, for models that rotate a part."""
        count, head = self.number("rope.dimension_count"), _head_dim(config)
        part = "partial_rotary_factor" in parameters
        return {"partial_rotary_factor": count / head} if count and (part or count < head) else {}

    def _scaling(self, config: Any) -> dict[str, Any]:
        """The scaling as ``rope_parameters`` of a configuration; empty where there is none."""
        kind = self.own("rope.scaling.type")
        factor = self.number("rope.scaling.factor") or self.number("rope.scale_linear") or 1.0
        table = self.floats(_FREQS)
        if kind not in (None, "none", "linear", "yarn") or self._tensors.keys() & {*_LONG}:
            raise UnsupportedModelError(
                f"{self.path.name}: rotary scaling '{one_line(kind or 'longrope', 40)}' cannot be exported"
            )
        for key, usual in _USUAL.items():
            value = self.own(f"rope.scaling.{key}")
            if value not in (None, usual):
                raise UnsupportedModelError(f"{self.path.name}: a rotary scaling with {key} {value} cannot be exported")
        if kind == "none":
            factor = 1.0
        if table is not None and self.architecture != "gemma4" and not np.allclose(table, 1, rtol=_TABLE_ERROR):
            if factor != 1:
                raise UnsupportedModelError(
                    f"{self.path.name}: {_FREQS} and a scaling by {factor:g} cannot be exported"
                )
            return self._llama3(table, config)
        if factor == 1:
            return {}
        if kind != "yarn":
            return {"rope_type": "linear", "factor": factor}
        return self._yarn(factor, config)

    def _yarn(self, factor: float, config: Any) -> dict[str, Any]:
        length = self.number("rope.scaling.original_context_length") or config.max_position_embeddings
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(length)}
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            value = self.number(f"rope.scaling.{theirs}")
            if value is not None:
                scaling[ours] = value
        return scaling

    def _llama3(self, table: npt.NDArray[np.float64], config: Any) -> dict[str, Any]:
        """Llama 3's scaling that makes this table, from which llama.cpp's converter left out the constants."""
        base = self.number("rope.freq_base") or 10000.0
        turns = base ** (-np.arange(len(table)) / len(table)) / (2 * np.pi)  # per token
        factor = float(table.max())
        width = int(self.number("rope.dimension_count") or _head_dim(config))
        for low, high in _cuts(table, turns, factor) if 2 * len(table) == width and factor > 1 else ():
            if np.allclose(llama3_table(turns, factor, low, high), table, rtol=_TABLE_ERROR):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low * _LLAMA3_LENGTH,
                    "high_freq_factor": high * _LLAMA3_LENGTH,
                    "original_max_position_embeddings": _LLAMA3_LENGTH,
                }
        raise UnsupportedModelError(
            f"{self.path.name}: {_FREQS} is no table of Llama 3's scaling; it cannot be exported"
        )


def llama3_table(turns: npt.NDArray[np.float64], factor: float, low: float, high: float) -> npt.NDArray[np.float64]:
    """Divisors of the angles: ``factor`` below ``low`` turns per token, 1 above ``high``, between them in between."""
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _cuts(table: npt.NDArray[np.float64], turns: npt.NDArray[np.float64], factor: float) -> list[tuple[float, float]]:
    """Pairs (low, high) of :func:`llama3_table`, in turns per token, that may explain the table."""
    usual = (_LLAMA3_LOW / _LLAMA3_LENGTH, _LLAMA3_HIGH / _LLAMA3_LENGTH)
    smooth = (1 / table - 1 / factor) / (1 - 1 / factor)
    between = (smooth > _TABLE_ERROR) & (smooth < 1 - _TABLE_ERROR)
    found = [usual]
    if between.sum() > 1:  # a line through the points: 0 at low, 1 at high
        slope, offset = np.polyfit(turns[between], smooth[between], 1)
        if slope > 0:
            found.append((-offset / slope, (1 - offset) / slope))
    elif between.any():
        at, share = turns[between][0], smooth[between][0]
        ratio = _LLAMA3_HIGH / _LLAMA3_LOW
        low = at / (1 + share * (ratio - 1))
        found.append((low, ratio * low))
    else:
        fast, slow = turns[smooth > 0.5], turns[smooth <= 0.5]
        if len(fast) and len(slow) and slow.max() < fast.min():
            found.append((float(slow.max()) * 1.0001, float(fast.min()) * 0.9999))
    return [(low, high) for low, high in found if 0 < low < high]


def _same(stated: Any, held: Any) -> bool:
    """Whether a configuration holds the value of a key, which may be a float of 32 bits."""
    try:
        return held is not None and math.isclose(stated, held, rel_tol=1e-6)
    except TypeError:
        return bool(stated == held)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _part(path: Path, number: int, count: int) -> str:
    return (
        f"{path} is part {number} of {count} of a split GGUF file: join the parts first "
        "(llama-gguf-split --merge FIRST_PART WHOLE.gguf)"
    )
