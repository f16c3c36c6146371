"""The caches that are compared: full, sparse, sparse with as many bytes as LESS, and LESS.

Baselines keep their slots in what the plan's slots are, so that a comparison at equal bytes shows what the state adds;
``sparse16+bytes`` keeps them in the compute dtype, which for int8 slots shows what a user gains in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..contract import LayerSpec
from ..dtypes import item_bytes
from ..errors import UsageError
from ..less.feature_maps import Kernels
from ..less.memory import extra_tokens, layer_bytes
from ..plan import exact_layer, sparse_layer

#: ``sparse+4`` is the sparse cache plus the 4 tokens of the paper (section 4.1), ``sparse+bytes`` the sparse cache
#: plus all bytes that LESS adds to a sequence, ``sparse16+bytes`` one of these bytes with slots in the compute dtype.
Kind = Literal["full", "sparse", "sparse+4", "sparse16+bytes", "sparse+bytes", "less"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Baselines, strongest first.
BASELINES: tuple[Kind, ...] = ("sparse+bytes", "sparse16+bytes", "sparse+4", "sparse")
PAPER_TOKENS = 4


@dataclass(frozen=True)
class Variant:
    """A cache: its kind, the plan of every layer, the kernels of layers with a low-rank term, and the centring of keys
    in int8 slots."""

    kind: Kind
    plan: tuple[LayerSpec, ...]
    kernels: Kernels

    def state_bytes(self, dtype: str) -> int:
        """Bytes of one sequence's state; for the full cache only keys and values, as in an ordinary decoder."""
        plain = sum(2 * s.kv_heads * s.capacity * s.head_dim * item_bytes(dtype) for s in self.plan)
        return plain if self.kind == "full" else sum(layer_bytes(s, dtype) for s in self.plan)

    def slots(self) -> list[int]:
        """The slots of every layer that evicts."""
        return [s.capacity for s in self.plan if s.policy.evicts]


def same_bytes(spec: LayerSpec, dtype: str) -> LayerSpec:
    """The layer without its low-rank state, with slots in the compute dtype that take its bytes, rounded up."""
    plain = replace(spec.without_state(), slot_dtype="model")
    token = layer_bytes(plain, dtype, spec.capacity + 1) - layer_bytes(plain, dtype)
    return sparse_layer(plain, max(-(-layer_bytes(spec, dtype) // token), spec.policy.fixed_recent or 1))


def kinds_for(plan: Sequence[LayerSpec], kernels: Kernels) -> list[Kind]:
    """The kinds that differ from one another for a plan."""
    absent = set() if kernels.layers else {"less"}
    if not any(s.int8 and s.policy.evicts for s in plan):
        absent.add("sparse16+bytes")
    return [k for k in KINDS if k not in absent]


def chosen(names: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds in ``names``, each once, LESS last (its share of a gap needs the others).

    Raises:
        UsageError: a name is not a kind.
    """
    unknown = [n for n in names if n not in KINDS]
    if unknown:
        raise UsageError(f"--compare: unknown '{unknown[0]}'; choose from {', '.join(KINDS)}")
    return tuple(k for k in KINDS if k in names)


def build(
    kinds: Sequence[Kind], plan: Sequence[LayerSpec], kernels: Kernels, context: int, dtype: str
) -> list[Variant]:
    """The variants of a comparison.

    Args:
        plan: layers of the LESS cache. kernels: feature maps, needed for "less" only, and centring of keys.
        context: tokens of the full cache. dtype: of the cache, to count bytes.

    Raises:
        UsageError: "less" is compared without kernels.
    """
    maps, variants, centring = kernels.layers, [], Kernels({}, {}, kernels.centring)
    for kind in kinds:
        if kind == "full":
            variants.append(Variant(kind, tuple(exact_layer(s, context) for s in plan), centring))
        elif kind == "less":
            used = {i: maps[i] for i, s in enumerate(plan) if s.absorb and i in maps}
            if not used:
                raise UsageError(
                    "no layer has kernels, so LESS equals the sparse cache: give --kernels, or drop less from --compare"
                )
            variants.append(Variant(kind, tuple(plan), Kernels(used, {}, kernels.centring)))
        elif kind == "sparse16+bytes":
            layers = tuple(same_bytes(s, dtype) if s.policy.evicts else s for s in plan)
            variants.append(Variant(kind, layers, centring))
        else:
            layers = tuple(sparse_layer(s, s.capacity + _extra_slots(kind, s, dtype)) if s.absorb else s for s in plan)
            variants.append(Variant(kind, layers, centring))
    return variants


def _extra_slots(kind: Kind, spec: LayerSpec, dtype: str) -> int:
    """Slots that a sparse baseline gets in addition."""
    return {"sparse": 0, "sparse+4": PAPER_TOKENS, "sparse+bytes": extra_tokens(spec, dtype)}[kind]
