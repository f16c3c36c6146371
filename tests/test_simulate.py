"""Simulation of whole sequences against the operator step by step: the same tokens in the slots, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from less_export.contract import LayerSpec, Policy
from less_export.less import int8, operators, rotary, simulate, state16, stream
from less_export.testing import empty_state

from .oracle import centring_of, frequencies_of

#: A layer's attention: q, k, v, log phi and psi -> output.
Attend = Callable[[list[torch.Tensor]], torch.Tensor]

TOKENS = 70
LAYERS = {
    "h2o": LayerSpec(4, 2, 8, 0.4, Policy.H2O, 5, 6, 0, True, 11, 3),
    "h2o, sparse": LayerSpec(4, 2, 8, 0.4, Policy.H2O, 5, 6, 0, False, 11, 1),
    "h2o, fading": LayerSpec(4, 2, 8, 0.4, Policy.H2O, 5, 6, 0, True, 11, 3, 7),
    "h2o, sliding, fading": LayerSpec(4, 1, 8, 0.4, Policy.H2O, 4, 4, 20, True, 8, 3, 3),
    "h2o, no heavy": LayerSpec(2, 2, 8, 0.4, Policy.H2O, 0, 9, 0, True, 9, 1),
    "h2o, sliding": LayerSpec(4, 1, 8, 0.4, Policy.H2O, 4, 4, 20, True, 8, 3),
    "tova": LayerSpec(6, 2, 8, 0.4, Policy.TOVA, 9, 1, 0, True, 10, 4),
    "sink": LayerSpec(4, 4, 8, 0.4, Policy.SINK, 4, 6, 0, True, 10, 2),
    "sink, sliding": LayerSpec(4, 2, 8, 0.4, Policy.SINK, 4, 6, 16, True, 10, 2),
    "window": LayerSpec(4, 2, 8, 0.4, Policy.WINDOW, 0, 16, 16, False, 16, 1),
    "full": LayerSpec(4, 2, 8, 0.4, Policy.FULL, 0, 80, 0, False, 80, 1),
}
INT8_LAYERS = {f"{name}, int8": replace(layer, slot_dtype="int8") for name, layer in LAYERS.items()}
#: Layers that rotate q and k themselves; distances of most sequences here pass the largest.
DISTANCE_LAYERS = {
    f"{name}, distance": replace(layer, max_distance=far)
    for layers, name, far in (
        (LAYERS, "h2o", 30), (LAYERS, "sink, sliding", 9), (LAYERS, "window", 15), (LAYERS, "full", 40),
        (LAYERS, "h2o, sliding", 100), (INT8_LAYERS, "tova, int8", 20), (INT8_LAYERS, "full, int8", 1),
    )
    for layer in (layers[name],)
}  # fmt: skip
#: Layers with a state of 16 bits; the simulation does not round its means.
STATE16_LAYERS = {
    f"{name}, 16": replace(layer, slot_dtype="int8", state_bits=16)
    for name in ("h2o, fading", "tova", "sink, sliding")
    for layer in (LAYERS[name],)
}
ALL_LAYERS = {**LAYERS, **INT8_LAYERS, **DISTANCE_LAYERS, **STATE16_LAYERS}


def centring(layer: LayerSpec) -> int8.Centring:
    return int8.Centring(*map(torch.from_numpy, centring_of(layer)))


def table(layer: LayerSpec) -> torch.Tensor | None:
    """The table of the layer's rotary embedding, which leaves the last channels alone."""
    if layer.max_distance is None:
        return None
    return rotary.table(torch.from_numpy(frequencies_of(layer)), max(TOKENS, layer.max_distance + 1))


def scores(layer: LayerSpec, q: torch.Tensor, k: torch.Tensor, chunk: int) -> torch.Tensor:
    return simulate.scores(q, k, simulate.slot_keys(k, layer, centring(layer)), layer, chunk, table(layer))


def inputs(layer: LayerSpec, log_mass: float = 0.0) -> list[torch.Tensor]:
    """q, k, v, log phi and psi of two sequences."""
    g = torch.Generator().manual_seed(7)
    shapes = [(layer.query_heads, layer.head_dim)] + [(layer.kv_heads, layer.head_dim)] * 2
    q, k, v = (torch.randn(2, h, TOKENS, d, generator=g) for h, d in shapes)
    log_phi = torch.randn(2, layer.query_heads, TOKENS, layer.rank, generator=g) * 3 + log_mass
    log_phi[:, 0, ::7, 0] = -torch.inf
    psi = torch.softmax(torch.randn(2, layer.kv_heads, TOKENS, layer.rank, generator=g), -1) * float(layer.absorb)
    return [q * 2, k * 2, v, log_phi, psi]


