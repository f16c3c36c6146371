"""The tables of ``step.json`` and ``sampler.json``: where a decode step goes, and what choosing its tokens costs."""

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


def sampler_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    before = f"before: commit {data['before']}; " if data["before"] else ""
    return (
        f"CPU time in milliseconds, median of {data['steps']} steps; {before}a vocabulary of {data['vocab']:,}, "
        f"prompts of {data['prompt']:,} tokens; numpy {data['machine']['versions']['numpy']}"
    )


def step(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Microseconds and nodes of a layer's cache, beside those of the rest of the model, by how weights are stored."""
    header = ["weights", "step, us", "products with weights", "caches", "the rest", "a layer's cache", "its nodes"]
    rows = []
    for r in data["rows"]:
        parts, layers = r["parts"], data["layers"]
        times = [f"{parts[p]['us']:,} ({parts[p]['nodes']})" for p in ("weights", "cache", "rest")]
        cache = parts["cache"]
        own = [f"{cache['us'] / layers:,.0f}", f"{cache['nodes'] / layers:.0f}"]
        rows.append([r["weights"], f"{r['step_us']:,}", *times, *own])
    return header, rows


def step_cache(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The operators that take most of the time of a layer's cache."""
    row = data["rows"][-1]
    whole, layers = sum(row["cache"].values()), data["layers"]
    most = list(row["cache"].items())[:10]
    rows = [[f"`{kind}`", f"{us / layers:,.0f}", f"{us / whole:.0%}"] for kind, us in most]
    return ["operator", "us a layer", "share"], rows


def step_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    threads = f"{data['threads']} threads" if data["threads"] > 1 else "one thread"
    return (
        f"microseconds by ONNX Runtime's profiler, number of nodes in brackets; {data['layers']} layers of TinyLlama's "
        f"shape, {data['slots']} int8 slots, one row, {threads}"
    )


#: Results, table and note by the table's name.
PARTS: dict[str, Any] = {
    "sampler": ("sampler", sampler, sampler_note),
    "step": ("step", step, step_note),
    "step_cache": ("step", step_cache, step_note),
}
