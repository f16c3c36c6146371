"""The table of ``benchmarks/results/long.json``: loss by position, and what a half-life changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from less_export.evaluation import statistics

#: Edges of the windows of positions.
EDGES = (0, 1024, 2048, 4096, 8192, 16384, 32768)
BASE = "h2o"


def steps(row: dict[str, Any], begin: int, end: int, chunk: int) -> np.ndarray:
    """The losses of the steps between two positions, of all streams."""
    return np.array([x for losses in row["nll"].values() for x in losses[begin // chunk : end // chunk]])


def windows(data: dict[str, Any]) -> list[tuple[int, int]]:
    length = max(r["length"] for r in data["rows"])
    return [(a, b) for a, b in pairwise(EDGES) if b <= length]


def long(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean loss of every cache by position, and its difference to h2o without a half-life in the last window."""
    rows, spans = [], windows(data)
    base = next(r for r in data["rows"] if r["cache"] == BASE)
    last = steps(base, *spans[-1], data["chunk"])
    for row in data["rows"]:
        cells = [f"{steps(row, *span, data['chunk']).mean():.3f}" for span in spans]
        change = statistics.mean(steps(row, *spans[-1], data["chunk"]) - last)
        same = row is base
        cells.append("" if same else f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")
        rows.append([row["cache"], *cells])
    names = [f"{a:,} to {b:,}" for a, b in spans]
    return ["cache", *names, f"difference to {BASE}, {names[-1]}"], rows
