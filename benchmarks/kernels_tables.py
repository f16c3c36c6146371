"""The table of ``benchmarks/results/kernels.json``: what kernels add to int8 slots at equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from less_export.evaluation import statistics

CACHES = {"16-bit": "16-bit slots", "sparse": "int8 slots", "less": "LESS"}


def kernels_kl(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model, kernels and text, and what LESS changes on the same sequences."""
    header = [
        "model",
        "R",
        "trained on",
        "text",
        "sequences",
        "tokens",
        *CACHES.values(),
        "LESS to int8 slots",
        "of 16-bit's KL",
    ]
    rows = []
    for row in data["rows"]:
        kl = {name: np.array(row["kl"][name]).mean(1) for name in CACHES}
        cells = [f"{x.mean():.4f} ({_slots(row['slots'][name])})" for name, x in kl.items()]
        base = kl["sparse"].mean()
        change = statistics.mean((kl["less"] - kl["sparse"]) / base)
        shown = f"{change.value:+.0%} [{change.low:+.0%}, {change.high:+.0%}]"
        left = f"{kl['less'].mean() / kl['16-bit'].mean():.0%}"
        trained = f"{_texts(row['trained']['texts'])}, {row['trained']['sequences']}"
        what = [row["model"], str(row["rank"]), trained, row["text"], str(len(kl["less"])), f"{row['length']:,}"]
        rows.append([*what, *cells, shown, left])
    return header, rows


#: Rank of the kernels, and the context, that the README speaks of.
HEADLINE_RANK, HEADLINE_LENGTH = 4, 1024


def headline(data: dict[str, Any]) -> list[tuple[str, float, float]]:
    """By model, the mean KL of all texts with LESS and with int8 slots of the same bytes; kernels of the defaults."""
    chosen: dict[str, list[list[float]]] = {}
    for row in data["rows"]:
        if (
            row["length"] == HEADLINE_LENGTH
            and row["rank"] == HEADLINE_RANK
            and _texts(row["trained"]["texts"]) == "shipped"
        ):
            means = [float(np.mean(row["kl"][name])) for name in ("less", "sparse")]
            chosen.setdefault(row["model"], []).append(means)
    return [(model, *np.mean(found, 0)) for model, found in chosen.items()]


def _texts(names: list[str]) -> str:
    return "shipped" if names == ["calibration"] else "shipped, web"


def _slots(counts: list[int]) -> str:
    """The slots of the layers that evict."""
    return "/".join(map(str, sorted(set(counts))))