def streamed(layer: LayerSpec, tensors: list[torch.Tensor], chunk: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The operator over the sequences, chunk by chunk: outputs, and the positions in the slots before each."""
    state = empty_state(layer, 2, poison=True)
    outs, positions = [], []
    for begin in range(0, tensors[0].shape[2], chunk):
        piece = [x[:, :, begin : begin + chunk] for x in tensors]
        new = torch.full((2,), piece[0].shape[2], dtype=torch.int32)
        positions.append(state[4])
        lengths = (torch.full_like(new, begin), new)
        out, *state = operators.run(layer, piece, state, lengths, centring(layer), table(layer), opaque=False)
        outs.append(out)
    return torch.cat(outs, 2), positions


@pytest.mark.parametrize("chunk", [1, 13])
@pytest.mark.parametrize("name", ALL_LAYERS)
def test_the_simulation_is_the_operator(name: str, chunk: int) -> None:
    layer = ALL_LAYERS[name]
    close = dict.fromkeys(("rtol", "atol"), 8 * state16.ONE_CODE if layer.state16 else 2e-5)
    q, k, v, log_phi, psi = tensors = inputs(layer)
    want, positions = streamed(layer, tensors, chunk)
    features = (log_phi, psi) if layer.absorb else None
    got = simulate.attend(q, k, v, layer, features, chunk, centring(layer), table(layer))
    torch.testing.assert_close(got, want, **close)
    left = simulate.evictions(scores(layer, q, k, chunk), layer, chunk)
    if chunk == 1:
        again = simulate.attend_as(q, k, v, layer, features, left, centring(layer), rotary=table(layer))
        torch.testing.assert_close(again, want, **close)
    at = torch.arange(TOKENS)
    for begin, held in zip(range(0, TOKENS, chunk), positions, strict=True):
        mine = (left > begin) & (at < begin)
        theirs = torch.zeros(*held.shape[:2], TOKENS + 1, dtype=torch.bool)
        theirs.scatter_(2, torch.where(held >= 0, held, TOKENS).long(), True)
        assert torch.equal(mine, theirs[..., :TOKENS])


@pytest.mark.parametrize("log_mass", [-200.0, 60.0])
def test_masses_of_any_size(log_mass: float) -> None:
    layer = LAYERS["h2o"]
    q, k, v, log_phi, psi = tensors = inputs(layer, log_mass)
    want, _ = streamed(layer, tensors, 1)
    got = simulate.attend(q, k, v, layer, (log_phi, psi), 1)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_int8_slots_change_outputs_and_evictions() -> None:
    """Otherwise the comparisons above would not notice an exact simulation."""
    layer = LAYERS["h2o"]
    q, k, v, *_ = inputs(layer)
    rounded = replace(layer, slot_dtype="int8")
    # One channel that is not centred out takes the range of the others.
    k[..., 3] += 400
    outs = [simulate.attend(q, k, v, x, None, 1) for x in (layer, rounded)]
    assert float((outs[0] - outs[1]).abs().max()) > 1e-2
    left = [simulate.evictions(scores(x, q, k, 1), x) for x in (layer, rounded)]
    assert not torch.equal(*left)


@pytest.mark.parametrize("name", [n for n, x in ALL_LAYERS.items() if stream.takes(x, torch.device("cpu"))])
def test_both_ways_evict_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ALL_LAYERS[name]
    q, k, v, *_ = inputs(layer)
    fast = simulate.one_by_one(q, k, v, layer, centring(layer), table(layer))
    monkeypatch.setattr(stream, "takes", lambda *_: False)
    for got, want in zip(fast, simulate.one_by_one(q, k, v, layer, centring(layer), table(layer)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_states_run_along_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["h2o"]
    q, k, v, *features = inputs(layer)
    want = simulate.attend(q, k, v, layer, tuple(features), 1)
    monkeypatch.setattr(simulate, "_BLOCK", 7)
    torch.testing.assert_close(simulate.attend(q, k, v, layer, tuple(features), 1), want, rtol=1e-5, atol=1e-5)


def test_nothing_of_what_a_slot_no_longer_holds_is_attended() -> None:
    layer = LAYERS["sink, sliding"]
    q, k, *_ = inputs(layer)
    queries = torch.arange(TOKENS)
    left = simulate.evictions(simulate.logits(q, k, layer), layer)
    seen, state = simulate.visible(left, queries, layer.window), simulate.absorbed(left, queries)
    causal = (queries <= queries[:, None]).expand_as(seen)
    assert torch.equal(seen | state, causal)
    assert not bool((seen & state).any())


def test_gradients_are_finite_where_features_vanish() -> None:
    layer = LAYERS["h2o"]
    q, k, v, log_phi, psi = inputs(layer)
    log_phi, psi = log_phi.requires_grad_(), psi.requires_grad_()
    simulate.attend(q, k, v, layer, (log_phi, psi), 1).square().sum().backward()
    assert log_phi.grad is not None
    assert psi.grad is not None
    assert bool(log_phi.grad.isfinite().all())
    assert bool(psi.grad.isfinite().all())
    assert float(log_phi.grad.abs().max()) > 0


def two_layers(layer: LayerSpec, tensors: list[torch.Tensor], attend: Attend) -> torch.Tensor:
    """A second layer that reads q, k, v and features from the output of the first."""
    q, _, _, log_phi, psi = tensors
    first = attend(tensors)
    kv = first.unflatten(1, (layer.kv_heads, layer.group))
    mixed = torch.softmax(first[..., : layer.rank], -1).unflatten(1, (layer.kv_heads, layer.group))[:, :, 0]
    return attend([q + first, kv[:, :, 0], kv[:, :, -1] + 1, log_phi + first[..., : layer.rank], psi * mixed])


EXACT_SLOTS = {n: x for n, x in {**LAYERS, **DISTANCE_LAYERS}.items() if not x.int8}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", [n for n, x in EXACT_SLOTS.items() if x.policy.evicts])
def test_gradients_are_those_of_the_operator(name: str, masks: bool) -> None:
    """Through two evicting layers, from every input, as autograd finds them through the reference token by token."""
    layer = EXACT_SLOTS[name]
    angles = table(layer)

    def operator(tensors: list[torch.Tensor]) -> torch.Tensor:
        return streamed(layer, tensors, 1)[0]

    def simulation(tensors: list[torch.Tensor]) -> torch.Tensor:
        q, k, v, log_phi, psi = tensors
        features = (log_phi, psi) if layer.absorb else None
        if not masks:
            return simulate.attend(q, k, v, layer, features, 1, None, angles)
        left = simulate.departures(q.detach(), k.detach(), layer, rotary=angles)
        return checkpoint(simulate.attend_as, q, k, v, layer, features, left, None, 1, angles, use_reentrant=False)

    goal = torch.randn(2, layer.query_heads, 30, layer.head_dim, generator=torch.Generator().manual_seed(1))
    gradients = []
    for attend in (operator, simulation):
        tensors = [x[:, :, :30].requires_grad_(layer.absorb or i < 3) for i, x in enumerate(inputs(layer))]
        loss = (two_layers(layer, tensors, attend) * goal).sum()
        gradients.append(torch.autograd.grad(loss, [x for x in tensors if x.requires_grad]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert float(want.abs().max()) > 0
        assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", [n for n, x in INT8_LAYERS.items() if x.policy.evicts])
def test_gradients_pass_the_rounding_unchanged(name: str, masks: bool) -> None:
    """Gradients for queries, values and features are those of a fixed rounding error added to keys and values."""
    layer = INT8_LAYERS[name]
    q, k, v, log_phi, psi = inputs(layer)
    left = simulate.evictions(scores(layer, q, k, 1), layer)
    errors = simulate.slot_keys(k, layer, centring(layer)) - k, simulate.slot_values(v, layer) - v

    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention over slots that hold k and v plus their errors, written out with masks."""
        queries, group = torch.arange(TOKENS), layer.group
        own = torch.eye(TOKENS, dtype=torch.bool)
        k, old_k, v, old_v = (x.repeat_interleave(group, 1) for x in (k, k + errors[0], v, v + errors[1]))
        seen = simulate.visible(left, queries, layer.window)[:, :, 0].repeat_interleave(group, 1)
        logits = torch.where(own, q @ k.mT, q @ old_k.mT) * layer.scale
        logits = logits.masked_fill(~seen, -torch.inf)
        if not layer.absorb:
            weight = torch.softmax(logits, -1)
            return torch.where(own, 0, weight) @ old_v + torch.where(own, weight, 0) @ v
        state = simulate.absorbed(left, queries)[:, :, 0].repeat_interleave(group, 1)
        low = log_phi.exp() @ psi.repeat_interleave(group, 1).mT * state
        weight = logits.exp()
        out = torch.where(own, 0, weight) @ old_v + torch.where(own, weight, 0) @ v + low @ old_v
        return out / (weight.sum(-1, keepdim=True) + low.sum(-1, keepdim=True))

    def simulation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        features = (log_phi, psi) if layer.absorb else None
        if not masks:
            return simulate.attend(q, k, v, layer, features, 1, centring(layer))
        return simulate.attend_as(q, k, v, layer, features, left, centring(layer))

    gradients = []
    for attend in (by_hand, simulation):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        gradients.append(torch.autograd.grad(attend(*tensors).square().sum(), tensors))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-5
