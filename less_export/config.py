"""Options of an export, validated once, and the layer plan they lead to."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .contract import COMPUTE_DTYPES, LayerSpec, Policy
from .errors import UsageError
from .less.policies import POLICIES

Target = Literal["ort", "trt", "both"]
TARGETS: tuple[Target, ...] = ("ort", "trt", "both")
Weights = Literal["int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("int8", "int4")
#: Policies a user may ask for; ``window`` is what a sliding layer gets by itself.
EVICTING = (Policy.H2O, Policy.TOVA, Policy.SINK)
DEFAULT_POLICY = Policy.H2O.label
DEFAULT_CONTEXT = 4096
DEFAULT_BUDGET = "5%"
DEFAULT_CHUNK = 256


@dataclass(frozen=True)
class AttentionLayer:
    """What a decoder's layer asks of attention. ``window`` is 0 where the layer does not slide."""

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int


@dataclass(frozen=True)
class ExportConfig:
    """What a user may choose; ``None`` leaves it to the recipe, then to the model, then to the default.

    budget: tokens per layer and head (``"256"``) or a share of ``context`` (``"5%"``).
    context: tokens; what percentages refer to, and the capacity of policy ``full``.
    layer_budgets: layers with a budget of their own, ``"5:4%,11:88"``. heavy, recent: how the budget is split, in
    tokens. dtype: compute dtype, over the target's own choice.
    weights: what linear layers' weights are quantised to. max_batch: most rows.
    rank: must match the kernels when both are given. chunk: most tokens per step.
    plugin: engines run LESS in the plugin, not in standard operators. random_weights: make the weights up,
    from ``seed`` (0 unless given).
    """

    target: Target | None = None
    policy: str | None = None
    budget: str | None = None
    layer_budgets: str | None = None
    context: int | None = None
    heavy: int | None = None
    recent: int | None = None
    rank: int | None = None
    kernels: Path | None = None
    dtype: str | None = None
    weights: Weights | None = None
    max_batch: int = 8
    chunk: int | None = None
    num_hidden_layers: int | None = None
    logits: Literal["last", "all"] = "last"
    gpu_arch: str | None = None
    plugin: bool = True
    compress_sliding: bool | None = None
    validate: bool = True
    random_weights: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise UsageError(f"unknown target '{self.target}': choose one of {', '.join(TARGETS)}")
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}': choose one of {', '.join(COMPUTE_DTYPES)}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise UsageError(f"unknown weights '{self.weights}': choose one of {', '.join(WEIGHTS)}")
        if self.policy is not None and Policy.parse(self.policy) not in (*EVICTING, Policy.FULL):
            raise UsageError(f"policy '{self.policy}' is not for choosing: take h2o, tova, sink or full")
        for name in ("context", "recent", "rank", "max_batch", "chunk", "num_hidden_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.heavy is not None and self.heavy < 0:
            raise UsageError(f"--heavy must be at least 0, not {self.heavy}")
        if self.seed is not None and not self.random_weights:
            raise UsageError("--seed is for --random-weights: add it, or drop --seed")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed must be at least 0, not {self.seed}")

    def with_defaults(self, recipe: dict[str, Any]) -> ExportConfig:
        """The same options, those that are unset and that nothing else settles taken from ``recipe``."""
        given = {n for n in recipe if getattr(self, n) is not None}
        policy = self.policy or recipe.get("policy")
        whole = self.heavy is not None and (self.recent is not None or policy == Policy.TOVA.label)
        if policy == Policy.FULL.label or whole:
            given.add("budget")
        others = "budget" in given or (self.heavy, self.recent) != (None, None) or policy != recipe.get("policy")
        if others or self.num_hidden_layers is not None:
            given.add("layer_budgets")  # they divide the recipe's budget among its layers under its policy, no other
        return replace(self, **{n: v for n, v in recipe.items() if n not in given})


def budget_tokens(budget: str, context: int, option: str = "--budget") -> int:
    """Tokens of a budget ``option``: ``N``, or ``P%`` of ``context`` rounded down to an even number.

    Raises:
        UsageError: not a number, less than 1 token or more than the context.
    """
    text = str(budget).strip()
    try:  # exactly: 29% of 200 are 58, which floats miss
        tokens = 2 * math.floor(Fraction(text[:-1]) * context / 200) if text.endswith("%") else int(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option} '{budget}' is neither a number of tokens nor a percentage like 5%") from None
    if tokens < 1:
        raise UsageError(f"{option} {budget} leaves no token of a context of {context}: raise it")
    if tokens > context:
        raise UsageError(f"{option} {budget} is more than the context of {context} tokens: lower it or raise --context")
    return tokens


def split_budget(policy: Policy, config: ExportConfig, context: int) -> tuple[int, int]:
    """``(heavy, recent)`` in tokens, from --budget, --heavy and --recent."""
    heavy, recent = config.heavy, config.recent
    if policy is Policy.TOVA:
        if recent not in (None, 1):
            raise UsageError("tova protects only the newest token: drop --recent")
        recent = 1
    if heavy is not None and recent is not None:
        if config.budget is not None and budget_tokens(config.budget, context) != heavy + recent:
            raise UsageError("--heavy and --recent do not add up to --budget: give two of the three")
        return _fitting(heavy, recent, context)
    total = budget_tokens(config.budget or DEFAULT_BUDGET, context)
    if heavy is not None:
        return _fitting(heavy, total - heavy, context)
    if recent is not None:
        return _fitting(total - recent, recent, context)
    return _fitting(*POLICIES[policy].split(total), context)


def layer_tokens(text: str, context: int) -> dict[int, int]:
    """Slots of the layers that ``--layer-budgets LAYER:N|P%,...`` names.

    Raises:
        UsageError: not such a list, a layer named twice, or a budget that is none.
    """
    if text == "auto":
        raise UsageError("--layer-budgets auto is for less-export train, which says what to give here")
    found: dict[int, int] = {}
    for part in text.split(","):
        name, colon, budget = part.strip().partition(":")
        if not (name.isdecimal() and colon):
            raise UsageError(f"--layer-budgets '{text}' is not a list like 5:42,11:8.5%")
        if int(name) in found:
            raise UsageError(f"--layer-budgets names layer {name} twice: drop one")
        found[int(name)] = budget_tokens(budget, context, "--layer-budgets")
    return found


def _fitting(heavy: int, recent: int, context: int) -> tuple[int, int]:
    if heavy < 0 or recent < 1:
        raise UsageError(f"the budget leaves {heavy} heavy and {recent} recent tokens: raise it or change the split")
    if heavy + recent > context:
        raise UsageError(f"{heavy} heavy and {recent} recent tokens are more than the context of {context}")
    return heavy, recent


def plan_layers(
    layers: Sequence[AttentionLayer], config: ExportConfig, context: int, ranks: dict[int, int]
) -> tuple[LayerSpec, ...]:
    """What every layer's cache will be.

    ``ranks`` gives the layers that have kernels and their rank. Layers that slide keep their window
    exactly, unless ``compress_sliding`` gives them the policy with a budget below the window.
    """
    policy = Policy.parse(config.policy or DEFAULT_POLICY)
    own = {} if config.layer_budgets is None else layer_tokens(config.layer_budgets, context)
    if policy is Policy.FULL:
        if config.budget is not None or config.heavy is not None or config.recent is not None:
            raise UsageError("policy full keeps every token: drop --budget, --heavy and --recent, set --context")
        if own:
            raise UsageError("policy full keeps every token: drop --layer-budgets, set --context")
        common = 0, context
    else:
        common = split_budget(policy, config, context)
    if own and (config.heavy is not None or config.recent is not None):
        raise UsageError("--layer-budgets are split as the policy does it: drop --heavy and --recent")
    if own and max(own) >= len(layers):
        raise UsageError(f"--layer-budgets names layer {max(own)}, but the model has {len(layers)} layers")
    planned = []
    for index, layer in enumerate(layers):
        heavy, recent = _fitting(*POLICIES[policy].split(own[index]), context) if index in own else common
        facts = (layer.query_heads, layer.kv_heads, layer.head_dim, layer.scale)
        compressed = config.compress_sliding and policy is not Policy.FULL and heavy + recent < layer.window
        if layer.window and not compressed:
            if index in own:
                raise UsageError(
                    f"--layer-budgets: layer {index} keeps its window of {layer.window} tokens: leave it out, or give "
                    "--compress-sliding and less than the window"
                )
            planned.append(LayerSpec(*facts, Policy.WINDOW, 0, layer.window, layer.window, False, layer.window, 1))
            continue
        rank = ranks.get(index, 0) if policy is not Policy.FULL else 0
        planned.append(LayerSpec(*facts, policy, heavy, recent, layer.window, rank > 0, heavy + recent, max(rank, 1)))
    return tuple(planned)


def sparse_layer(layer: LayerSpec, slots: int) -> LayerSpec:
    """The layer with ``slots`` slots, split as its policy splits a budget, and without a low-rank term."""
    split = POLICIES[layer.policy].split
    heavy, recent = split(slots)
    if (layer.heavy, layer.recent) != split(layer.capacity):  # a split of the user's own keeps its heavy tokens
        heavy, recent = layer.heavy, slots - layer.heavy
    return replace(layer, absorb=False, rank=1, heavy=heavy, recent=recent, capacity=slots)


def exact_layer(layer: LayerSpec, context: int) -> LayerSpec:
    """The layer with everything it would see without LESS."""
    policy, size = (Policy.WINDOW, layer.window) if layer.window else (Policy.FULL, context)
    return replace(layer, policy=policy, heavy=0, recent=size, absorb=False, capacity=size, rank=1)


def default_context(max_position_embeddings: int | None) -> int:
    """Context of a model without a recipe (tokens)."""
    return min(max_position_embeddings or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def unused_kernels(planned: Sequence[LayerSpec], kernels: Collection[int]) -> list[int]:
    """Layers that have kernels which the plan does not use (they keep everything they see)."""
    return [i for i in kernels if not planned[i].absorb]
