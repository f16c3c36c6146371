"""The tables of ``benchmarks/results/slots.json``: what int8 slots gain at equal bytes, and what rounding costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from less_export.evaluation import statistics

#: Caches of the benchmark: 16-bit slots, int8 slots of the same bytes, and as many int8 slots.
WIDE, INT8, AS_MANY = "16-bit", "int8", "int8, as many slots"


def _values(row: dict[str, Any], cache: str, kind: str) -> np.ndarray:
    return np.array(row["caches"][cache][kind])


def slots_kl(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model and text, and how much lower it is with int8 slots of equal bytes."""
    header = ["model", "text", "sequences", "16-bit slots", "int8, same bytes", "lower by", "int8, as many slots"]
    rows = []
    for row in data["rows"]:
        wide, coded, many = (_values(row, c, "kl") for c in (WIDE, INT8, AS_MANY))
        change = statistics.mean(1 - coded / wide)
        counts = [f"{x.mean():.4f} ({row['slots'][c]})" for c, x in ((WIDE, wide), (INT8, coded))]
        lower = change.text(".0%")
        rows.append([row["model"], row["text"], str(row["sequences"]), *counts, lower, f"{many.mean():.4f}"])
    return header, rows


def slots_rounding(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Relative squared error of attention when only rounding is added: the worst layer and the mean, over all texts."""
    rows = []
    for model in dict.fromkeys(r["model"] for r in data["rows"]):
        errors = {
            kind: np.array([r["rounding"][kind] for r in data["rows"] if r["model"] == model])
            for kind in ("plain", "calibrated")
        }
        cells = [f"{x.max():.5f}, {x.mean():.5f}" for x in errors.values()]
        rows.append([model, str(errors["plain"].shape[1]), *cells])
    return ["model", "layers", "keys as they are: worst, mean", "calibrated: worst, mean"], rows


def slots_decode(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of a decode step by cache, beside those of the first in the same process, and their ratio."""
    header = ["cache", "step", data["first"], "ratio"]
    return header, [[c, f"{t:.1f} ms", f"{a:.1f} ms", f"{t / a:.3f}"] for c, (a, t) in data["milliseconds"].items()]


def int4(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL by text and cache at equal bytes, and how much lower the first cache of four bits is than int8."""
    caches, rows = list(data["rows"][0]["kl"]), []
    for row in data["rows"]:
        kl = {cache: np.array(x) for cache, x in row["kl"].items()}
        change = statistics.mean(1 - kl[caches[2]] / kl["int8"])
        cells = [f"{x.mean():.4f} ({row['slots'][cache]})" for cache, x in kl.items()]
        lower = change.text(".0%")
        rows.append([row["text"], str(row["sequences"]), *cells, lower])
    return ["text", "sequences", *caches, "lower than int8"], rows


def state_drift(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Relative errors of the means of a 16-bit state after so many tokens."""
    rows = data["rows"]
    names = {"dither": "with the dither", "nearest": "to the nearest code"}
    header = ["rounding", *(f"{int(n):,}" for n in rows["dither"])]
    return header, [[shown, *(f"{x:.4f}" for x in rows[name].values())] for name, shown in names.items()]


def state_kl(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL with a state of 32 and of 16 bits, and what the 16 bits add, paired by token."""
    rows = []
    for row in data["rows"]:
        wide, narrow = (np.array(row["kl"][bits]).ravel() for bits in ("32", "16"))
        change = statistics.mean((narrow - wide) / wide.mean())
        shown = change.text("+.2%")
        rows.append([row["model"], row["text"], f"{wide.mean():.4f}", f"{narrow.mean():.4f}", shown])
    return ["model", "text", "32 bits", "16 bits", "change"], rows


#: Tables by name.
PARTS = {"slots_kl": slots_kl, "slots_rounding": slots_rounding}
