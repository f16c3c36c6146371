"""LESS over whole sequences at once: what a streaming run computes, in a few large products.

The op decides step by step which tokens keep a slot; here that decision is made first, for a whole sequence
and by the same policy code, and recorded as one number per token: the first query that no longer finds it in a slot
(:func:`evictions`). Attention and the low-rank term are then masks and matrix products over all positions
(:func:`sparse`, :func:`combine`). Training and evaluation use this; tests compare it with ``less.reference``.

Shapes: B rows, Hq query heads, Hk KV heads, G = Hq / Hk, T positions, P query positions, R features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import LayerSpec
from .policies import Candidates
from .reference import fading, place

#: Largest exponent of a single feature: beyond it z is negligible, and f32 would overflow.
_MOST = 80.0


def logits(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    """[B,Hq,P,D] queries and [B,Hk,T,D] keys -> unmasked f32 logits [B,Hk,G,P,T]."""
    groups, queries = layer.group, q.shape[2]
    flat = q.float().unflatten(1, (layer.kv_heads, groups)).flatten(2, 3)
    return (flat @ k.float().mT).unflatten(2, (groups, queries)) * layer.scale


@torch.no_grad()
def evictions(scores: Tensor, layer: LayerSpec, chunk: int = 1) -> Tensor:
    """When each token leaves its slot in a run with chunks of ``chunk`` tokens.

    Args:
        scores: :func:`logits` of all T queries, [B,Hk,G,T,T]; policies without scores read only its shape.
        chunk: tokens per step; 1 as in decoding.

    Returns:
        [B,Hk,T] i32: the first query position that no longer finds the token in a slot, T if it stays.
    """
    rules, slots = layer.policy, layer.capacity
    batch, heads, _, total, _ = scores.shape
    device = scores.device
    position = torch.full((batch, heads, slots), -1, dtype=torch.int32, device=device)
    score = torch.zeros(batch, heads, slots, device=device)
    left = torch.full((batch, heads, total + 1), total, dtype=torch.int32, device=device)
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        now = torch.arange(begin, end, dtype=torch.int32, device=device)
        at = torch.cat([position, now.expand(batch, heads, -1)], 2)
        held = at >= 0
        past = torch.cat([score, score.new_zeros(batch, heads, end - begin)], 2)
        if rules.scoring != "none":
            rows = scores[:, :, :, begin:end]
            index = at.clamp(min=0).long()[:, :, None, None].expand(-1, -1, *rows.shape[2:4], -1)
            visible = held[:, :, None, None] & (at[:, :, None, None] <= now[:, None])
            if layer.window:
                visible &= at[:, :, None, None] > now[:, None] - layer.window
            seen = torch.softmax(rows.gather(-1, index).masked_fill(~visible, -torch.inf), -1)
            if rules.scoring == "accumulate":
                count = torch.tensor([[end - begin]], device=device)
                remaining, weight = fading(layer.decay, now - begin, count)
                past = past * remaining[:, None] + (seen * weight[:, None, None, :, None]).sum((2, 3))
            else:
                past = seen[:, :, :, -1].sum(2)
        live, stop = held, torch.full((1, 1, 1), end, dtype=torch.int32, device=device)
        if layer.window:
            live = held & (at >= rules.oldest(stop, layer.window))
        kept = rules.keep(Candidates(live, at, past, stop), layer.heavy, layer.recent)
        left.scatter_(2, torch.where(held & ~kept, at, total).long(), end)
        source = place(kept, slots)
        index = source.clamp(min=0)
        position = torch.where(source >= 0, at.gather(2, index), -1)
        score = past.gather(2, index)
    return left[..., :total]


def visible(left: Tensor, queries: Tensor, window: int) -> Tensor:
    """Which tokens the queries at positions ``queries`` [P] find in a slot or in their chunk: [B,Hk,1,P,T]."""
    at = torch.arange(left.shape[-1], device=left.device)
    causal = at <= queries[:, None]
    if window:
        causal &= at > queries[:, None] - window
    return (causal & (left[:, :, None] > queries[:, None]))[:, :, None]


def absorbed(left: Tensor, queries: Tensor) -> Tensor:
    """Which tokens the state holds for those queries: [B,Hk,1,P,T]."""
    return (left[:, :, None] <= queries[:, None])[:, :, None]


def sparse(scores: Tensor, seen: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over what is seen: output [B,Hk,G,P,D] and log-sum-exp [B,Hk,G,P,1]; overwrites ``scores``."""
    scores = scores.masked_fill_(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1, keepdim=True)
    weight = torch.exp_(scores.sub_(total))
    return (weight.flatten(2, 3) @ v.float()).unflatten(2, weight.shape[2:4]), total


