"""The table of ``benchmarks/results/kernels.json``: what kernels add to int8 slots at equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from less_export.evaluation import statistics


def kernels_kl(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model, policy and text, and what LESS changes on the same tokens."""
    caches = {"16-bit": "16-bit slots", "sparse": "int8 slots", "less": "LESS"}
    header = ["model", "policy", "text", "sequences", *caches.values(), "LESS - int8 slots", "gap of 16-bit recovered"]
    rows = []
    for row in data["rows"]:
        kl = {name: np.array(row["kl"][name]).mean(1) for name in caches}
        cells = [f"{x.mean():.4f} ({_slots(row['slots'][name])})" for name, x in kl.items()]
        change = statistics.mean(kl["less"] - kl["sparse"])
        shown = f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
        recovered = f"{1 - kl['less'].mean() / kl['16-bit'].mean():.0%}"
        rows.append([row["model"], row["policy"], row["text"], str(len(kl["less"])), *cells, shown, recovered])
    return header, rows


def _slots(counts: list[int]) -> str:
    """The slots of the layers that evict."""
    return "/".join(map(str, sorted(set(counts))))
