"""Opening a model: its architecture, its kernels and the plan of its caches, for export, training and evaluation.

No weights are read here.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import DEFAULT_CHUNK, DEFAULT_POLICY, ExportConfig
from ..contract import LayerSpec, limits_distances
from ..errors import UnsupportedModelError, UsageError
from ..less.feature_maps import Kernels, state_for
from ..less.rotary import RotaryTable, table_length
from ..plan import AttentionLayer, budget_tokens, default_context, max_distance_of, plan_layers
from ..versions import EXPORT_PACKAGES, warn_if_untested
from . import rotary, weights
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
    plan: every layer's cache. rotations: how each layer turns queries and keys, where the plan limits distances.
    """

    config: ExportConfig
    kernels: Kernels
    context: int
    ranks: Mapping[int, int]
    plan: tuple[LayerSpec, ...]
    rotations: tuple[rotary.Rotation | None, ...]

    def plan_for(self, config: ExportConfig) -> tuple[LayerSpec, ...]:
        """The plan for other options of the cache; its distances are those of this plan.

        Raises:
            UsageError: options that contradict each other or the model.
        """
        distances = {i: s.max_distance for i, s in enumerate(self.plan) if s.max_distance is not None}
        return plan_layers(self.layers, config, self.context, dict(self.ranks), distances)

    def rotary_tables(self, length: int) -> tuple[RotaryTable, ...]:
        """Tables of distances below ``length``, for layers with a largest distance."""
        return rotary.tables(self.rotations, length)


def open_model(
    source: ModelSource, config: ExportConfig, *, rank: int | None = None, equal_budgets: bool = False
) -> OpenModel:
    """Open a model and plan its cache.

    Args:
        rank: plan every evicting layer with a low-rank term of this rank (to be trained); default the kernels' ranks.
        equal_budgets: leave out the layer budgets of the recipe and of the kernels.

    Raises:
        ModelError: config.json is unreadable. UnsupportedModelError: LESS cannot express the model.
        KernelError: damaged kernels, or those of another model. UsageError: options that do not fit.
    """
    warn_if_untested(*EXPORT_PACKAGES)
    defaults = source.recipe.options() if source.recipe else {}
    given, config = config, config.with_defaults({**defaults, "layer_budgets": None} if equal_budgets else defaults)
    architecture = open_architecture(source, config.num_hidden_layers)
    kernels = Kernels({}, {}) if config.kernels is None else Kernels.load(config.kernels)
    kernels.check([x.heads for x in architecture.layers])
    for index, maps in kernels.layers.items():
        if config.rank is not None and config.rank != maps.rank:
            raise UsageError(f"--rank {config.rank}, but the kernels of layer {index} have rank {maps.rank}")
    config = replace(config, state=state_for(kernels.parametrisation, config.state))
    ranks = {i: m.rank for i, m in kernels.layers.items()}
    if rank is not None:
        ranks = dict.fromkeys(range(len(architecture.layers)), rank)
    context = config.context or default_context(architecture.trained_length)
    if not equal_budgets:
        config = _with_budgets(given, config, kernels, context)
    distance, rotations = distances(architecture, config, kernels)
    limited = {i: distance for i, r in enumerate(rotations) if r is not None and distance is not None}
    plan = plan_layers(architecture.layers, config, context, ranks, limited)
    kernels = _with_tables(kernels, rotations, plan, config)
    return OpenModel(
        **vars(architecture), config=config, kernels=kernels, context=context, ranks=ranks, plan=plan,
        rotations=rotations,
    )  # fmt: skip


def _with_budgets(given: ExportConfig, config: ExportConfig, kernels: Kernels, context: int) -> ExportConfig:
    """The options with the slots that kernels were trained with, unless ``given``, what the user asks for, has others.

    Kernels for another policy or other kinds of layers say nothing about this one.
    """
    facts, slots = kernels.provenance, kernels.slots
    same = facts.get("policy") == (config.policy or DEFAULT_POLICY)
    same &= bool(facts.get("compress_sliding")) == bool(config.compress_sliding)
    others = (given.layer_budgets, given.heavy, given.recent, given.num_hidden_layers)
    if not slots or not same or any(x is not None for x in others):
        return config
    if given.budget is not None and budget_tokens(given.budget, context) != facts.get("budget"):
        if len({*slots.values()}) > 1:
            reason = "because --budget is another one: leave it out to use them"
            warnings.warn(f"the slots that {config.kernels} states for each layer are not used, {reason}", stacklevel=3)
        return config
    return replace(config, layer_budgets=",".join(f"{i}:{n}" for i, n in slots.items()))


def distances(
    architecture: Architecture, config: ExportConfig, kernels: Kernels
) -> tuple[int | None, tuple[rotary.Rotation | None, ...]]:
    """The largest distance, and how each layer turns queries and keys; None and nothing for absolute positions.

    Raises:
        UsageError: the options give a largest distance that the model or the kernels cannot have.
    """
    distance = max_distance_of(config, architecture.trained_length)
    if distance is None:
        return None, ()
    # Where the model's positions end, whatever a cache does, nothing is lost.
    advice, expected = "give --max-distance none", architecture.position_limit is not None
    if kernels.rotated:
        reason = f"{config.kernels} was trained on rotated queries and keys"
        advice, expected = f"train again, or {advice}", False
    else:
        try:
            rotations = rotary.probe(architecture.bare)
        except UnsupportedModelError as error:
            reason = str(error)
        else:
            if any(rotations):
                return distance, rotations
            reason = "no layer has a rotary embedding"
    if config.max_distance is not None:
        raise UsageError(f"--max-distance {distance} is impossible: {reason}; {advice}")
    if not expected:
        warnings.warn(f"positions are absolute, because {reason}: {advice} to say so", stacklevel=3)
    return None, ()


def _with_tables(
    kernels: Kernels, rotations: tuple[rotary.Rotation | None, ...], plan: tuple[LayerSpec, ...], config: ExportConfig
) -> Kernels:
    """The kernels with tables for the plan, without constants that were measured on other keys."""
    if kernels.centring_rotated == limits_distances(plan):
        keys = "rotated" if kernels.centring_rotated else "unrotated"
        if any(s.int8 for s in plan):
            constants = f"the constants of int8 slots in {config.kernels}"
            warnings.warn(f"{constants} are not used: they were measured on {keys} keys", stacklevel=3)
        kernels = replace(kernels, centring={})
    chunk = config.chunk or DEFAULT_CHUNK
    lengths = [table_length(s.max_distance or 0, chunk) for s in plan]
    whole = rotary.tables(rotations, max(lengths))
    return replace(kernels, rotary=[replace(t, angles=t.angles[: max(lengths[i] for i in t.layers)]) for t in whole])


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
