"""The tables of ``memory.json`` and ``memory_loading.json``: memory of bundles on ONNX Runtime's CPU."""

from __future__ import annotations

from typing import Any


def _memory_cells(row: dict[str, Any]) -> list[str]:
    """Memory of a bundle in MB: loaded, decoding and peak, minus the process before loading."""
    figures = (row["loaded"]["resident_mb"], row["running"]["resident_mb"], row["running"]["peak_mb"])
    return [f"{x - row['empty']['resident_mb']:,.0f}" for x in figures]


def memory(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Memory of a bundle."""
    rows = [
        [f"`{r['model']}`, {r['layers']} layers", r["weights"], f"{r['weight_mb']:,.0f}", *_memory_cells(r)]
        for r in data["rows"]
        if r["variant"] == data["rows"][0]["variant"]
    ]
    header = ["model", "weights", "their files, MB", "loaded, MB", "decoding, MB", "at most, MB"]
    return header, rows


def memory_loading(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Memory while a bundle is loaded."""
    rows = []
    for r in data["rows"]:
        empty, loaded = r["empty"], r["loaded"]
        held = loaded["anonymous_mb"] - empty["anonymous_mb"]
        peak = loaded["loading_mb"] - empty["anonymous_mb"]
        mapped = loaded["peak_mb"] - empty["resident_mb"]
        name = f"`{r['model']}`, {r['layers']} layers"
        rows.append([name, r["weights"], f"{held:,.0f}", f"{peak:,.0f}", f"{peak / held:.2f}", f"{mapped:,.0f}"])
    header = ["model", "weights", "held, MB", "while loading, MB", "ratio", "with mapped files, MB"]
    return header, rows


def memory_options(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The same with other session options, where measured."""
    varied = {r["weights"] for r in data["rows"] if r["variant"] != data["rows"][0]["variant"]}
    rows = []
    for r in data["rows"]:
        if r["weights"] in varied:
            rows.append([r["weights"], r["variant"], *([r["failed"], "", ""] if "failed" in r else _memory_cells(r))])
    header = ["weights", "session options", "loaded, MB", "decoding, MB", "at most, MB"]
    return header, rows


#: Results, table and note by the table's name.
PARTS: dict[str, Any] = {
    "memory": (
        "memory",
        memory,
        lambda data: f"random weights, batch {data['batch']}, less the process before loading",
    ),
    "memory_loading": (
        "memory_loading",
        memory_loading,
        lambda data: "random weights, less the process before loading",
    ),
    "memory_options": ("memory", memory_options, lambda data: ""),
}
