"""Sparse attention over whole sequences, one token a step, in time and memory that grow with the slots, not with T x T.

What :mod:`.simulate` computes with masks, for policies whose rule is a single comparison, on a CPU; with gradients.

Shapes: B rows, Hq query heads, Hk KV heads, G = Hq / Hk, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..contract import LayerSpec


def takes(layer: LayerSpec, device: torch.device) -> bool:
    """Whether :func:`attend` can compute a layer: the policy has a simple rule, and queries see all that is kept."""
    return layer.policy.leaves is not None and not layer.window and device.type == "cpu"


def attend(
    q: Tensor, slot_k: Tensor, own_k: Tensor, slot_v: Tensor, own_v: Tensor, layer: LayerSpec,
    far: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention over what is in a layer's slots and the token itself.

    Args:
        q: [B,Hq,T,D], turned by its positions where the layer has a largest distance.
        slot_k, own_k: [B,Hk,T,D], keys as slots give them back, and exact, turned likewise.
        slot_v, own_v: values [B,Hk,T,D], likewise.
        far: q not turned, and keys of slots turned back by the largest distance, where distances are clamped.

    Returns:
        Output [B,Hk,G,T,D], log-sum-exp [B,Hk,G,T,1], and [B,Hk,T] i32, the first query that no longer finds a token
        in a slot, T if it stays.
    """
    queries = [x.float().unflatten(1, (layer.kv_heads, layer.group)) for x in (q, *(far[:1] if far else ()))]
    keys = [x.float() for x in (slot_k, *(far[1:] if far else ()))]
    out, total, left = Attention.apply(
        torch.stack(queries, 2).flatten(0, 1) * layer.scale,
        torch.stack(keys, 2).flatten(0, 1),
        *(x.float().flatten(0, 1) for x in (own_k, slot_v, own_v)),
        layer,
    )
    rows = (q.shape[0], layer.kv_heads)
    return out.unflatten(0, rows), total.unflatten(0, rows)[..., None], left.unflatten(0, rows)


class Attention(torch.autograd.Function):
    """q [N,J,G,T,D], slot_k [N,J,T,D], own_k, slot_v, own_v [N,T,D]; N = B Hk; see :mod:`.stream_loops` for J."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, slot_k: Tensor, own_k: Tensor, slot_v: Tensor, own_v: Tensor, layer: LayerSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        from . import stream_loops  # takes a second to import

        inputs = [x.contiguous() for x in (q, slot_k, own_k, slot_v, own_v)]
        count, _, groups, length, _ = q.shape
        out = q.new_empty(count, groups, length, slot_v.shape[-1])
        total = q.new_empty(count, groups, length)
        left = torch.empty(count, length, dtype=torch.int32)
        decay = float(torch.tensor(layer.decay)) if layer.policy.scoring == "accumulate" else 0.0
        reach = length if layer.max_distance is None else layer.max_distance
        numbers = (layer.capacity, layer.heavy, layer.recent, layer.policy.leaves == "score", decay, reach)
        _each(stream_loops.forward, [*inputs, out, total, left], *numbers)
        ctx.save_for_backward(*inputs, out, total, left)
        ctx.numbers = layer.capacity, reach
        ctx.mark_non_differentiable(left)
        return out, total, left

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from . import stream_loops

        saved = ctx.saved_tensors
        results = [torch.zeros_like(x) for x in saved[:5]]
        given = [x.contiguous() for x in gradients[:2]]
        _each(stream_loops.backward, [*saved, *given, *results], *ctx.numbers)
        return (*results, None)


def _each(loop: Callable[..., None], tensors: list[Tensor], *numbers: float) -> None:
    """Call ``loop`` for every KV head, with as many threads as torch uses."""
    arrays = [x.detach().numpy() for x in tensors]

    def one(head: int) -> None:
        loop(*(x[head] for x in arrays), *numbers)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(one, range(len(arrays[0]))))
