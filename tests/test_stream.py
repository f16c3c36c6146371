"""Compiled loops over the tokens of a sequence: gradients in float64, threads, and which policies get them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from less_export.contract import LayerSpec, Policy
from less_export.less import stream
from less_export.less.policies import H2O, EvictionPolicy

CPU = torch.device("cpu")
LAYERS = {
    "h2o": LayerSpec(4, 2, 3, 0.4, Policy.H2O, 2, 2, 0, True, 4, 3),
    "h2o, fading": LayerSpec(2, 2, 3, 0.4, Policy.H2O, 2, 2, 0, True, 4, 3, 2),
    "tova": LayerSpec(4, 1, 3, 0.4, Policy.TOVA, 3, 1, 0, True, 4, 3),
    "sink": LayerSpec(2, 1, 3, 0.4, Policy.SINK, 1, 3, 0, True, 4, 3),
}


def inputs(layer: LayerSpec, tokens: int, kinds: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    rows = 2 * layer.kv_heads
    shapes = [(kinds, layer.group, tokens), (kinds, tokens), *[(tokens,)] * 3]
    return [torch.randn(rows, *s, layer.head_dim, generator=g, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str, clamped: bool) -> None:
    """Of outputs and log-sum-exps, from every input, with the evictions fixed: a difference does not change them."""
    layer = replace(LAYERS[name], max_distance=3 if clamped else None)
    tensors = inputs(layer, 9, 1 + clamped, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: stream.Attention.apply(*x, layer)[:2], tensors)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_sequences_that_just_fit(tokens: int) -> None:
    """Against attention that is causal: nothing has left before the last query of C + 1 tokens."""
    layer = LAYERS["h2o"]
    q, _, own_k, _, own_v = (x.detach() for x in inputs(layer, tokens, 1, torch.float32))
    out, total, left = stream.Attention.apply(q, own_k[:, None], own_k, own_v, own_v, layer)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    logits = (q[:, 0] @ own_k[:, None].mT).masked_fill(~causal, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ own_v[:, None])
    torch.testing.assert_close(total, logits.logsumexp(-1))
    assert bool((left == tokens).all())


def test_what_must_not_be_read_is_not_read() -> None:
    """Of a token that has left, and keys and values in slots of the last one, which never gets into a slot."""
    layer = LAYERS["sink"]
    tensors = [x.detach() for x in inputs(layer, 12, 1, torch.float32)]
    want = stream.Attention.apply(*tensors, layer)[0]
    q, slot_k, own_k, slot_v, own_v = (x.clone() for x in tensors)
    slot_k[..., -1, :] = slot_v[..., -1, :] = torch.nan
    torch.testing.assert_close(stream.Attention.apply(q, slot_k, own_k, slot_v, own_v, layer)[0], want)
    slot_v[..., 2, :] = torch.nan  # leaves after the query at 5: 4 slots, of which 3 hold the newest
    got = stream.Attention.apply(q, slot_k, own_k, slot_v, own_v, layer)[0]
    assert bool(got[..., 3:6, :].isnan().all())
    torch.testing.assert_close(got[..., 6:, :], want[..., 6:, :])


def test_threads_change_nothing() -> None:
    layer = LAYERS["h2o"]
    tensors = inputs(layer, 40, 1, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, *_ = stream.Attention.apply(*tensors, layer)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_known_rules_are_compiled() -> None:
    class Inherits(H2O):
        name = "inherits"

    class Another(H2O):
        name = "another"

        def keep(self, c: object, heavy: int, recent: int) -> torch.Tensor:
            raise NotImplementedError

    def takes(policy: EvictionPolicy, window: int = 0) -> bool:
        return stream.takes(replace(LAYERS["h2o"], policy=policy, window=window), CPU)

    assert takes(Inherits())
    assert not takes(Another())
    assert not takes(Policy.H2O, window=20)
    assert not stream.takes(LAYERS["h2o"], torch.device("cuda"))