def combine(
    out: Tensor, total: Tensor, log_phi: Tensor, psi: Tensor, v: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the low-rank term to sparse attention (LESS, section 3.1).

    Args:
        out, total: from :func:`sparse`. log_phi: [B,Hk,G,P,R] f32. psi: [B,Hk,T,R]. v: [B,Hk,T,D].
        state: :func:`absorbed`.

    Returns:
        The output [B,Hk,G,P,D] and the log of the low-rank mass [B,Hk,G,P,1] (-inf where nothing is absorbed).
    """
    psi = psi.float()
    z = state[:, :, 0].float() @ psi  # [B,Hk,P,R]
    mass = log_phi + torch.where(z > 0, torch.where(z > 0, z, 1.0).log(), -torch.inf)[:, :, None]
    peak = torch.maximum(total, mass.amax(-1, keepdim=True)).detach()
    feature = torch.exp((log_phi - peak).clamp(max=_MOST))
    weight = (feature.flatten(2, 3) @ psi.mT).unflatten(2, feature.shape[2:4])
    weight = torch.where(state, weight, 0.0)
    low = (weight.flatten(2, 3) @ v.float()).unflatten(2, weight.shape[2:4])
    exact, share = torch.exp(total - peak), weight.sum(-1, keepdim=True)
    return (exact * out + low) / (exact + share), torch.logsumexp(mass, -1, keepdim=True)


def full(q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
    """Attention over everything a layer would see without LESS (its window, or all): [B,Hq,T,D]."""
    mask = None
    if layer.window and layer.window < q.shape[2]:
        steps = torch.arange(q.shape[2], device=q.device)
        mask = (steps <= steps[:, None]) & (steps > steps[:, None] - layer.window)
    # Not F.scaled_dot_product_attention: it may be patched to call this function.
    return torch._C._nn.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=layer.scale, enable_gqa=layer.group > 1
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec, features: tuple[Tensor, Tensor] | None, chunk: int
) -> Tensor:
    """A layer's attention over whole sequences from their first token: [B,Hq,T,D] in the dtype of ``q``.

    ``features`` are log phi [B,Hq,T,R] and psi [B,Hk,T,R], or None for plain sparse eviction.
    """
    if not layer.policy.evicts:
        return full(q, k, v, layer)
    scores = logits(q, k, layer)
    return _attend(q, scores, v, layer, features, evictions(scores.detach(), layer, chunk))


def attend_as(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec, features: tuple[Tensor, Tensor] | None, left: Tensor
) -> Tensor:
    """:func:`attend` with known evictions: ``left``, from :func:`evictions`."""
    return _attend(q, logits(q, k, layer), v, layer, features, left)


def _attend(
    q: Tensor, scores: Tensor, v: Tensor, layer: LayerSpec, features: tuple[Tensor, Tensor] | None, left: Tensor
) -> Tensor:
    queries = torch.arange(q.shape[2], device=q.device)
    out, total = sparse(scores, visible(left, queries, layer.window), v)
    if features is not None:
        log_phi = features[0].float().unflatten(1, (layer.kv_heads, layer.group))
        out, _ = combine(out, total, log_phi, features[1], v, absorbed(left, queries))
    return out.flatten(1, 2).to(q.dtype)
