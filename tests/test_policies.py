"""Policies against their O(T^2) definitions, one token at a time, and the effect of chunks.

The definitions here are masks over a whole matrix of logits, as in the papers; they share only the layer's
numbers with ``oracle.py`` and the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from less_export import testing
from less_export.contract import LayerSpec, Policy
from less_export.less import reference
from less_export.less.policies import by_code, by_name, registered

from .oracle import layer_of

STEPS = 220


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine, torch's threads wait ten times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ definitions


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def scored_mask(logits: np.ndarray, layer: LayerSpec) -> tuple[np.ndarray, float]:
    """h2o and tova: what the query at t sees, [T,T] bool, from the logits [G,T,T] of one KV head.

    A query at t sees the tokens that survived t - 1, and itself. After its attention what a sliding layer's
    next query is blind to leaves; then, if more than ``heavy + recent`` are live, the lowest score among
    positions <= t - recent leaves. Of equal scores the one in the highest slot leaves; a newcomer takes the
    lowest free slot. Also returns the smallest non-zero gap, relative, between the lowest score and the next.
    """
    total, budget = logits.shape[-1], layer.heavy + layer.recent
    mask, score, slot = np.zeros((total, total), bool), np.zeros(total), np.full(total, -1)
    live, gap = np.zeros(total, bool), np.inf
    for t in range(total):
        live[t] = True
        mask[t] = live
        share = softmax(np.where(live, logits[:, t], -np.inf)).sum(0)
        score = score + share if layer.policy is Policy.H2O else share
        score[score < 1e-80] = 0  # the state is float32: exp(-400) is zero
        if layer.window:
            live[: max(t + 2 - layer.window, 0)] = False
        if live.sum() > budget:
            old = np.flatnonzero(live[: t - layer.recent + 1])
            ranked = old[np.lexsort((-slot[old], score[old]))]
            low = score[ranked[:2]]
            if low[-1] > low[0]:
                gap = min(gap, 1 - low[0] / low[-1])
            live[ranked[0]] = False
        live[t] = False
        slot[t] = min(set(range(budget)) - set(slot[live]))
        live[t] = True
    return mask, gap


def positional_mask(total: int, layer: LayerSpec) -> np.ndarray:
    """sink and window: what the query at t sees in a plain band mask, [T,T] bool."""
    t, j = np.ogrid[:total, :total]
    mask = (j <= t) & ((j > t - layer.window) | (layer.window == 0))
    if layer.policy is Policy.SINK:  # the first `heavy`, the `recent` before t, and t
        mask &= (j < layer.heavy) | (j >= t - layer.recent)
    return mask


def definition(layer: LayerSpec, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, float]:
    """Masks [B,Hk,T,T] of a layer and the smallest gap; q [B,Hq,T,D], k [B,Hk,T,D]."""
    total, gap = q.shape[2], np.inf
    masks = np.zeros((*k.shape[:2], total, total), bool)
    for b, j in np.ndindex(k.shape[:2]):
        if layer.policy in (Policy.SINK, Policy.WINDOW):
            masks[b, j] = positional_mask(total, layer)
            continue
        heads = q[b, j * layer.group : (j + 1) * layer.group].astype(np.float64)
        logits = heads @ k[b, j].astype(np.float64).T * layer.scale
        masks[b, j], one = scored_mask(logits, layer)
        gap = min(gap, one)
    return masks, gap


def defined(layer: LayerSpec, draw: Callable[[int], list[Tensor]]) -> tuple[list[Tensor], np.ndarray]:
    """Tokens of the first seed whose scores differ enough for float32, and their masks."""
    for seed in range(20):
        sequence = draw(seed)
        masks, gap = definition(layer, sequence[0].numpy(), sequence[1].numpy())
        if gap > 1e-5:
            return sequence, masks
    raise AssertionError("no data without near ties: take fewer steps")


# --------------------------------------------------------------------------------------------- the package


def tokens(layer: LayerSpec, batch: int, total: int, seed: int) -> list[Tensor]:
    """q, k, v, log_phi_q, psi_k of whole sequences, Gaussian."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, layer.query_heads, total, layer.head_dim, generator=g) * 1.5
    k, v = torch.randn(2, batch, layer.kv_heads, total, layer.head_dim, generator=g)
    log_phi = torch.randn(batch, layer.query_heads, total, layer.rank, generator=g)
    psi = torch.randn(batch, layer.kv_heads, total, layer.rank, generator=g).softmax(-1)
    return [q, k, v, log_phi, psi if layer.absorb else torch.zeros_like(psi)]


