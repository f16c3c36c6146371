"""Named models: a recipe is a TOML file under ``models/`` with a source, its architecture and suitable options."""

from __future__ import annotations

import difflib
import importlib.resources
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import CACHE_OPTIONS, ExportConfig, HalfLife, MaxDistance
from ..contract import PLUGIN_RANK_LIMIT, Contract, SlotDtype, StateBits
from ..errors import ModelError, UsageError
from ..less.kernel_shapes import kernel_bytes
from ..plan import AttentionLayer, max_distance_of, plan_layers

_OPTIONS = (*CACHE_OPTIONS, "chunk")
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
#: Keys that every decoder's architecture has, all positive integers.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
#: Keys of older config.json files that transformers rewrites, and what it turns them into.
REWRITTEN = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
_DERIVED = ("rope_parameters", "layer_types", "no_rope_layers")
#: What the values of a recipe's keys must be, and of those of its architecture.
_KINDS: dict[str, tuple[type, ...]] = {
    "text in quotes": (str,),
    "a whole number": (int,),
    "a number": (int, float),
    "true or false": (bool,),
    "a table": (dict,),
    "a whole number or text in quotes": (int, str),
}
_KEYS = {
    **dict.fromkeys(("hub", "policy", "budget", "layer_budgets", "slots", "dtype", "gguf_package"), "text in quotes"),
    **dict.fromkeys(("context", "rank", "hidden", "chunk", "state"), "a whole number"),
    **{"compress_sliding": "true or false", "architecture": "a table"},
    **dict.fromkeys(("score_half_life", "max_distance"), "a whole number or text in quotes"),
}
_FACTS = {
    **dict.fromkeys(("model_type", "hidden_act"), "text in quotes"),
    **dict.fromkeys(_SIZES, "a whole number"),
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim"), "a whole number"),
    **dict.fromkeys(("sliding_window", "sliding_window_pattern", "no_rope_layer_interval"), "a whole number"),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq"), "a number"),
    **dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier"), "a number"),
    **dict.fromkeys(("residual_multiplier", "logits_scaling", "logit_scale"), "a number"),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "bias"), "true or false"),
    **dict.fromkeys(("alibi", "multi_query", "new_decoder_architecture", "parallel_attn"), "true or false"),
    "rope_scaling": "a table",
}


