"""Test of the tests: kernels with one fault must fail the comparison with the oracle.

A small build (float16, for some faults float32; head_dim up to 64) is compiled for each fault. Barriers and waits are
removed one at a time, all of them; a fault that nothing here can see stands in SURVIVORS with the reason, and the test
fails as well when such a fault begins to be caught, so that the list stays true. Ordinary runs take every twelfth
fault; the others run with ``-m exhaustive``, as they should when the kernels change.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export.contract import LayerSpec, SlotDtype, StateBits

from . import emulation
from .cuda_faults import (
    DISTANCE_FAULTS,
    FAULTS,
    FLOAT32,
    FLOAT32_FAULTS,
    INT8_FAULTS,
    MERGE_FAULTS,
    SHORT,
    SHORT_FAULTS,
    STATE16_FAULTS,
    Fault,
    row_faults,
    waits,
)
from .emulation import ORDERS, PLUGIN, emulated, fails, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import Arrays
from .scenarios import OneHot, Step, follow, scenario
from .test_cuda import allowed, compare_on_scattered_states
from .test_cuda_distance import LARGE, large_elements
from .test_cuda_row_indices import KINDS, check_scattered
from .test_cuda_row_indices import layer_of as layer_by_index
from .test_cuda_rows import check_many_slots, check_rows
from .test_int8 import far
from .test_ops import DECODE, MIXED, empty, tied, torch_run

pytestmark = pytest.mark.slow


#: Faults that cannot be detected here, and why.
SURVIVORS: dict[str, str] = {
    "prefill: padding is a key": "padding comes after every token of its row, so that causality hides it",
}


def _halves(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Tokens whose scores tie, in float16."""
    drawn = OneHot(layer.recent, 0.5 if layer.policy.name == "tova" else 0.0)(rng, layer, positions)
    return {n: x if n == "log_phi_q" else emulation.rounded("float16")(x) for n, x in drawn.items()}


@dataclass(frozen=True)
class Case:
    """A layer, its steps, how decode is cut, fresh rows, and the errors of the torch reference."""

    layer: LayerSpec
    steps: list[Step]
    blocks: int
    fresh: list[np.ndarray]
    reference: dict[str, float]


def case(layer: LayerSpec, steps: list[Step], blocks: int = 512, dtype: torch.dtype = torch.float16) -> Case:
    fresh = empty(layer, dtype, len(steps[0].inputs["new_length"]))
    return Case(layer, steps, blocks, fresh, follow(torch_run(layer, dtype=dtype), steps, fresh))


@functools.cache
def racing() -> list[Case]:
    """Cases that reach every barrier; run in all thread orders."""
    chunks = [(70, 9), *[(1, 1)] * 6, (20, 66), *[(1, 1)] * 3]
    layers = [kernel_layer("h2o", 90, 40, group, 9, kv_heads=1) for group in (2, 3)]
    sliding = replace(kernel_layer("h2o", 12, 16, 2, 8, kv_heads=1), window=20)
    crowd = scenario(sliding, [(30, 9), (1, 1), (17, 25), (1, 1)], 2, normal("float16"))
    long = kernel_layer("h2o", 24, 16, 1, 8, kv_heads=1)  # enough tiles of queries to reuse a buffer
    turning = replace(long, max_distance=30)
    crowded = kernel_layer("h2o", 40, 16, 17, 8, kv_heads=1)  # two tiles of heads
    return [
        *(case(la, scenario(la, chunks, 6, normal("float16")), blocks) for la in layers for blocks in (512, 1)),
        case(sliding, crowd),
        case(long, scenario(long, [(200, 9), (1, 1)], 6, normal("float16"))),
        case(turning, scenario(turning, [(100, 9), (1, 1)], 6, normal("float16"))),
        case(crowded, scenario(crowded, [(30, 9), (1, 1)], 6, normal("float16"))),
    ]


