"""The tables of ``results/kernels.json``, ``tasks.json`` and ``half_life.json``: kernels, and slots alone, at equal
bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from less_export.config import DEFAULT_HALF_LIFE
from less_export.evaluation import statistics

#: How rows name the text of the package before it had reviews, the Factbook, SQLite's pages and the code of others.
EARLIER_TEXT = "calibration, earlier"
#: How rows name it where every fourth sequence consisted of short passages.
PASSAGES = "calibration, passages"
CACHES = {
    "16-bit": "16-bit slots",
    "sparse": "int8 slots",
    "divided": "int8 slots, divided",
    "less": "LESS",
    "fewer": "LESS without its state",
}


def kernels_kl(
    data: dict[str, Any], half_life: int | None, edition: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model, kernels and text, and what LESS changes on the same sequences.

    Rows whose scores have this half-life; None: of policies without scores. ``edition``: see :func:`edition_of`; None:
    of all.
    """
    header = [
        "model",
        "policy",
        "R",
        "trained on",
        "text",
        "sequences",
        "tokens",
        *CACHES.values(),
        "LESS vs int8 slots",
        "share of the 16-bit KL",
    ]
    rows = []
    for row in _with_pooled(data["rows"]):
        if row["half_life"] != half_life or edition not in (None, edition_of(row)):
            continue
        kl = {name: np.array(x).mean(1) for name, x in row["kl"].items()}
        cells = [f"{kl[n].mean():.4f} ({_slots(row['slots'][n])})" if n in kl else "" for n in CACHES]
        base = kl.get("divided", kl["sparse"])
        change = statistics.mean((kl["less"] - base) / base.mean())
        shown = change.text("+.0%")
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


#: Works of the held-out text, which have few sequences each.
HELD_OUT = ("austen", "code", "factbook", "jargon", "newton", "presidents", "reviews", "shakespeare", "sqlite")


def edition_of(row: dict[str, Any]) -> str:
    """``today``; ``passages``: trained on short passages too; ``divided``: counted from where all layers evict;
    ``equal``: also trained on the text of before, with the same slots in every layer."""
    if EARLIER_TEXT in row["trained"]["texts"]:
        return "equal"
    if PASSAGES in row["trained"]["texts"]:
        return "passages"
    return "today" if "first" in row else "divided"


def _with_pooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and after those of the held-out works one with the sequences of all of them."""
    works: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["text"] in HELD_OUT:
            works.setdefault(_kernels(row), []).append(row)
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        of_kernels = works.get(_kernels(row), [])
        if len(of_kernels) > 1 and row is of_kernels[-1]:
            kl = {kind: [x for work in of_kernels for x in work["kl"][kind]] for kind in row["kl"]}
            found.append({**row, "text": f"these {len(of_kernels)}", "kl": kl})
    return found


def _kernels(row: dict[str, Any]) -> tuple[str, int]:
    return row["kernels"], row["length"]


def half_lives(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """KL from the full cache by model, text and half-life, and what the default changes to an earlier one."""
    columns = list(data["rows"][0]["kl"])
    header = ["model", "slots", "text", "sequences", *("none" if c == "None" else c for c in columns)]
    rows = []
    for row in data["rows"]:
        kl = {name: np.array(x) for name, x in row["kl"].items()}
        before = kl[EARLIER_HALF_LIFE]
        change = statistics.mean((kl[str(DEFAULT_HALF_LIFE)] - before) / before.mean())
        shown = change.text("+.0%")
        what = [row["model"], str(row["slots"]), row["text"], str(len(before))]
        rows.append([*what, *(f"{kl[c].mean():.4f}" for c in columns), shown])
    return [*header, f"{DEFAULT_HALF_LIFE} to {EARLIER_HALF_LIFE}"], rows


#: The default half-life of the second edition.
EARLIER_HALF_LIFE = "512"
#: Caches of the tasks.
TASK_CACHES = {"full": "full cache", "sparse": "int8 slots", "less": "LESS"}
_SUMMARIES = "summarize"
_METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def tasks(data: dict[str, Any], trained: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Accuracy by model, task and cache, and by how much LESS raises the log probability of the right answer, alone and
    as a share of that of all choices. ``trained``: what kernels were trained on, if not on the text of the package."""
    header = ["model", "policy", "task", "examples", "tokens", "items", *TASK_CACHES.values()]
    rows = []

    def wanted(row: dict[str, Any]) -> bool:
        return row["task"] != _SUMMARIES and (row["kind"] == "full" or row.get("trained") == trained)

    for caches in _compared(data, wanted):
        less = caches["less"]
        gold = {kind: np.array(caches[kind]["gold"]) for kind in ("sparse", "less")}
        what = [less["model"], less["policy"], less["task"], str(less["shots"]), f"{less['tokens']:,}"]
        what += [str(len(gold["less"])), *(_accuracy(caches[kind]["right"]) for kind in TASK_CACHES)]
        among = ""
        if "among" in less:
            among = _change(np.array(less["among"]) - np.array(caches["sparse"]["among"]), 3)
        state = ["", ""]
        if fewer := caches.get("fewer"):
            state = [_accuracy(fewer["right"]), _change(gold["less"] - np.array(fewer["gold"]), 3)]
        rows.append([*what, _change(gold["less"] - gold["sparse"], 3), among, *state])
    header += ["LESS - int8 slots, right answer", "among the choices"]
    return [*header, "LESS without its state", "what the state adds, right answer"], rows


