"""Budgets of single layers: the option, the cost of eviction in each layer, and the division of a budget."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from less_export import export, open_bundle
from less_export.config import ExportConfig
from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import UsageError
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.hf.surgery import discover
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.plan import exact_layer, layer_tokens, plan_layers, sparse_layer
from less_export.progress import Silent
from less_export.runtime.torch import ModelBackend
from less_export.training import allocate, end_to_end
from less_export.training.end_to_end import Comparison, Measured

from .training_support import QUICK, model_folder, sliding_folder, text, trained

__all__ = ["text"]


def plan(*windows: int, **options: Any) -> tuple[LayerSpec, ...]:
    layers = [SimpleNamespace(query_heads=4, kv_heads=2, head_dim=8, scale=0.35, window=w) for w in windows]
    return plan_layers(layers, ExportConfig(**options), 1000, {})  # type: ignore[arg-type]


# ------------------------------------------------------------------ the option


def test_layers_have_the_budget_they_are_given() -> None:
    layer_plan = plan(0, 0, 0, budget="10", layer_budgets="1:20, 2:0.5%")
    assert [(s.heavy, s.recent, s.capacity) for s in layer_plan] == [(5, 5, 10), (10, 10, 20), (2, 2, 4)]
    assert [s.heavy for s in plan(0, 0, policy="sink", budget="10", layer_budgets="1:20")] == [4, 4]
    assert [s.capacity for s in plan(64, 0, budget="10", layer_budgets="0:20", compress_sliding=True)] == [20, 10]


@pytest.mark.parametrize("option", ["", "5", "5:", ":5", "a:5", "1:2:3", "1:2,", "-1:4", "auto"])
def test_bad_lists_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="--layer-budgets"):
        layer_tokens(option, 1000)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer_budgets": "3:8"}, "has 2 layers"),
        ({"layer_budgets": "0:8"}, "layer 0 keeps its window of 64 tokens"),
        ({"layer_budgets": "0:64", "compress_sliding": True}, "layer 0 keeps its window"),
        ({"layer_budgets": "1:8,1:9"}, "layer 1 twice"),
        ({"layer_budgets": "1:2000"}, "more than the context"),
        ({"layer_budgets": "1:8", "heavy": 4}, "drop --heavy"),
        ({"layer_budgets": "1:8", "policy": "full"}, "policy full keeps every token"),
        ({"layer_budgets": "auto"}, "less-export train"),
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan(64, 0, **options)


def test_a_recipes_layer_budgets_divide_its_own_budget_only() -> None:
    recipe = {"policy": "h2o", "budget": "5%", "layer_budgets": "1:20"}
    assert ExportConfig().with_defaults(recipe).layer_budgets == "1:20"
    assert ExportConfig(budget="10%").with_defaults(recipe).layer_budgets is None
    assert ExportConfig(heavy=3).with_defaults(recipe).layer_budgets is None
    assert ExportConfig(policy="full").with_defaults(recipe).layer_budgets is None
    assert ExportConfig(policy="sink").with_defaults(recipe).layer_budgets is None
    assert ExportConfig(num_hidden_layers=1).with_defaults(recipe).layer_budgets is None
    assert ExportConfig(policy="h2o").with_defaults(recipe).layer_budgets == "1:20"
    assert ExportConfig(layer_budgets="0:4").with_defaults(recipe).layer_budgets == "0:4"


@pytest.mark.slow
def test_a_bundle_runs_with_layers_of_different_budgets(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    export(str(folder), tmp_path / "bundle", budget="8", layer_budgets="1:12")
    texts = [
        open_bundle(tmp_path / "bundle", backend=b).generate(["Alice was"], max_new_tokens=30)[0].token_ids
        for b in ("ort", "torch")
    ]
    assert len(texts[0]) == 30
    assert texts[0] == texts[1]


# ------------------------------------------------------------------ slots that kernels state


def stating(folder: Path, **facts: Any) -> Path:
    """Kernels of a model with two layers, and their provenance."""
    heads = [x.heads for x in discover(resolve(str(folder)).load(torch.float32))]
    file = folder.parent / "stating.safetensors"
    Kernels(random_kernels(heads, [0, 1], 2, 8).layers, facts).save(file)
    return file


def slots_of(folder: Path, equal_budgets: bool = False, **options: Any) -> list[int]:
    config = ExportConfig(**{"context": 64, "max_distance": "none"} | options)
    return [s.capacity for s in open_model(resolve(str(folder)), config, equal_budgets=equal_budgets).plan]


STATED: dict[str, Any] = {"policy": "h2o", "slots": {"0": [3, 3], "1": [10, 10]}, "budget": 8}


def test_kernels_come_with_the_slots_they_were_trained_for(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    file = stating(folder, **STATED)
    assert slots_of(folder, kernels=file) == [6, 20]
    assert slots_of(folder, kernels=file, context=128) == [6, 20]
    assert slots_of(folder, kernels=file, policy="h2o", chunk=4) == [6, 20]
    for same in ("8", "12.5%"):
        assert slots_of(folder, kernels=file, budget=same) == [6, 20]
    assert slots_of(folder, kernels=file, layer_budgets="1:12", budget="8") == [8, 12]
    assert slots_of(folder, kernels=file, heavy=4, recent=4) == [8, 8]
    assert slots_of(folder, kernels=file, policy="sink") == [2, 2]
    assert slots_of(folder, kernels=file, equal_budgets=True) == [2, 2]
    with pytest.warns(
        UserWarning, match=r"slots that .*stating\.safetensors states for each layer are not used, because"
    ):
        assert slots_of(folder, kernels=file, budget="10") == [10, 10]
    with pytest.raises(UsageError, match="more than the context of 16"):
        slots_of(folder, kernels=file, context=16)


def test_slots_of_other_kinds_of_layers_are_not_taken(tmp_path: Path) -> None:
    folder = sliding_folder(tmp_path / "model")
    file = stating(folder, **STATED, compress_sliding=True)
    assert slots_of(folder, kernels=file, compress_sliding=True) == [6, 20]
    assert slots_of(folder, kernels=file) == [16, 2]


@pytest.mark.parametrize(
    "slots", [None, 7, [3, 3], {}, {"0": 6}, {"0": ["3", 3]}, {"x": [3, 3]}, {"0": [0, 0]}, {"9" * 5000: [3, 3]}]
)
def test_slots_that_no_training_states_count_as_none(slots: Any, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert slots_of(folder, kernels=stating(folder, policy="h2o", slots=slots)) == [2, 2]


def test_slots_of_a_layer_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UsageError, match=r"names layer 9, but the model has 2 layers"):
        slots_of(folder, kernels=stating(folder, policy="h2o", slots={"9": [2, 2]}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"layer_budgets": "auto"},
        {"layer_budgets": "equal"},
        {"layers": "1", "layer_budgets": "0:12"},
        {"end_to_end": True},
    ],
    ids=str,
)
def test_an_export_takes_the_slots_of_the_training(options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    options = {"tune_steps": 1, "steps": 5} | options
    file, reports = trained(folder, text, **options)
    slots = slots_of(folder, kernels=file)
    assert {r.layer: slots[r.layer] for r in reports} == {r.layer: r.slots for r in reports}
    assert slots == {"equal": [8, 8], "0:12": [12, 8]}.get(options.get("layer_budgets", ""), slots)
    assert slots_of(folder, kernels=file, budget=QUICK["budget"]) == slots


# ------------------------------------------------------------------ cost of eviction


def test_costs_are_those_of_a_streaming_run_in_which_one_layer_evicts(text: Path, tmp_path: Path) -> None:
    source = resolve(str(model_folder(tmp_path / "model")))
    model = source.load(torch.float32)
    layers = discover(model)
    layer_plan = plan_layers(layers, ExportConfig(budget="8"), 48, dict.fromkeys(range(2), 2))
    ids = torch.randint(3, 60, (allocate.SEQUENCES + 1, 48), generator=torch.Generator().manual_seed(1))
    result = allocate.measure(LayerwiseDecoder(model, layer_plan), ids, layer_plan, [0, 1], Silent())
    assert {i: sorted(at) for i, at in result.items()} == {0: [4, 8, 24], 1: [4, 8, 24]}

    def stream(caches: list[LayerSpec]) -> torch.Tensor:
        """Log probabilities past the largest budget, token by token through a backend."""
        backend = ModelBackend(model, Contract(tuple(caches), 300, "float32", 1, len(ids)), Kernels({}, {}))
        backend.open(len(ids))
        steps = [backend.step(ids[:, t : t + 1].numpy(), np.ones(len(ids), np.int32)) for t in range(48)]
        backend.close()
        logits = torch.from_numpy(np.concatenate(steps, 1))[: allocate.SEQUENCES, 25:47]
        return torch.log_softmax(logits.double(), -1)

    exact = [exact_layer(s, 48) for s in layer_plan]
    wanted = stream(exact)
    for layer, slots in itertools.product((0, 1), (4, 8, 24)):
        caches = list(exact)
        caches[layer] = sparse_layer(layer_plan[layer], slots)
        divergence = (wanted.exp() * (wanted - stream(caches))).sum(-1).mean()
        assert result[layer][slots] == pytest.approx(float(divergence), rel=1e-3)
        assert divergence > 1e-4


@pytest.mark.slow
def test_costs_with_kernels_are_those_of_the_layer_with_its_state(tmp_path: Path) -> None:
    model = resolve(str(model_folder(tmp_path / "model"))).load(torch.float32)
    layer_plan = plan_layers(discover(model), ExportConfig(budget="8", slots="model"), 48, {0: 2, 1: 2})
    ids = torch.randint(3, 60, (allocate.SEQUENCES, 48), generator=torch.Generator().manual_seed(1))
    kernels = random_kernels([s.heads for s in layer_plan], [1], 2, 8)
    decoder = LayerwiseDecoder(model, layer_plan)
    result = allocate.measure(decoder, ids, layer_plan, [0, 1], Silent(), maps=kernels.layers)
    without = allocate.measure(decoder, ids, layer_plan, [0, 1], Silent())
    assert result[0] == without[0]
    plan = [exact_layer(layer_plan[0], 48), layer_plan[1]]
    compared = Comparison(decoder, ids, plan, 1, {}, ())
    at = torch.arange(25, 47)
    wanted = sum(float(compared.divergence(row, 48, at, kernels.layers).mean()) for row in range(len(ids))) / len(ids)
    assert result[1][8] == pytest.approx(wanted, rel=1e-4)
    assert result[1][8] != pytest.approx(without[1][8], rel=1e-2)


def test_no_slots_beyond_a_window(tmp_path: Path) -> None:
    model = resolve(str(sliding_folder(tmp_path / "model"))).load(torch.float32)
    config = ExportConfig(budget="10", compress_sliding=True)
    layer_plan = plan_layers(discover(model), config, 48, dict.fromkeys(range(2), 2))
    ids = torch.randint(3, 60, (2, 48), generator=torch.Generator().manual_seed(1))
    result = allocate.measure(LayerwiseDecoder(model, layer_plan), ids, layer_plan, [0, 1], Silent())
    assert {i: sorted(at) for i, at in result.items()} == {0: [4, 10, 14], 1: [4, 10, 24]}


# ------------------------------------------------------------------ division


def spec(capacity: int, head_dim: int = 8) -> LayerSpec:
    return LayerSpec(4, 2, head_dim, 0.35, Policy.H2O, capacity // 2, capacity // 2, 0, True, capacity, 4)


def test_bytes_are_what_is_divided() -> None:
    layer_plan = [spec(16, 8), spec(16, 16)]
    costs = {0: {4: 4.0, 8: 2.0, 32: 0.5}, 1: {4: 4.0, 8: 2.0, 32: 0.5}}
    result = allocate.divide(costs, layer_plan)
    assert result[0] > result[1]  # the same gain for half the bytes
    assert result[0] * 8 + result[1] * 16 <= 16 * (8 + 16) < result[0] * 8 + (result[1] + 2) * 16


def test_training_divides_the_budget_by_default(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    file, reports = trained(folder, text, layer_budgets=None, steps=2)
    facts = Kernels.load(file).provenance
    assert facts["eviction_costs"]
    assert facts["layer_budgets"] == allocate.option({r.layer: r.slots for r in reports})
    file, reports = trained(folder, text, layer_budgets="equal", steps=2)
    assert [r.slots for r in reports] == [8, 8]
    assert Kernels.load(file).provenance["layer_budgets"] == "0:8,1:8"
    file, reports = trained(folder, text, layer_budgets="1:12", steps=2)
    assert [r.slots for r in reports] == [8, 12]
    _, reports = trained(folder, text, layer_budgets=None, layers="1", steps=2)
    assert [r.slots for r in reports] == [8], "there is nothing to divide in one layer"


def test_a_budget_of_most_of_a_sequence_stays_the_layers_own(text: Path, tmp_path: Path) -> None:
    _, reports = trained(model_folder(tmp_path / "model"), text, budget="40", layer_budgets="auto", steps=1)
    assert sum(r.slots for r in reports) == 80


def test_a_cost_that_is_not_finite_is_a_large_one() -> None:
    assert allocate.divide({0: {4: 1.0, 16: 0.5}, 1: {4: 1e6, 16: 1e6}}, [spec(8)] * 2) == {0: 4, 1: 12}


def test_layers_whose_eviction_costs_nothing_keep_equal_shares() -> None:
    assert allocate.divide({i: {2: 0.0, 8: 0.0, 32: 0.0} for i in range(3)}, [spec(8)] * 3) == {0: 8, 1: 8, 2: 8}


def test_one_measurement_that_is_off_decides_nothing() -> None:
    """Costs as measured in three layers of Gemma 3 270M: that layer 11 gains nothing from 22 to 46 slots is noise."""
    costs = {
        5: {22: 0.154, 46: 0.119, 92: 0.081, 186: 0.024},
        11: {22: 0.1335, 46: 0.1334, 92: 0.087, 186: 0.032},
        17: {22: 0.0109, 46: 0.0070, 92: 0.0029, 186: 0.0013},
    }
    slots = allocate.divide(costs, dict.fromkeys(costs, spec(92)))  # type: ignore[arg-type]
    assert sum(slots.values()) == 3 * 92
    assert all(100 < slots[i] < 150 for i in (5, 11))
    assert slots[17] < 40


@pytest.mark.slow
def test_training_divides_the_budget_and_says_how(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    file, reports = trained(folder, text, layer_budgets="auto", steps=5)
    facts = Kernels.load(file).provenance
    slots = {r.layer: r.slots for r in reports}
    assert facts["layer_budgets"] == allocate.option(slots)
    assert sum(slots.values()) == 16
    costs = {int(i): {int(n): x for n, x in at.items()} for i, at in facts["eviction_costs"].items()}
    assert slots == allocate.divide(costs, [spec(8)] * 2)
    assert slots != {0: 8, 1: 8}, "a division that changes nothing tests nothing"
    _, again = trained(folder, text, layer_budgets=facts["layer_budgets"], steps=5)
    assert [(r.slots, r.less) for r in again] == [(r.slots, r.less) for r in reports]


@pytest.mark.slow
def test_the_budget_is_divided_again_by_what_eviction_costs_with_kernels(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that are measured are the fitted ones, and the new slots are those they are tuned with."""
    seen: list[tuple[LayerSpec, ...]] = []
    monkeypatch.setattr(end_to_end, "choose", lambda maps, plan, *_: seen.append(plan) or Measured(1, 2, 2, {}, plan))
    file, reports = trained(
        model_folder(tmp_path / "model"), text, layer_budgets="auto", steps=40, end_to_end=True, tune_steps=1
    )
    facts = Kernels.load(file).provenance
    costs, again = (
        {int(i): {int(n): x for n, x in at.items()} for i, at in facts[name].items()}
        for name in ("eviction_costs", "eviction_costs_with_kernels")
    )
    first = allocate.divide(costs, [spec(8)] * 2)
    second = allocate.divide(again, [spec(n) for n in first.values()])
    assert {i: s.capacity for i, s in enumerate(seen[0])} == second == {r.layer: r.slots for r in reports}
    assert all(again[i][4] < costs[i][4] for i in costs), "a state that does good makes eviction cheaper"


@pytest.mark.parametrize("budget", [2, 3])
def test_no_budget_is_so_small_that_dividing_it_takes_more(budget: int, text: Path, tmp_path: Path) -> None:
    _, reports = trained(model_folder(tmp_path / "model"), text, budget=str(budget), layer_budgets="auto", steps=2)
    assert sum(r.slots for r in reports) <= 2 * budget


def test_what_is_measured_is_not_measured_twice(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from less_export.training import fit

    folder = model_folder(tmp_path / "model")
    measured: list[int] = []
    true = allocate.measure

    def measure(*args: Any, **options: Any) -> Any:
        measured.append(1)
        return true(*args, **options)

    monkeypatch.setattr(allocate, "measure", measure)
    with monkeypatch.context() as broken:
        broken.setattr(fit, "prepare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, layer_budgets="auto", steps=5)
    trained(folder, text, layer_budgets="auto", steps=5)
    assert len(measured) == 1
