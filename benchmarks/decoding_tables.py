"""The tables about decoding: its cost by context and beside peers, where a step goes, what choosing tokens costs."""

from __future__ import annotations

from typing import Any


def decode_cost(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Cost of a decode step, compared with the full cache."""
    rows = [
        [
            f"{r['context']:,}",
            f"{r['less_ms']:.1f}",
            f"{r['sparse_ms']:.1f}",
            f"{r['full_ms']:.1f}",
            f"{r['speedup']:.2f}x",
            f"{r['less_state_bytes'] / 1e6:.2f}",
            f"{r['full_cache_bytes'] / 1e6:.2f}",
        ]
        for r in data["rows"]
    ]
    header = [
        "context",
        "LESS, ms",
        "without kernels, ms",
        "full cache, ms",
        "full / LESS",
        "LESS state, MB",
        "full cache, MB",
    ]
    return header, rows


def decode_cost_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    note = f"{data['layers']} layers, {data['dtype']}, batch {data['batch']}, {data['slots']} slots, {data['policy']}, "
    kernels = f"{data['kernel_bytes'] / 1e6:.2f} MB of kernels for all rows"
    return f"{note}rank {data['rank']}, hidden {data['hidden']}: {kernels}"


def peers(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Export and decoding against other exporters. Rows may lack an export, or some contexts."""
    rows = []
    contexts = sorted({c["context"] for r in data["rows"] for c in r.get("contexts", [])})
    for r in data["rows"]:
        if "failed" in r:
            rows.append([r["who"], r["precision"], r["failed"], *[""] * (2 + 2 * len(contexts))])
            continue
        exported = {"seconds": ".0f", "peak_rss_mb": ",.0f", "written_mb": ",.1f"}
        cells = [format(r[name], shown) if name in r else "" for name, shown in exported.items()]
        measured = {c["context"]: c for c in r["contexts"]}
        for context in contexts:
            c = measured.get(context, {"failed": "not measured"})
            cells += (
                [c["failed"], ""] if "failed" in c else [f"{c['tokens_per_second']:.2f}", f"{c['resident_mb']:,.0f}"]
            )
        rows.append([r["who"], r["precision"], *cells])
    header = ["exporter", "weights", "export, s", "its peak RSS, MB", "written, MB"]
    header += [h for c in contexts for h in (f"tokens/s at {c:,}", f"resident at {c:,}, MB")]
    return header, rows


def peers_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    checkpoint = f"fp16 checkpoint of {data['checkpoint_mb']:,.0f} MB"
    return f"{data['layers']} layers, {checkpoint}, {data['slots']} slots, {data['threads']} threads"


def peers_prompts(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Feeding prompts against other exporters."""
    measured = [r for r in data["rows"] if r.get("prompts")]
    sizes = [p["tokens"] for p in measured[0]["prompts"]] if measured else []
    rows = []
    for r in measured:
        cells = [p["failed"] if "failed" in p else f"{p['tokens_per_second']:.1f}" for p in r["prompts"]]
        rows.append([r["who"], r["precision"], *cells])
    return ["exporter", "weights", *(f"{n:,} tokens" for n in sizes)], rows


def sampler(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of a step by what rows ask for and by their number; before and now, if both were measured."""
    times = {(r["case"], r["rows"]): r["milliseconds"] for r in data["rows"]}
    counts = sorted({count for _, count in times}, reverse=True)
    kinds = list(data["rows"][0]["milliseconds"])
    header = [f"{'a row alone' if n == 1 else f'{n} rows'}, {kind}" for n in counts for kind in kinds]
    rows = []
    for case in dict.fromkeys(case for case, _ in times):
        cells = [times.get((case, count), {}).get(kind) for count in counts for kind in kinds]
        rows.append([case, *("" if ms is None else f"{ms:.2f}" for ms in cells)])
    return ["rows ask for", *header], rows


def sampler_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    before = f"before: commit {data['before']}; " if data["before"] else ""
    return (
        f"CPU time in milliseconds, median of {data['steps']} steps; {before}a vocabulary of {data['vocab']:,}, "
        f"prompts of {data['prompt']:,} tokens; numpy {data['machine']['versions']['numpy']}"
    )


def step(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Microseconds of a step and of its parts, by how weights are stored and by what runs LessAttention."""
    header = ["weights", "LessAttention", "step, us", "products with weights", "caches", "the rest", "a layer's cache"]
    names = {"native": "native operator", "onnx": "the graph's nodes"}
    rows = []
    for r in data["rows"]:
        parts, layers = r["parts"], data["layers"]
        times = [f"{parts[p]['us']:,} ({parts[p]['nodes']})" for p in ("weights", "cache", "rest")]
        own = f"{parts['cache']['us'] / layers:,.0f}"
        rows.append([r["weights"], names[r["operator"]], f"{r['step_us']:,}", *times, own])
    return header, rows


def step_note(data: dict[str, Any]) -> str:
    """What was measured, as text."""
    threads = f"{data['threads']} threads" if data["threads"] > 1 else "one thread"
    return (
        f"microseconds by ONNX Runtime's profiler, number of nodes in brackets; {data['layers']} layers of TinyLlama's "
        f"shape, {data['slots']} int8 slots, one row, {threads}"
    )


#: Results, table and note by the table's name.
PARTS: dict[str, Any] = {
    "decode_cost": ("decode_cost", decode_cost, decode_cost_note),
    "peers": ("peers", peers, peers_note),
    "peers_prompts": ("peers", peers_prompts, lambda data: "tokens/s"),
    "sampler": ("sampler", sampler, sampler_note),
    "step": ("step", step, step_note),
}
