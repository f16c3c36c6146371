"""Divide one budget among the layers by what eviction costs the model in each.

One layer at a time evicts, at several budgets, and the model's next-token distributions are compared with those of its
full cache. The total is then divided so that the sum of these costs is smallest. That the costs of layers add up is an
assumption; ``benchmarks`` measures the result. Costs are measured twice: without low-rank terms, for the slots that
kernels are fitted with, and with these kernels, for the slots that they are tuned and served with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contract import LayerSpec
from ..hf.layerwise import LayerwiseDecoder, Passed
from ..hf.rotary import arranged
from ..hf.surgery import AttentionCall
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from ..less.rotary import RotaryTable
from ..plan import exact_layer, resized
from ..progress import Progress
from .attention import attend

#: Budgets to measure, as shares of the layer's own; the smallest and the largest bound what a layer can get.
SHARES = (0.25, 1.0, 4.0)
#: Sequences that are measured, and positions of each.
SEQUENCES, _POSITIONS = 4, 96
#: Slots that a layer gains at a time.
_STEP = 2
#: Costs below this, in nats, are errors of rounding; this is what a cost that is not finite counts.
_LEAST, _MOST = 1e-6, 1e6
#: Least fall of the cost: where it seems not to fall with the slots, that is an error of measurement.
_LEAST_EXPONENT = -0.05

#: Cost of eviction in nats per token, by layer and slots.
Costs = Mapping[int, Mapping[int, float]]


@torch.no_grad()
def measure(
    decoder: LayerwiseDecoder, ids: Tensor, plan: Sequence[LayerSpec], layers: Sequence[int], progress: Progress,
    centring: Mapping[int, Centring] | None = None, rotary: Sequence[RotaryTable] = (),
    maps: Mapping[int, FeatureMap] = MappingProxyType({}), *, most: int | None = None,
) -> dict[int, dict[int, float]]:  # fmt: skip
    """Measure the cost of eviction in each of ``layers`` alone, at each of :data:`SHARES` of its budget.

    Args:
        ids: [N,T], of which the first :data:`SEQUENCES` are used. plan: every layer's cache. centring: of keys in int8
            slots, by layer. rotary: tables of distances below T, for plans that limit distances. maps: kernels by
            layer; layers without them evict without a low-rank term. most: the most slots of a layer that has no more
            already; at most, and by default, half of T.

    Returns:
        By layer and slots: mean KL divergence from the full cache's next-token distribution, in nats per token, at
            positions past the largest budget.
    """
    full_caches = [exact_layer(s, ids.shape[1]) for s in plan]
    most = ids.shape[1] // 2 if most is None else min(most, ids.shape[1] // 2)
    budgets = {i: sorted({_slots(plan[i], share, most) for share in SHARES}) for i in sorted(layers)}
    start = max(map(max, budgets.values())) + 1
    positions = torch.linspace(start, ids.shape[1] - 2, _POSITIONS).long().unique().to(decoder.model.device)
    costs = {i: dict.fromkeys(slots, 0.0) for i, slots in budgets.items()}
    rows, constants = ids[:SEQUENCES].split(1), centring or {}

    def run(row: Tensor, caches: Sequence[LayerSpec], begin: int, hidden: Tensor | None, stop: int | None) -> Passed:
        """Run the layers from ``begin``, whose input is ``hidden``, to the input of ``stop``, or to the head."""

        def handler(call: AttentionCall) -> Tensor:
            return attend(*arranged(call, rotary), caches, maps, constants)

        return decoder.run(row, handler, not rotary, begin, hidden, stop, stop)

    def predicted(passed: Passed) -> Tensor:
        assert passed.last is not None
        return decoder.log_probabilities(passed.last[0, positions])

    runs, kind = len(rows) * sum(map(len, budgets.values())), "with kernels" if maps else "without kernels"
    with progress.phase(f"measuring the cost of eviction in each layer, {kind}", runs) as step:
        for row in rows:
            reference = predicted(run(row, full_caches, 0, None, None))
            begin, hidden = 0, None
            for i, by_slots in costs.items():  # what the layers below it do is the same whatever its cache
                hidden = run(row, full_caches, begin, hidden, i).kept
                begin = i
                for slots in by_slots:
                    caches = [*full_caches[:i], resized(plan[i], slots), *full_caches[i + 1 :]]
                    other = predicted(run(row, caches, i, hidden, None))
                    cost = float((reference.exp() * (reference - other)).sum(-1).mean())
                    by_slots[slots] += (cost if math.isfinite(cost) else _MOST) / len(rows)
                    step(f"layer {i}, {slots} slots: {cost:.4f}")
    return costs


def divide(costs: Costs, plan: Sequence[LayerSpec]) -> dict[int, int]:
    """Divide the bytes that the layers of ``costs`` take in ``plan`` among them; returns each one's slots.

    A power law in the number of slots is fitted to the costs of each layer, in logarithms, because measurements are
    noisy. Starts with the fewest slots that were measured and gives more to the layer that gains most per byte, which
    is best where costs are convex, as power laws are; of equal gains, to the one with the smallest share of its slots.
    """
    laws = {i: _law(by_slots) for i, by_slots in costs.items()}

    def cost(layer: int, slots: int) -> float:
        exponent, constant = laws[layer]
        return math.exp(constant + exponent * math.log(slots))

    def size(layer: int) -> int:
        return plan[layer].kv_heads * plan[layer].head_dim

    slots_of = {i: min(by_slots) for i, by_slots in costs.items()}
    spare = sum((plan[i].capacity - n) * size(i) for i, n in slots_of.items())
    while True:
        candidates = [i for i, n in slots_of.items() if n + _STEP <= max(costs[i]) and _STEP * size(i) <= spare]
        if not candidates:
            return slots_of
        best = max(
            candidates,
            key=lambda i: (
                (cost(i, slots_of[i]) - cost(i, slots_of[i] + _STEP)) / size(i), -slots_of[i] / plan[i].capacity,
            ),
        )  # fmt: skip
        slots_of[best] += _STEP
        spare -= _STEP * size(best)


def _law(by_slots: Mapping[int, float]) -> tuple[float, float]:
    """The exponent and the logarithm of the factor of the power law nearest to the costs."""
    slots = np.log(sorted(by_slots))
    logs = np.log([max(by_slots[n], _LEAST) for n in sorted(by_slots)])
    exponent = _LEAST_EXPONENT
    if len(slots) > 1:
        exponent = min(exponent, float(np.polyfit(slots, logs, 1)[0]))
    return exponent, float(logs.mean() - exponent * slots.mean())


def option(slots: Mapping[int, int]) -> str:
    """The value of ``--layer-budgets`` for those slots."""
    return ",".join(f"{i}:{n}" for i, n in sorted(slots.items()))


def provenance(plan: Sequence[LayerSpec]) -> dict[str, Any]:
    """Provenance of the budgets of layers that evict."""
    layers = {i: s for i, s in enumerate(plan) if s.policy.evicts}
    return {
        "layer_budgets": option({i: s.capacity for i, s in layers.items()}),
        "slots": {str(i): [s.heavy, s.recent] for i, s in layers.items()},
    }


def _slots(layer: LayerSpec, share: float, most: int) -> int:
    """``share`` of the layer's slots: an even number, fewer than its window and at most ``most``, unless it has more.

    At least 4, or the layer's own number of slots where that is smaller.
    """
    limit = max(most, layer.capacity)
    if layer.window:
        limit = min(limit, layer.window - 1)
    return max(min(2 * _STEP, layer.capacity), min(int(layer.capacity * share), limit) // _STEP * _STEP)
