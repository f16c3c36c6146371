"""Slots where they count: one budget for all layers, divided by what eviction costs the model in each.

Every layer alone is made to evict, at some budgets, and the model's next-token distributions are compared with those
of its full cache. Then the layers share their total so that the sum of these costs is least. That costs add up is an
assumption; what it leads to is measured in ``benchmarks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contract import LayerSpec
from ..plan import exact_layer, sparse_layer
from ..progress import Progress
from .end_to_end import divergence, full_cache

#: Budgets that are tried, as shares of the layer's own; none gets less or more.
SHARES = (0.25, 0.5, 1.0, 2.0)
#: Sequences that are looked at, and positions of each.
SEQUENCES, _POSITIONS = 4, 96
#: Slots that change hands at a time.
_STEP = 2

#: Cost in nats per token by slots, of every layer.
Costs = Mapping[int, Mapping[int, float]]


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids: Tensor, plan: Sequence[LayerSpec], layers: Sequence[int], progress: Progress
) -> dict[int, dict[int, float]]:
    """What it costs when one of ``layers`` alone evicts, at each of :data:`SHARES` of its budget.

    Args:
        ids: [N,T], of which a few are looked at. plan: every layer's cache.

    Returns:
        By layer and slots: KL of the full cache's next-token distribution from that, nats per token, past every budget.
    """
    kept = [exact_layer(s, ids.shape[1]) for s in plan]
    tried = {i: sorted({_slots(plan[i], share, ids.shape[1]) for share in SHARES}) for i in layers}
    first = max(map(max, tried.values())) + 1
    positions = torch.linspace(first, ids.shape[1] - 2, _POSITIONS).long().unique()
    found = {i: dict.fromkeys(slots, 0.0) for i, slots in tried.items()}
    rows = ids[:SEQUENCES]
    with progress.phase("what eviction costs in each layer", len(rows) * sum(map(len, tried.values()))) as step:
        for row in rows:
            wanted = full_cache(model, row, kept, positions)
            for i, costs in found.items():
                for slots in costs:
                    changed = [*kept[:i], sparse_layer(plan[i], slots), *kept[i + 1 :]]
                    cost = float(divergence(wanted, model, row, changed, {}, positions))
                    costs[slots] += cost / len(rows)
                    step(f"layer {i}, {slots} slots: {cost:.4f}")
    return found


def divide(costs: Costs, plan: Sequence[LayerSpec]) -> dict[int, int]:
    """Slots for every layer of ``costs``: all of them together take no more bytes than in ``plan``.

    Starts with the fewest slots that were measured and gives more to the layer that gains most by them for its bytes.
    Between measurements the cost is a power of the slots.
    """

    def cost(layer: int, slots: int) -> float:
        at = sorted(costs[layer])
        logs = [np.log(max(costs[layer][s], 1e-12)) for s in at]
        return float(np.exp(np.interp(np.log(slots), np.log(at), logs)))

    def size(layer: int) -> int:
        return plan[layer].kv_heads * plan[layer].head_dim

    given = {i: min(at) for i, at in costs.items()}
    left = sum((plan[i].capacity - n) * size(i) for i, n in given.items())
    while True:
        able = [i for i, n in given.items() if n + _STEP <= max(costs[i]) and _STEP * size(i) <= left]
        if not able:
            return given
        best = max(able, key=lambda i: (cost(i, given[i]) - cost(i, given[i] + _STEP)) / size(i))
        given[best] += _STEP
        left -= _STEP * size(best)


def option(slots: Mapping[int, int]) -> str:
    """The value of ``--layer-budgets`` for those slots."""
    return ",".join(f"{i}:{n}" for i, n in sorted(slots.items()))


def _slots(layer: LayerSpec, share: float, length: int) -> int:
    """That share of the layer's slots: an even number, fewer than its window and than leave nothing to evict.

    At least 4, but not more than a smaller budget has.
    """
    most = min(layer.window - 1 if layer.window else length, length // 2)
    return max(min(2 * _STEP, layer.capacity), min(int(layer.capacity * share), most) // _STEP * _STEP)
