"""Brute-force ``LessAttention``, written from the specification: token lists, plain Python, float64.

It is independent of how the operator is computed. Per row and KV head there is a list of slots that hold a
token's position or nothing, a list of absorbed positions, and every token ever seen; each output is the
formula evaluated over those. :mod:`.scenarios` compares implementations with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from less_export.contract import LayerSpec, SlotDtype, StateBits
from less_export.less.policies import by_name

from .oracle_rounding import rounded_means, rounded_psi, rounded_to_int8

Arrays = dict[str, np.ndarray]

TOKENS = ("q", "k", "v", "log_phi_q", "psi_k")
STATE = ("key", "value", "psi", "score", "position", "h", "z")
OUTPUTS = ("out", *STATE)
#: What layers with int8 slots have besides: state, and the constants that centre keys.
SCALES = ("key_scale", "value_scale")
#: What layers with a state of 16 bits have besides.
STATE_SCALES = ("h_scale",)
CENTRING = ("key_mean", "key_std")
#: What layers with a largest distance have besides: the table that turns q and k.
TURNING = ("rotary",)
#: Tokens that a test's table reaches.
TURNS = 128
#: Channels that are rotated, by head_dim; all but the last two for others.
ROTATED = {2: 2, 4: 4, 64: 64, 96: 64, 128: 96, 256: 256}

#: Scores that differ by less than this (relative) but are not equal could rank differently in float32: not used.
FRAGILE = 1e-5


def layer_of(
    policy: str,
    heavy: int,
    recent: int,
    window: int = 0,
    absorb: bool = True,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    rank: int = 3,
    half_life: int | None = None,
    slot_dtype: SlotDtype = "model",
    max_distance: int | None = None,
    state_bits: StateBits = 32,
) -> LayerSpec:
    """A small layer; ``heads`` are query and KV heads."""
    absorb = absorb and policy not in ("window", "full")
    capacity, rank = heavy + recent, rank if absorb else 1
    rules = by_name(policy)
    low_rank = absorb, capacity, rank
    return LayerSpec(
        *heads, head_dim, 0.5, rules, heavy, recent, window, *low_rank, half_life, slot_dtype, max_distance, state_bits
    )


def centring_of(layer: LayerSpec) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of a layer's keys, f32 [Hk,D]; one channel of the first head lies off zero."""
    rng = np.random.default_rng(layer.head_dim)
    shape = layer.kv_heads, layer.head_dim
    mean, std = rng.normal(size=shape), rng.uniform(0.25, 4.0, shape)
    mean[0, 0] = 4.0
    return mean.astype(np.float32), std.astype(np.float32)


