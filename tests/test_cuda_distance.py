"""The CUDA kernels with distances inside the operator, on the host, against the oracle and next to the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from less_export.contract import SlotDtype

from . import emulation, test_distance
from .emulation import kernel_layer, normal
from .oracle import scenario
from .test_cuda import CHUNKS, check_accuracy, upwards
from .test_ops import ordinary

__all__ = ["upwards"]  # a fixture that is used here too

#: The layers of test_distance.py that the kernels run: their head_dim is a multiple of 8.
RULES = {n: x for n, x in test_distance.VARIANTS.items() if n != "narrow"}
#: Largest distance of the shapes below; their sequences are longer.
FARTHEST = 40
#: Every dtype with every width of a tile and both kinds of slots, with all channels rotated and with some.
SHAPES: list[tuple[str, str, int, int, int, SlotDtype]] = [
    ("float16", "h2o", 64, 2, 8, "model"),
    ("float16", "tova", 256, 4, 16, "int8"),
    ("float16", "sink", 96, 1, 8, "int8"),
    ("float16", "h2o", 128, 8, 1, "model"),
    ("float16", "h2o", 80, 3, 8, "int8"),
    ("bfloat16", "h2o", 256, 4, 8, "model"),
    ("bfloat16", "tova", 80, 1, 16, "model"),
    ("bfloat16", "full", 128, 2, 1, "int8"),
    ("bfloat16", "h2o", 64, 12, 8, "int8"),
    ("bfloat16", "window", 96, 2, 1, "model"),
    ("float32", "h2o", 128, 4, 8, "int8"),
    ("float32", "tova", 256, 2, 8, "model"),
    ("float32", "window", 96, 1, 1, "int8"),
    ("float32", "sink", 40, 3, 9, "model"),
    ("float32", "h2o", 64, 2, 9, "model"),
]


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name: str, decode: bool) -> None:
    """Policies, windows, the clamp; ragged, parked and reset rows; empty, partial and full caches; NaN poison."""
    check_accuracy(RULES[name], ordinary(RULES[name], decode))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "policy", "head_dim", "group", "rank", "slots"), SHAPES)
def test_shapes(dtype: str, policy: str, head_dim: int, group: int, rank: int, slots: SlotDtype) -> None:
    """Prefill past the budget and decode, with the slots of a head in one block and split over several."""
    layer = kernel_layer(policy, 150 if policy == "full" else 100, head_dim, group, rank, kv_heads=1)
    layer = replace(layer, slot_dtype=slots, max_distance=FARTHEST)
    steps = scenario(layer, CHUNKS, 3, normal(dtype))
    for blocks in (512, 1):
        emulation.set_blocks(blocks)
        check_accuracy(layer, steps, dtype)
