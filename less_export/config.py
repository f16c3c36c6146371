"""Options of an export, validated once, and the allowed names; ``plan`` turns them into layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .contract import SLOT_DTYPES, STATE_BITS, SlotDtype, StateBits
from .dtypes import COMPUTE_DTYPES
from .errors import UsageError
from .less.policies import Policy, by_name, choosable

Target = Literal["ort", "trt", "both"]
TARGETS: tuple[Target, ...] = ("ort", "trt", "both")
Weights = Literal["int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("int8", "int4")
Block = Literal[32, 64, 128]
#: Input features of a quantised matrix that share a scale.
BLOCKS: tuple[Block, ...] = (32, 64, 128)
DEFAULT_BLOCK: Block = 64
#: The output embedding's errors reach the logits undamped.
DEFAULT_HEAD: Weights = "int8"
#: Runtimes of exported graphs, and all of them: torch is the reference of the others.
GRAPH_BACKENDS = ("ort", "trt")
BACKENDS = (*GRAPH_BACKENDS, "torch")
DEFAULT_POLICY = Policy.H2O.name
DEFAULT_CONTEXT = 4096
DEFAULT_BUDGET = "5%"
DEFAULT_CHUNK = 256
#: A half-life in tokens, or that scores never fade.
HalfLife = int | Literal["none"]
#: Measured: docs/results/long.md.
DEFAULT_HALF_LIFE: HalfLife = 128
#: Longest half-life; beyond it a float32 score does not fade from one token to the next.
MAX_HALF_LIFE = 1 << 20
#: The largest distance in tokens that a slot is seen at, or that positions are absolute.
MaxDistance = int | Literal["none"]
#: Most of a default largest distance: tables of angles grow with it, and few slots are older.
DEFAULT_FARTHEST = 1 << 15
#: Bound of the largest distance, up to which a model's frequencies are known exactly.
DISTANCE_LIMIT = 1 << 20
#: Slots of policies that evict. Measured: docs/results/int8.md. A policy that keeps every token is exact.
DEFAULT_SLOTS: SlotDtype = "int8"
#: Bits of the low-rank state where slots are int8 and psi sums to one; 32 elsewhere.
DEFAULT_STATE: StateBits = 16
#: Options of a cache, for every command that plans one.
CACHE_OPTIONS = (
    "policy", "budget", "layer_budgets", "score_half_life", "slots", "state", "max_distance", "context",
    "compress_sliding",
)  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """Options of an export; ``None`` leaves one to the recipe, then to the model, then to the default.

    Args:
        target: graph for ``"ort"``, ``"trt"`` or ``"both"``; default by what is written.
        policy: which tokens keep a slot: ``"h2o"``, ``"tova"``, ``"sink"`` or ``"full"``.
        budget: slots per layer and KV head, in tokens (``"256"``) or as a share of ``context`` (``"5%"``).
        layer_budgets: budgets of single layers, like ``"5:4%,11:88"``; default those that ``kernels`` were trained
            with, unless ``budget``, ``heavy`` or ``recent`` differ, or the policy does.
        score_half_life: tokens after which a score of policy h2o counts half (default 128), or ``"none"``: scores
            never fade, as in the H2O paper.
        slots: what slots hold keys and values in: ``"int8"`` (the default), or the compute dtype (``"model"``, the
            default of policy ``full``).
        state: bits of the low-rank state and of psi in slots: 16 (the default with int8 slots, which it needs), or 32.
        max_distance: largest distance in tokens that a slot is seen at, whatever the length of the text (the rotary
            embedding is then part of the operator), or ``"none"``: absolute positions. Default: the trained length
            less the chunk, but at least half of it and at most 32,768; none for policy ``full`` and for models without
            rotary embeddings.
        context: tokens that percentages refer to, and slots of policy ``full``.
        heavy: slots for heavy hitters or sinks, in tokens; default by the policy.
        recent: slots for the newest tokens; default by the policy.
        rank: refuse kernels of another rank.
        kernels: file of trained kernels.
        dtype: compute dtype; default float32 for ONNX Runtime, the model's own for TensorRT.
        weights: quantise the weights of linear layers to ``"int8"`` or ``"int4"``.
        block: with ``weights``, input features that share a scale: 32, 64 (the default) or 128; fewer where that does
            not divide a layer's width.
        head: with ``weights``, what the output embedding is quantised to; default ``"int8"`` in either case.
        max_batch: most rows at a time.
        chunk: most tokens per step.
        num_hidden_layers: keep only the first layers, for trials.
        logits: of the ``"last"`` token, or of ``"all"``.
        gpu_arch: GPU architectures of an engine, like ``"sm_89,sm_90"`` (TensorRT-RTX).
        plugin: engines run LESS in the plugin, not in standard operators.
        compress_sliding: give sliding layers the policy too.
        validate: compare with Hugging Face before anything is written.
        random_weights: make a checkpoint of the model's true shape with random weights, and export that.
        seed: of the random weights; default 0.

    Raises:
        UsageError: a value out of range, or one that contradicts another.
    """

    target: Target | None = None
    policy: str | None = None
    budget: str | None = None
    layer_budgets: str | None = None
    score_half_life: HalfLife | None = None
    slots: SlotDtype | None = None
    state: StateBits | None = None
    max_distance: MaxDistance | None = None
    context: int | None = None
    heavy: int | None = None
    recent: int | None = None
    rank: int | None = None
    kernels: Path | None = None
    dtype: str | None = None
    weights: Weights | None = None
    block: Block | None = None
    head: Weights | None = None
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
        if self.block is not None and self.block not in BLOCKS:
            raise UsageError(f"--block must be {', '.join(map(str, BLOCKS[:-1]))} or {BLOCKS[-1]}, not {self.block}")
        if self.head is not None and self.head not in WEIGHTS:
            raise UsageError(f"unknown head '{self.head}': choose one of {', '.join(WEIGHTS)}")
        for name in ("block", "head"):
            if getattr(self, name) is not None and self.weights is None:
                raise UsageError(f"--{name} is for quantised weights: add --weights, or drop --{name}")
        if self.policy is not None and not by_name(self.policy).choosable:
            raise UsageError(f"policy '{self.policy}' cannot be chosen: choose one of {', '.join(choosable())}")
        if self.slots is not None and self.slots not in SLOT_DTYPES:
            raise UsageError(f"unknown slots '{self.slots}': choose one of {', '.join(SLOT_DTYPES)}")
        if self.state is not None and self.state not in STATE_BITS:
            raise UsageError(f"--state must be {' or '.join(map(str, STATE_BITS))} bits, not {self.state}")
        if self.state == 16 and self.slots == "model":
            raise UsageError("--state 16 goes with int8 slots: drop --slots model, or give --state 32")
        for name in ("context", "recent", "rank", "max_batch", "chunk", "num_hidden_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        half_life = self.score_half_life
        if half_life not in (None, "none") and not (type(half_life) is int and 1 <= half_life <= MAX_HALF_LIFE):
            raise UsageError(f"--score-half-life must be from 1 to {MAX_HALF_LIFE} tokens or none, not {half_life}")
        distance = self.max_distance
        if distance not in (None, "none") and not (type(distance) is int and 1 <= distance <= DISTANCE_LIMIT):
            raise UsageError(f"--max-distance must be from 1 to {DISTANCE_LIMIT} tokens or none, not {distance}")
        if self.heavy is not None and self.heavy < 0:
            raise UsageError(f"--heavy must be at least 0, not {self.heavy}")
        if self.seed is not None and not self.random_weights:
            raise UsageError("--seed is for --random-weights: add it, or drop --seed")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed must be at least 0, not {self.seed}")

    def with_defaults(self, recipe: dict[str, Any]) -> ExportConfig:
        """The same options, where those that are unset, and that no other option determines, come from ``recipe``."""
        settled = {n for n in recipe if getattr(self, n) is not None}
        name = self.policy or recipe.get("policy")
        policy = by_name(name or DEFAULT_POLICY)
        whole = self.heavy is not None and (self.recent is not None or policy.fixed_recent is not None)
        if policy.keeps_all or whole:
            settled.add("budget")
        others = "budget" in settled or (self.heavy, self.recent) != (None, None) or name != recipe.get("policy")
        if policy.scoring != "accumulate":
            settled.add("score_half_life")
        if self.slots == "model":
            settled.add("state")
        if others or self.num_hidden_layers is not None:
            settled.add("layer_budgets")  # the recipe's are valid only for its own budget and policy
        return replace(self, **{n: v for n, v in recipe.items() if n not in settled})
