"""The tables of kernels and tasks: figures by hand, pairs of the same items, and rows that lack a cache."""

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
        answers("less", [1, 1, 0, 0] * 2, [-1.0, -2.0, -3.0, -4.0] * 2, among=[-0.25] * 8),
        answers("full", [1, 1, 1, 1] * 2, [-1.0, -1.0, -1.0, -1.0] * 2),
        answers("sparse", [1, 0, 0, 0] * 2, [-1.5, -2.5, -3.5, -4.5] * 2, among=[-0.5] * 8),
    ]
    header, (found,) = tables.tasks({"rows": rows})
    assert len(header) == len(found)
    assert found == ["m", "h2o", "copa", "30", "1,234", "8", "100.0 (0.0)", "25.0 (15.3)", "50.0 (17.7)",
                     "+0.500 [+0.500, +0.500]", "+0.250 [+0.250, +0.250]", "", ""]  # fmt: skip
    rows.append(answers("fewer", [1, 1, 1, 0] * 2, [-2.0, -3.0, -4.0, -5.0] * 2))
    assert tables.tasks({"rows": rows})[1][0][-2:] == ["75.0 (15.3)", "+1.000 [+1.000, +1.000]"]
    assert header[6:9] == ["full cache", "int8 slots", "LESS"]
    others = [{**r, "kernels": "b", "trained": tables.PASSAGES} for r in rows if r["kind"] in ("sparse", "less")]
    assert len(tables.tasks({"rows": rows + others})[1]) == 1
    assert len(tables.tasks({"rows": rows + others}, tables.PASSAGES)[1]) == 1
    assert tables.tasks({"rows": rows}, tables.PASSAGES)[1] == []


def test_intervals_are_of_pairs(tables: ModuleType) -> None:
    gold = [-8.0, -1.0, -6.0, -2.0, -9.0, -3.0]
    rows = [answers("full", [1] * 6, gold), answers("sparse", [1] * 6, gold)]
    changes = (0.5, -0.25, 0.5, 0.25, 0.25, 0.25)
    rows.append(answers("less", [1] * 6, [x + d for x, d in zip(gold, changes, strict=True)]))
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
    assert found[0][3:] == ["1,234", "2", "30.0", "10.0", "20.0", "+10.0"]
    assert tables.tasks({"rows": rows})[1] == []


def kernels(text: str, kl: dict[str, float], **more: Any) -> dict[str, Any]:
    """Two sequences, whose KL is that and twice that."""
    facts = {"model": "m", "policy": "h2o", "text": text, "length": 1024, "half_life": 128, "rank": 4, "first": 21}
    trained = {"texts": ["calibration"], "sequences": 54}
    slots = {n: [50, 50] if n == "16-bit" else [20, 70, 80, 90] for n in kl}
    return {
        **facts,
        "trained": trained,
        "kernels": "k",
        "slots": slots,
        "kl": {n: [[x], [2 * x]] for n, x in kl.items()},
        **more,
    }


DIVIDED = {"16-bit": 0.4, "sparse": 0.2, "divided": 0.16, "less": 0.12, "fewer": 0.18}


def test_kernels_are_compared_with_slots_that_are_divided_like_theirs(tables: ModuleType) -> None:
    equal = {n: x for n, x in DIVIDED.items() if n != "divided"}
    _, rows = tables.kernels_kl({"rows": [kernels("a", DIVIDED), kernels("b", equal)]}, 128)
    assert rows[0][7:12] == ["0.6000 (50)", *(f"{1.5 * DIVIDED[n]:.4f} (65, 20 to 90)" for n in list(DIVIDED)[1:])]
    assert rows[1][9] == ""
    assert [row[12].partition(" ")[0] for row in rows] == ["-25%", "-40%"]
    assert [row[13] for row in rows] == ["30%", "30%"]


def test_held_out_works_are_also_one_row(tables: ModuleType) -> None:
    """Of six sequences, each twice as good as slots, which is beyond chance; two of one work show no interval."""
    half = {n: 0.1 if n == "less" else 0.2 for n in DIVIDED}
    rows = [kernels(text, half) for text in ("austen", "newton", "code", "c4")]
    _, found = tables.kernels_kl({"rows": rows}, 128)
    assert [(row[4], row[5]) for row in found] == [
        ("austen", "2"), ("newton", "2"), ("code", "2"), ("these 3", "6"), ("c4", "2"),
    ]  # fmt: skip
    assert [row[12] for row in found] == ["-50%"] * 3 + ["-50% [-61%, -39%]"] + ["-50%"]


def test_editions(tables: ModuleType) -> None:
    today = kernels("c4", DIVIDED)
    before = {n: x for n, x in today.items() if n != "first"}
    equal = {**before, "trained": {"texts": [tables.EARLIER_TEXT], "sequences": 54}}
    passages = {**today, "trained": {"texts": [tables.PASSAGES], "sequences": 54}}
    rows = (today, before, equal, passages)
    assert [tables.edition_of(row) for row in rows] == ["today", "divided", "equal", "passages"]
    for edition in ("today", "divided", "equal"):
        assert len(tables.kernels_kl({"rows": [today, before, equal]}, 128, edition)[1]) == 1
    assert len(tables.kernels_kl({"rows": [today, before, equal]}, 128)[1]) == 3
    assert len(tables.headline({"rows": [today, before, equal]})) == 1


def test_headline_is_a_mean_of_texts(tables: ModuleType) -> None:
    rows = [kernels(text, DIVIDED) for text in tables.HEADLINE_TEXTS]
    large = dict.fromkeys(DIVIDED, 9.0)
    others = [kernels("x", large), *(kernels("c4", large, **x) for x in ({"length": 4096}, {"policy": "sink"}))]
    ((model, less, slots),) = tables.headline({"rows": rows + others})
    assert (model, less, slots) == ("m", pytest.approx(0.18), pytest.approx(0.24))
