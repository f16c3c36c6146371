"""Throughput and time between tokens of servers under concurrent requests, by length of the prompt.

    python benchmarks/bench_serving.py less=http://127.0.0.1:8000/v1 llama.cpp=http://127.0.0.1:8001/v1 \
        --pid less=PID llama.cpp=PID --note llama.cpp="Q4_1, full cache" --out serving.json

The servers of OpenAI's API run already: ``less-export serve``, and as the peer ``python -m llama_cpp.server`` or
another one on the same weights. They get load in turns, never at the same time. A cell that is in the file is not
measured again, so that a run that was stopped goes on. Prompts have the wanted number of tokens by the server's own
count.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

LEVELS, LENGTHS, TOKENS = (1, 2, 4, 8), (128, 1024, 4096), 64
SECONDS = 3600
WORDS = ("time", "river", "stone", "morning", "letter", "garden", "window", "number", "summer", "paper", "journey")


def text_of(words: int, salt: int) -> str:
    """A text that no other request begins with: servers keep what they have seen."""
    return f"{salt} " + " ".join(WORDS[(i * 7 + salt + i // 11) % len(WORDS)] for i in range(words))


def completion(base: str, model: str, prompt: str, count: int) -> tuple[list[float], dict[str, int]]:
    """Times of one streamed completion, the first one that of its request, the others of its chunks; and its usage.

    Raises:
        RuntimeError: the server reports an error. OSError: it refuses the request, or does not answer.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    request = urllib.request.Request(
        f"{base}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    times, usage = [time.perf_counter()], {}
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        for line in reply:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                times.append(time.perf_counter())
    return times, usage or {"prompt_tokens": 0, "completion_tokens": len(times) - 1}


def words_for(base: str, model: str, tokens: int) -> int:
    """How many words make a prompt of so many tokens, by the usage of one completion."""
    words = max(8, tokens // 4)
    _, usage = completion(base, model, text_of(words, 1), 1)
    return max(1, round(words * tokens / max(1, usage["prompt_tokens"])))


def measure(base: str, model: str, prompts: list[str], count: int) -> dict[str, Any]:
    """The figures of requests that begin at the same time."""
    results: list[tuple[list[float], dict[str, int]]] = []
    failures: list[Exception] = []

    def one(prompt: str) -> None:
        try:
            results.append(completion(base, model, prompt, count))
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(p,)) for p in prompts]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if failures:
        raise SystemExit(f"{base}: {failures[0]}")
    gaps = sorted(b - a for times, _ in results for a, b in itertools.pairwise(times[1:]))
    new = sum(usage["completion_tokens"] for _, usage in results)
    return {
        "prompt_tokens": statistics.mean(usage["prompt_tokens"] for _, usage in results),
        "new_tokens": new,
        "seconds": seconds,
        "new_tokens_per_second": new / seconds,
        "first_chunk_seconds": statistics.median(times[1] - times[0] for times, _ in results if len(times) > 1),
        "between_chunks_seconds": {
            "median": gaps[len(gaps) // 2] if gaps else None,
            "p99": gaps[int(len(gaps) * 0.99)] if gaps else None,
            "longest": gaps[-1] if gaps else None,
        },
    }


def resident(pid: str | None) -> int | None:
    """Bytes of memory that a process has, its children not counted."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


def named(values: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` as a dictionary."""
    if not all("=" in v for v in values):
        raise SystemExit(f"these must be NAME=VALUE: {' '.join(values)}")
    return {v.partition("=")[0]: v.partition("=")[2] for v in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--pid", nargs="*", default=[], metavar="NAME=PID", help="processes whose memory is measured")
    parser.add_argument("--note", nargs="*", default=[], metavar="NAME=TEXT", help="weights and cache of a server")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    servers, pids, notes = named(args.servers), named(args.pid), named(args.note)
    report = json.loads(args.out.read_text()) if args.out.exists() else {"tokens": args.tokens, "cells": []}
    if report["tokens"] != args.tokens:
        raise SystemExit(f"{args.out} was measured with --tokens {report['tokens']}: choose another --out")
    report["notes"] = {**report.get("notes", {}), **notes}
    done = {(c["server"], c["requests"], c["wanted_prompt_tokens"], c["round"]) for c in report["cells"]}
    words: dict[tuple[str, int], int] = {}
    cells = [(t, n, k, s) for t in range(args.rounds) for n in args.lengths for k in args.levels for s in servers]
    for turn, length, level, name in cells:  # the servers take turns, so that a slow hour slows all
        if (name, level, length, turn) in done:
            continue
        base = servers[name]
        with urllib.request.urlopen(f"{base}/models", timeout=SECONDS) as reply:
            model = json.load(reply)["data"][0]["id"]
        if (name, length) not in words:
            words[name, length] = words_for(base, model, length)
        salt = 1000 * (turn + 1) + 100 * level
        prompts = [text_of(words[name, length], salt + i) for i in range(level)]
        place = {"server": name, "requests": level, "wanted_prompt_tokens": length, "round": turn}
        figures = measure(base, model, prompts, args.tokens)
        report["cells"].append({**place, **figures, "resident_bytes": resident(pids.get(name))})
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        rate = figures["new_tokens_per_second"]
        print(f"{name}: {level} requests of {length} tokens: {rate:.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
