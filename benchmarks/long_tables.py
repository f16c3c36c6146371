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


#: Edges of the windows of streams past the trained length.
BEYOND = (0, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768)


def _mean(row: dict[str, Any], begin: int, end: int, chunk: int) -> float:
    return float(np.mean([losses[begin // chunk : end // chunk] for losses in row["nll"]]))


#: The cache of an export's defaults.
DEFAULT = "h2o, half-life 512, clamped, int8"


def beyond(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean loss of every model and cache by position, and its difference to the default cache in the last window."""
    rows, chunk = [], data["chunk"]
    longest = max(m["length"] for m in data["models"].values())
    spans = [(a, b) for a, b in pairwise(BEYOND) if b <= longest]
    begin, end = (x // chunk for x in spans[-1])
    for name, model in data["models"].items():
        default = next(np.array(r["nll"]) for r in model["rows"] if r["cache"] == DEFAULT)
        for row in model["rows"]:
            cells = [f"{_mean(row, a, b, chunk):.3f}" if b <= row["length"] else "" for a, b in spans]
            change = ""
            if row["length"] == longest and row["cache"] != DEFAULT:
                x = statistics.mean((np.array(row["nll"]) - default)[:, begin:end].ravel())
                change = f"{x.value:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"
            rows.append([name, row["cache"], *cells, change])
    names = [f"{a:,} to {b:,}" for a, b in spans]
    return ["model", "cache", *names, f"difference to the default, {names[-1]}"], rows


def held(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How old the tokens are that slots hold at the end of the streams."""
    rows = []
    for name, model in data["models"].items():
        for row in model["rows"]:
            if "age_quantiles" in row:
                ages = [f"{row['age_quantiles'][q]:,}" for q in ("0.25", "0.5", "0.75", "0.95")]
                rows.append([name, row["cache"], *ages, f"{row['first_1024']:.1%}"])
    return ["model", "cache", "age: first quartile", "median", "third quartile", "95%", "of the first 1,024"], rows


def recall(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Loss of the answer to a planted sentence by distance, and without the sentence."""
    rows, distances = [], list[str]()
    for name, model in data["models"].items():
        for row in model["rows"]:
            if "recall" in row:
                distances = list(row["recall"])
                cells = [f"{x['planted']:.2f} ({x['not']:.2f})" for x in row["recall"].values()]
                rows.append([name, row["cache"], *cells])
    return ["model", "cache", *(f"{int(d):,} tokens" for d in distances)], rows


#: Tokens at the beginning of a part of a rotated stream that are left out, where another text may have gone before.
_SETTLING = 1024


def same(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean loss by position in streams whose parts hold the same text, and the change from the first part to the last,
    paired by text."""
    rows, names, chunk = [], list[str](), data["chunk"]
    for name, model in data["rotated"].items():
        count, part = model["rotations"], model["length"] // model["rotations"]
        names = [f"{i * part + _SETTLING:,} to {(i + 1) * part:,}" for i in range(count)]
        for row in model["rows"]:
            # [text, rotation, part, step]; rotation r has text r + i in its part i
            nll = np.array(row["nll"]).reshape(-1, count, count, part // chunk)[..., _SETTLING // chunk :]
            last = np.roll(nll[:, :, -1], -1, 1)
            change = statistics.mean(((last - nll[:, :, 0]) / nll[:, :, 0].mean()).ravel())
            cells = [f"{nll[:, :, i].mean():.3f}" for i in range(count)]
            change_cell = f"{change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}]"
            rows.append([name, row["cache"], ", ".join(model["texts"]), *cells, change_cell])
    return ["model", "cache", "texts", *names, "from first to last"], rows


#: Tables of ``beyond.json`` by name.
PARTS = {"beyond": beyond, "beyond_held": held, "beyond_recall": recall, "beyond_same": same}