def frequencies_of(layer: LayerSpec) -> np.ndarray:
    """Radians per token of the pairs of channels."""
    return np.linspace(1.0, 0.05, ROTATED.get(layer.head_dim, layer.head_dim - 2) // 2)


def table_of(layer: LayerSpec) -> np.ndarray:
    """The layer's table, f32 [TURNS, D_rot]: cosines of the angles of each distance, then sines."""
    angles = np.outer(np.arange(TURNS), frequencies_of(layer))
    return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


class Overflow(Exception):
    """Policy full was fed more tokens than it has slots."""


# ------------------------------------------------------------------------------------- one row, one KV head


@dataclass
class Head:
    """The tokens of one row in one KV head, the ``index``-th."""

    layer: LayerSpec
    index: int
    slots: list[int | None] = field(init=False)
    absorbed: list[int] = field(default_factory=list)
    score: dict[int, float] = field(default_factory=dict)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    psis: list[np.ndarray] = field(default_factory=list)
    rounded: dict[int, Arrays] = field(default_factory=dict)
    fragile: bool = False
    codes: np.ndarray = field(init=False)
    scale: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [None] * self.layer.capacity
        self.codes = np.zeros((self.layer.rank, self.layer.head_dim), int)
        self.scale = np.zeros(self.layer.rank, np.float32)

    def stored(self, p: int) -> Arrays:
        """A token's codes and scales in an int8 slot, and the key and value that they stand for."""
        if p not in self.rounded:
            mean, std = (x[self.index] for x in centring_of(self.layer))
            code, scale = rounded_to_int8((self.keys[p].astype(np.float32) - mean) / std)
            value, value_scale = rounded_to_int8(self.values[p])
            self.rounded[p] = {
                "key": code,
                "value": value,
                "key_scale": np.asarray(scale),
                "value_scale": np.asarray(value_scale),
                "key read": code * float(scale) * std.astype(np.float64) + mean,
                "value read": value * float(value_scale),
            }
        return self.rounded[p]

    def key(self, p: int, first: int) -> np.ndarray:
        """A token's key as queries of the chunk from ``first`` see it: rounded if it was there before the chunk."""
        return self.stored(p)["key read"] if self.layer.int8 and p < first else self.keys[p]

    def distance(self, t: int, p: int, first: int) -> int:
        """Tokens between the query at ``t`` and the token at ``p``: those before the chunk are at most so far from its
        first token."""
        far = self.layer.max_distance
        return t - p if p >= first or far is None else t - first + min(first - p, far)

    def logits(self, q: np.ndarray, t: int, visible: list[int], first: int) -> np.ndarray:
        """Of queries q [G,D] at ``t`` with the tokens ``visible``, [G,n]."""
        keys = np.stack([self.key(p, first) for p in visible])
        products = q @ keys.T
        if self.layer.max_distance is not None:  # pairs of channels as complex numbers
            frequencies = frequencies_of(self.layer)
            half = len(frequencies)
            pairs, turned = (x[:, :half] + 1j * x[:, half : 2 * half] for x in (q, keys))
            away = np.array([self.distance(t, p, first) for p in visible])
            angles = np.exp(1j * away[:, None] * frequencies)
            turning = np.einsum("gi,ni,ni->gn", pairs, turned.conj(), angles).real
            products = turning + q[:, 2 * half :] @ keys[:, 2 * half :].T
        return products * self.layer.scale

    def value(self, p: int, first: int) -> np.ndarray:
        """A token's value as queries of the chunk from ``first`` see it."""
        return self.stored(p)["value read"] if self.layer.int8 and p < first else self.values[p]

    def psi(self, p: int) -> np.ndarray:
        """A token's psi as it is absorbed."""
        return rounded_psi(self.psis[p])[1] if self.layer.state16 else self.psis[p]

    def sums(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over tokens of psi times value, [R,D], and of psi, [R]; values are rounded as in a slot."""
        h, z = np.zeros((self.layer.rank, self.layer.head_dim)), np.zeros(self.layer.rank)
        for p in tokens:
            h += np.outer(self.psi(p), self.value(p, len(self.keys)))
            z += self.psi(p)
        return h, z

    def low_rank(self) -> tuple[np.ndarray, np.ndarray]:
        """``H [R,D]`` and ``z [R]``, summed over the absorbed list, or in 16 bits from the means."""
        h, z = self.sums(self.absorbed)
        return (self.means() * z[:, None] if self.layer.state16 else h), z

    def means(self) -> np.ndarray:
        """Means of 16 bits, [R,D]."""
        return self.codes * self.scale[:, None].astype(np.float64)

    def round_means(self, leaving: list[int], first: int) -> None:
        """Move the means of 16 bits of a step that began at ``first`` towards the values of the tokens that leave."""
        (total, mass), z, old = self.sums(leaving), self.sums(self.absorbed)[1], self.means()
        for r in range(self.layer.rank):
            if mass[r] > 0:
                moved = old[r] + (total[r] - mass[r] * old[r]) / (z[r] + mass[r])
                self.codes[r], self.scale[r] = rounded_means(moved, first, r)

    def attend(
        self, logits: np.ndarray, values: np.ndarray, log_phi: np.ndarray, h: np.ndarray, z: np.ndarray
    ) -> np.ndarray:
        """``(phi H + sum exp(l) v) / (phi z + sum exp(l))`` with a maximum subtracted; logits [n] -> [D]."""
        masses = [lp + math.log(zr) for lp, zr in zip(log_phi, z, strict=True) if zr > 0 and lp > -np.inf]
        top = max([*logits, *masses])
        phi, weight = np.exp(log_phi - top), np.exp(logits - top)
        return (phi @ h + weight @ values) / (phi @ z + weight.sum())

    def chunk(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, log_phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
        """Take the valid tokens of a chunk: q [G,n,D], k, v [n,D], log_phi [G,n,R], psi [n,R] -> [G,n,D]."""
        layer, first, count = self.layer, len(self.keys), len(k)
        out = np.zeros(q.shape)
        if count == 0:
            return out
        self.keys += list(k)
        self.values += list(v)
        self.psis += list(psi)
        h, z = self.low_rank()
        candidates = [p for p in self.slots if p is not None] + list(range(first, first + count))
        h2o = layer.policy.name == "h2o"
        fade = 0.5 ** (1 / layer.score_half_life) if layer.score_half_life else 1.0
        gained = {p: self.score.get(p, 0.0) if h2o else 0.0 for p in candidates}
        for i, t in enumerate(range(first, first + count)):
            visible = [p for p in candidates if p <= t and (layer.window == 0 or p > t - layer.window)]
            logits = self.logits(q[:, i], t, visible, first)
            seen = np.stack([self.value(p, first) for p in visible])
            out[:, i] = [self.attend(row, seen, lp, h, z) for row, lp in zip(logits, log_phi[:, i], strict=True)]
            weight = np.exp(logits - logits.max(1, keepdims=True))
            share = (weight / weight.sum(1, keepdims=True)).sum(0)
            if layer.policy.name == "tova":
                gained = dict.fromkeys(candidates, 0.0)
            gained = {p: s * fade for p, s in gained.items()}
            for p, s in zip(visible, share, strict=True):
                gained[p] += s
        for p in candidates:
            self.score[p] = float(np.float32(gained[p])) if layer.policy.name in ("h2o", "tova") else 0.0
        self.settle(candidates, self.kept(candidates, first + count), first)
        return out

    def kept(self, candidates: list[int], end: int) -> set[int]:
        """Tokens that keep a slot, by the policy table; ``end`` is the next query's position."""
        layer, policy = self.layer, self.layer.policy.name
        if policy == "full":
            if len(candidates) > layer.capacity:
                raise Overflow
            return set(candidates)
        if policy == "window":
            return set(sorted(candidates)[-layer.window :])
        alive = [p for p in candidates if layer.window == 0 or p > end - layer.window]
        newest = set(sorted(alive)[-layer.recent :])
        if policy == "sink":
            return newest | {p for p in alive if p < layer.heavy}
        rest = sorted((p for p in alive if p not in newest), key=lambda p: -self.score[p])  # stable
        room = layer.capacity - len(newest)
        if 0 < room < len(rest):
            last, next_ = self.score[rest[room - 1]], self.score[rest[room]]
            self.fragile |= 0 < last - next_ < FRAGILE * last
        return newest | set(rest[:room])

    def settle(self, candidates: list[int], kept: set[int], first: int) -> None:
        """Kept tokens stay in their slots, new ones fill the freed slots in order, the others are absorbed."""
        if self.layer.absorb:
            leaving = [p for p in candidates if p not in kept]
            if self.layer.state16:
                self.round_means(leaving, first)
            self.absorbed += leaving
        arriving = sorted(p for p in kept if p >= first)
        for i, p in enumerate(self.slots):
            if p not in kept:
                self.slots[i] = arriving.pop(0) if arriving else None
        assert not arriving

    def snapshot(self) -> Arrays:
        """State in the op's layout; zeros where a slot is empty."""
        layer = self.layer
        got: Arrays = {
            "key": np.zeros((layer.capacity, layer.head_dim)),
            "value": np.zeros((layer.capacity, layer.head_dim)),
            "psi": np.zeros((layer.capacity, layer.rank)),
            "score": np.zeros(layer.capacity),
            "position": np.array([-1 if p is None else p for p in self.slots]),
        }
        if layer.int8:
            got |= {n: np.zeros(layer.capacity, np.float32) for n in SCALES}
        for i, p in enumerate(self.slots):
            if p is None:
                continue
            token = self.stored(p) if layer.int8 else {"key": self.keys[p], "value": self.values[p]}
            for name in got.keys() & token.keys():
                got[name][i] = token[name]
            got["psi"][i] = rounded_psi(self.psis[p])[0] if layer.state16 else self.psis[p]
            got["score"][i] = self.score[p]
        got["h"], got["z"] = self.low_rank()
        if layer.state16:
            high = (self.codes + 128) // 256
            got |= {"h": np.concatenate([high, self.codes - 256 * high], -1), "h_scale": self.scale}
        return got


# ------------------------------------------------------------------------------------------- the whole batch


class Oracle:
    """All rows and KV heads of one layer; query head ``i`` belongs to KV head ``i // G``."""

    def __init__(self, layer: LayerSpec, batch: int) -> None:
        self.layer = layer
        self.heads = [self.fresh_row() for _ in range(batch)]

    def fresh_row(self) -> list[Head]:
        return [Head(self.layer, i) for i in range(self.layer.kv_heads)]

    def reset(self, row: int) -> None:
        self.heads[row] = self.fresh_row()

    @property
    def fragile(self) -> bool:
        return any(head.fragile for row in self.heads for head in row)

    def step(self, chunk: Arrays) -> Arrays:
        """Expected outputs of a chunk, float64."""
        group = self.layer.group
        q, k, v, log_phi, psi = (chunk[n].astype(np.float64) for n in TOKENS)
        out = np.zeros(q.shape)
        for b, row in enumerate(self.heads):
            n = int(chunk["new_length"][b])
            for j, head in enumerate(row):
                mine = slice(j * group, (j + 1) * group)
                args = q[b, mine, :n], k[b, j, :n], v[b, j, :n], log_phi[b, mine, :n], psi[b, j, :n]
                out[b, mine, :n] = head.chunk(*args)
        shots = [[head.snapshot() for head in row] for row in self.heads]
        return {"out": out, **{n: np.array([[s[n] for s in row] for row in shots]) for n in shots[0][0]}}
