"""The reference of ``less::LessAttention``: every other implementation is tested against this one.

One call attends a chunk of T new tokens to the slots, to itself (causally) and to the low-rank state,
then decides which tokens keep a slot and absorbs the others (LESS, arXiv 2402.09398, section 3).
Everything is computed in float32, for readability rather than speed. Entries that hold no token are masked out
before any product, so that NaN in an empty slot or in padding never spreads.

Shapes: B rows, Hq query heads, Hk KV heads (G = Hq / Hk), T chunk, C slots, R features, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BackendError
from . import int8, state16
from .int8 import Centring
from .policies import Candidates, by_code
from .rotary import rotate


def _select(mask: Tensor, x: Tensor) -> Tensor:
    """f32 ``x`` [..., N, E] with rows that ``mask`` [..., N] excludes set to zero."""
    return torch.where(mask[..., None], x.float(), 0.0)


def _attend(
    logits: Tensor, values: Tensor, log_phi: Tensor, mean: Tensor, z: Tensor, query_valid: Tensor, absorb: bool
) -> Tensor:
    """Softmax over what is visible and, for absorbing layers, over the low-rank state.

    Feature r of the state acts as one more token: its logit is ``log phi_r + log z_r`` (the mass it
    stands for) and its value the mean ``H_r / z_r`` of what it absorbed.

    logits [B,Hk,G,T,N] (-inf where invisible), values [B,Hk,N,D], log_phi [B,Hk,G,T,R], mean [B,Hk,R,D],
    z [B,Hk,R], query_valid [B,1,1,T,1] -> [B,Hk,G,T,D]
    """
    if absorb:
        filled = z > 0
        mass = log_phi + torch.where(filled, z, 1.0).log()[:, :, None, None]
        logits = torch.cat([logits, torch.where(filled[:, :, None, None], mass, -torch.inf)], -1)
        values = torch.cat([values, torch.where(filled[..., None], mean, 0.0)], 2)
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
    """What all operators share: query features, the state that is stored alike, lengths [B], and the attributes."""

    log_phi_q: Tensor
    past_score: Tensor
    past_position: Tensor
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


def _mean(h: Tensor, z: Tensor) -> Tensor:
    """H / z [B,Hk,R,D], of features that have mass."""
    return h / torch.where(z > 0, z, 1.0)[..., None]


class _Seen(NamedTuple):
    """What queries see, and what the state absorbs, of the tokens in [slots, chunk], N = C + T.

    keys, values, leaving: [B,Hk,N,D], ``leaving`` the values that are absorbed. psi: [B,Hk,N,R]. mean: what each
    feature of the state absorbed, [B,Hk,R,D] f32; of features without mass it is not read.
    """

    keys: Tensor
    values: Tensor
    leaving: Tensor
    psi: Tensor
    mean: Tensor


class _After(NamedTuple):
    """The output, what fills each slot (an index into [slots, chunk]), the state that is stored alike, and what leaves:
    the sums of psi [B,Hk,R] and of psi times value [B,Hk,R,D]."""

    out: Tensor
    source: Tensor
    score: Tensor
    position: Tensor
    mass: Tensor
    total: Tensor


def _fill(source: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """Slots [B,Hk,C,...] after the chunk, from those before it and the tokens of the chunk [B,Hk,T,...]."""
    both = torch.cat([past, new], 2)
    if both.ndim == 3:
        return both.gather(2, source)
    return both.gather(2, source[..., None].expand(-1, -1, -1, both.shape[-1]))


class _Int8(NamedTuple):
    """Keys and values of [slots, chunk] as queries see them and as they are absorbed, f32 [B,Hk,N,D], and the pairs
    (past, new) of codes and scales that fill the slots."""

    seen: tuple[Tensor, Tensor, Tensor]
    pairs: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, value_scale: Tensor,
        centring: Centring,
    ) -> _Int8:  # fmt: skip
        """From the chunk's tokens, and codes and scales of the slots."""
        new_key, new_key_scale = int8.quantise_keys(k, centring)
        new_value, new_value_scale = int8.quantise(v.float())
        slot_keys, slot_values = int8.dequantise_keys(key, key_scale, centring), int8.dequantise(value, value_scale)
        keys, values = torch.cat([slot_keys, k.float()], 2), torch.cat([slot_values, v.float()], 2)
        leaving = torch.cat([slot_values, int8.dequantise(new_value, new_value_scale)], 2)
        pairs = (key, new_key), (value, new_value), (key_scale, new_key_scale), (value_scale, new_value_scale)
        return cls((keys, values, leaving), pairs)

    def fill(self, source: Tensor) -> tuple[Tensor, ...]:
        """Codes of keys and values, and their scales, after the chunk."""
        return tuple(_fill(source, *pair) for pair in self.pairs)


