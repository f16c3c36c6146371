"""LESS over whole sequences at once: what a streaming run computes, in a few large products.

The op decides step by step which tokens keep a slot; here that decision is made first, for a whole sequence
and by the same policy code, and recorded as one number per token: the first query that no longer finds it in a slot
(:func:`evictions`). Attention and the low-rank term are then masks and matrix products over all positions
(:func:`sparse`, :func:`combine`). Where compiled loops know the policy, they do both in one pass, whose cost grows with
the slots and not with all positions (:mod:`.stream`, :func:`combine_all`). Training and evaluation use this; tests
compare it with ``less.reference``.

With int8 slots a query sees the tokens of its own chunk as they are and older ones as slots give them back
(:func:`slot_keys`, :func:`slot_values`); gradients pass the rounding as if it were not there. Layers with a largest
distance take q and k before the rotary embedding, and a table (:mod:`.rotary`) that reaches as far as the sequence.
psi of a low-rank state of 16 bits is rounded, its means are not: they are exact to a thousandth in 4,000 tokens.

Shapes: B rows, Hq query heads, Hk KV heads, G = Hq / Hk, T positions, P query positions, R features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..contract import LayerSpec
from ..plan import AttentionLayer
from . import int8, state16, stream
from .policies import Candidates
from .reference import fading, place
from .rotary import rotate

#: Largest exponent of a single feature: beyond it z is negligible, and f32 would overflow.
_MOST = 80.0
#: Queries whose states H [R,D] are in memory at a time.
_BLOCK = 1024


def logits(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    """[B,Hq,P,D] queries and [B,Hk,T,D] keys -> unmasked f32 logits [B,Hk,G,P,T]. Both are rotated, or neither."""
    groups, queries = layer.group, q.shape[2]
    flat = q.float().unflatten(1, (layer.kv_heads, groups)).flatten(2, 3)
    return (flat @ k.float().mT).unflatten(2, (groups, queries)) * layer.scale


def turned(x: Tensor, rotary: Tensor | None, positions: Tensor | None = None) -> Tensor:
    """``x`` [B,H,P,D] with the rotary embedding of ``positions`` [P] (default 0 to P - 1); itself without a table."""
    if rotary is None:
        return x
    return rotate(x, rotary, torch.arange(x.shape[2], device=x.device) if positions is None else positions)


def slot_keys(k: Tensor, layer: LayerSpec, centring: int8.Centring | None = None) -> Tensor:
    """Keys [B,Hk,T,D] as the layer's slots give them back: themselves, or rounded to int8, in f32.

    Args:
        centring: the constants of the layer's keys in int8 slots; default mean 0 and std 1.
    """
    if not layer.int8:
        return k
    constants = centring or int8.Centring.none(layer.kv_heads, layer.head_dim)
    return _straight_through(k.float(), int8.rounded_keys(k.detach(), constants.to(k.device)))


def slot_values(v: Tensor, layer: LayerSpec) -> Tensor:
    """:func:`slot_keys` of values."""
    return _straight_through(v.float(), int8.rounded_values(v.detach())) if layer.int8 else v


def slot_psi(psi: Tensor, layer: LayerSpec) -> Tensor:
    """:func:`slot_keys` of psi, which a low-rank state of 16 bits rounds."""
    return _straight_through(psi.float(), state16.rounded_psi(psi.detach())) if layer.state16 else psi


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, through which gradients pass to ``x`` as if it were not rounded."""
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def _own_chunks(x: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Where queries of ``x`` [...,T,T] meet tokens of their own chunk: positions of n chunks of c tokens, and a view
    [...,n,c,c]. The last chunk may be shorter and then comes alone."""
    total = x.shape[-1]
    whole = total - total % chunk
    for begin, end, size in ((0, whole, chunk), (whole, total, total - whole)):
        if begin < end:
            part = x[..., begin:end, begin:end].unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
            yield slice(begin, end), part.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def scores(
    q: Tensor, k: Tensor, slot_k: Tensor, layer: LayerSpec, chunk: int = 1, rotary: Tensor | None = None
) -> Tensor:
    """:func:`logits` of all T queries as they see the tokens: those of their own chunk exactly, older ones in slots.

    q [B,Hq,T,D], k [B,Hk,T,D], and ``slot_k`` from :func:`slot_keys` -> unmasked f32 [B,Hk,G,T,T]. ``rotary`` is the
    table of a layer with a largest distance, f32 [at least T, D_rot].
    """
    turned_q = turned(q, rotary)
    seen = logits(turned_q, turned(slot_k, rotary), layer)
    if rotary is not None and clamps(layer, q.shape[2]):
        seen = _clamped(seen, q, slot_k, layer, chunk, rotary)
    if layer.int8:
        queries = turned_q.float().unflatten(1, (layer.kv_heads, layer.group))
        new = turned(k, rotary).float()[:, :, None]
        for where, part in _own_chunks(seen, chunk):
            own = (-1, part.shape[-1])
            exact = new[..., where, :].unflatten(-2, own).mT
            part.copy_(queries[:, :, :, where].unflatten(-2, own) @ exact * layer.scale)
    return seen


def _clamped(seen: Tensor, q: Tensor, slot_k: Tensor, layer: LayerSpec, chunk: int, rotary: Tensor) -> Tensor:
    """:func:`scores` where tokens further back than the layer's largest distance are seen at that distance."""
    assert layer.max_distance is not None
    position = torch.arange(q.shape[2], device=q.device)
    offset = position % chunk
    beyond = (position - offset)[:, None] - position > layer.max_distance
    away = torch.full_like(position, -layer.max_distance)
    far = logits(rotate(q, rotary, offset), rotate(slot_k, rotary, away), layer)
    return torch.where(beyond, far, seen)


@torch.no_grad()
def evictions(scores: Tensor, layer: LayerSpec, chunk: int = 1) -> Tensor:
    """When each token leaves its slot in a run with chunks of ``chunk`` tokens.

    Args:
        scores: :func:`scores` of all T queries, [B,Hk,G,T,T]; policies without scores read only its shape.
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


def departures(
    q: Tensor, k: Tensor, layer: LayerSpec, centring: int8.Centring | None = None, chunk: int = 1,
    rotary: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`evictions` of a layer, from its queries and keys; a policy that evicts nothing lets every token stay."""
    if layer.policy.evicts:
        return evictions(scores(q, k, slot_keys(k, layer, centring), layer, chunk, rotary), layer, chunk)
    return torch.full(k.shape[:3], k.shape[2], dtype=torch.int32, device=k.device)


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


def sparse(
    scores: Tensor, seen: Tensor, v: Tensor, slot_v: Tensor | None = None, chunk: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention over what is seen: output [B,Hk,G,P,D] and log-sum-exp [B,Hk,G,P,1]; overwrites ``scores``.

    Args:
        scores: :func:`scores`, or :func:`logits` of some of the queries. seen: from :func:`visible`. v: values.
        slot_v: values of tokens from before a query's chunk, from :func:`slot_values`; ``v`` by default.
    """
    scores = scores.masked_fill_(~seen, -torch.inf)
    total = torch.logsumexp(scores, -1, keepdim=True)
    if scores.requires_grad:  # logsumexp has saved its input for the backward pass
        weight = torch.exp(scores - total)
    else:
        weight = torch.exp_(scores.sub_(total))
    old = (v if slot_v is None else slot_v).float()
    out = (weight.flatten(2, 3) @ old).unflatten(2, weight.shape[2:4])
    if slot_v is None or slot_v is v:
        return out, total
    change = (v.float() - old)[:, :, None]
    own = []
    for where, part in _own_chunks(weight, chunk):
        own.append((part @ change[..., where, :].unflatten(-2, (-1, part.shape[-1]))).flatten(-3, -2))
    return out + torch.cat(own, -2), total


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec, centring: int8.Centring | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What :func:`evictions` and :func:`sparse` give for all T queries at one token a step: output [B,Hk,G,T,D],
    log-sum-exp [B,Hk,G,T,1], and evictions [B,Hk,T]. In one pass where :func:`.stream.takes` says so."""
    slot_k, slot_v = slot_keys(k, layer, centring), slot_values(v, layer)
    if not stream.takes(layer, q.device):
        seen = scores(q, k, slot_k, layer, 1, rotary)
        left = evictions(seen.detach(), layer)
        queries = torch.arange(q.shape[2], device=q.device)
        return *sparse(seen, visible(left, queries, layer.window), v, slot_v), left
    far = None
    if rotary is not None and clamps(layer, q.shape[2]):
        assert layer.max_distance is not None
        away = torch.full((k.shape[2],), -layer.max_distance, device=k.device)
        far = q, rotate(slot_k, rotary, away)
    turned_q, turned_k, turned_slot_k = (turned(x, rotary) for x in (q, k, slot_k))
    return stream.attend(turned_q, turned_slot_k, turned_k, slot_v, v, layer, far)


def combine(
    out: Tensor, total: Tensor, log_phi: Tensor, psi: Tensor, v: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the low-rank term to sparse attention (LESS, section 3.1).

    Args:
        out, total: from :func:`sparse`. log_phi: [B,Hk,G,P,R] f32. psi: [B,Hk,T,R].
        v: [B,Hk,T,D], the values that are absorbed, from :func:`slot_values`.
        state: :func:`absorbed`.

    Returns:
        The output [B,Hk,G,P,D] and the log of the low-rank mass [B,Hk,G,P,1] (-inf where nothing is absorbed).
    """
    psi = psi.float()

    def read(feature: Tensor) -> Tensor:
        weight = (feature.flatten(2, 3) @ psi.mT).unflatten(2, feature.shape[2:4])
        weight = torch.where(state, weight, 0.0)
        return (weight.flatten(2, 3) @ v.float()).unflatten(2, weight.shape[2:4])

    return _combined(out, total, log_phi, state[:, :, 0].float() @ psi, read)


def combine_all(out: Tensor, total: Tensor, log_phi: Tensor, psi: Tensor, v: Tensor, left: Tensor) -> Tensor:
    """:func:`combine` of all T queries, of which one token after the other leaves: the output [B,Hk,G,T,D].

    ``left`` comes from :func:`one_by_one`, of a layer that :func:`.stream.takes`. The state runs along instead of
    T x T weights.
    """
    absorbed = int((left[0, 0] < left.shape[-1]).sum())
    first = left.shape[-1] - absorbed  # the query that is the first to find something in the state
    order = left.argsort(-1)[..., :absorbed, None]
    psi, v = (x.float().take_along_dim(order, 2) for x in (psi, v))
    # z and H: what has been absorbed in earlier blocks.
    parts, z, h = [out[:, :, :, :first]], psi.new_zeros(()), psi.new_zeros(())
    for begin in range(0, absorbed, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        masses = z + psi[:, :, block].cumsum(2)
        states = h + (psi[:, :, block, :, None] * v[:, :, block, None]).cumsum(2)
        z, h = masses[:, :, -1:], states[:, :, -1:]

        def read(feature: Tensor, states: Tensor = states) -> Tensor:
            return (feature.movedim(2, 3) @ states).movedim(3, 2)

        queries = slice(first + begin, first + begin + masses.shape[2])
        sparse_part = out[:, :, :, queries], total[:, :, :, queries]
        parts.append(_combined(*sparse_part, log_phi[:, :, :, queries], masses, read)[0])
    return torch.cat(parts, 3)


def _combined(
    out: Tensor, total: Tensor, log_phi: Tensor, z: Tensor, read: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """:func:`combine`, with the absorbed masses z [B,Hk,P,R] and what features [B,Hk,G,P,R] ``read`` of the state."""
    mass = log_phi + torch.where(z > 0, torch.where(z > 0, z, 1.0).log(), -torch.inf)[:, :, None]
    peak = torch.maximum(total, mass.amax(-1, keepdim=True)).detach()
    feature = torch.exp((log_phi - peak).clamp(max=_MOST))
    exact, share = torch.exp(total - peak), (feature * z[:, :, None]).sum(-1, keepdim=True)
    return (exact * out + read(feature)) / (exact + share), torch.logsumexp(mass, -1, keepdim=True)


def full(q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec | AttentionLayer, rotary: Tensor | None = None) -> Tensor:
    """Attention over everything a layer would see without LESS (its window, or all): [B,Hq,T,D]."""
    q, k = (turned(x, rotary).to(v.dtype) for x in (q, k))
    mask = None
    if layer.window and layer.window < q.shape[2]:
        steps = torch.arange(q.shape[2], device=q.device)
        mask = (steps <= steps[:, None]) & (steps > steps[:, None] - layer.window)
    # Not F.scaled_dot_product_attention: it may be patched to call this function.
    return torch._C._nn.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=layer.scale, enable_gqa=layer.group > 1
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: LayerSpec,
    features: tuple[Tensor, Tensor] | None,
    chunk: int,
    centring: int8.Centring | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """A layer's attention over whole sequences from their first token: [B,Hq,T,D] in the dtype of ``q``.

    Args:
        features: log phi [B,Hq,T,R] and psi [B,Hk,T,R], or None for plain sparse eviction.
        chunk: tokens per step. centring: see :func:`slot_keys`. rotary: see :func:`scores`.
    """
    if exact(layer, q.shape[2]):
        return full(q, k, v, layer, rotary)
    if chunk == 1 and stream.takes(layer, q.device):
        out, total, left = one_by_one(q, k, v, layer, centring, rotary)
        if features is not None:
            log_phi = features[0].float().unflatten(1, (layer.kv_heads, layer.group))
            out = combine_all(out, total, log_phi, slot_psi(features[1], layer), slot_values(v, layer), left)
        return out.flatten(1, 2).to(q.dtype)
    if not layer.policy.evicts:
        return attend_as(q, k, v, layer, features, departures(q, k, layer), centring, chunk, rotary)
    seen = scores(q, k, slot_keys(k, layer, centring), layer, chunk, rotary)
    return _attend(q, seen, v, layer, features, evictions(seen.detach(), layer, chunk), chunk)


def attend_as(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: LayerSpec,
    features: tuple[Tensor, Tensor] | None,
    left: Tensor,
    centring: int8.Centring | None = None,
    chunk: int = 1,
    rotary: Tensor | None = None,
) -> Tensor:
    """:func:`attend` with known evictions: ``left``, from :func:`evictions` or :func:`departures`."""
    seen = scores(q, k, slot_keys(k, layer, centring), layer, chunk, rotary)
    return _attend(q, seen, v, layer, features, left, chunk)


def exact(layer: LayerSpec, length: int) -> bool:
    """Whether the layer computes what it would without LESS on sequences of ``length`` tokens: it evicts nothing that
    it would see, rounds nothing, and no distance is clamped."""
    return not (layer.policy.evicts or layer.int8 or clamps(layer, length))


def clamps(layer: LayerSpec, length: int) -> bool:
    """Whether queries of ``length`` tokens see any from further away than the layer's largest distance."""
    return layer.max_distance is not None and min(layer.window or length, length) - 1 > layer.max_distance


def _attend(
    q: Tensor,
    scores: Tensor,
    v: Tensor,
    layer: LayerSpec,
    features: tuple[Tensor, Tensor] | None,
    left: Tensor,
    chunk: int,
) -> Tensor:
    queries, slot_v = torch.arange(q.shape[2], device=q.device), slot_values(v, layer)
    out, total = sparse(scores, visible(left, queries, layer.window), v, slot_v, chunk)
    if features is not None:
        log_phi = features[0].float().unflatten(1, (layer.kv_heads, layer.group))
        psi = slot_psi(features[1], layer)
        out, _ = combine(out, total, log_phi, psi, slot_v, absorbed(left, queries))
    return out.flatten(1, 2).to(q.dtype)