def summaries(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """ROUGE F1 in percent by model, metric and cache, and what LESS changes on the same articles."""
    header = ["model", "policy", "metric", "tokens", "articles", *TASK_CACHES.values(), "LESS - int8 slots"]
    rows = []
    for caches in _compared(data, lambda row: row["task"] == _SUMMARIES):
        less = caches["less"]
        for metric, name in _METRICS.items():
            found = {kind: 100 * np.array(caches[kind]["rouge"][metric]) for kind in TASK_CACHES}
            what = [less["model"], less["policy"], name, f"{less['tokens']:,}", str(len(found["less"]))]
            what += [f"{x.mean():.1f}" for x in found.values()]
            rows.append([*what, _change(found["less"] - found["sparse"], 1)])
    return header, rows


def _compared(data: dict[str, Any], wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, dict[str, Any]]]:
    """Rows by cache, for each task and kernels that all of TASK_CACHES were measured of, on as many items; the full
    cache has no kernels, and is compared with those of all."""
    chosen = [row for row in data["rows"] if wanted(row)]
    full = {(row["model"], row["task"], row["limit"]): row for row in chosen if row["kind"] == "full"}
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in chosen:
        key = (row["model"], row["task"], row["limit"])
        if row["kind"] != "full" and key in full:
            found.setdefault((*key, row["kernels"]), {"full": full[key]})[row["kind"]] = row
    return [caches for caches in found.values() if caches.keys() >= TASK_CACHES.keys()]


def _change(values: np.ndarray, digits: int) -> str:
    """The mean of differences, with its interval."""
    return statistics.mean(values).text(f"+.{digits}f")


def _accuracy(right: list[int]) -> str:
    """The share of right answers, with its standard error, in percent."""
    share = float(np.mean(right))
    return f"{100 * share:.1f} ({100 * (share * (1 - share) / len(right)) ** 0.5:.1f})"


#: The context, and the texts, that the README speaks of.
HEADLINE_LENGTH = 1024
HEADLINE_TEXTS = (*HELD_OUT, "c4", "languages", "films", "wiki")


def headline(data: dict[str, Any]) -> list[tuple[str, float, float]]:
    """By model, the mean KL of these texts with LESS and with int8 slots of the same bytes in each layer, with the
    kernels of the defaults."""
    chosen: dict[str, list[list[float]]] = {}
    for row in data["rows"]:
        default = row["policy"] == "h2o" and edition_of(row) == "today"
        if default and row["length"] == HEADLINE_LENGTH and row["text"] in HEADLINE_TEXTS:
            slots = "divided" if "divided" in row["kl"] else "sparse"
            means = [float(np.mean(row["kl"][name])) for name in ("less", slots)]
            chosen.setdefault(row["model"], []).append(means)
    return [(model, *np.mean(found, 0)) for model, found in chosen.items()]


def _texts(names: list[str]) -> str:
    known = {("calibration",): "shipped", (EARLIER_TEXT,): "shipped earlier", (PASSAGES,): "shipped, with passages"}
    return known.get(tuple(names), "shipped earlier, web")


def _slots(counts: list[int]) -> str:
    """The slots of the layers that evict, in order, or their mean and range if they are many."""
    if len(set(counts)) == 1:
        return str(counts[0])
    if len(counts) <= 3:
        return "/".join(map(str, counts))
    return f"{np.mean(counts):.0f}, {min(counts)} to {max(counts)}"