def _step(q: Tensor, seen: _Seen, x: _Chunk) -> _After:
    """One chunk of queries q [B,Hq,T,D]."""
    rules, keys = by_code(x.policy), seen.keys
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
    keys, values = _select(held, keys), _select(held, seen.values)

    logits = (q.float().unflatten(1, split).flatten(2, 3) @ keys.mT).unflatten(2, (groups, chunk)) * x.scale
    at, now = position[:, :, None, None], query_position[:, None, None, :, None]
    visible = (at >= 0) & (at <= now)
    if x.window:
        visible &= at > now - x.window
    logits = torch.where(visible, logits, -torch.inf)  # [B,Hk,G,T,N]
    valid = query_valid[:, None, None, :, None]
    log_phi = x.log_phi_q.float().unflatten(1, split)
    out = _attend(logits, values, log_phi, seen.mean, x.past_z, valid, bool(x.absorb))

    score = torch.zeros_like(position, dtype=torch.float32)  # and remains zero for a policy without scores
    if rules.scoring != "none":
        past = torch.where(held, torch.cat([x.past_score, score[..., slots:]], 2), 0.0)
        share = torch.where(valid, torch.softmax(logits, -1), 0.0)
        if rules.scoring == "accumulate":
            # Every token of the chunk fades what was there before it, scores of its own chunk included.
            remaining, weight = fading(x.decay, step, x.new_length[:, None])
            score = past * remaining[:, None] + (share * weight[:, None, None, :, None]).sum((2, 3))
        else:  # only the last valid query counts; a parked row keeps its scores
            last = (step == x.new_length[:, None] - 1)[:, None, None, :, None]
            latest = torch.where(last, share, 0.0).sum((2, 3))
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
    leaves = held & ~kept & bool(x.absorb)
    psi = _select(leaves, seen.psi)
    return _After(
        out.flatten(1, 2).to(dtype),
        index,
        score.gather(2, index),
        torch.where(source >= 0, position.gather(2, index), -1),
        psi.sum(2),
        psi.mT @ _select(leaves, seen.leaving),
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
        log_phi_q, past_score, past_position, past_z, past_length, new_length,
        scale, policy, heavy, recent, window, absorb, decay, max_distance, rotary,
    )  # fmt: skip
    values, psi = torch.cat([past_value, v], 2), torch.cat([past_psi, psi_k], 2)
    after = _step(q, _Seen(torch.cat([past_key, k], 2), values, values, psi, _mean(past_h, past_z)), chunk)
    return (
        after.out,
        _fill(after.source, past_key, k),
        _fill(after.source, past_value, v),
        _fill(after.source, past_psi, psi_k),
        after.score,
        after.position,
        past_h + after.total,
        past_z + after.mass,
    )


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
        log_phi_q, past_score, past_position, past_z, past_length, new_length,
        scale, policy, heavy, recent, window, absorb, decay, max_distance, rotary,
    )  # fmt: skip
    tokens = _Int8.of(k, v, past_key, past_value, past_key_scale, past_value_scale, Centring(key_mean, key_std))
    psi = torch.cat([past_psi, psi_k], 2)
    after = _step(q, _Seen(*tokens.seen, psi, _mean(past_h, past_z)), chunk)
    key, value, key_scale, value_scale = tokens.fill(after.source)
    psi = _fill(after.source, past_psi, psi_k)
    h, z = past_h + after.total, past_z + after.mass
    return after.out, key, value, psi, after.score, after.position, h, z, key_scale, value_scale


def less_attention_state16(
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
    past_h_scale: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`less_attention_int8` with a low-rank state of 16 bits (:mod:`less_export.less.state16`).

    Args:
        psi_k: [B,Hk,T,R], non-negative; its sum over R counts as one.
        past_psi: int8 [B,Hk,C,R]. past_h: int8 [B,Hk,R,2D]. past_h_scale: [B,Hk,R] f32.

        The others are those of :func:`less_attention_int8`.

    Returns:
        The results of :func:`less_attention_int8`, then the scales of the state after the chunk.
    """
    chunk = _Chunk(
        log_phi_q, past_score, past_position, past_z, past_length, new_length,
        scale, policy, heavy, recent, window, absorb, decay, max_distance, rotary,
    )  # fmt: skip
    tokens = _Int8.of(k, v, past_key, past_value, past_key_scale, past_value_scale, Centring(key_mean, key_std))
    new_psi = state16.psi_codes(psi_k)
    psi = state16.psi_of(torch.cat([past_psi, new_psi], 2))
    after = _step(q, _Seen(*tokens.seen, psi, state16.means(past_h, past_h_scale)), chunk)
    key, value, key_scale, value_scale = tokens.fill(after.source)
    h, h_scale, z = state16.absorb(past_h, past_h_scale, past_z, after.mass, after.total, past_length)
    psi = _fill(after.source, past_psi, new_psi)
    return after.out, key, value, psi, after.score, after.position, h, z, key_scale, value_scale, h_scale