@functools.cache
def cases() -> list[Case]:
    """Cases that reach every rule."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    layers = [kernel_layer(p, 70, 40, 2, 8, kv_heads=1) for p in ("tova", "sink", "window")]
    layers.append(replace(kernel_layer("h2o", 70, 40, 2, 8, kv_heads=1), score_half_life=20))
    narrow = kernel_layer("window", 20, 40, 2, 1, kv_heads=1)
    ties = [tied(kernel_layer(p, 7, 64, 2, 8)) for p in ("h2o", "tova")]
    loud, heavy = normal("float16", logit=80, log_phi=(-60, 60)), normal("float16", log_phi=(-60, 120))
    return [
        *racing(),
        *(case(la, scenario(la, chunks, 6, normal("float16"))) for la in layers),
        case(narrow, scenario(narrow, [(150, 70), (1, 1), (100, 131)], 6, normal("float16"))),
        *(case(la, scenario(la, [*MIXED, *DECODE], 0, _halves)) for la in ties),
        case(layers[1], scenario(layers[1], chunks, 1, loud), blocks=1),
        case(layers[1], scenario(layers[1], chunks, 1, heavy)),
    ]


def _between_codes(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Tokens as in float16, with values of scale 1 between two codes and a zero token now and then."""
    drawn = far(rng, layer, positions)
    drawn["v"] = (rng.integers(-30, 30, drawn["v"].shape) + 0.5).astype(np.float32)
    drawn["v"][..., 5] = 127
    drawn["v"][:, :, ::5] = 0
    return {n: x if n == "log_phi_q" else emulation.rounded("float16")(x) for n, x in drawn.items()}


@functools.cache
def int8_cases() -> list[Case]:
    """Cases that reach every rule of int8 slots."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    h2o, sink = (replace(kernel_layer(p, 70, 40, 2, 9, kv_heads=1), slot_dtype="int8") for p in ("h2o", "sink"))
    return [
        *(case(h2o, scenario(h2o, chunks, 6, normal("float16")), blocks) for blocks in (512, 1)),
        case(sink, scenario(sink, chunks, 6, _between_codes)),
    ]


@functools.cache
def distance_cases() -> list[Case]:
    """Cases that reach every rule of distances: all channels rotated and some, slots of both kinds, large elements."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    layers = [
        replace(kernel_layer(p, 70, d, 2, 9, kv_heads=1), max_distance=30) for p, d in (("h2o", 64), ("tova", 40))
    ]
    layers.append(replace(layers[0], slot_dtype="int8"))
    return [
        *(case(la, scenario(la, chunks, 6, normal("float16")), blocks) for la in layers for blocks in (512, 1)),
        case(LARGE, scenario(LARGE, [(30,), (1,)], 0, large_elements)),
    ]


@functools.cache
def state16_cases() -> list[Case]:
    """Cases that reach every rule of a state of 16 bits. Scales of features without mass are NaN."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), *[(1, 1)] * 3]
    h2o, sink = (
        replace(kernel_layer(p, 70, 40, 2, 9, kv_heads=1), slot_dtype="int8", state_bits=16) for p in ("h2o", "sink")
    )
    made = [
        *(case(h2o, scenario(h2o, chunks, 6, normal("float16")), blocks) for blocks in (512, 1)),
        case(sink, scenario(sink, chunks, 6, normal("float16"))),
    ]
    for c in made:
        c.fresh[-1][:] = np.nan
    return made


@functools.cache
def short_cases() -> list[Case]:
    """Cases that reach every rule of short chunks: full slots and more, padding, and queries of three warps."""
    chunks = [(50, 9), (1, 1), (1, 0), (20, 63), (1, 1)]
    h2o, tova, sink = (kernel_layer(p, 40, 40, 2, 9, kv_heads=1) for p in ("h2o", "tova", "sink"))
    layers = [
        replace(h2o, score_half_life=20),
        replace(h2o, max_distance=30, slot_dtype="int8"),
        tova,
        replace(sink, max_distance=30, slot_dtype="int8", state_bits=16),
    ]
    return [case(la, scenario(la, chunks, 6, normal("float16"))) for la in layers]


@functools.cache
def float32_cases() -> list[Case]:
    """Cases that reach every rule of the decode kernel of float32 models."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    h2o, in_eights = (kernel_layer("h2o", n, d, 3, 9, kv_heads=1) for n, d in ((150, 40), (70, 64)))
    layers = [
        h2o,
        replace(h2o, slot_dtype="int8"),
        replace(h2o, max_distance=30),  # partners that are no whole vector
        *(replace(in_eights, max_distance=30, slot_dtype=s) for s in ("model", "int8")),
    ]
    layers.append(kernel_layer("sink", 20, 64, 9, 4, kv_heads=1))  # one split, two tiles of heads
    return [
        case(la, scenario(la, chunks, 6, normal("float32")), blocks, torch.float32)
        for la in layers
        for blocks in (512, 1)
    ]


