"""Simulation of whole sequences against the operator step by step: the same tokens in the slots, the same outputs."""

from __future__ import annotations

import pytest
import torch

from less_export.contract import LayerSpec, Policy
from less_export.less import simulate
from less_export.less.reference import less_attention
from less_export.testing import empty_state

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
    for begin in range(0, TOKENS, chunk):
        piece = [x[:, :, begin : begin + chunk] for x in tensors]
        new = torch.full((2,), piece[0].shape[2], dtype=torch.int32)
        positions.append(state[4])
        out, *state = less_attention(*piece, *state, torch.full_like(new, begin), new, **layer.attributes())
        outs.append(out)
    return torch.cat(outs, 2), positions


@pytest.mark.parametrize("chunk", [1, 13])
@pytest.mark.parametrize("name", LAYERS)
def test_the_simulation_is_the_operator(name: str, chunk: int) -> None:
    layer = LAYERS[name]
    q, k, v, log_phi, psi = tensors = inputs(layer)
    want, positions = streamed(layer, tensors, chunk)
    features = (log_phi, psi) if layer.absorb else None
    got = simulate.attend(q, k, v, layer, features, chunk)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    left = simulate.evictions(simulate.logits(q, k, layer), layer, chunk)
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
