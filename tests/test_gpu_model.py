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


def test_the_loop_over_slots_is_the_shortest_that_loads_and_reduces(model: Any) -> None:
    loads = ["LDG.E.128.CONSTANT R4, [R2.64]"] * 4
    code = _sass(
        "MOV R1, c[0x0][0x28]",
        ".L_x_1:",
        *loads, "SHFL.BFLY PT, R5, R4, 0x8, 0x1f", "LDL R9, [R1]", "STL [R1], R9", "@P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "SHFL.BFLY PT, R5, R4, 0x8, 0x1f", "@P0 BRA `(.L_x_2)",
        ".L_x_3:",
        *loads, *["FFMA R1, R2, R3, R1"] * 9, "SHFL.BFLY PT, R5, R4, 0x8, 0x1f", "@P0 BRA `(.L_x_3)",
        "@P1 BRA `(.L_x_4)",
        ".L_x_4:",
        "EXIT",
    )  # fmt: skip
    body, local, slots, total = model.inner_loop(code)
    assert (body, local, slots) == (8, 2, 2)
    assert total == 1 + 8 + 2 + 15 + 2


def _kernels(model: Any) -> dict[int, Any]:
    names = {f.name for f in dataclasses.fields(model.Kernel)}
    return {k["group"]: model.Kernel(**{n: x for n, x in k.items() if n in names}) for k in RESULT["kernels"]}


def test_the_committed_table_follows_from_what_the_compiler_made(model: Any) -> None:
    rows = list(model.rows(model.Chip(**RESULT["chip"]), _kernels(model)))
    assert rows == RESULT["decode"]
    assert all(0 < row["of_a_copy"] < 1 for row in rows)


def test_what_limits_a_step(model: Any) -> None:
    chip, kernel = model.Chip(), _kernels(model)[4]
    layer = kernel_layer("h2o", 1024, 128, 4, 16, 8)
    base = model.predicted(chip, kernel, layer, 64)

    def limited(chip: Any = chip, kernel: Any = kernel, batch: int = 64) -> dict[str, Any]:
        return dict(model.predicted(chip, kernel, layer, batch))

    slow = limited(dataclasses.replace(chip, dram_gb_per_s=chip.dram_gb_per_s / 8))
    assert slow["limit"] == "memory"
    assert slow["memory_us"] > base["memory_us"]
    assert slow["issue_us"] == base["issue_us"]
    wordy = limited(kernel=dataclasses.replace(kernel, loop_instructions=20 * kernel.loop_instructions))
    assert wordy["limit"] == "issue"
    assert wordy["issue_us"] == pytest.approx(20 * base["issue_us"], rel=0.01)
    assert wordy["memory_us"] == base["memory_us"]
    assert limited(batch=1)["limit"] == "launch and merge"
    fat = limited(kernel=dataclasses.replace(kernel, registers=255))
    assert fat["occupancy"] < base["occupancy"] <= 1
    assert limited(kernel=dataclasses.replace(kernel, shared_bytes=200 * 1024))["occupancy"] == round(4 / 64, 3)
