"""The reference of ``less::LessAttention``: every other implementation is tested against this one.

One call attends a chunk of T new tokens to the slots, to itself (causally) and to the low-rank state,
then decides which tokens keep a slot and absorbs the others (LESS, arXiv 2402.09398, section 3).
Everything is computed in float32, for readability rather than speed. Entries that hold no token are masked out
before any product, so that NaN in an empty slot or in padding never spreads.

Shapes: B rows, Hq query heads, Hk KV heads (G = Hq / Hk), T chunk, C slots, R features, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import OP_DOMAIN, SCALE_FIELDS, STATE_FIELDS, LayerSpec
from ..errors import BackendError
from . import int8
from .policies import Candidates, by_code
from .rotary import rotate


def _select(mask: Tensor, x: Tensor) -> Tensor:
    """f32 ``x`` [..., N, E] with rows that ``mask`` [..., N] excludes set to zero."""
    return torch.where(mask[..., None], x.float(), 0.0)


def _attend(
    logits: Tensor, values: Tensor, log_phi: Tensor, h: Tensor, z: Tensor, query_valid: Tensor, absorb: bool
) -> Tensor:
    """Softmax over what is visible and, for absorbing layers, over the low-rank state.

    Feature r of the state acts as one more token: its logit is ``log phi_r + log z_r`` (the mass it
    stands for) and its value the mean ``H_r / z_r`` of what it absorbed.

    logits [B,Hk,G,T,N] (-inf where invisible), values [B,Hk,N,D], log_phi [B,Hk,G,T,R], h [B,Hk,R,D],
    z [B,Hk,R], query_valid [B,1,1,T,1] -> [B,Hk,G,T,D]
    """
    if absorb:
        filled = z > 0
        mass = log_phi + torch.where(filled, z, 1.0).log()[:, :, None, None]
        logits = torch.cat([logits, torch.where(filled[:, :, None, None], mass, -torch.inf)], -1)
        mean = torch.where(filled[..., None], h / torch.where(filled, z, 1.0)[..., None], 0.0)
        values = torch.cat([values, mean], 2)
    peak = logits.amax(-1, keepdim=True)
    weight = torch.exp(logits - torch.where(query_valid, peak, 0.0))
    out = (weight.flatten(2, 3) @ values).unflatten(2, weight.shape[2:4]) / weight.sum(-1, keepdim=True)
    return torch.where(query_valid, out, 0.0)


def fading(decay: float, step: Tensor, new_length: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a score is left after a chunk: of one from before it, [B,1], and of the query ``step`` [B,T], f32.

    ``step`` [T] counts the tokens of the chunk, ``new_length`` [B,1] says how many are valid. Token by token, scores
    are multiplied by ``decay`` before those of the next query are added; so the result does not depend on the chunks.
    """
    base = torch.tensor(decay, dtype=torch.float32, device=step.device)
    return base**new_length, base ** (new_length - 1 - step).clamp(min=0)


def place(kept: Tensor, slots: int) -> Tensor:
    """Source index of every slot, [B,Hk,C] into [slots, chunk]; -1 leaves the slot empty.

    A kept slot is its own source; the j-th kept new token fills the j-th free slot.
    """
    kept_slot, kept_new = kept[..., :slots], kept[..., slots:]
    # Stable sort of "not kept" lists the kept new tokens first, by position.
    arrivals = torch.sort((~kept_new).int(), dim=-1, stable=True).indices
    turn = (~kept_slot).cumsum(-1) - 1
    fills = ~kept_slot & (turn < kept_new.sum(-1, keepdim=True))
    chunk = kept_new.shape[-1]
    arrival = arrivals.gather(-1, turn.clamp(0, chunk - 1)) + slots
    own = torch.arange(slots, device=kept.device).expand_as(kept_slot)
    return torch.where(kept_slot, own, torch.where(fills, arrival, -1))


class _Chunk(NamedTuple):
    """What both operators share: lengths [B], features, the state that is stored alike, and the attributes."""

    log_phi_q: Tensor
    psi_k: Tensor
    past_psi: Tensor
    past_score: Tensor
    past_position: Tensor
    past_h: Tensor
    past_z: Tensor
    past_length: Tensor
    new_length: Tensor
    scale: float
    policy: int
    heavy: int
    recent: int
    window: int
    absorb: int
    decay: float
    max_distance: int
    rotary: Tensor | None


class _After(NamedTuple):
    """The output, what fills each slot (an index into [slots, chunk]), and the state that is stored alike."""

    out: Tensor
    source: Tensor
    psi: Tensor
    score: Tensor
    position: Tensor
    h: Tensor
    z: Tensor


