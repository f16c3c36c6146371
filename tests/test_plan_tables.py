"""The bytes of the tables that plan a service: the shapes of the models, and what the plugin's kernels move."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from less_export.hf.recipes import Recipe, all_recipes

ROOT = Path(__file__).parents[1]
RECIPES = {r.name: r for r in all_recipes()}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("plan_tables")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_weights_are_those_of_the_model(recipe: Recipe, tables: ModuleType) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe.facts()))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = {p for p in model.parameters() if p.dim() == 2} - {embedding} | {head}
    assert tables.weight_bytes(recipe) == 2 * sum(p.numel() for p in matrices)
    assert sum(p.numel() for p in model.parameters() if p.dim() < 2) < 1e-3 * sum(p.numel() for p in matrices)


@pytest.mark.parametrize("slots", ["model", "int8"])
@pytest.mark.parametrize("name", ["llama3.1-8b", "gemma3-270m"])
def test_state_traffic_is_that_of_the_kernels(name: str, slots: str, tables: ModuleType) -> None:
    """Less what the kernels read and write besides the state, and with the position of the new token."""
    decode_bytes = importlib.import_module("gpu_kernels").decode_bytes
    contract = RECIPES[name].contract().with_slots(slots)
    want = 0
    for layer in contract.layers:
        if layer.absorb:
            activations = 2 * (2 * layer.head_dim + layer.rank + layer.group * 2 * layer.head_dim)
            activations += layer.group * 4 * layer.rank
            want += decode_bytes(layer, contract.dtype, 1) - layer.kv_heads * (activations - 4)
        else:  # key, value and position of all slots and of the new one
            width = layer.head_dim + 4 if slots == "int8" else 2 * layer.head_dim
            scores = 8 * layer.capacity * (layer.policy.scoring != "none")
            want += layer.kv_heads * ((layer.capacity + 1) * (2 * width + 4) + scores)
    assert tables.state_traffic(contract) == want
    assert tables.state_traffic(contract) < 2 * contract.state_bytes()


def test_bounds_by_hand(tables: ModuleType) -> None:
    """A GPU of 2 GB and 10 GB/s: 1 GB of weights leaves room for 10 rows of 100 MB, a step moves 1.5 GB."""
    steps = 10 / 1.5
    assert tables._bound(10**9, 50 * 10**6, 100 * 10**6, 2, 10) == f"{10 * steps / tables.ANSWER:,.2f} (10)"
    assert tables._bound(10**9, 1, 10**9 + 1, 2, 10) == "does not fit"
    assert tables._bound(10**9, 1, 1, 2, 10).endswith("(64)")


def test_tables_agree(tables: ModuleType) -> None:
    """A token takes the share of the weights and its cache, as the row says."""
    header, rows = tables.traffic()
    assert header[2:5] == ["weights / rows", "state", "LESS"]
    for row in rows:
        shared, state, total = (float(cell.replace(",", "")) for cell in row[2:5])
        assert math.isclose(shared + state, total, abs_tol=0.11), row
