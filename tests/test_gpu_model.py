"""The model of a decode step on a GPU: what it reads in disassembled code, and what it computes from that."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from .emulation import kernel_layer

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks/results/gpu_model.json").read_text())


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_model

    return gpu_model


def _sass(*lines: str) -> str:
    """Code as nvdisasm prints it; labels end with a colon."""
    return "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/    {x} ;" for i, x in enumerate(lines))


def test_the_loop_over_tiles_is_the_shortest_that_multiplies(model: Any) -> None:
    product = "HMMA.16816.F32 R4, R8, R12, R4"
    code = _sass(
        "MOV R1, c[0x0][0x28]",
        ".L_x_1:",
        *["FFMA R1, R2, R3, R1"] * 3, "@P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "STG.E [R2], R3",
        ".L_x_3:",
        product, "LDL R9, [R1]", "STL [R1], R9", *["FFMA R1, R2, R3, R1"] * 9, "@P0 BRA `(.L_x_3)",
        "SHFL.BFLY PT, R5, R4, 0x8, 0x1f", "@P0 BRA `(.L_x_2)",
        "@P1 BRA `(.L_x_4)",
        ".L_x_4:",
        "EXIT",
    )  # fmt: skip
    assert model.loops(code) == (13, 2, 3, 1 + 4 + 1 + 13 + 2 + 2)


def _kernels(model: Any) -> list[Any]:
    names = {f.name for f in dataclasses.fields(model.Kernel)}
    return [model.Kernel(**{n: x for n, x in k.items() if n in names}) for k in RESULT["kernels"]]


def _used(model: Any) -> Any:
    return next(k for k in _kernels(model) if (k.architecture, k.slots, k.heads) == ("90", "float16", 8))


def test_the_committed_tables_follow_from_what_the_compiler_made(model: Any) -> None:
    rows = list(model.rows(model.Chip(**RESULT["chip"]), _used(model)))
    assert rows == RESULT["decode"]
    assert all(0 < row["of_a_copy"] < 1 for row in rows)
    assert [model.row_of(k) for k in _kernels(model)] == RESULT["kernels"]
    made = {(k.architecture, k.slots, k.heads) for k in _kernels(model)}
    assert made == {(a, s, t) for a in model.ARCHITECTURES for s in model.SLOTS for t in model.TILES}


def test_the_kernels_keep_to_their_limits(model: Any) -> None:
    """No spilled registers, and at most 450 instructions for eight slots of up to eight query heads."""
    for k in _kernels(model):
        assert k.spill_bytes == k.tile_local == 0, k
        assert k.heads > 8 or k.per_8_slots <= 450, k


def test_what_limits_a_step(model: Any) -> None:
    chip, kernel = model.Chip(), _used(model)
    layer = kernel_layer("h2o", 1024, 128, 4, 16, 8)
    base = model.predicted(chip, kernel, layer, 64)

    def limited(chip: Any = chip, kernel: Any = kernel, batch: int = 64) -> dict[str, Any]:
        return dict(model.predicted(chip, kernel, layer, batch))

    slow = limited(dataclasses.replace(chip, dram_gb_per_s=chip.dram_gb_per_s / 8))
    assert slow["limit"] == "memory"
    assert slow["memory_us"] > base["memory_us"]
    assert slow["issue_us"] == base["issue_us"]
    longer = {n: 20 * getattr(kernel, n) for n in ("tile_instructions", "split_instructions")}
    wordy = limited(kernel=dataclasses.replace(kernel, **longer))
    assert wordy["limit"] == "issue"
    assert wordy["issue_us"] == pytest.approx(20 * base["issue_us"], rel=0.01)
    assert wordy["memory_us"] == base["memory_us"]
    assert limited(batch=1)["limit"] == "launch and merge"
    fat = limited(kernel=dataclasses.replace(kernel, registers=255))
    assert fat["occupancy"] < base["occupancy"] <= 1
    assert limited(kernel=dataclasses.replace(kernel, stage_bytes=100 * 1024))["occupancy"] == round(4 / 64, 3)
