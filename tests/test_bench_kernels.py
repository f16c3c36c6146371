"""The caches that ``benchmarks/bench_kernels.py`` compares take the same bytes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from less_export.contract import LayerSpec, Policy
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.less.memory import layer_bytes

LAYER = LayerSpec(9, 3, 64, 0.125, Policy.H2O, 25, 25, 0, True, 50, 4, 128, "int8", 7936, 16)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("bench_kernels")


def size(layer: LayerSpec, slots: int | None = None) -> int:
    return layer_bytes(layer, "bfloat16", layer.capacity if slots is None else slots)


def test_caches_of_a_layer_take_the_bytes_of_its_16_bit_slots(bench: ModuleType) -> None:
    caches = bench.caches(LAYER, 50, None)
    room = size(caches["16-bit"])
    assert {n: (c.slot_dtype, c.absorb) for n, c in caches.items()} == {
        "16-bit": ("model", False), "sparse": ("int8", False), "divided": ("int8", False), "less": ("int8", True),
        "fewer": ("int8", False),
    }  # fmt: skip
    for kind in ("sparse", "less"):
        assert size(caches[kind]) <= room < size(caches[kind], caches[kind].capacity + 1)
    assert caches["less"].capacity == caches["fewer"].capacity < caches["sparse"].capacity
    assert caches["divided"] == caches["sparse"]


@pytest.mark.parametrize("used", [True, False])
def test_a_layer_with_slots_of_its_own(used: bool, bench: ModuleType) -> None:
    """Slots have the bytes of LESS in that layer, whether its state is used or became slots."""
    caches = bench.caches(LAYER, 50, 120, used)
    less = replace(LAYER, heavy=60, recent=60, capacity=120)
    assert size(caches["divided"]) <= size(less) < size(caches["divided"], caches["divided"].capacity + 1)
    assert caches["less"] == (less if used else caches["divided"])
    assert caches["fewer"].capacity == (120 if used else caches["divided"].capacity)
    assert caches["sparse"] == bench.caches(LAYER, 50, None)["sparse"]


def test_slots_that_a_layer_was_trained_with(bench: ModuleType) -> None:
    stated = {"0": [40, 40], "1": [44, 43]}
    kernels = Kernels(random_kernels([LAYER.heads] * 2, [0], 4, 8).layers, {"slots": stated})
    assert bench.slots_of(kernels, 0, LAYER) == 80
    for before in (20, 81, 400):
        instead = bench.slots_instead(bench.resized(LAYER, before))
        kernels.provenance["slots"]["1"] = [instead.heavy, instead.recent]
        assert bench.slots_of(kernels, 1, LAYER) == before
