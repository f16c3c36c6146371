"""The plan of every layer's cache, from the options and the model's attention layers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType

from .config import (
    DEFAULT_BUDGET,
    DEFAULT_CHUNK,
    DEFAULT_CONTEXT,
    DEFAULT_FARTHEST,
    DEFAULT_HALF_LIFE,
    DEFAULT_POLICY,
    DEFAULT_SLOTS,
    DEFAULT_STATE,
    ExportConfig,
)
from .contract import Heads, LayerSpec, SlotDtype, StateBits
from .errors import UsageError
from .less.policies import EvictionPolicy, Policy, by_name


@dataclass(frozen=True)
class AttentionLayer(Heads):
    """One attention layer of a decoder. ``window`` is 0 if the layer does not slide."""

    scale: float
    window: int


def budget_tokens(budget: str, context: int, option: str = "--budget") -> int:
    """Tokens of a budget ``option``: ``N``, or ``P%`` of ``context`` rounded down to an even number.

    Raises:
        UsageError: not a number, less than 1 token or more than the context.
    """
    text = str(budget).strip()
    try:  # exact: 29% of 200 are 58, floats give 57
        if not re.fullmatch(r"-?[0-9./]{1,20}%?", text):
            raise ValueError(text)
        tokens = 2 * math.floor(Fraction(text[:-1]) * context / 200) if text.endswith("%") else int(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option} '{budget}' is neither a number of tokens nor a percentage like 5%") from None
    if tokens < 1:
        raise UsageError(f"{option} {budget} leaves no token of a context of {context}: raise it")
    if tokens > context:
        raise UsageError(f"{option} {budget} is more than the context of {context} tokens: lower it or raise --context")
    return tokens


def split_budget(policy: EvictionPolicy, config: ExportConfig, context: int) -> tuple[int, int]:
    """``(heavy, recent)`` in tokens, from --budget, --heavy and --recent."""
    heavy, recent = config.heavy, config.recent
    if policy.fixed_recent is not None:
        if recent not in (None, policy.fixed_recent):
            raise UsageError(f"policy {policy.name} fixes --recent at {policy.fixed_recent}: drop --recent")
        recent = policy.fixed_recent
    if heavy is not None and recent is not None:
        if config.budget is not None and budget_tokens(config.budget, context) != heavy + recent:
            raise UsageError("--heavy and --recent do not add up to --budget: give two of the three")
        return _fitting(heavy, recent, context)
    total = budget_tokens(config.budget or DEFAULT_BUDGET, context)
    if heavy is not None:
        return _fitting(heavy, total - heavy, context)
    if recent is not None:
        return _fitting(total - recent, recent, context)
    return _fitting(*policy.split(total), context)


def half_life_of(policy: EvictionPolicy, config: ExportConfig) -> int | None:
    """The half-life of a policy's scores in tokens, ``None`` if they never fade.

    Raises:
        UsageError: a half-life for a policy that accumulates no scores.
    """
    half_life = config.score_half_life
    if policy.scoring != "accumulate":
        if half_life not in (None, "none"):
            raise UsageError(f"policy {policy.name} accumulates no scores: drop --score-half-life")
        return None
    half_life = DEFAULT_HALF_LIFE if half_life is None else half_life
    return None if half_life == "none" else half_life


def state_of(policy: EvictionPolicy, config: ExportConfig) -> tuple[SlotDtype, StateBits]:
    """What slots hold keys and values in, and the bits of a low-rank state.

    Raises:
        UsageError: a state of 16 bits without int8 slots.
    """
    slots = config.slots or (DEFAULT_SLOTS if policy.evicts else "model")
    if slots == "int8":
        return slots, config.state or DEFAULT_STATE
    if config.state == 16:
        raise UsageError(f"--state 16 goes with int8 slots, which policy {policy.name} has with --slots int8 only")
    return slots, 32


def max_distance_of(config: ExportConfig, trained_length: int | None) -> int | None:
    """The largest distance of the options, or the default, in tokens; ``None`` for absolute positions.

    ``trained_length`` is that of the model.
    """
    if config.max_distance is not None:
        return None if config.max_distance == "none" else config.max_distance
    if trained_length is None or by_name(config.policy or DEFAULT_POLICY).keeps_all:
        return None
    known = max(trained_length - (config.chunk or DEFAULT_CHUNK), trained_length // 2, 1)
    return min(known, DEFAULT_FARTHEST)


def layer_tokens(text: str, context: int) -> dict[int, int]:
    """Slots of the layers that ``--layer-budgets LAYER:N|P%,...`` names.

    Raises:
        UsageError: not such a list, a layer named twice, or an invalid budget.
    """
    if text in ("auto", "equal"):
        raise UsageError(f"--layer-budgets {text} is for less-export train: leave it out to use the kernels' budgets")
    budgets: dict[int, int] = {}
    for part in text.split(","):
        name, colon, budget = part.strip().partition(":")
        if not (name.isdecimal() and colon):
            raise UsageError(f"--layer-budgets '{text}' is not a list like 5:42,11:8.5%")
        if int(name) in budgets:
            raise UsageError(f"--layer-budgets names layer {name} twice: drop one")
        budgets[int(name)] = budget_tokens(budget, context, "--layer-budgets")
    return budgets


def _fitting(heavy: int, recent: int, context: int) -> tuple[int, int]:
    if heavy < 0 or recent < 1:
        raise UsageError(f"the budget leaves {heavy} heavy and {recent} recent tokens: raise it or change the split")
    if heavy + recent > context:
        raise UsageError(f"{heavy} heavy and {recent} recent tokens are more than the context of {context}")
    return heavy, recent


def plan_layers(
    layers: Sequence[AttentionLayer],
    config: ExportConfig,
    context: int,
    ranks: dict[int, int],
    distances: Mapping[int, int] = MappingProxyType({}),
) -> tuple[LayerSpec, ...]:
    """The cache of every layer.

    ``ranks`` maps the layers that have kernels to their rank, ``distances`` those that rotate queries and keys
    themselves to their largest distance. Sliding layers keep their window
    exactly, unless ``compress_sliding`` applies the policy with a budget below the window to them.
    """
    policy = by_name(config.policy or DEFAULT_POLICY)
    half_life = half_life_of(policy, config)
    slots, state = state_of(policy, config)
    own = {} if config.layer_budgets is None else layer_tokens(config.layer_budgets, context)
    if policy.keeps_all:
        split = config.budget is not None or config.heavy is not None or config.recent is not None
        if split or own:
            drop = "--budget, --heavy and --recent" if split else "--layer-budgets"
            raise UsageError(f"policy {policy.name} keeps every token: drop {drop}, set --context")
        common = 0, context
    else:
        common = split_budget(policy, config, context)
    if own and (config.heavy is not None or config.recent is not None):
        raise UsageError("--layer-budgets are split by the policy: drop --heavy and --recent")
    if own and max(own) >= len(layers):
        raise UsageError(f"--layer-budgets names layer {max(own)}, but the model has {len(layers)} layers")
    planned = []
    for index, layer in enumerate(layers):
        heavy, recent = _fitting(*policy.split(own[index]), context) if index in own else common
        facts, distance = (layer.query_heads, layer.kv_heads, layer.head_dim, layer.scale), distances.get(index)
        if distance is not None and layer.window:  # nothing further away is seen, and shorter tables suffice
            distance = min(distance, layer.window)
        compressed = config.compress_sliding and policy.evicts and heavy + recent < layer.window
        if layer.window and not compressed:
            if index in own:
                raise UsageError(
                    f"--layer-budgets: layer {index} keeps its window of {layer.window} tokens: leave it out, or give "
                    "--compress-sliding and less than the window"
                )
            window = layer.window
            spec = LayerSpec(*facts, Policy.WINDOW, 0, window, window, False, window, 1, None, slots, distance)
            planned.append(spec)
            continue
        rank = ranks.get(index, 0) if policy.evicts else 0
        low_rank = (rank > 0, heavy + recent, max(rank, 1))
        bits = state if rank > 0 else 32
        spec = LayerSpec(*facts, policy, heavy, recent, layer.window, *low_rank, half_life, slots, distance, bits)
        planned.append(spec)
    return tuple(planned)


def sparse_layer(layer: LayerSpec, slots: int) -> LayerSpec:
    """The layer with ``slots`` slots, split as its policy splits a budget, and without a low-rank term."""
    split = layer.policy.split
    heavy, recent = split(slots)
    if (layer.heavy, layer.recent) != split(layer.capacity):  # a split that the user chose keeps its heavy tokens
        heavy, recent = layer.heavy, slots - layer.heavy
    return replace(layer.without_state(), heavy=heavy, recent=recent, capacity=slots)


def resized(layer: LayerSpec, slots: int) -> LayerSpec:
    """The layer with ``slots`` slots, split as its policy splits a budget, and its low-rank term."""
    return replace(sparse_layer(layer, slots), absorb=layer.absorb, rank=layer.rank, state_bits=layer.state_bits)


def exact_layer(layer: LayerSpec, context: int) -> LayerSpec:
    """The layer with every token that it would see without LESS, at its true distance, in the compute dtype."""
    distance = None if layer.max_distance is None else max(layer.max_distance, context)
    policy, size = (Policy.WINDOW, layer.window) if layer.window else (Policy.FULL, context)
    return replace(
        layer.without_state(), policy=policy, heavy=0, recent=size, capacity=size, score_half_life=None,
        slot_dtype="model", max_distance=distance,
    )  # fmt: skip


def default_context(max_position_embeddings: int | None) -> int:
    """Context of a model without a recipe (tokens)."""
    return min(max_position_embeddings or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def unused_kernels(planned: Sequence[LayerSpec], kernels: Collection[int]) -> list[int]:
    """Layers with kernels that the plan does not use (they keep every token they see)."""
    return [i for i in kernels if not planned[i].absorb]
