"""The tensor contract: the inputs and outputs of a LESS graph, with their names, dtypes and shapes.

Exporter, engine profiles, backends, manifest and embedding services all derive names and shapes from
:class:`Contract`; no other module contains a tensor name. Needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .dtypes import COMPUTE_DTYPES, item_bytes
from .errors import BundleError, UsageError
from .less.policies import EvictionPolicy, registered
from .less.policies import Policy as Policy

OP_DOMAIN = "less"
OP_NAME = "LessAttention"
OP_VERSION = 2
#: Version of the TensorRT plugin, which runs every version of the operator.
PLUGIN_VERSION = "1"

#: TensorRT's limit on K of TopK, with which the bodies of h2o and tova choose the slots.
TENSORRT_TOPK_LIMIT = 3840
#: Bytes that the tensors of all rows stay below, so that sums of sizes fit into 64 bits in every runtime.
MAX_TENSOR_BYTES = 2**60
#: Largest rank that the plugin's kernels accept.
PLUGIN_RANK_LIMIT = 64

INPUT_IDS = "input_ids"
PAST_LENGTH = "past_length"
NEW_LENGTH = "new_length"
#: The input of plans that take rows of the state by index.
ROWS = "rows"
LOGITS = "logits"

BATCH = "batch"
CHUNK = "chunk"
#: The rows of the state where a step runs any of them.
STATE_ROWS = "state_rows"

#: What slots hold their keys and values in: the compute dtype, or integers with a scale per token (``less.int8``).
SlotDtype = Literal["model", "int8"]
SLOT_DTYPES: tuple[SlotDtype, ...] = ("model", "int8")
#: Bits in which the low-rank state keeps what a feature absorbed: a sum in float32, or a mean in 16 bits
#: (``less.state16``).
StateBits = Literal[16, 32]
STATE_BITS: tuple[StateBits, ...] = (16, 32)


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and their size: what the kernels of an attention layer must match."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def heads(self) -> Heads:
        """These numbers alone, without those of a subclass."""
        return Heads(self.query_heads, self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class LayerSpec(Heads):
    """Static properties of one attention layer's LESS node.

    ``capacity`` slots hold at most ``heavy + recent`` tokens; ``window`` > 0 limits what a query sees to
    the newest ``window`` positions, itself included. ``absorb`` layers own a low-rank state of ``rank``
    features; the others have rank 1, psi = 0 and skip it. ``score_half_life`` is the number of tokens after
    which an accumulated score counts half, ``None`` if scores never fade. ``slot_dtype`` is what the slots hold.
    ``max_distance`` is the largest distance in tokens that a slot is seen at; its layer gets q and k before the
    rotary embedding and rotates them itself. ``None``: the model rotates q and k by absolute positions, or not at all.
    ``state_bits`` 16 keeps the low-rank state and psi of int8 slots in fewer bits.
    """

    scale: float
    policy: EvictionPolicy
    heavy: int
    recent: int
    window: int
    absorb: bool
    capacity: int
    rank: int
    score_half_life: int | None = None
    slot_dtype: SlotDtype = "model"
    max_distance: int | None = None
    state_bits: StateBits = 32

    def __post_init__(self) -> None:
        def require(ok: bool, why: str) -> None:
            if not ok:
                raise UsageError(f"impossible layer ({self.policy.name}): {why}")

        require(min(self.query_heads, self.kv_heads, self.head_dim) > 0, "heads and head_dim must be positive")
        require(self.query_heads % self.kv_heads == 0, "query heads must be a multiple of KV heads")
        require(math.isfinite(self.scale), "the attention scale must be finite")
        require(self.heavy >= 0 and self.recent >= 1 and self.window >= 0, "heavy, window >= 0 and recent >= 1")
        require(self.capacity >= 1 and self.rank >= 1, "capacity and rank must be at least 1")
        require(self.absorb or self.rank == 1, "a layer that absorbs nothing has rank 1")
        require(self.heavy + self.recent == self.capacity, "heavy + recent must equal the capacity")
        require(
            self.score_half_life is None or (self.score_half_life >= 1 and self.policy.scoring == "accumulate"),
            "a half-life is at least 1 token, and only accumulated scores have one",
        )
        require(self.slot_dtype in SLOT_DTYPES, f"slots are {' or '.join(SLOT_DTYPES)}, not {self.slot_dtype}")
        require(self.max_distance is None or self.max_distance >= 1, "the largest distance is at least 1 token")
        require(self.state_bits in STATE_BITS, f"a state has 16 or 32 bits, not {self.state_bits}")
        require(self.state_bits == 32 or (self.absorb and self.int8), "a state of 16 bits goes with int8 slots")
        reason = self.policy.why_impossible(self)
        require(reason is None, reason or "")

    @property
    def decay(self) -> float:
        """How much one token leaves of the scores before it, 2 ** (-1 / half-life), or 1 if they never fade."""
        return 1.0 if self.score_half_life is None else 2.0 ** (-1 / self.score_half_life)

    @property
    def int8(self) -> bool:
        """Whether keys and values of the slots are int8."""
        return self.slot_dtype == "int8"

    @property
    def state_fields(self) -> tuple[StateField, ...]:
        """The state of the layer, in the op's order."""
        return state_fields(self.int8, self.state16)

    @property
    def state16(self) -> bool:
        """Whether the low-rank state has 16 bits."""
        return self.state_bits == 16

    @property
    def state_width(self) -> int:
        """Elements of a feature of ``h``: head_dim numbers, or two planes of them."""
        return 2 * self.head_dim if self.state16 else self.head_dim

    def without_state(self) -> LayerSpec:
        """The layer without its low-rank state."""
        return replace(self, absorb=False, rank=1, state_bits=32)

    def attributes(self) -> dict[str, int | float]:
        """Attributes of the torch operator, and of every ``LessAttention`` node, in the op's order."""
        return {
            "scale": float(self.scale),
            "policy": self.policy.code,
            "heavy": self.heavy,
            "recent": self.recent,
            "window": self.window,
            "absorb": int(self.absorb),
            "decay": self.decay,
        }


