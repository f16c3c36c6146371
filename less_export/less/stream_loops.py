"""The loops of :mod:`.stream` over the tokens of one KV head, compiled by Numba.

J is 1, or 2 where distances are clamped: the first queries and keys are turned by their positions; of the second, the
queries are not turned and the keys are turned back by the largest distance. G query heads, T positions, C slots.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

#: Sums may be reordered, so that they run in vector registers; NaN and infinities stay what they are.
_compiled = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _dot(a: Any, b: Any) -> Any:
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


@_compiled
def forward(
    q: Any, slot_k: Any, own_k: Any, slot_v: Any, own_v: Any, out: Any, total: Any, left: Any,
    slots: int, heavy: int, recent: int, scored: bool, decay: float, reach: int,
) -> None:  # fmt: skip
    """Attend to what is in the slots and to the token itself, then decide which token leaves.

    At every step past C tokens the one with the least key leaves, of several the last in slot order, and the new token
    takes its slot. The ``recent`` newest stay. ``scored``: the key is the score, which is multiplied by ``decay``
    before the next query's is added; otherwise it is the position, and the first ``heavy`` tokens stay.

    Args:
        q: [J,G,T,D], already multiplied by the scale. slot_k: [J,T,D]. own_k, slot_v, own_v: [T,D].
        out, total, left: receive outputs [G,T,D], their log-sum-exp [G,T], and the first query that does not find a
            token in a slot [T] (T if it stays).
        reach: the largest distance; T or more if none is clamped.
    """
    groups, length, _ = out.shape
    position = np.empty(slots + 1, np.int32)
    score = np.zeros(slots + 1, q.dtype)
    weight = np.empty(slots + 1, q.dtype)
    left[:] = length
    held = 0
    for now in range(length):
        position[held], score[held] = now, 0.0
        for i in range(held):
            score[i] *= decay
        for group in range(groups):
            query = q[0, group, now]
            peak = _dot(query, own_k[now])
            weight[held] = peak
            for i in range(held):
                at = position[i]
                if now - at > reach:
                    weight[i] = _dot(q[1, group, now], slot_k[1, at])
                else:
                    weight[i] = _dot(query, slot_k[0, at])
                peak = max(peak, weight[i])
            mass = weight[held] * 0
            for i in range(held + 1):
                weight[i] = np.exp(weight[i] - peak)
                mass += weight[i]
            total[group, now] = peak + np.log(mass)
            share = weight[held] / mass
            score[held] += share
            result = out[group, now]
            result[:] = share * own_v[now]
            for i in range(held):
                share = weight[i] / mass
                score[i] += share
                value = slot_v[position[i]]
                for d in range(len(result)):
                    result[d] += share * value[d]
        if held < slots:
            held += 1
            continue
        taken = -1
        for i in range(slots + 1):
            at = position[i]
            if at > now - recent or (not scored and at < heavy):
                continue
            if taken < 0 or (score[i] <= score[taken] if scored else at <= position[taken]):
                taken = i
        left[position[taken]] = now + 1
        position[taken], score[taken] = position[slots], score[slots]


@_compiled
def backward(
    q: Any, slot_k: Any, own_k: Any, slot_v: Any, own_v: Any, out: Any, total: Any, left: Any,
    d_out: Any, d_total: Any, d_q: Any, d_slot_k: Any, d_own_k: Any, d_slot_v: Any, d_own_v: Any,
    slots: int, reach: int,
) -> None:  # fmt: skip
    """Gradients of :func:`forward`, added to ``d_q`` to ``d_own_v``, with its evictions ``left``."""
    groups, length, _ = out.shape
    leaves = np.full(length + 1, -1, np.int32)  # the token that leaves before a query
    for at in range(length):
        if left[at] < length:
            leaves[left[at]] = at
    position = np.empty(slots + 1, np.int32)
    held = 0
    for now in range(length):
        for i in range(held):
            if position[i] == leaves[now]:
                held -= 1
                position[i] = position[held]
                break
        for group in range(groups):
            gradient = d_out[group, now]
            common = d_total[group, now] - _dot(gradient, out[group, now])
            for i in range(held + 1):
                own = i == held
                at = now if own else position[i]
                kind = 0 if now - at <= reach else 1
                query = q[kind, group, now]
                key = own_k[at] if own else slot_k[kind, at]
                value = own_v[at] if own else slot_v[at]
                weight = np.exp(_dot(query, key) - total[group, now])
                change = weight * (_dot(gradient, value) + common)
                d_query = d_q[kind, group, now]
                d_key = d_own_k[at] if own else d_slot_k[kind, at]
                d_value = d_own_v[at] if own else d_slot_v[at]
                for d in range(len(query)):
                    d_query[d] += change * key[d]
                    d_key[d] += change * query[d]
                for d in range(len(gradient)):
                    d_value[d] += weight * gradient[d]
        position[held] = now
        held += 1