@dataclass(frozen=True)
class Recipe:
    """One file under ``models/``.

    hub: Hugging Face id. gguf_package: Python package that ships the model as GGUF, tried first.
    policy, budget, layer_budgets, score_half_life, slots, state, max_distance, context, chunk,
    compress_sliding: defaults of :class:`~less_export.config.ExportConfig`.
    rank, hidden: sizes of the kernels trained for this model. dtype: compute dtype on TensorRT.
    architecture: keys of the (text) config.json that fix shapes and arithmetic.
    """

    name: str
    hub: str
    policy: str
    budget: str
    context: int
    rank: int
    hidden: int
    chunk: int
    dtype: str
    architecture: dict[str, Any] = field(hash=False)
    layer_budgets: str | None = None
    score_half_life: HalfLife | None = None
    slots: SlotDtype | None = None
    state: StateBits | None = None
    max_distance: MaxDistance | None = None
    compress_sliding: bool | None = None
    gguf_package: str | None = None

    def __post_init__(self) -> None:
        ExportConfig(**self.options(), rank=self.rank, dtype=self.dtype)
        if self.rank > PLUGIN_RANK_LIMIT:
            raise UsageError(f"rank must be at most {PLUGIN_RANK_LIMIT}, not {self.rank}")
        if self.hidden < 1 or not _HUB_ID.match(self.hub):
            raise UsageError("hidden must be positive and hub an id like org/name")
        for key in _SIZES:
            value = self.architecture.get(key)
            if type(value) is not int or value < 1:
                raise UsageError(f"architecture.{key} must be a positive whole number, not {value}")
        if not isinstance(self.architecture.get("model_type"), str):
            raise UsageError("architecture.model_type must name a model type of transformers")
        self.contract()

    def options(self) -> dict[str, Any]:
        """Defaults for :meth:`ExportConfig.with_defaults`."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The attention layers that ``surgery.discover`` finds in such a model."""
        facts = self.architecture
        heads = facts["num_attention_heads"]
        kv_heads = 1 if facts.get("multi_query") else facts.get("num_key_value_heads", heads)
        head_dim = facts.get("head_dim", facts["hidden_size"] // heads)
        scale = facts.get("attention_multiplier", facts.get("query_pre_attn_scalar", head_dim) ** -0.5)
        window, full_every = facts.get("sliding_window", 0), facts.get("sliding_window_pattern", 0)
        windows = [
            0 if full_every and i % full_every == 0 else window for i in range(1, facts["num_hidden_layers"] + 1)
        ]
        return tuple(AttentionLayer(heads, kv_heads, head_dim, scale, w) for w in windows)

    def max_distance_tokens(self) -> int | None:
        """The largest distance of an export with this recipe's options, if the model allows one."""
        config = ExportConfig().with_defaults(self.options())
        return max_distance_of(config, self.architecture["max_position_embeddings"])

    def contract(self) -> Contract:
        """The contract of an export with this recipe's options and trained kernels, in its dtype."""
        layers = self.layers()
        config = ExportConfig().with_defaults(self.options())
        plan = plan_layers(layers, config, self.context, dict.fromkeys(range(len(layers)), self.rank))
        return Contract(plan, self.architecture["vocab_size"], self.dtype, self.chunk, ExportConfig().max_batch)

    def kernel_bytes(self) -> int:
        """Bytes of the trained kernels' weights, once for all sequences."""
        absorbing = [s.heads for s in self.contract().layers if s.absorb]
        return sum(kernel_bytes(heads, self.rank, self.hidden) for heads in absorbing)

    def facts(self) -> dict[str, Any]:
        """The architecture as arguments of a transformers config: a ``sliding_window`` of 0 is None there.

        Raises :class:`UsageError` for a key that the config of this model type does not have.
        """
        from transformers import CONFIG_MAPPING

        facts = dict(self.architecture)
        if facts["model_type"] in CONFIG_MAPPING:
            config = CONFIG_MAPPING[facts["model_type"]]
            known = {"model_type", *REWRITTEN, *config.attribute_map, *(f.name for f in fields(config))}
            for key in facts:
                if key not in known:
                    raise UsageError(f"architecture.{key} is not a key of {config.__name__}")
        if facts.get("sliding_window") == 0:
            facts["sliding_window"] = None
        return facts

    def compare(self, expected: Any, actual: Any) -> None:
        """Raise :class:`ModelError` where this recipe's config and a checkpoint's differ."""
        for key in (*self.architecture, *_DERIVED):
            want, got = getattr(expected, key, None), getattr(actual, key, None)
            if key not in REWRITTEN and want != got:
                raise ModelError(
                    f"{self.hub} is not the model of recipe {self.name}: its config.json says {key} = {got}, the "
                    f"recipe {want}; give {self.hub} as MODEL to export it without the recipe"
                )


def _check(values: dict[str, Any], known: dict[str, str], prefix: str = "") -> None:
    """Raise :class:`UsageError` for unknown keys and for values of the wrong kind."""
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"unknown key {prefix}{key}" + (f": did you mean {prefix}{close[0]}?" if close else ""))
        if type(value) not in _KINDS[known[key]]:
            raise UsageError(f"{prefix}{key} must be {known[key]}, not {value!r}")


def _files() -> dict[str, Any]:
    folder = importlib.resources.files("less_export.models")
    return {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}


def names() -> list[str]:
    """Names of all recipes."""
    return sorted(_files())


def load(name: str) -> Recipe | None:
    """The recipe called ``name``, or None; raises :class:`UsageError` for a damaged one."""
    file = _files().get(name)
    if file is None:
        return None
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        _check(data, _KEYS)
        _check(data.get("architecture", {}), _FACTS, "architecture.")
        return Recipe(name=name, **data)
    except (ValueError, TypeError, UsageError) as error:
        known = ", ".join(f.name for f in fields(Recipe) if f.name != "name")
        raise UsageError(f"recipe {name}.toml is not valid ({error}); its keys are {known}") from error


def all_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [r for r in map(load, names()) if r is not None]


def user_path(text: str) -> Path:
    """A path in which ~ stands for the home folder, if there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_hub_id(model: str) -> bool:
    """Whether a MODEL that is not a file can be an id like org/name."""
    return bool(_HUB_ID.match(model))


def refuse_unknown(model: str) -> None:
    """Raise :class:`UsageError` for a MODEL that is not a recipe, file, folder or hub id; does not import torch."""
    path = user_path(model)
    if model in _files() or path.exists() or path.suffix == ".gguf" or is_hub_id(model):
        return
    close = difflib.get_close_matches(model, names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"unknown model '{model}': {hint}MODEL is a recipe ({', '.join(names())}), "
        "a hub id like org/name, a checkpoint folder or a .gguf file"
    )
