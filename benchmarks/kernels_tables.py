"""The tables of ``results/kernels.json`` and ``results/tasks.json``: what kernels add to int8 slots at equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from less_export.evaluation import statistics

CACHES = {"16-bit": "16-bit slots", "sparse": "int8 slots", "less": "LESS"}


def kernels_kl(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model, kernels and text, and what LESS changes on the same sequences."""
    header = [
        "model",
        "policy",
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
        what = [
            row["model"],
            row["policy"],
            str(row["rank"]),
            trained,
            row["text"],
            str(len(kl["less"])),
            f"{row['length']:,}",
        ]
        rows.append([*what, *cells, shown, left])
    return header, rows


#: Caches of the tasks.
TASK_CACHES = {"full": "full cache", "sparse+bytes": "int8 slots", "less": "LESS"}


def tasks(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy by model, task and cache, and by how much LESS raises the log probability of the right answer."""
    header = ["model", "task", "items", "examples", "tokens"]
    header += [f"{name}, accuracy" for name in TASK_CACHES.values()]
    header += [f"{name}, right answer" for name in TASK_CACHES.values()] + ["LESS to int8 slots"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in data["rows"]:
        found.setdefault((row["model"], row["task"]), {})[row["kind"]] = row
    rows = []
    for (model, task), caches in found.items():
        if caches.keys() != TASK_CACHES.keys():
            continue
        full, gold = caches["full"], {kind: np.array(caches[kind]["gold"]) for kind in TASK_CACHES}
        change = statistics.mean(gold["less"] - gold["sparse+bytes"])
        what = [model, task, str(len(gold["full"])), str(full["shots"]), str(full["tokens"])]
        what += [_accuracy(caches[kind]["right"]) for kind in TASK_CACHES]
        what += [f"{gold[kind].mean():.3f}" for kind in TASK_CACHES]
        rows.append([*what, f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"])
    return header, rows


def _accuracy(right: list[int]) -> str:
    """The share of right answers with its standard error; nothing for tasks without choices."""
    if not right:
        return ""
    share = float(np.mean(right))
    return f"{share:.0%} ± {(share * (1 - share) / len(right)) ** 0.5:.0%}"


#: Rank of the kernels, the context, and the texts that the README speaks of.
HEADLINE_RANK, HEADLINE_LENGTH = 4, 1024
HEADLINE_TEXTS = ("austen", "code", "c4", "languages", "reviews", "wiki")


def headline(data: dict[str, Any]) -> list[tuple[str, float, float]]:
    """By model, the mean KL of six texts with LESS and with int8 slots of the same bytes; kernels of the defaults."""
    chosen: dict[str, list[list[float]]] = {}
    for row in data["rows"]:
        if (
            row["policy"] == "h2o"
            and row["length"] == HEADLINE_LENGTH
            and row["text"] in HEADLINE_TEXTS
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
