"""A layer's attention with its cache, as training runs it over whole sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..contract import LayerSpec
from ..hf.surgery import AttentionCall
from ..less import simulate, stream
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring


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
