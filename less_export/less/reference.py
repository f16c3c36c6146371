"""The reference of ``less::LessAttention``: every other implementation is tested against this one.

One call attends a chunk of T new tokens to the slots, to itself (causally) and to the low-rank state,
then decides which tokens keep a slot and absorbs the others (LESS, arXiv 2402.09398, section 3).
Everything is computed in float32, for readability rather than speed. Entries that hold no token are masked out
before any product, so that NaN in an empty slot or in padding never spreads.

Shapes: B rows, Hq query heads, Hk KV heads (G = Hq / Hk), T chunk, C slots, R features, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import OP_DOMAIN
from ..errors import BackendError
from .policies import Candidates, by_code


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LESS attention of one chunk, from one state to the next.

    Args:
        q: [B,Hq,T,D] queries, RoPE applied. k, v: [B,Hk,T,D] new keys and values.
        log_phi_q: [B,Hq,T,R] f32, log of the query features; -inf allowed. psi_k: [B,Hk,T,R] key
            features, non-negative.
        past_key, past_value: [B,Hk,C,D]. past_psi: [B,Hk,C,R]. past_score: [B,Hk,C] f32.
        past_position: [B,Hk,C] i32, -1 where empty. past_h: [B,Hk,R,D] f32. past_z: [B,Hk,R] f32.
        past_length: [B] i32, tokens seen before the chunk. new_length: [B] i32, valid tokens of it.
        scale, policy, heavy, recent, window, absorb, decay: see :class:`less_export.contract.LayerSpec`.

    Returns:
        out [B,Hq,T,D] (zero where t >= new_length), then the seven state tensors after the chunk. Slots
        that stay empty have position -1 and unspecified contents.

    Raises:
        BackendError: policy ``full`` and more tokens than slots.
    """
    rules = by_code(policy)
    slots, chunk, groups = past_key.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    split = (k.shape[1], groups)

    step = torch.arange(chunk, dtype=torch.int32, device=q.device)
    query_position = past_length[:, None] + step  # [B,T]
    query_valid = step < new_length[:, None]
    new_position = torch.where(query_valid, query_position, -1)[:, None].expand(-1, k.shape[1], -1)
    position = torch.cat([past_position, new_position], 2)  # [B,Hk,N]
    held = position >= 0
    keys = _select(held, torch.cat([past_key, k], 2))
    values = _select(held, torch.cat([past_value, v], 2))

    logits = (q.float().unflatten(1, split).flatten(2, 3) @ keys.mT).unflatten(2, (groups, chunk)) * scale
    at, now = position[:, :, None, None], query_position[:, None, None, :, None]
    visible = (at >= 0) & (at <= now)
    if window:
        visible &= at > now - window
    logits = torch.where(visible, logits, -torch.inf)  # [B,Hk,G,T,N]
    valid = query_valid[:, None, None, :, None]
    out = _attend(logits, values, log_phi_q.float().unflatten(1, split), past_h, past_z, valid, bool(absorb))

    score = torch.zeros_like(position, dtype=torch.float32)  # and remains zero for a policy without scores
    if rules.scoring != "none":
        past = torch.where(held, torch.cat([past_score, score[..., slots:]], 2), 0.0)
        seen = torch.where(valid, torch.softmax(logits, -1), 0.0)
        if rules.scoring == "accumulate":
            # Every token of the chunk fades what was there before it, scores of its own chunk included.
            remaining, weight = fading(decay, step, new_length[:, None])
            score = past * remaining[:, None] + (seen * weight[:, None, None, :, None]).sum((2, 3))
        else:  # only the last valid query counts; a parked row keeps its scores
            last = (step == new_length[:, None] - 1)[:, None, None, :, None]
            latest = torch.where(last, seen, 0.0).sum((2, 3))
            score = torch.where((new_length > 0)[:, None, None], latest, past)

    end = (past_length + new_length)[:, None, None]
    live = held
    if window:
        live = held & (position >= rules.oldest(end, window))
    kept = rules.keep(Candidates(live, position, score, end), heavy, recent)
    if rules.keeps_all and bool((kept.sum(-1) > slots).any()):
        raise BackendError(f"policy {rules.name} holds {slots} tokens and was fed more: export with a larger --context")

    source = place(kept, slots)
    index = source.clamp(min=0)

    def slotted(past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], 2).gather(2, index[..., None].expand(-1, -1, -1, past.shape[-1]))

    present_position = torch.where(source >= 0, position.gather(2, index), -1)
    present_h, present_z = past_h.clone(), past_z.clone()
    if absorb:
        leaving = _select(held & ~kept, torch.cat([past_psi, psi_k], 2))  # [B,Hk,N,R]
        present_h = past_h + leaving.mT @ values
        present_z = past_z + leaving.sum(2)
    return (
        out.flatten(1, 2).to(q.dtype),
        slotted(past_key, k),
        slotted(past_value, v),
        slotted(past_psi, psi_k),
        score.gather(2, index),
        present_position,
        present_h,
        present_z,
    )


#: The same function as an opaque operator, which ``torch.export`` keeps as one node.
attention = torch.library.custom_op(f"{OP_DOMAIN}::attention", less_attention, mutates_args=())


@attention.register_fake
def _(*args: Tensor | float | int) -> tuple[Tensor, ...]:
    q, state = args[0], args[5:12]
    assert isinstance(q, Tensor)
    return (q.new_empty(q.shape), *(x.new_empty(x.shape) for x in state if isinstance(x, Tensor)))
