"""Tables of the tested architectures: recipes at full width, and all of transformers in a tiny size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


def full_width(data: dict[str, Any]) -> Table:
    """Every recipe's architecture at full width, with two layers of each kind."""
    header = ["recipe", "class", "layers", "weights", "torch vs HF", "ONNX vs torch", "export, CPU time", "peak RSS"]
    rows = [
        [
            f"`{r['recipe']}`",
            f"`{r['class']}`",
            ", ".join(map(str, r["layers"])),
            f"{r['weight_bytes'] / 1e9:.2f} GB",
            f"{r['torch_against_hf']:.1e}",
            f"{r['onnx_against_torch']:.1e}",
            f"{r['export_cpu_seconds']:.0f} s",
            f"{r['peak_rss_mb'] / 1e3:.1f} GB",
        ]
        for r in data["rows"]
    ]
    return header, rows


def _with_outcome(outcome: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in data["rows"] if r["outcome"] == outcome]


def supported(data: dict[str, Any]) -> Table:
    """Model types whose export agrees with Hugging Face."""
    rows = [
        [f"`{r['model_type']}`", f"`{r['class']}`", _sliding(r["layers"]), f"{r['error']:.1e}"]
        for r in _with_outcome("supported", data)
    ]
    return ["model type", "class", "sliding layers", "difference"], rows


def _sliding(layers: list[list[int]]) -> str:
    windows = [bool(layer[-1]) for layer in layers]
    return "all" if all(windows) else "some" if any(windows) else ""


def refused(data: dict[str, Any]) -> Table:
    """Decoders that LESS cannot express, with the message of the refusal."""
    return ["model type", "reason"], [
        [f"`{r['model_type']}`", _cell(r["reason"])] for r in _with_outcome("refused", data)
    ]


def unknown(data: dict[str, Any]) -> Table:
    """Model types that could not be tried, or failed."""
    rows = [*_with_outcome("failed", data), *_with_outcome("no tiny config", data)]
    return ["model type", "reason"], [[f"`{r['model_type']}`", _cell(r["reason"])] for r in rows]


def not_decoders(data: dict[str, Any]) -> Table:
    """Encoder-decoders, and decoders taken from them, that transformers lists as causal language models."""
    rows = [[f"`{r['model_type']}`", _cell(r["reason"])] for r in _with_outcome("not a decoder", data)]
    return ["model type", "reason"], rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


#: By table name: the name of the result file, and the function that makes the table.
PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], Table]]] = {
    "full_width": ("full_width", full_width),
    "zoo_supported": ("zoo", supported),
    "zoo_refused": ("zoo", refused),
    "zoo_unknown": ("zoo", unknown),
    "zoo_not_decoders": ("zoo", not_decoders),
}