def tied_tokens(layer: LayerSpec, total: int, seed: int, blind: float) -> list[Tensor]:
    """One row whose queries look at one of the ``recent`` tokens before them or at themselves, +200 against
    -200, or (a share ``blind`` of them) at everything alike; head_dim is at least ``total``."""
    q, k, v, log_phi, psi = tokens(layer, 1, total, seed)
    rng = np.random.default_rng(seed)
    k[:] = -1
    k[:, :, torch.arange(total), torch.arange(total)] = 1
    target = np.maximum(np.arange(total) - rng.integers(0, layer.recent + 1, (layer.query_heads, total)), 0)
    q.zero_()
    q[0].scatter_(-1, torch.from_numpy(target)[..., None], 200 / layer.scale)
    q[0, torch.from_numpy(rng.random((layer.query_heads, total)) < blind)] = 0
    return [q, k, v, log_phi, psi]


def walk(layer: LayerSpec, sequence: list[Tensor], cuts: list[int]) -> Iterator[tuple[Tensor, ...]]:
    """Feed whole sequences in chunks of ``cuts`` tokens: the outputs of each call."""
    batch = sequence[0].shape[0]
    state, past = testing.empty_state(layer, batch, poison=True), 0
    for width in cuts:
        chunk = [x[:, :, past : past + width].contiguous() for x in sequence]
        lengths = [torch.full((batch,), n, dtype=torch.int32) for n in (past, width)]
        outputs = reference.less_attention(*chunk, *state, *lengths, **layer.attributes())
        yield outputs
        state, past = list(outputs[1:]), past + width


