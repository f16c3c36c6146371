"""The plots of the docs, from the committed results in ``benchmarks/results``."""

from __future__ import annotations

import json
from typing import Any

import kernels_tables
import matplotlib
import numpy as np
import quality_tables
import serving_tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_common import RESULTS


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=120)
    print(f"wrote {RESULTS / name}")


def decode_cost() -> None:
    """Time of a decode step and bytes of the cache over the context, for LESS and the full cache."""
    data = json.loads((RESULTS / "decode_cost.json").read_text())
    rows = data["rows"]
    contexts = [r["context"] for r in rows]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 3.8))
    time.plot(contexts, [r["full_ms"] for r in rows], "o-", label="full cache (ordinary export)")
    time.plot(contexts, [r["less_ms"] for r in rows], "s-", label=f"LESS, {data['slots']} slots")
    time.plot(contexts, [r["sparse_ms"] for r in rows], "^:", label="the same without kernels")
    time.set_ylabel("decode step, ms")
    memory.plot(contexts, [r["full_cache_bytes"] / 1e6 for r in rows], "o-", label="full cache")
    memory.plot(contexts, [r["less_state_bytes"] / 1e6 for r in rows], "s-", label=f"LESS, {data['slots']} slots")
    memory.set_ylabel("cache of one sequence, MB")
    memory.set_yscale("log")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{data['layers']} layers of TinyLlama-1.1B's shape, {data['dtype']}, batch {data['batch']}, "
        f"ONNX Runtime {data['machine']['versions']['onnxruntime']}, {data['machine']['cores']} cores",
        fontsize=10,
    )
    _save(figure, "decode_cost.png")


def quality() -> None:
    """Perplexity of every setting, and the relative error of the layers, with and without LESS."""
    measured = quality_tables.Quality(json.loads((RESULTS / "quality.json").read_text()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=[3, 2])
    settings = [s for s in measured.settings() if measured.less("in", s)]
    caches = {"sparse": "sparse", "sparse+4": "+4 tokens", "sparse+bytes R8": "= bytes of LESS"}
    for marker, (cache, label) in zip("v^s", caches.items(), strict=True):
        rows = [(i, measured.one("in", s, cache)) for i, s in enumerate(settings)]
        points = [(i, r.row["perplexity"]) for i, r in rows if r is not None]
        left.plot(*zip(*points, strict=True), marker, label=label) if points else None
    less = [np.mean([f.row["perplexity"] for f in measured.less("in", s)]) for s in settings]
    left.plot(range(len(settings)), less, "o", label="LESS, R = 8")
    divided = [(settings.index(s.removesuffix(quality_tables.DIVIDED)), s) for s in measured.divided()]
    for marker, label, recipe in (("P", "", quality_tables.PLAIN), ("*", ", end to end", quality_tables.TUNED)):
        rows = [(i, measured.less("in", s, recipe)) for i, s in divided]
        points = [(i, np.mean([f.row["perplexity"] for f in less])) for i, less in rows if less]
        left.plot(*zip(*points, strict=True), marker, label=f"LESS, divided{label}") if points else None
    full = measured.one("in", "", "full")
    if full is not None:
        left.axhline(full.row["perplexity"], color="black", linestyle=":", label="full cache")
    left.set_xticks(range(len(settings)), [s.replace(", ", "\n") for s in settings], fontsize=8)
    left.set_ylabel("perplexity, WikiText-2 test")
    plain = [(s, r) for s, r in measured.training if r == "R8 hidden 128 exp steps 500 seed 0"]
    layers = max((measured.training[k] for k in plain), key=len)
    ticks = range(len(layers))
    for shift, (name, label) in enumerate((("sparse", "sparse"), ("start", "k-means start"), ("less", "LESS"))):
        right.bar([i + 0.27 * (shift - 1) for i in ticks], [x[name] for x in layers], 0.27, label=label)
    right.set_xticks(ticks, [str(x["layer"]) for x in layers], fontsize=8)
    right.set_xlabel("layer")
    right.set_ylabel("relative error of the layer's output")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8)
    figure.suptitle("Gemma 3 270M, contexts of 1,024 tokens, one token a step", fontsize=10)
    _save(figure, "quality.png")


def long() -> None:
    """What eviction costs along a stream: loss of every cache above that of the full cache."""
    data = json.loads((RESULTS / "long.json").read_text())
    length, chunk = max(r["length"] for r in data["rows"]), data["chunk"]
    means = {r["cache"]: np.mean(list(r["nll"].values()), 0) for r in data["rows"]}
    full, width = means.pop("full"), 1024 // chunk
    figure, axes = plt.subplots(figsize=(9, 4))
    for name, losses in means.items():
        smooth = np.convolve(losses - full, np.ones(width) / width, "valid")
        axes.plot((np.arange(len(smooth)) + width / 2) * chunk, smooth, label=name)
    axes.set_xlim(0, length)
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("loss above the full cache, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(
        f"{data['model']}, {data['slots']} slots, mean of {len(data['rows'][0]['nll'])} streams over 1,024 tokens"
    )
    _save(figure, "long.png")


