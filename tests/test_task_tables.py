"""The tables of tasks: accuracies by hand, pairs of the same items, and rows that lack a cache."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernels_tables")


def row(kind: str, task: str = "copa", kernels: str = "a", limit: int = 4, **more: Any) -> dict[str, Any]:
    own = {"model": "m", "policy": "h2o", "task": task, "kind": kind, "limit": limit, "tokens": 1234, "seconds": 1}
    return {**own, "kernels": None if kind == "full" else kernels, **more}


def answers(kind: str, right: list[int], gold: list[float], **more: Any) -> dict[str, Any]:
    return row(kind, right=right, gold=gold, **{"shots": 30, **more})


def test_tasks(tables: ModuleType) -> None:
    rows = [
        answers("less", [1, 1, 0, 0], [-1.0, -2.0, -3.0, -4.0], among=[-0.25] * 4),
        answers("full", [1, 1, 1, 1], [-1.0, -1.0, -1.0, -1.0]),
        answers("sparse", [1, 0, 0, 0], [-1.5, -2.5, -3.5, -4.5], among=[-0.5] * 4),
    ]
    header, (found,) = tables.tasks({"rows": rows})
    assert len(header) == len(found)
    assert found == ["m", "h2o", "copa", "30", "1,234", "4", "100.0 (0.0)", "25.0 (21.7)", "50.0 (25.0)",
                     "+0.500 [+0.500, +0.500]", "+0.250 [+0.250, +0.250]", "", ""]  # fmt: skip
    rows.append(answers("fewer", [1, 1, 1, 0], [-2.0, -3.0, -4.0, -5.0]))
    assert tables.tasks({"rows": rows})[1][0][-2:] == ["75.0 (21.7)", "+1.000 [+1.000, +1.000]"]
    assert header[6:9] == ["full cache", "int8 slots", "LESS"]


def test_intervals_are_of_pairs(tables: ModuleType) -> None:
    gold = [-8.0, -1.0, -6.0, -2.0]
    rows = [answers("full", [1] * 4, gold), answers("sparse", [1] * 4, gold)]
    rows.append(answers("less", [1] * 4, [x + d for x, d in zip(gold, (0.5, -0.25, 0.5, 0.25), strict=True)]))
    change = tables.tasks({"rows": rows})[1][0][-4]
    value, low, high = (float(x.strip("[],")) for x in change.split())
    assert value == 0.25
    assert -0.25 <= low < value < high <= 0.5


def test_the_full_cache_is_compared_with_all_kernels(tables: ModuleType) -> None:
    """And nothing with rows of other numbers of items."""
    full, other = answers("full", [1] * 4, [0.0] * 4), {"limit": 2, "right": [1, 1], "gold": [0.0, 0.0]}
    rows = [full, *(answers(k, [1] * 4, [0.0] * 4, kernels=n) for n in "ab" for k in ("sparse", "less"))]
    assert len(tables.tasks({"rows": rows})[1]) == 2
    assert len(tables.tasks({"rows": rows[:-1]})[1]) == 1
    assert len(tables.tasks({"rows": [*rows[:-1], row("less", kernels="b", shots=30, **other)]})[1]) == 1
    assert tables.tasks({"rows": rows[1:]})[1] == []


def test_summaries(tables: ModuleType) -> None:
    rows = [answers("full", [1], [0.0])]
    for kind, value in (("full", 0.3), ("sparse", 0.1), ("less", 0.2)):
        rouge = {name: [value, value] for name in ("rouge1", "rouge2", "rougeL")}
        rows.append(row(kind, "summarize", rouge=rouge))
    header, found = tables.summaries({"rows": rows})
    assert [x[2] for x in found] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert {len(x) for x in found} == {len(header)}
    assert found[0][3:] == ["1,234", "2", "30.0", "10.0", "20.0", "+10.0 [+10.0, +10.0]"]
    assert tables.tasks({"rows": rows})[1] == []
