"""Opening a model: its architecture, its kernels and the plan of its caches, for export, training and evaluation.

No weights are read here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import ExportConfig
from ..contract import LayerSpec
from ..errors import UnsupportedModelError, UsageError
from ..less.feature_maps import Kernels
from ..plan import AttentionLayer, default_context, plan_layers
from ..versions import EXPORT_PACKAGES, warn_if_untested
from . import weights
from .config_layers import keep_first
from .sources import ModelSource
from .surgery import discover, learned_positions


@dataclass(frozen=True)
class Architecture:
    """A decoder without its weights.

    hf_config: its Hugging Face configuration. bare: the model, its parameters without memory (f32).
    layers: the attention of each layer.
    """

    source: ModelSource
    hf_config: Any
    bare: PreTrainedModel
    layers: tuple[AttentionLayer, ...]

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the decoder."""
        return self.hf_config.get_text_config()

    @property
    def trained_length(self) -> int | None:
        """The number of positions the model was trained for, from its configuration (tokens)."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @property
    def position_limit(self) -> int | None:
        """Number of learned positions; None for a model that computes them."""
        return learned_positions(self.bare)


@dataclass(frozen=True)
class OpenModel(Architecture):
    """An architecture and its cache.

    config: the options, with defaults from the recipe. context: tokens that percentages
    refer to. kernels: those of ``config.kernels``. ranks: rank of each layer that gets a low-rank term if it evicts.
    plan: every layer's cache.
    """

    config: ExportConfig
    kernels: Kernels
    context: int
    ranks: Mapping[int, int]
    plan: tuple[LayerSpec, ...]

    def plan_for(self, config: ExportConfig) -> tuple[LayerSpec, ...]:
        """The plan for other options of the cache.

        Raises:
            UsageError: options that contradict each other or the model.
        """
        return plan_layers(self.layers, config, self.context, dict(self.ranks))


def open_model(
    source: ModelSource, config: ExportConfig, *, rank: int | None = None, equal_budgets: bool = False
) -> OpenModel:
    """Open a model and plan its cache.

    Args:
        rank: plan every evicting layer with a low-rank term of this rank (to be trained); default the kernels' ranks.
        equal_budgets: leave out the layer budgets of the recipe.

    Raises:
        ModelError: config.json is unreadable. UnsupportedModelError: LESS cannot express the model.
        KernelError: damaged kernels, or those of another model. UsageError: options that do not fit.
    """
    warn_if_untested(*EXPORT_PACKAGES)
    defaults = source.recipe.options() if source.recipe else {}
    config = config.with_defaults({**defaults, "layer_budgets": None} if equal_budgets else defaults)
    architecture = open_architecture(source, config.num_hidden_layers)
    kernels = Kernels({}, {}) if config.kernels is None else Kernels.load(config.kernels)
    kernels.check([x.heads for x in architecture.layers])
    for index, maps in kernels.layers.items():
        if config.rank is not None and config.rank != maps.rank:
            raise UsageError(f"--rank {config.rank}, but the kernels of layer {index} have rank {maps.rank}")
    ranks = {i: m.rank for i, m in kernels.layers.items()}
    if rank is not None:
        ranks = dict.fromkeys(range(len(architecture.layers)), rank)
    context = config.context or default_context(architecture.trained_length)
    plan = plan_layers(architecture.layers, config, context, ranks)
    return OpenModel(**vars(architecture), config=config, kernels=kernels, context=context, ranks=ranks, plan=plan)


def open_architecture(source: ModelSource, num_hidden_layers: int | None = None) -> Architecture:
    """Read a model's configuration and find its attention layers.

    Args:
        num_hidden_layers: keep only the first layers, this many.

    Raises:
        ModelError: config.json is unreadable. UnsupportedModelError: LESS cannot express the model.
        UsageError: the model has fewer layers.
    """
    hf_config = source.config()
    quantised = getattr(hf_config, "quantization_config", None)
    if quantised is not None and source.gguf is None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        how = method or "by a method that config.json does not name"
        raise UnsupportedModelError(f"{source.name} is quantised ({how}): use a checkpoint in 16 or 32 bits")
    if num_hidden_layers is not None:
        keep_first(hf_config.get_text_config(), num_hidden_layers)
    try:
        bare = weights.bare_model(hf_config, torch.float32)
    except Exception as error:  # whatever a model's constructor raises for a config
        reason = textwrap.shorten(str(error), 160) or type(error).__name__
        raise UnsupportedModelError(f"transformers cannot build a decoder from this config.json: {reason}") from error
    return Architecture(source, hf_config, bare, discover(bare))