def serving() -> None:
    """Two servers under load, by requests at the same time: throughput, and time between tokens."""
    data = json.loads((RESULTS / "serving.json").read_text())
    found = serving_tables.cells(data)
    lengths = sorted({length for _, length, _ in found})
    figure, grid = plt.subplots(2, len(lengths), figsize=(4 * len(lengths), 6.4), squeeze=False, sharex=True)
    for length, (top, bottom) in zip(lengths, grid.T, strict=True):
        for name in data["servers"]:
            levels = sorted(r for s, n, r in found if (s, n) == (name, length))
            figures = [found[name, length, r] for r in levels]
            style = "s-" if name.startswith("less-export") else "o--"
            top.plot(levels, [f["new_tokens_per_second"] for f in figures], style, label=name)
            bottom.plot(levels, [1e3 * f["between_p95"] for f in figures], style, label=name)
        top.set_title(f"prompts of {length:,} tokens", fontsize=10)
        bottom.set_xlabel("requests at the same time")
    grid[0, 0].set_ylabel("new tokens per second")
    grid[1, 0].set_ylabel("between tokens, 95%, ms")
    grid[0, 0].legend(fontsize=8)
    for axes in grid.flat:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{data['model']}, answers of {data['tokens']} tokens, {data['threads']} threads", fontsize=10)
    _save(figure, "serving.png")


def gpu() -> None:
    """Decode on a GPU: bandwidth compared with a copy, and time compared with attention over a full cache."""
    data = json.loads((RESULTS / "gpu.json").read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    rows = data["decode"]
    left.bar(range(len(rows)), [r["gb_per_s"] for r in rows])
    left.axhline(data["bandwidth"]["gb_per_s"], color="black", linestyle=":", label="device-to-device copy")
    int8 = ["\nint8" if r.get("slot_dtype") == "int8" else "" for r in rows]
    labels = [f"B{r['batch']}\nC{r['slots']}\nHk{r['kv_heads']}{x}" for r, x in zip(rows, int8, strict=True)]
    left.set_xticks(range(len(rows)), labels, fontsize=7)
    left.set_ylabel("decode step, GB/s")
    for batch in sorted({r["batch"] for r in data["full_cache"]}):
        selected = [r for r in data["full_cache"] if r["batch"] == batch]
        (line,) = right.plot(
            [r["context"] for r in selected], [r["sdpa_us"] for r in selected], "o-", label=f"SDPA, batch {batch}"
        )
        ours = [r["plugin_us"] for r in selected]
        right.plot([r["context"] for r in selected], ours, "s--", color=line.get_color(), label=f"LESS, batch {batch}")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("context, tokens")
    right.set_ylabel("decode step, us")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{data['machine']['gpu']}, float16, policy h2o, D 128, R 16", fontsize=10)
    _save(figure, "gpu.png")


def kernels() -> None:
    """KL from the full cache by text, for slots alone and for LESS in the same bytes."""
    data = json.loads((RESULTS / "kernels.json").read_text())
    edition = {"h2o": "today", "sink": "passages"}  # those of docs/results/quality.md
    chosen = [r for r in data["rows"] if kernels_tables.edition_of(r) == edition[r["policy"]] and r["length"] == 1024]
    panels = sorted({(r["policy"], r["model"]) for r in chosen})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), squeeze=False)
    for ax, (policy, model) in zip(axes[0], panels, strict=True):
        rows = [r for r in chosen if (r["policy"], r["model"]) == (policy, model)]
        for shift, cache in enumerate(("16-bit", "sparse", "divided", "less")):
            means = [np.mean(r["kl"][cache]) for r in rows]
            ax.bar(np.arange(len(rows)) + 0.2 * (shift - 1.5), means, 0.2, label=kernels_tables.CACHES[cache])
        ax.set_xticks(range(len(rows)), [r["text"] for r in rows], rotation=45, ha="right", fontsize=8)
        ax.set_ylabel("KL from the full cache, nats")
        ax.set_title(f"{model}, {policy}", fontsize=10)
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    _save(figure, "kernels.png")


if __name__ == "__main__":
    decode_cost()
    quality()
    long()
    serving()
    kernels()
    if (RESULTS / "gpu.json").is_file():
        gpu()
