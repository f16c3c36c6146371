"""What int8 slots save: bytes by hand, by the contract, as backends allocate them, and as commands show them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from less_export.bundle.artifact import MANIFEST, KernelFacts, Manifest
from less_export.cli.recipes import recipe_figures
from less_export.cli.tables import size
from less_export.contract import MAX_TENSOR_BYTES, SLOT_DTYPES, Contract, LayerSpec, Policy, SlotDtype, StateBits
from less_export.dtypes import COMPUTE_DTYPES, item_bytes
from less_export.errors import BundleError
from less_export.hf import recipes
from less_export.less.feature_maps import random_kernels
from less_export.runtime.backend import empty
from less_export.runtime.ort import OrtBackend
from less_export.runtime.torch import ModelBackend

from . import bundles
from .bundles import Run
from .test_format1 import BUNDLE
from .tiny_decoder import INT8, onnx_decoder

pytest_plugins = ["tests.bundles"]

SLOT_FIELDS = {"key", "value", "key_scale", "value_scale"}


def slot_bytes(contract: Contract) -> int:
    """Bytes of the keys and values of one sequence, with their scales."""
    return sum(s.row_bytes for s in contract.state() if s.field.name in SLOT_FIELDS)


def contract_of(head_dim: int, dtype: str = "float16", slots: SlotDtype = "int8") -> Contract:
    h2o = LayerSpec(8, 2, head_dim, 0.25, Policy.H2O, 3, 4, 0, True, 7, 5, slot_dtype=slots)
    full = LayerSpec(8, 1, head_dim, 0.25, Policy.FULL, 0, 100, 0, False, 100, 1, slot_dtype=slots)
    return Contract((h2o, full), 50, dtype, 4, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_int8_slots_take_about_half(head_dim: int, dtype: str) -> None:
    int8, model = (slot_bytes(contract_of(head_dim, dtype, s)) for s in ("int8", "model"))
    assert model == 2 * 2 * head_dim * (2 * 7 + 100)
    assert int8 == 2 * (head_dim + 4) * (2 * 7 + 100)
    assert int8 <= 0.54 * model


@pytest.mark.parametrize("name", recipes.names())
def test_int8_slots_of_every_recipe(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe is not None
    contract = recipe.contract()
    assert min(s.head_dim for s in contract.layers) >= 64
    assert slot_bytes(contract.with_slots("int8")) <= 0.54 * slot_bytes(contract.with_slots("model"))
    figures = recipe_figures(recipe)["memory"]["state_bytes_by_slots"]
    assert figures == {s: contract.with_slots(s).state_bytes() for s in SLOT_DTYPES}
    saved = slot_bytes(contract.with_slots("model")) - slot_bytes(contract.with_slots("int8"))
    assert figures["model"] - contract.with_state(32).state_bytes() == saved > 0
    assert low_rank_bytes(contract) <= 0.52 * low_rank_bytes(contract.with_state(32))


def low_rank_bytes(contract: Contract) -> int:
    """Bytes of psi, h, z and the scales of h, in layers that absorb."""
    absorbing = (s for s in contract.state() if contract.layers[s.layer].absorb)
    return sum(s.row_bytes for s in absorbing if s.field.name in ("psi", "h", "z", "h_scale"))


def test_slots_are_all_that_differs() -> None:
    model, int8 = contract_of(16, slots="model"), contract_of(16)
    assert model.with_slots("int8") == int8
    assert int8.with_slots("model") == model
    assert Contract.from_dict(json.loads(json.dumps(int8.to_dict()))) == int8
    names = [s.past.name for s in int8.state()]
    assert [n for n in names if not n.endswith("_scale")] == [s.past.name for s in model.state()]
    assert int8.full_cache_bytes(99) == model.full_cache_bytes(99)  # an ordinary cache is in the compute dtype


def test_a_contract_of_an_earlier_version_has_slots_in_the_compute_dtype() -> None:
    data = contract_of(16, slots="model").to_dict()
    for layer in data["layers"]:
        del layer["slot_dtype"]
    assert Contract.from_dict(data) == contract_of(16, slots="model")


def test_the_bound_of_manifests_covers_every_state() -> None:
    """What is accepted takes fewer bytes than 2^60, by the rule that both runtimes share."""
    for capacity, head_dim, rank in ((1, 1, 1), (1, 1, 64), (1, 256, 1), (4096, 1, 1), (100, 64, 8)):
        for dtype in COMPUTE_DTYPES:
            for slots in SLOT_DTYPES:
                layer = LayerSpec(1, 1, head_dim, 1.0, Policy.SINK, 0, capacity, 0, True, capacity, rank)
                contract = Contract((layer,), 1, dtype, 1, 1).with_slots(slots)
                bound = 16 * (capacity + rank) * (head_dim + rank + 1)
                assert contract.state_bytes() <= bound
                rows = MAX_TENSOR_BYTES // (8 + bound)
                many = {**contract.to_dict(), "max_batch": rows}
                assert Contract.from_dict(many).max_batch == rows
                with pytest.raises(BundleError, match="too large"):
                    Contract.from_dict({**many, "max_batch": rows + 1})


# ------------------------------------------------------------------ what backends allocate


def test_empty_rows_have_the_bytes_that_are_stated() -> None:
    contract = contract_of(16, "bfloat16")
    tensors = [empty(s, 3) for s in contract.state()]
    assert sum(x.nbytes for x in tensors) == 3 * contract.state_bytes()
    for s, x in zip(contract.state(), tensors, strict=True):
        assert x.dtype.itemsize == item_bytes(s.dtype)
        assert (x == s.field.empty).all()


@pytest.mark.parametrize(("slots", "state"), [("model", 32), ("int8", 32), ("int8", 16)])
def test_the_torch_backend_allocates_them(slots: SlotDtype, state: StateBits) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    h2o = LayerSpec(4, 2, 8, 8**-0.5, Policy.H2O, 3, 4, 0, True, 7, 3)
    full = LayerSpec(4, 2, 8, 8**-0.5, Policy.FULL, 0, 20, 0, False, 20, 1)
    contract = Contract((h2o, full), 50, "float32", 4, 3).with_slots(slots).with_state(state)
    backend = ModelBackend(model, contract, random_kernels([h2o.heads, full.heads], [0], h2o.rank, 6))
    backend.open(3)
    for _ in range(3):
        assert sum(x.nbytes for x in backend._state) == 3 * contract.state_bytes()
        backend.step(np.arange(12).reshape(3, 4))
    row = backend.read_row(1)
    assert sum(x.nbytes for x in row.tensors.values()) == contract.state_bytes()
    assert {row.tensors[f"past.{i}.key"].dtype for i in (0, 1)} == {np.dtype("int8" if slots == "int8" else "float32")}
    row.check(contract)


def test_onnx_runtime_allocates_them(tmp_path: Path) -> None:
    backend = OrtBackend(INT8, onnx_decoder(INT8, tmp_path / "model.onnx"), threads=1)
    backend.open(2)
    backend.step([[1, 2, 3], [4, 5, 6]])
    for values in backend._values:  # two sets, which swap roles
        assert sum(x.numpy().nbytes for x in values.values()) == 2 * INT8.state_bytes()
    row = backend.read_row(0)
    backend.write_row(1, row)
    assert backend.read_row(1).tensors["past.0.key"].tobytes() == row.tensors["past.0.key"].tobytes()


# ------------------------------------------------------------------ what commands show


def with_slots(out: Path, slots: SlotDtype, **changes: Any) -> Contract:
    """A bundle whose manifest states such slots; returns the contract of its first artifact."""
    bundles.copy(BUNDLE, out)

    def change(manifest: Manifest) -> Manifest:
        artifacts = (dataclasses.replace(a, contract=a.contract.with_slots(slots)) for a in manifest.artifacts)
        return dataclasses.replace(manifest, artifacts=tuple(artifacts), **changes)

    bundles.resign(out, change)
    return Manifest.parse((out / MANIFEST).read_bytes(), "manifest").artifacts[0].contract


def test_info_shows_both(run: Run, tmp_path: Path) -> None:
    for slots, cell, other in (("model", " 12 ", "int8"), ("int8", " 12 int8 ", "float32")):
        contract = with_slots(tmp_path / slots, slots)
        out = run("info", tmp_path / slots).out
        layers = [line for line in out.splitlines() if line.split()[:2] == ["0-1", "h2o"]]
        assert [cell in line for line in layers] == [True] * 2  # of either graph
        state, changed = (contract.with_slots(s).state_bytes() for s in (slots, "model" if slots == "int8" else "int8"))
        rows = {line.strip().split("  ")[0]: line.split("  ") for line in out.splitlines()}
        assert size(state) in [c.strip() for c in rows["LESS state, any length"]]
        shown = [c.strip() for c in rows[f"the same with slots in {other}"]]
        assert size(changed) in shown
        assert f"{changed / state:.1f}x" in shown


def test_kernels_without_maps_are_no_low_rank_term(run: Run, tmp_path: Path) -> None:
    """Their file holds the centring of keys alone."""
    with_slots(tmp_path / "bundle", "int8", kernels=KernelFacts("", "", 64, None, 0, 0, ()))
    out = run("info", tmp_path / "bundle").out
    assert "none (low-rank term off)" in out
