"""Initial kernels: features that stand for clusters of keys, before any training step.

k-means over the layer's keys gives R centroids c. psi(k) is the soft assignment of k to them, phi(q) the
weight exp(scale q.c) that a query gives each, and a bias per query head matches the total mass to the true
mass of the evicted tokens. Keys that are not rotated are first multiplied by their mean rotation (:func:`mean_turn`).
The authors' parametrisation is scaled to the same masses so that its gradients
do not vanish (with their scale of 1e-4 the low-rank term is negligible).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import LayerSpec
from ..less import simulate
from ..less.feature_maps import PARAMETRISATIONS, ExpMap, FeatureMap
from ..less.rotary import rotate

_ITERATIONS = 15
#: Keys per KV head that k-means uses.
_KEYS = 8192


def centroids(keys: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """k-means of ``keys`` [N,D] -> [rank,D]."""
    points = keys[torch.randperm(len(keys), generator=generator)[:_KEYS].to(keys.device)]
    centres = points[torch.randperm(len(points), generator=generator)[:rank].to(keys.device)]
    if len(centres) < rank:
        centres = centres[torch.arange(rank, device=keys.device) % len(centres)]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(-1)
        members = torch.nn.functional.one_hot(nearest, rank).to(points.dtype)
        count = members.sum(0)[:, None]
        centres = torch.where(count > 0, members.T @ points / count.clamp(min=1), centres)
    return centres


def new_map(
    parametrisation: str, layer: LayerSpec, rank: int, hidden: int, keys: Tensor, generator: torch.Generator,
    rotary: Tensor | None = None,
) -> FeatureMap:  # fmt: skip
    """An untrained feature map whose masses are not calibrated yet; ``keys`` [Hk,N,D] f32, unrotated with a table."""
    heads = layer.heads
    feature_map = PARAMETRISATIONS[parametrisation](heads, rank, hidden).to(keys.device)
    for name, parameter in feature_map.named_parameters():
        if name.endswith(("_in", "_out", "_interaction")):
            fan_in, fan_out = parameter.shape[-2:]
            bound = (6 / (fan_in + fan_out)) ** 0.5
            if name.endswith("_out") and isinstance(feature_map, ExpMap):
                bound *= 0.1  # at first the skip connection dominates
            noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data = (noise * bound).to(keys.device)
    if isinstance(feature_map, ExpMap):
        _assign_clusters(feature_map, layer, keys, generator, mean_turn(rotary, layer))
    else:
        feature_map.get_parameter("k_scale").data.fill_(1.0)
        feature_map.get_parameter("k_scale_interaction").data.fill_(0.1)
        feature_map.get_parameter("k_gain").data.fill_(1.0)
        mass = feature_map.psi(keys[None]).sum(-1).mean(-1)[0]  # a token weighs one on average, as for "exp"
        feature_map.get_parameter("k_gain").data = 1 / mass.clamp(min=1e-6)[:, None, None]
    return feature_map


def mean_turn(rotary: Tensor | None, layer: LayerSpec) -> Tensor:
    """The matrix M [D,D] with which q.(M k) is the mean of the rotated q.k over distances at which tokens are absorbed.

    They are the true distances that ``rotary``, a table as long as the sequences, has beyond the layer's slots. Pairs
    of channels that turn fast average to zero: for a query that no longer knows how far a token is, they mean nothing.
    """
    unit = torch.eye(layer.head_dim)
    if rotary is None:
        return unit
    distances = torch.arange(min(layer.capacity, len(rotary) - 1), len(rotary), device=rotary.device)
    columns = unit.to(rotary.device)[:, None].expand(-1, len(distances), -1)
    return rotate(columns, rotary, -distances).mean(1).T


def _assign_clusters(
    feature_map: FeatureMap, layer: LayerSpec, keys: Tensor, generator: torch.Generator, turn: Tensor
) -> None:
    turn = turn.to(keys.device)
    for head in range(layer.kv_heads):
        points = keys[head] @ turn.T
        centres = centroids(points, feature_map.rank, generator)
        distance = torch.cdist(points, centres).pow(2)
        spread = distance.var(-1).sqrt().mean() if feature_map.rank > 1 else distance.new_ones(())
        softness = spread.clamp(min=1e-6)
        feature_map.get_parameter("k_skip").data[head] = 2 * turn.T @ centres.T / softness
        feature_map.get_parameter("k_bias").data[head, 0] = -centres.pow(2).sum(-1) / softness
        group = slice(head * layer.group, (head + 1) * layer.group)
        feature_map.get_parameter("q_skip").data[group] = layer.scale * centres.T


def true_mass(
    q: Tensor, k: Tensor, layer: LayerSpec, evicted_at: Tensor, queries: Tensor, rotary: Tensor | None = None
) -> Tensor:
    """Log of the softmax mass of the absorbed tokens, [B,Hk,G,P]; -inf where there are none."""
    state = simulate.absorbed(evicted_at, queries)
    turned_q, turned_k = simulate.turned(q[:, :, queries], rotary, queries), simulate.turned(k, rotary)
    scores = simulate.logits(turned_q, turned_k, layer)
    if layer.window:  # tokens that slid out of the window are absorbed too, but the full model does not see them
        at = torch.arange(k.shape[2], device=k.device)
        state = state & (at > queries[:, None] - layer.window)
    return torch.logsumexp(scores.masked_fill(~state, -torch.inf), -1)


def calibrate(feature_map: FeatureMap, target: Tensor, predicted: Tensor) -> None:
    """Shift log phi so that each query head's median low-rank mass is that of ``target``; both [B,Hk,G,P]."""
    gap = (target - predicted).permute(1, 2, 0, 3).flatten(0, 1).flatten(1)  # [Hq,N]
    name = "q_bias" if isinstance(feature_map, ExpMap) else "q_offset"
    for head, values in enumerate(gap):
        finite = values[values.isfinite()]
        if len(finite):
            feature_map.get_parameter(name).data[head] += finite.median()
