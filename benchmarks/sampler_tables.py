"""The table of ``benchmarks/results/sampler.json``: what choosing the tokens of a step costs."""

from __future__ import annotations

from typing import Any


def sampler(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of a step by what rows ask for and by their number; before and now, if both were measured."""
    times = {(r["case"], r["rows"]): r["milliseconds"] for r in data["rows"]}
    counts = sorted({count for _, count in times}, reverse=True)
    kinds = list(data["rows"][0]["milliseconds"])
    header = [f"{'a row alone' if n == 1 else f'{n} rows'}, {kind}" for n in counts for kind in kinds]
    rows = []
    for case in dict.fromkeys(case for case, _ in times):
        cells = [times.get((case, count), {}).get(kind) for count in counts for kind in kinds]
        rows.append([case, *("" if ms is None else f"{ms:.2f}" for ms in cells)])
    return ["rows ask for", *header], rows


def note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    before = f"before: commit {data['before']}; " if data["before"] else ""
    return (
        f"CPU time in milliseconds, median of {data['steps']} steps; {before}a vocabulary of {data['vocab']:,}, "
        f"prompts of {data['prompt']:,} tokens; numpy {data['machine']['versions']['numpy']}"
    )