@functools.cache
def merge_cases() -> list[Case]:
    """Decode with four splits, in a block each and in one."""
    layer = kernel_layer("h2o", 200, 40, 3, 1, kv_heads=1)
    steps = scenario(layer, [(150, 200), *[(1, 1)] * 3], 6, normal("float16"))
    return [case(layer, steps, blocks) for blocks in (512, 1)]


def row_cases() -> list[Case]:
    """None: rows by index are compared with rows in order."""
    return []


#: The cases of a kind of faults, and what their slots and their state hold.
CASES = {
    "rules": cases,
    "merge": merge_cases,
    "int8": int8_cases,
    "distance": distance_cases,
    "state16": state16_cases,
    "rows": row_cases,
    "short": short_cases,
    "float32": float32_cases,
}
HOLDS: dict[str, tuple[SlotDtype, StateBits]] = {"int8": ("int8", 32), "state16": ("int8", 16)}
#: Thread orders in which faults of the merge are looked for.
MERGE_ORDERS = (0, 3, 6)


def check(path: Path, orders: Sequence[int], kind: str) -> None:
    """Compare a library with the oracle, in every case once and in the racing cases in all thread orders."""
    dtype = "float32" if kind == "float32" else "float16"
    for order in orders:
        emulation.set_order(order, path)
        for c in racing() if kind == "rules" and order != orders[0] else CASES[kind]():
            emulation.set_blocks(c.blocks, path)
            limits = allowed(c.layer, c.reference)
            for name, error in follow(emulated(c.layer, dtype, path=path), c.steps, c.fresh).items():
                assert error <= limits[name]
        if kind == "merge":
            layer = kernel_layer("h2o", 256, 40, 3, 1, kv_heads=1)
            check_rows(layer, "float16", (1, 2, 5), path, cancelling=True)
        elif kind == "rules" and order == orders[0]:
            check_many_slots("float16", path)
        if kind == "rows":
            for policy, _, options in KINDS:
                check_scattered(layer_by_index(policy, 2, options, kv_heads=1), "float16", path)
        elif kind != "merge":
            compare_on_scattered_states(dtype, path, *HOLDS.get(kind, ("model", 32)))


def flags(kind: str) -> tuple[str, str]:
    """Flags of a small build."""
    return f"-DLESS_TRIAL={'float' if kind == 'float32' else '__half'}", "-O1"


def sound(kind: str = "rules") -> Path:
    """The unchanged kernels."""
    return emulation.cached_build("libless_sound.so", *flags(kind))


def includes(source: Path) -> set[str]:
    """Names of the files that a source includes, directly or not."""
    direct = set(re.findall(r'#include "(\w+\.cuh)"', source.read_text()))
    return direct.union(*(includes(source.with_name(n)) for n in direct))


def broken(folder: Path, fault: Fault, kind: str = "rules") -> Path:
    """The kernels with a fault; files that do not include the changed one are not recompiled."""
    sources = folder / "src"
    shutil.copytree(PLUGIN / "src", sources)
    text = (sources / fault.file).read_text()
    (sources / fault.file).write_text(fault.applied(text))
    for part in emulation.SOURCES:
        if fault.file not in {part, *includes(sources / part)}:
            (sources / part).unlink()
    emulation.build(folder / "libless_broken.so", *flags(kind), "-w", sources=sources, reuse=sound(kind))
    return folder / "libless_broken.so"