def run_in(layer: LayerSpec, sequence: list[Tensor], cuts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of all tokens [B,Hq,T,D], final positions [B,Hk,C], final keys [B,Hk,C,D]."""
    steps = list(walk(layer, sequence, cuts))
    return torch.cat([s[0] for s in steps], 2), steps[-1][5], steps[-1][1]


def seen_one_by_one(layer: LayerSpec, sequence: list[Tensor]) -> np.ndarray:
    """What every query saw exactly, [B,Hk,T,T] bool: the slots before it, and itself."""
    batch, total = sequence[0].shape[0], sequence[0].shape[2]
    seen = np.zeros((batch, layer.kv_heads, total, total), bool)
    slots = np.full((batch, layer.kv_heads, layer.capacity), -1)
    for t, outputs in enumerate(walk(layer, sequence, [1] * total)):
        for b, j in np.ndindex(seen.shape[:2]):
            held = slots[b, j][slots[b, j] >= 0]
            assert len(set(held)) == len(held)
            seen[b, j, t, held] = True
        slots = outputs[5].numpy()
    seen |= np.eye(total, dtype=bool)
    if layer.policy is Policy.WINDOW:  # its oldest slot is one the next query cannot see
        seen &= np.subtract.outer(np.arange(total), np.arange(total)) < layer.window
    return seen


# --------------------------------------------------------------------------------------------------- tests


HEADS = pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["MHA", "GQA", "MQA"])


@HEADS
@pytest.mark.parametrize(
    ("policy", "heavy", "recent", "window"),
    [
        ("h2o", 12, 12, 0),
        ("h2o", 20, 1, 0),
        ("h2o", 3, 17, 0),
        ("h2o", 10, 8, 50),
        ("tova", 15, 1, 0),
        ("tova", 15, 1, 40),
        ("sink", 4, 12, 0),
        ("sink", 4, 12, 100),
        ("window", 0, 16, 16),
    ],
)
def test_one_token_at_a_time_is_the_definition(
    policy: str, heavy: int, recent: int, window: int, heads: tuple[int, int]
) -> None:
    """Set for set over 220 queries."""
    layer = layer_of(policy, heavy, recent, window, heads=heads)
    sequence, want = defined(layer, lambda seed: tokens(layer, 2, STEPS, seed))
    np.testing.assert_array_equal(seen_one_by_one(layer, sequence), want)


@HEADS
@pytest.mark.parametrize(
    ("policy", "heavy", "recent", "window"),
    [("h2o", 8, 6, 0), ("h2o", 10, 2, 0), ("h2o", 8, 4, 30), ("tova", 9, 1, 0), ("tova", 9, 1, 30)],
)
def test_ties_one_token_at_a_time(policy: str, heavy: int, recent: int, window: int, heads: tuple[int, int]) -> None:
    """Scores are integers (tova: often all equal); the highest slot with the lowest score is evicted."""
    layer = layer_of(policy, heavy, recent, window, heads=heads, head_dim=STEPS)
    blind = 0.5 if policy == "tova" else 0.0
    sequence, want = defined(layer, lambda seed: tied_tokens(layer, STEPS, seed, blind))
    np.testing.assert_array_equal(seen_one_by_one(layer, sequence), want)


@pytest.mark.parametrize(("policy", "heavy", "recent"), [("h2o", 12, 8), ("tova", 19, 1), ("sink", 4, 16)])
def test_a_query_sees_the_heavy_the_recent_and_itself(policy: str, heavy: int, recent: int) -> None:
    layer = layer_of(policy, heavy, recent)
    seen = seen_one_by_one(layer, tokens(layer, 1, 80, 2))
    for t in range(80):
        assert (seen[..., t, :].sum(-1) == min(t, heavy + recent) + 1).all()
        assert seen[..., t, max(t - recent, 0) : t + 1].all()


CUTS = [[60], [1] * 60, [7] * 8 + [4], [16, 1, 1, 30, 12], [1, 59], [59, 1]]


def test_full_is_the_same_in_any_chunks() -> None:
    """The same slots, and the outputs of plain causal attention, up to rounding."""
    layer = layer_of("full", 0, 64)
    sequence = tokens(layer, 2, 60, 5)
    q, k, v = sequence[:3]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)
    for cuts in CUTS:
        out, position, key = run_in(layer, sequence, cuts)
        assert torch.equal(position, torch.tensor([*range(60), *[-1] * 4]).int().expand_as(position))
        assert torch.equal(key[:, :, :60], k)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_window_is_the_same_in_any_chunks() -> None:
    """The newest positions, and the outputs of plain sliding attention, up to rounding."""
    layer = layer_of("window", 0, 9, window=9)
    sequence = tokens(layer, 2, 60, 6)
    q, k, v = sequence[:3]
    mask = torch.from_numpy(positional_mask(60, layer))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True)
    for cuts in CUTS:
        out, position, _ = run_in(layer, sequence, cuts)
        assert torch.equal(position.sort(-1).values, torch.arange(51, 60).int().expand_as(position))
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_sink_keeps_the_same_positions_in_any_chunks() -> None:
    layer = layer_of("sink", 4, 9)
    sequence = tokens(layer, 2, 60, 7)
    for cuts in CUTS:
        _, position, _ = run_in(layer, sequence, cuts)
        want = torch.tensor([*range(4), *range(51, 60)]).int()
        assert torch.equal(position.sort(-1).values, want.expand_as(position))


@pytest.mark.parametrize("policy", ["h2o", "sink"])
def test_larger_chunks_see_more(policy: str) -> None:
    """A chunk without evictions is plain causal attention; the same tokens one by one are not."""
    layer = layer_of(policy, 6, 6, absorb=False)
    sequence = tokens(layer, 1, 60, 8)
    whole, kept, _ = run_in(layer, sequence, [60])
    single, kept_single, _ = run_in(layer, sequence, [1] * 60)
    causal = torch.nn.functional.scaled_dot_product_attention(
        *sequence[:3], is_causal=True, scale=layer.scale, enable_gqa=True
    )
    torch.testing.assert_close(whole, causal, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single[:, :, :13], causal[:, :, :13], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(single[:, :, 13:], causal[:, :, 13:], rtol=1e-2, atol=1e-2)
    same = torch.equal(kept.sort(-1).values, kept_single.sort(-1).values)
    assert same == (policy == "sink")


def test_table_of_policies() -> None:
    """The op's numbers, the policies with scores, and the split of a budget."""
    assert [p.name for p in registered()] == ["h2o", "tova", "sink", "window", "full"]
    assert [p.code for p in registered()] == [0, 1, 2, 3, 4]
    assert all(by_name(p.name) is p and by_code(p.code) is p for p in registered())
    scoring = {p.name: p.scoring for p in registered()}
    assert scoring == {"h2o": "accumulate", "tova": "last", "sink": "none", "window": "none", "full": "none"}
    for budget in (2, 5, 50, 52, 1024):
        split = {p.name: p.split(budget) for p in registered()}
        assert split["h2o"] == (budget // 2, budget - budget // 2)
        assert split["tova"] == (budget - 1, 1)
        assert split["sink"] == (min(4, budget - 1), max(budget - 4, 1))
        assert split["window"] == split["full"] == (0, budget)
