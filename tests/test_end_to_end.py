"""Tuning all kernels together: its gradients, what it keeps, which layers get slots instead."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from less_export.contract import LayerSpec
from less_export.hf import rotary as probes
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.rotary import arranged
from less_export.hf.surgery import AttentionCall, less_attention
from less_export.hf.weights import bare_model
from less_export.less import int8, operators
from less_export.less.feature_maps import FeatureMap, Kernels
from less_export.less.memory import extra_tokens
from less_export.plan import exact_layer
from less_export.progress import Silent
from less_export.testing import empty_state
from less_export.training import end_to_end, initialisation

from . import bundles
from .marks import slow_but
from .test_training_runtime import loaded
from .training_support import LENGTH, model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]

TUNED: dict[str, Any] = {"steps": 20, "end_to_end": True, "tune_steps": 12}


def maps_of(plan: tuple[LayerSpec, ...], layers: tuple[int, ...]) -> dict[int, FeatureMap]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(plan[0].kv_heads, 100, plan[0].head_dim, generator=generator)
    return {i: initialisation.new_map("exp", plan[i], 3, 6, keys, generator) for i in layers}


def by_the_operator(
    model: Any, plan: tuple[LayerSpec, ...], maps: dict[int, FeatureMap], ids: Tensor, at: Tensor, tables: Any
) -> Tensor:
    """The divergence, with attention from the operator's reference token by token."""

    def stream(call: AttentionCall) -> Tensor:
        call, angles = arranged(call, tables)
        spec, feature_map = plan[call.layer], maps.get(call.layer)
        spec = replace(spec, rank=3 if feature_map else 1, absorb=feature_map is not None)
        none = torch.zeros_like(call.q[..., :1]), torch.zeros_like(call.k[..., :1])
        log_phi, psi = none if feature_map is None else (feature_map.log_phi(call.q), feature_map.psi(call.k))
        state, outs = empty_state(spec, 1), []
        for t in range(call.q.shape[2]):
            piece = [x[:, :, t : t + 1] for x in (call.q, call.k, call.v, log_phi, psi)]
            lengths = torch.tensor([t], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
            out, *state = operators.run(spec, piece, state, lengths, None, angles, opaque=False)
            outs.append(out)
        return torch.cat(outs, 2)

    steps = torch.arange(len(ids))[None]
    with torch.no_grad():
        want = torch.log_softmax(model(input_ids=ids[None], position_ids=steps, use_cache=False).logits[0, at], -1)
    with less_attention(model, stream):
        positions = steps if not tables else torch.zeros_like(steps)
        got = torch.log_softmax(model(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0, at], -1)
    return (want.exp() * (want - got)).sum(-1)


@pytest.mark.parametrize("trained_layers", [(0, 1), (1,)])
@pytest.mark.parametrize("distance", slow_but([None, 15], None))
def test_gradients_are_those_of_the_operator(
    distance: int | None, trained_layers: tuple[int, ...], tmp_path: Path
) -> None:
    """From predictions through two evicting layers to every parameter, also where the first layer's result is kept."""
    model, plan = loaded(model_folder(tmp_path / "model"), {})
    plan = tuple(replace(s, max_distance=distance, slot_dtype="model") for s in plan)
    tables = () if distance is None else probes.tables(probes.probe(bare_model(model.config, torch.float32)), 40)
    model.requires_grad_(False)
    maps = maps_of(plan, trained_layers)
    ids, at = torch.arange(30) * 7 % 300, torch.arange(12, 29)
    comparison = end_to_end.Comparison(
        LayerwiseDecoder(model, plan), torch.cat([ids, ids[:4]])[None], plan, min(trained_layers), {}, tables
    )
    parameters = [p for m in maps.values() for p in m.requires_grad_().parameters()]
    found = []
    for divergence in (comparison.divergence(0, 30, at, maps), by_the_operator(model, plan, maps, ids, at, tables)):
        gradients = torch.autograd.grad(divergence.mean(), parameters)
        found.append((divergence.detach(), torch.cat([g.flatten() for g in gradients])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    assert float(found[1][1].norm()) > 0
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-3


def test_divergences_do_not_depend_on_what_is_kept(tmp_path: Path) -> None:
    """A second sequence, a prefix, other caches, and int8 slots."""
    model, plan = loaded(model_folder(tmp_path / "model"), {})
    plan = tuple(replace(s, slot_dtype="int8") for s in plan)
    centring = {i: int8.Centring.none(s.kv_heads, s.head_dim) for i, s in enumerate(plan)}
    maps, decoder = maps_of(plan, (1,)), LayerwiseDecoder(model, plan)
    ids, at = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1)), torch.arange(12, 24)
    whole, prefix = (end_to_end.Comparison(decoder, x, plan, 1, centring, ()) for x in (ids, ids[:, :25]))
    with torch.no_grad():
        a, b = whole.divergence(1, 25, at, maps), prefix.divergence(1, 25, at, maps)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert float(a.mean()) > 0
        nothing = [exact_layer(s, 40) for s in plan]
        from_start = end_to_end.Comparison(decoder, ids, plan, 0, centring, ())
        assert float(from_start.divergence(1, 25, at, {}, nothing).abs().max()) < 1e-5


def test_the_best_state_is_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that do harm are undone; the kernels are those that the layers were fitted to."""
    folder = model_folder(tmp_path / "model")
    true, counter = end_to_end.Comparison.divergence, itertools.count(1)

    def worse_every_time(*args: Any) -> Tensor:
        """Where it is measured."""
        return true(*args) if torch.is_grad_enabled() else torch.tensor([float(next(counter))])

    monkeypatch.setattr(end_to_end.Comparison, "divergence", worse_every_time)
    before = Kernels.load(trained(folder, text, **TUNED | {"tune_steps": 0})[0]).tensors()
    after = Kernels.load(trained(folder, text, **TUNED)[0])
    assert after.tensors().keys() == before.keys() != set()
    assert all(torch.equal(x, before[n]) for n, x in after.tensors().items())


def test_a_loss_that_is_not_finite_ends_tuning(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, steps = end_to_end.Comparison.divergence, itertools.count()  # the first is that of the memory

    def divergence(*args: Any) -> Tensor:
        return true(*args) * (float("nan") if torch.is_grad_enabled() and next(steps) == 3 else 1)

    monkeypatch.setattr(end_to_end.Comparison, "divergence", divergence)
    with pytest.warns(UserWarning, match="the loss is not finite at step 3: tuning ends"):
        file, _ = trained(model_folder(tmp_path / "model"), text, **TUNED)
    kernels = Kernels.load(file)
    assert kernels.provenance["end_to_end"]["steps"] == 2
    assert all(bool(x.isfinite().all()) for x in kernels.tensors().values())


@pytest.mark.slow
def test_tuning_helps(text: Path, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = bundles.checkpoint(tmp_path / "model", initializer_range=0.2, **heads)  # a milder model: tuning can help
    file, reports = trained(folder, text, **TUNED | {"tune_steps": 40})
    facts = Kernels.load(file).provenance["end_to_end"]
    assert 0 < facts["divergence_tuned"] < facts["divergence_before"]
    assert facts["divergence_after"] <= facts["divergence_tuned"] < facts["divergence_sparse_bytes"]
    assert facts["lengths"] == [LENGTH // 2, LENGTH // 2, LENGTH, LENGTH // 2, LENGTH // 2, 2 * LENGTH]
    assert {r.layer: r.gain for r in reports} == {int(i): x for i, x in facts["gains"].items()}
    assert all(r.used for r in reports if r.gain > 0)


def test_a_run_resumes_where_it_was_interrupted(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(end_to_end, "Tuning", functools.partial(end_to_end.Tuning, save=4, spread=8))
    whole = Kernels.load(trained(folder, text, **TUNED)[0]).tensors()
    true, steps = end_to_end.Comparison.divergence, []

    def divergence(self: Any, row: int, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            steps.append(row)
            if len(steps) == 7:
                raise KeyboardInterrupt
        return true(self, row, *args)

    monkeypatch.setattr(end_to_end.Comparison, "divergence", divergence)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, text, **TUNED)
    again = Kernels.load(trained(folder, text, **TUNED)[0]).tensors()
    assert len(steps) == 7 + 8  # the second run goes on after 4 steps
    assert all(torch.equal(x, whole[n]) for n, x in again.items())


@pytest.mark.parametrize("everything", [1.0, 0.5])
def test_bytes_that_are_worth_more_in_slots_become_slots(everything: float, tmp_path: Path) -> None:
    """The worst layer first, and only while the others do not need it; all, if slots alone are better."""
    _, plan = loaded(model_folder(tmp_path / "model"), {})
    plan = (plan[0],) * 3
    more = end_to_end.slots_instead(plan[0])
    assert more.capacity == plan[0].capacity + extra_tokens(plan[0], "bfloat16") > plan[0].capacity
    #: Divergence by the layers that have kernels, if the bytes of the others are slots: without layer 0, layer 2 helps.
    costs = {(0, 1, 2): 1.0, (1, 2): 0.7, (0, 2): 1.5, (0, 1): 0.9, (1,): 0.8, (): everything}

    def measure(maps: Any, caches: Any, rows: int) -> float:
        instead = [s == more for s in caches]
        if not maps and not any(instead):
            return 2.0
        assert instead == [i not in maps for i in range(3)]
        return costs[tuple(maps)]

    tuned: dict[int, Any] = dict.fromkeys(range(3))
    measured = end_to_end.choose(tuned, plan, measure, 6, Silent())
    left = [] if everything < 0.7 else [1, 2]
    assert sorted(tuned) == left
    assert measured.plan == tuple(plan[i] if i in left else more for i in range(3))
    assert measured.gains == pytest.approx({0: -0.3, 1: 0.5, 2: -0.1})
    assert (measured.less, measured.sparse, measured.sparse_bytes) == (min(0.7, everything), 2.0, everything)
