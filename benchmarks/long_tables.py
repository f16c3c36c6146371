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
        cells.append("" if same else change.text("+.3f"))
        rows.append([row["cache"], *cells])
    names = [f"{a:,} to {b:,}" for a, b in spans]
    return ["cache", *names, f"difference to {BASE}, {names[-1]}"], rows


#: Edges of the windows of streams past the trained length.
BEYOND = (0, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768)


def _mean(row: dict[str, Any], begin: int, end: int, chunk: int) -> float:
    return float(np.mean([losses[begin // chunk : end // chunk] for losses in row["nll"]]))


def _streams(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs over texts whose parts are not rotated."""
    return [e for e in data["streams"] if e["rotations"] == 1]


#: The cache that others are compared with: the defaults of an export but for the half-life, which is shorter since.
BASIS = "h2o, half-life 512, clamped, int8"


def beyond(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean loss of every model and cache by position, and its difference to one of them in the last window."""
    rows, chunk, entries = [], data["chunk"], _streams(data)
    longest = max(e["length"] for e in entries)
    spans = [(a, b) for a, b in pairwise(BEYOND) if b <= longest]
    begin, end = (x // chunk for x in spans[-1])
    for entry in entries:
        default = next(np.array(r["nll"]) for r in entry["rows"] if r["cache"] == BASIS)
        for row in entry["rows"]:
            cells = [f"{_mean(row, a, b, chunk):.3f}" if b <= row["length"] else "" for a, b in spans]
            change = ""
            if row["length"] == longest and row["cache"] != BASIS:
                x = statistics.mean((np.array(row["nll"]) - default)[:, begin:end].ravel())
                change = x.text("+.3f")
            rows.append([entry["model"], row["cache"], *cells, change])
    names = [f"{a:,} to {b:,}" for a, b in spans]
    return ["model", "cache", *names, f"difference to {BASIS}, {names[-1]}"], rows


def held(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How old the tokens are that slots hold at the end of the streams."""
    rows = []
    for entry in _streams(data):
        for row in entry["rows"]:
            if "age_quantiles" in row:
                ages = [f"{row['age_quantiles'][q]:,}" for q in ("0.25", "0.5", "0.75", "0.95")]
                rows.append([entry["model"], row["cache"], *ages, f"{row['first_1024']:.1%}"])
    return ["model", "cache", "age: first quartile", "median", "third quartile", "95%", "of the first 1,024"], rows


#: Tokens at the beginning of a part of a rotated stream that are left out, where another text may have gone before.
_SETTLING = 1024


def same(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mean loss in the first and the last part of streams whose parts hold the same text, and the change, paired by
    text."""
    rows, chunk = [], data["chunk"]
    for entry in data["streams"]:
        count = entry["rotations"]
        if count == 1:
            continue
        part, spans = entry["length"] // count, []
        for i in (0, count - 1):
            spans.append(f"{i * part + _SETTLING:,} to {(i + 1) * part:,}")
        for row in entry["rows"]:
            # [text, rotation, part, step]; rotation r has text r + i in its part i
            nll = np.array(row["nll"]).reshape(-1, count, count, part // chunk)[..., _SETTLING // chunk :]
            last = np.roll(nll[:, :, -1], -1, 1)
            change = statistics.mean(((last - nll[:, :, 0]) / nll[:, :, 0].mean()).ravel())
            losses = [f"{nll[:, :, i].mean():.3f} ({span})" for i, span in zip((0, -1), spans, strict=True)]
            change_cell = change.text("+.1%")
            tokens = "1" if entry["simulated"] else str(chunk)
            rows.append([entry["model"], row["cache"], ", ".join(entry["texts"]), tokens, *losses, change_cell])
    return ["model", "cache", "texts", "tokens a step", "first part", "last part", "change"], rows


def recall(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Loss of the answer to a planted sentence by distance, and by how much the sentence lowers it."""
    rows = []
    for row in data["rows"]:
        cells = []
        for pairs in row["losses"].values():
            told, untold = np.array(pairs).T
            gain = statistics.mean(untold - told)
            cells.append(f"{told.mean():.2f} ({gain.text('+.2f')})")
        rows.append([row["model"], row["cache"], *cells])
    return ["model", "cache", *(f"{int(d):,} tokens" for d in data["rows"][0]["losses"])], rows


#: Tables of ``beyond.json`` by name.
PARTS = {"beyond": beyond, "beyond_held": held, "beyond_same": same}