def caught(library: Path, orders: Sequence[int], kind: str = "rules") -> bool:
    """Whether a library disagrees with the oracle, or takes several times as long as one without a fault."""
    CASES[kind]()  # made once, not in every process
    return fails(functools.partial(check, library, orders, kind), seconds=20 + 8 * len(orders))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", CASES)
def test_kernels_without_a_fault_pass(kind: str) -> None:
    orders = {"rules": ORDERS, "merge": MERGE_ORDERS, "rows": ORDERS[:1], "short": ORDERS}.get(kind, ORDERS[:2])
    assert not caught(sound("float32" if kind == "float32" else "rules"), orders, kind)


def chosen() -> list[object]:
    """Every fault and barrier; in ordinary runs every twelfth, as each takes a compilation."""
    names = (*FAULTS, *waits())
    return [pytest.param(n, marks=pytest.mark.exhaustive if i % 12 else ()) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", chosen())
def test_fault_is_caught(name: str, tmp_path: Path) -> None:
    kind = "float32" if name.startswith(FLOAT32) else "rules"
    library = broken(tmp_path, {**FAULTS, **waits()}[name], kind)
    orders = ORDERS if name in waits() else ORDERS[:1]
    # Some barriers matter with int8 slots, or with a state of 16 bits, alone.
    kinds = (kind, "int8", "state16") if name in waits() and kind == "rules" else (kind,)
    assert any(caught(library, orders, k) for k in kinds) is (name not in SURVIVORS), SURVIVORS.get(name, "survived")


@pytest.mark.parametrize("name", exhaustive_but(MERGE_FAULTS, *[*MERGE_FAULTS][::3]))
def test_fault_of_the_merge_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, MERGE_FAULTS[name]), MERGE_ORDERS, "merge")


@pytest.mark.parametrize("name", exhaustive_but(FLOAT32_FAULTS, *[*FLOAT32_FAULTS][2::9]))
def test_fault_of_float32_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, FLOAT32_FAULTS[name], "float32"), ORDERS[:1], "float32")


def short_faults() -> dict[str, Fault]:
    return {**SHORT_FAULTS, **waits((SHORT,))}


@pytest.mark.parametrize("name", exhaustive_but(short_faults(), *[*short_faults()][::8]))
def test_fault_of_short_chunks_is_caught(name: str, tmp_path: Path) -> None:
    orders = ORDERS[:1] if name in SHORT_FAULTS else ORDERS
    assert caught(broken(tmp_path, short_faults()[name]), orders, "short")


@pytest.mark.parametrize("name", exhaustive_but(INT8_FAULTS, *[*INT8_FAULTS][5::9]))
def test_fault_of_int8_slots_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, INT8_FAULTS[name]), ORDERS[:1], "int8")


@pytest.mark.parametrize("name", exhaustive_but(STATE16_FAULTS, *[*STATE16_FAULTS][3::9]))
def test_fault_of_a_state_of_16_bits_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, STATE16_FAULTS[name]), ORDERS[:1], "state16")


@pytest.mark.parametrize("name", exhaustive_but(DISTANCE_FAULTS, *[*DISTANCE_FAULTS][4::9]))
def test_fault_of_distances_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, DISTANCE_FAULTS[name]), ORDERS[:1], "distance")


@pytest.mark.parametrize("name", exhaustive_but(row_faults(), *[*row_faults()][1::12]))
def test_fault_of_rows_by_index_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, row_faults()[name]), ORDERS[:1], "rows")


def test_survivors_are_faults() -> None:
    assert set(SURVIVORS) <= {*FAULTS, *waits()}


def test_every_fault_changes_its_file() -> None:
    kinds = (FAULTS, FLOAT32_FAULTS, MERGE_FAULTS, INT8_FAULTS, STATE16_FAULTS, DISTANCE_FAULTS, short_faults())
    for fault in (f for faults in (*kinds, waits(), row_faults()) for f in faults.values()):
        text = (PLUGIN / "src" / fault.file).read_text()
        assert fault.applied(text) != text, fault
