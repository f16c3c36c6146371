"""How far the next-token distributions of a model with caches are from those with its full cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..contract import LayerSpec
from ..hf.rotary import arranged
from ..hf.running import position_ids
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate, stream
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from ..less.rotary import RotaryTable


@torch.no_grad()
def full_cache(
    model: PreTrainedModel, ids: Tensor, plan: Sequence[LayerSpec], positions: Tensor,
    rotary: Sequence[RotaryTable] = (),
) -> Tensor:  # fmt: skip
    """Log probabilities [P,V] of the next token at ``positions`` of one sequence with full caches."""

    def full(call: AttentionCall, angles: Tensor | None) -> Tensor:
        return simulate.full(call.q, call.k, call.v, plan[call.layer], angles)

    return _log_probabilities(model, ids, positions, full, rotary)


def divergence(
    reference: Tensor,
    model: PreTrainedModel,
    ids: Tensor,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    positions: Tensor,
    centring: Mapping[int, Centring] | None = None,
    rotary: Sequence[RotaryTable] = (),
) -> Tensor:
    """KL(``reference`` || the model with the caches of ``plan``), mean over ``positions``, in nats.

    ``reference`` comes from :func:`full_cache`, ``rotary`` are tables of distances below T. Layers without a map in
    ``maps`` evict without a low-rank term, and keys of layers without ``centring`` are rounded as they are.
    """
    constants = centring or {}

    def student(call: AttentionCall, angles: Tensor | None) -> Tensor:
        return attend(call, angles, plan, maps, constants)

    predicted = _log_probabilities(model, ids, positions, student, rotary)
    return (reference.exp() * (reference - predicted)).sum(-1).mean()


def attend(
    call: AttentionCall, angles: Tensor | None, plan: Sequence[LayerSpec], maps: Mapping[int, FeatureMap],
    centring: Mapping[int, Centring],
) -> Tensor:  # fmt: skip
    """A layer's attention with its cache and kernels, through which gradients flow; ``angles``: its rotary table."""
    layer, feature_map, own = plan[call.layer], maps.get(call.layer), centring.get(call.layer)
    if simulate.exact(layer, call.q.shape[2]):
        return simulate.full(call.q, call.k, call.v, layer, angles)
    features = None if feature_map is None else feature_map.features(call.q, call.k)
    if stream.takes(layer, call.q.device):
        return simulate.attend(call.q, call.k, call.v, layer, features, 1, own, angles)
    left = simulate.departures(call.q.detach(), call.k.detach(), layer, own, 1, angles)
    # Recomputed in the backward pass: T x T masks and weights per head do not fit in memory for larger models.
    return checkpoint(
        simulate.attend_as, call.q, call.k, call.v, layer, features, left, own, 1, angles, use_reentrant=False
    )


def _log_probabilities(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Callable[[AttentionCall, Tensor | None], Tensor],
    rotary: Sequence[RotaryTable],
) -> Tensor:  # fmt: skip
    def handler(call: AttentionCall) -> Tensor:
        return attention(*arranged(call, rotary))

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, positions.to(args[0].device)], *args[1:]))
    row = ids[None].to(model.device)
    try:
        with less_attention(model, handler):
            logits = model(input_ids=row, position_ids=position_ids(row, not rotary), use_cache=False).logits[0]
    finally:
        hook.remove()
    return torch.log_softmax(logits.float(), -1)