def _fill(source: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """Slots [B,Hk,C,...] after the chunk, from those before it and the tokens of the chunk [B,Hk,T,...]."""
    both = torch.cat([past, new], 2)
    if both.ndim == 3:
        return both.gather(2, source)
    return both.gather(2, source[..., None].expand(-1, -1, -1, both.shape[-1]))


def _step(q: Tensor, keys: Tensor, values: Tensor, leaving_values: Tensor, x: _Chunk) -> _After:
    """One chunk. ``keys``, ``values`` [B,Hk,N,D] are those of [slots, chunk] that queries see, N = C + T, and
    ``leaving_values`` what the state absorbs of them."""
    rules = by_code(x.policy)
    kv_heads, slots = x.past_position.shape[1:]
    chunk, groups = q.shape[2], q.shape[1] // kv_heads
    split, dtype = (kv_heads, groups), q.dtype

    step = torch.arange(chunk, dtype=torch.int32, device=q.device)
    if x.rotary is not None:
        age = (x.past_length[:, None, None] - x.past_position).clamp(0, x.max_distance)
        turned = rotate(keys[:, :, :slots], x.rotary, -age), rotate(keys[:, :, slots:], x.rotary, step)
        q, keys = rotate(q, x.rotary, step), torch.cat(turned, 2)
    query_position = x.past_length[:, None] + step  # [B,T]
    query_valid = step < x.new_length[:, None]
    new_position = torch.where(query_valid, query_position, -1)[:, None].expand(-1, kv_heads, -1)
    position = torch.cat([x.past_position, new_position], 2)  # [B,Hk,N]
    held = position >= 0
    keys, values = _select(held, keys), _select(held, values)

    logits = (q.float().unflatten(1, split).flatten(2, 3) @ keys.mT).unflatten(2, (groups, chunk)) * x.scale
    at, now = position[:, :, None, None], query_position[:, None, None, :, None]
    visible = (at >= 0) & (at <= now)
    if x.window:
        visible &= at > now - x.window
    logits = torch.where(visible, logits, -torch.inf)  # [B,Hk,G,T,N]
    valid = query_valid[:, None, None, :, None]
    log_phi = x.log_phi_q.float().unflatten(1, split)
    out = _attend(logits, values, log_phi, x.past_h, x.past_z, valid, bool(x.absorb))

    score = torch.zeros_like(position, dtype=torch.float32)  # and remains zero for a policy without scores
    if rules.scoring != "none":
        past = torch.where(held, torch.cat([x.past_score, score[..., slots:]], 2), 0.0)
        seen = torch.where(valid, torch.softmax(logits, -1), 0.0)
        if rules.scoring == "accumulate":
            # Every token of the chunk fades what was there before it, scores of its own chunk included.
            remaining, weight = fading(x.decay, step, x.new_length[:, None])
            score = past * remaining[:, None] + (seen * weight[:, None, None, :, None]).sum((2, 3))
        else:  # only the last valid query counts; a parked row keeps its scores
            last = (step == x.new_length[:, None] - 1)[:, None, None, :, None]
            latest = torch.where(last, seen, 0.0).sum((2, 3))
            score = torch.where((x.new_length > 0)[:, None, None], latest, past)

    end = (x.past_length + x.new_length)[:, None, None]
    live = held
    if x.window:
        live = held & (position >= rules.oldest(end, x.window))
    kept = rules.keep(Candidates(live, position, score, end), x.heavy, x.recent)
    if rules.keeps_all and bool((kept.sum(-1) > slots).any()):
        raise BackendError(f"policy {rules.name} holds {slots} tokens and was fed more: export with a larger --context")

    source = place(kept, slots)
    index = source.clamp(min=0)
    h, z = x.past_h.clone(), x.past_z.clone()
    if x.absorb:
        leaves = held & ~kept
        psi = _select(leaves, torch.cat([x.past_psi, x.psi_k], 2))  # [B,Hk,N,R]
        h = x.past_h + psi.mT @ _select(leaves, leaving_values)
        z = x.past_z + psi.sum(2)
    return _After(
        out.flatten(1, 2).to(dtype),
        index,
        _fill(index, x.past_psi, x.psi_k),
        score.gather(2, index),
        torch.where(source >= 0, position.gather(2, index), -1),
        h,
        z,
    )


def less_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_phi_q: Tensor,
    psi_k: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_psi: Tensor,
    past_score: Tensor,
    past_position: Tensor,
    past_h: Tensor,
    past_z: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    scale: float,
    policy: int,
    heavy: int,
    recent: int,
    window: int,
    absorb: int,
    decay: float,
    max_distance: int = 0,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LESS attention of one chunk, from one state to the next.

    Args:
        q: [B,Hq,T,D] queries. k, v: [B,Hk,T,D] new keys and values. RoPE is applied to q and k, unless there is a
            ``rotary`` table.
        log_phi_q: [B,Hq,T,R] f32, log of the query features; -inf allowed. psi_k: [B,Hk,T,R] key
            features, non-negative.
        past_key, past_value: [B,Hk,C,D]. past_psi: [B,Hk,C,R]. past_score: [B,Hk,C] f32.
        past_position: [B,Hk,C] i32, -1 where empty. past_h: [B,Hk,R,D] f32. past_z: [B,Hk,R] f32.
        past_length: [B] i32, tokens seen before the chunk. new_length: [B] i32, valid tokens of it.
        scale, policy, heavy, recent, window, absorb, decay, max_distance (0: none): see
            :class:`less_export.contract.LayerSpec`.
        rotary: the table of a layer with ``max_distance`` (:mod:`less_export.less.rotary`), f32 [P,D_rot] with
            P > max_distance and P >= T.

    Returns:
        out [B,Hq,T,D] (zero where t >= new_length), then the seven state tensors after the chunk. Slots
        that stay empty have position -1 and unspecified contents.

    Raises:
        BackendError: policy ``full`` and more tokens than slots.
    """
    chunk = _Chunk(
        log_phi_q, psi_k, past_psi, past_score, past_position, past_h, past_z, past_length, new_length,
        scale, policy, heavy, recent, window, absorb, decay, max_distance, rotary,
    )  # fmt: skip
    values = torch.cat([past_value, v], 2)
    after = _step(q, torch.cat([past_key, k], 2), values, values, chunk)
    key, value = _fill(after.source, past_key, k), _fill(after.source, past_value, v)
    return (after.out, key, value, *after[2:])


def less_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_phi_q: Tensor,
    psi_k: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_psi: Tensor,
    past_score: Tensor,
    past_position: Tensor,
    past_h: Tensor,
    past_z: Tensor,
    past_key_scale: Tensor,
    past_value_scale: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    key_mean: Tensor,
    key_std: Tensor,
    scale: float,
    policy: int,
    heavy: int,
    recent: int,
    window: int,
    absorb: int,
    decay: float,
    max_distance: int = 0,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`less_attention` with keys and values of the slots in int8 (:mod:`less_export.less.int8`).

    Tokens of the chunk are attended as they are. A token is rounded once, when it takes a slot, and stays as it is
    while it keeps it. What the state absorbs is the rounded value, also of a token that gets no slot, so that the
    state does not depend on the chunks.

    Args:
        past_key, past_value: int8 [B,Hk,C,D]. past_key_scale, past_value_scale: [B,Hk,C] f32, their scales.
        key_mean, key_std: [Hk,D] f32, with which keys are centred; ``key_std`` is positive.

        The others are those of :func:`less_attention`.

    Returns:
        The results of :func:`less_attention`, then both scales after the chunk.
    """
    chunk = _Chunk(
        log_phi_q, psi_k, past_psi, past_score, past_position, past_h, past_z, past_length, new_length,
        scale, policy, heavy, recent, window, absorb, decay, max_distance, rotary,
    )  # fmt: skip
    centring = int8.Centring(key_mean, key_std)
    new_key, new_key_scale = int8.quantise_keys(k, centring)
    new_value, new_value_scale = int8.quantise(v.float())
    slot_keys = int8.dequantise_keys(past_key, past_key_scale, centring)
    slot_values = int8.dequantise(past_value, past_value_scale)
    after = _step(
        q,
        torch.cat([slot_keys, k.float()], 2),
        torch.cat([slot_values, v.float()], 2),
        torch.cat([slot_values, int8.dequantise(new_value, new_value_scale)], 2),
        chunk,
    )
    return (
        after.out,
        _fill(after.source, past_key, new_key),
        _fill(after.source, past_value, new_value),
        *after[2:],
        _fill(after.source, past_key_scale, new_key_scale),
        _fill(after.source, past_value_scale, new_value_scale),
    )


#: The same functions as opaque operators, which ``torch.export`` keeps as one node each.
attention = torch.library.custom_op(f"{OP_DOMAIN}::attention", less_attention, mutates_args=())
attention_int8 = torch.library.custom_op(f"{OP_DOMAIN}::attention_int8", less_attention_int8, mutates_args=())


def _fake(fields: int) -> Callable[..., tuple[Tensor, ...]]:
    """Shapes and dtypes of the results: those of q, and of the ``fields`` past tensors behind the first five."""

    def shapes(*args: Tensor | float | int) -> tuple[Tensor, ...]:
        like = (args[0], *args[5 : 5 + fields])
        return tuple(x.new_empty(x.shape) for x in like if isinstance(x, Tensor))

    return shapes


attention.register_fake(_fake(len(STATE_FIELDS)))
attention_int8.register_fake(_fake(len(STATE_FIELDS + SCALE_FIELDS)))


def run(
    layer: LayerSpec, tokens: Sequence[Tensor], state: Sequence[Tensor], lengths: Sequence[Tensor],
    centring: int8.Centring | None = None, rotary: Tensor | None = None, opaque: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator of ``layer``, as one node for ``torch.export`` or (``opaque`` false) as plain torch.

    Args:
        tokens: q, k, v, log_phi_q, psi_k. state: the layer's fields. lengths: past_length, new_length.
        centring: of keys in int8 slots; none by default. rotary: the table of a layer with ``max_distance``.

    Returns:
        The output and the state after the chunk.
    """
    inputs = [*tokens, *state, *lengths]
    operator: Callable[..., tuple[Tensor, ...]] = attention if opaque else less_attention
    if layer.int8:
        inputs += centring or int8.Centring.none(layer.kv_heads, layer.head_dim)
        operator = attention_int8 if opaque else less_attention_int8
    assert (rotary is None) == (layer.max_distance is None), "a table belongs to a largest distance"
    return tuple(operator(*inputs, **layer.attributes(), max_distance=layer.max_distance or 0, rotary=rotary))
