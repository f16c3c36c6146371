"""The tables of ``serving.json`` and ``engine.json``: two servers under load, and what batching gains and stops."""

from __future__ import annotations

import statistics
from typing import Any

Cells = dict[tuple[str, int, int], dict[str, float]]


def cells(data: dict[str, Any]) -> Cells:
    """Figures by server, tokens of a prompt and requests: medians over the rounds, of memory the most."""
    rounds: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for cell in data["cells"]:
        flat = {f"between_{name}": value for name, value in cell["between_tokens_seconds"].items()}
        place = (cell["server"], cell["prompt_tokens"], cell["requests"])
        rounds.setdefault(place, []).append({**flat, **{n: x for n, x in cell.items() if isinstance(x, int | float)}})
    return {
        place: {name: statistics.median(r[name] for r in found) for name in found[0]}
        | {"resident_bytes": max(r["resident_bytes"] for r in found)}
        for place, found in rounds.items()
    }


def pairs(data: dict[str, Any]) -> list[list[str]]:
    """The servers with the same kind of weights."""
    by_weights: dict[str, list[str]] = {}
    for name, facts in data["servers"].items():
        by_weights.setdefault(facts["weights"], []).append(name)
    return list(by_weights.values())


def _rows(data: dict[str, Any]) -> list[tuple[list[str], list[dict[str, float]]]]:
    """First cells of a row, and the figures of its servers, where all of them were measured."""
    found = cells(data)
    places = sorted({place[1:] for place in found})
    rows = []
    for servers in pairs(data):
        formats = " / ".join(s.rpartition(" ")[2] for s in servers)
        for length, requests in places:
            if all((s, length, requests) in found for s in servers):
                figures = [found[s, length, requests] for s in servers]
                rows.append(([formats, f"{length:,}", str(requests)], figures))
    return rows


def throughput(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """New tokens per second of all requests together, and which server is faster by how much."""
    rows = []
    for place, figures in _rows(data):
        ours, theirs = (f["new_tokens_per_second"] for f in figures)
        faster = f"less-export {ours / theirs:.2f}x" if ours > theirs else f"llama.cpp {theirs / ours:.2f}x"
        rows.append([*place, f"{ours:.1f}", f"{theirs:.1f}", faster])
    return ["weights", "prompt, tokens", "requests", "less-export, tokens/s", "llama.cpp, tokens/s", "faster"], rows


def latency(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Time to the first token, and between tokens."""
    rows = []
    for place, figures in _rows(data):
        first = [f"{f['first_token_seconds']:.2f}" for f in figures]
        between = [" / ".join(f"{1e3 * f[f'between_{n}']:.0f}" for n in ("median", "p95", "longest")) for f in figures]
        rows.append([*place, *first, *between])
    header = ["weights", "prompt, tokens", "requests", "first token: less-export, s", "llama.cpp, s"]
    return [*header, "between tokens, median / 95% / longest: less-export, ms", "llama.cpp, ms"], rows


def memory(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The most resident memory after the cells of a prompt length."""
    found, rows = cells(data), []
    lengths = sorted({length for _, length, _ in found})
    for name, facts in data["servers"].items():
        most = []
        for length in lengths:
            held = [f["resident_bytes"] for (s, n, _), f in found.items() if (s, n) == (name, length)]
            most.append(f"{max(held) / 1e6:,.0f}" if held else "")
        rows.append([name, facts["stored"], facts["cache"], *most])
    return ["server", "weights", "cache", *(f"after prompts of {n:,}, MB" for n in lengths)], rows


def _remark(data: dict[str, Any]) -> str:
    return f"**{data['remark']}**; " if data["remark"] else ""


def _median(rounds: int) -> str:
    return f"median of {rounds} rounds" if rounds > 1 else "one round"


def note(data: dict[str, Any]) -> str:
    """What the tables of servers were measured with."""
    rounds = {cell["round"] for cell in data["cells"]}
    load = f"answers of {data['tokens']} tokens, {data['threads']} threads, {data['rows']} sequences at most"
    return f"{_remark(data)}{data['model']}, {load}, {_median(len(rounds))}, llama.cpp: {data['llama_cpp']}"


def engine_throughput(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Tokens per second of the same requests, one after another and at the same time: medians over the rounds."""
    rows = []
    for row in data["throughput"]:
        new = data["rows"] * data["tokens"]
        one, all_ = (new / statistics.median(row["seconds"][kind]) for kind in ("sequential", "concurrent"))
        same = f"{row['same_answers']} of {data['rows']}"
        rows.append([str(row["prompt_tokens"]), f"{one:.1f}", f"{all_:.1f}", f"{all_ / one:.2f}", same])
    return [
        "prompt, tokens",
        "one after another, tokens/s",
        "at the same time, tokens/s",
        "ratio",
        "same answers",
    ], rows


def engine_stall(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How long a prompt stops the others, beside a piece of it and a decode step, by round."""
    rows = []
    for place, r in enumerate(data["stall"]["rounds"]):
        ratio = r["longest_gap"] / (r["piece"] + r["decode"])
        times = [f"{1e3 * r[name]:.0f}" for name in ("longest_gap", "piece", "decode")]
        rows.append([str(place + 1), *times, f"{ratio:.2f}", f"{r['first_token']:.2f}"])
    header = ["round", "longest time between tokens, ms", "median piece, ms", "median decode step, ms"]
    return [*header, "longest / (piece + step)", "its first token, s"], rows


def engine_note(data: dict[str, Any]) -> str:
    """What the first table of the engine was measured with."""
    rounds = len(data["throughput"][0]["seconds"]["sequential"])
    described = f"{data['model']}, {data['weights']}, {data['rows']} requests, answers of {data['tokens']} tokens"
    return f"{_remark(data)}{described}, {_median(rounds)}"


def stall_note(data: dict[str, Any]) -> str:
    """What the second table of the engine was measured with."""
    stall, others = data["stall"], data["rows"] - 1
    pieces = f"a prompt of {stall['prompt_tokens']} tokens in pieces of {stall['piece_tokens']}"
    return f"{_remark(data)}{data['model']}, {data['weights']}, {pieces}, beside {others} requests that decode"


#: The results, the maker and the note of each table.
PARTS = {
    "serving_throughput": ("serving", throughput, note),
    "serving_latency": ("serving", latency, note),
    "serving_memory": ("serving", memory, note),
    "engine_throughput": ("engine", engine_throughput, engine_note),
    "engine_stall": ("engine", engine_stall, stall_note),
}