def limits_distances(layers: Iterable[LayerSpec]) -> bool:
    """Whether layers rotate queries and keys themselves: the model then runs with all positions 0."""
    return any(layer.max_distance is not None for layer in layers)


def _policy(name: str) -> EvictionPolicy:
    """The policy that a manifest names, exactly; options may use capitals."""
    policy = next((p for p in registered() if p.name == name), None)
    if policy is None:
        raise BundleError(
            f"the manifest's contract is damaged, or policy {name!r} is not registered: register it "
            "(less_export.less.policies), or export the bundle again"
        )
    return policy


@dataclass(frozen=True)
class StateField:
    """One state tensor of a layer: dims name :class:`LayerSpec` fields.

    dtype "T" is the compute dtype, "S" that of keys and values in slots, "P" that of psi in slots, "H"
    that of ``h``.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    empty: int = 0

    def dtype_in(self, layer: LayerSpec, compute_dtype: str) -> str:
        """dtype for ``layer`` in a graph that computes in ``compute_dtype``."""
        coded = {"S": layer.int8, "P": layer.state16, "H": layer.state16}.get(self.dtype, False)
        if coded:
            return "int8"
        return {"T": compute_dtype, "S": compute_dtype, "P": compute_dtype, "H": "float32"}.get(self.dtype, self.dtype)


#: The state of every layer, in the op's order; ``empty`` fills a fresh row.
STATE_FIELDS = (
    StateField("key", ("kv_heads", "capacity", "head_dim"), "S"),
    StateField("value", ("kv_heads", "capacity", "head_dim"), "S"),
    StateField("psi", ("kv_heads", "capacity", "rank"), "P"),
    StateField("score", ("kv_heads", "capacity"), "float32"),
    StateField("position", ("kv_heads", "capacity"), "int32", empty=-1),
    StateField("h", ("kv_heads", "rank", "state_width"), "H"),
    StateField("z", ("kv_heads", "rank"), "float32"),
)
#: What layers with int8 slots have besides: a scale per token and head.
SCALE_FIELDS = (
    StateField("key_scale", ("kv_heads", "capacity"), "float32"),
    StateField("value_scale", ("kv_heads", "capacity"), "float32"),
)
#: What layers with a state of 16 bits have besides: a scale per feature.
STATE_SCALE_FIELDS = (StateField("h_scale", ("kv_heads", "rank"), "float32"),)
ALL_FIELDS = STATE_FIELDS + SCALE_FIELDS + STATE_SCALE_FIELDS


def state_fields(int8: bool, state16: bool) -> tuple[StateField, ...]:
    """The state of a layer with or without int8 slots and a state of 16 bits, in the op's order."""
    return STATE_FIELDS + SCALE_FIELDS * int8 + STATE_SCALE_FIELDS * state16


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one graph input or output; a string in the shape is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, batch: int, chunk: int = 1, state_rows: int | None = None) -> tuple[int, ...]:
        """The shape with its dynamic axes filled in; the state has ``batch`` rows unless it is said how many."""
        sizes = {BATCH: batch, CHUNK: chunk, STATE_ROWS: batch if state_rows is None else state_rows}
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class StateTensor:
    """One state tensor of one layer: ``past`` is an input of the graph, ``present`` an output; ``rows`` is an axis."""

    layer: int
    field: StateField
    dtype: str
    row_shape: tuple[int, ...]
    rows: str = BATCH

    @property
    def past(self) -> TensorSpec:
        return TensorSpec(f"past.{self.layer}.{self.field.name}", self.dtype, (self.rows, *self.row_shape))

    @property
    def present(self) -> TensorSpec:
        return TensorSpec(f"present.{self.layer}.{self.field.name}", self.dtype, (self.rows, *self.row_shape))

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence."""
        return math.prod(self.row_shape) * item_bytes(self.dtype)


@dataclass(frozen=True)
class Contract:
    """Everything that a runtime must know to run one artifact.

    ``dtype`` is the compute dtype T, ``chunk`` the maximum number of tokens per step, ``max_batch`` the maximum
    number of rows, ``position_limit`` the number of learned positions (``None`` with rotary embeddings),
    ``trained_length`` the model's max_position_embeddings, beyond which quality is unknown.
    """

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    dtype: str
    chunk: int
    max_batch: int
    logits: Literal["last", "all"] = "last"
    position_limit: int | None = None
    trained_length: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in COMPUTE_DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}': choose one of {', '.join(COMPUTE_DTYPES)}")
        if self.chunk < 1 or self.max_batch < 1:
            raise UsageError("--chunk and --max-batch must be at least 1")
        if self.logits not in ("last", "all"):
            raise UsageError(f"unknown logits '{self.logits}': choose last or all")

    # Below, ``by_index`` asks for the tensors of a plan that takes rows of the state by index.

    def state(self, by_index: bool = False) -> Iterator[StateTensor]:
        """The state tensors, layer by layer, in the graph's order."""
        rows = STATE_ROWS if by_index else BATCH
        for index, layer in enumerate(self.layers):
            for field in layer.state_fields:
                dtype, shape = field.dtype_in(layer, self.dtype), tuple(getattr(layer, d) for d in field.dims)
                yield StateTensor(index, field, dtype, shape, rows)

    def tokens(self, by_index: bool = False) -> tuple[TensorSpec, ...]:
        """The inputs that are not state."""
        return (
            TensorSpec(INPUT_IDS, "int64", (BATCH, CHUNK)),
            TensorSpec(PAST_LENGTH, "int32", (BATCH,)),
            TensorSpec(NEW_LENGTH, "int32", (BATCH,)),
            *((TensorSpec(ROWS, "int32", (BATCH,)),) if by_index else ()),
        )

    def inputs(self, by_index: bool = False) -> tuple[TensorSpec, ...]:
        """All graph inputs in order."""
        return (*self.tokens(by_index), *(s.past for s in self.state(by_index)))

    def logits_spec(self) -> TensorSpec:
        return TensorSpec(LOGITS, "float32", (BATCH, CHUNK if self.logits == "all" else 1, self.vocab_size))

    def outputs(self, by_index: bool = False) -> tuple[TensorSpec, ...]:
        """All graph outputs in order."""
        return (self.logits_spec(), *(s.present for s in self.state(by_index)))

    def state_bytes(self) -> int:
        """State bytes of one sequence, regardless of its length."""
        return sum(s.row_bytes for s in self.state())

    def with_slots(self, slot_dtype: SlotDtype) -> Contract:
        """This contract with slots of another dtype in every layer; a state of 16 bits goes with int8 slots only."""
        bits: dict[str, Any] = {} if slot_dtype == "int8" else {"state_bits": 32}
        return replace(self, layers=tuple(replace(s, slot_dtype=slot_dtype, **bits) for s in self.layers))

    def with_state(self, bits: StateBits) -> Contract:
        """This contract with a low-rank state of so many bits in every layer that has one and int8 slots."""
        layers = (replace(s, state_bits=bits) if s.absorb and s.int8 else s for s in self.layers)
        return replace(self, layers=tuple(layers))

    def full_cache_bytes(self, length: int) -> int:
        """Bytes of an ordinary KV cache of ``length`` tokens for one sequence (sliding layers capped)."""
        tokens = (min(length, s.window) if s.window else length for s in self.layers)
        per_token = (2 * s.kv_heads * s.head_dim * item_bytes(self.dtype) for s in self.layers)
        return sum(n * b for n, b in zip(tokens, per_token, strict=True))

    def token_limit(self) -> int | None:
        """Longest sequence that the state can hold (layers that keep all, learned positions), ``None`` if unlimited."""
        limits = [s.capacity for s in self.layers if s.policy.keeps_all]
        if self.position_limit is not None:
            limits.append(self.position_limit)
        return min(limits, default=None)

    def known_length(self) -> int | None:
        """Longest sequence in which no distance exceeds what the model was trained for, ``None`` if unlimited."""
        reach = [s.max_distance + self.chunk for s in self.layers if s.max_distance is not None]
        return None if reach and max(reach) <= (self.trained_length or 0) else self.trained_length

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by :meth:`from_dict`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        return {**plain, "layers": [{**asdict(s), "policy": s.policy.name} for s in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Contract:
        """Contract of a manifest; raises :class:`BundleError` if it is damaged."""
        try:
            layers = tuple(LayerSpec(**{**s, "policy": _policy(s["policy"])}) for s in data["layers"])
            contract = cls(**{**data, "layers": layers})
            tokens = 8 * contract.chunk * contract.vocab_size
            state = sum(16 * s.kv_heads * (s.capacity + s.rank) * (s.head_dim + s.rank + 1) for s in layers)
            if contract.max_batch * (tokens + state) >= MAX_TENSOR_BYTES:
                raise ValueError("its tensors are too large")
            return contract
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise BundleError(f"the manifest's contract is damaged ({error}): export the bundle again") from error
