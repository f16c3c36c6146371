"""Throughput and time between tokens of less-export's server and llama.cpp's, under concurrent requests.

    python benchmarks/bench_serving.py --work FOLDER

exports the bundle and builds ``llama-server`` in ``FOLDER`` unless they are there (cmake and a C++ compiler are
needed), starts both servers and measures every cell: so many requests at the same time with prompts of so many tokens.
The servers run at the same time, but get load in turns, cell by cell. A cell that is in the results is not measured
again: a run that was stopped goes on, and more ``--rounds`` add to the earlier ones. ``--llama-server`` takes a
program that was built elsewhere.

Prompts are token ids, so that both servers get exactly the wanted number; no two begin alike, because servers keep what
they have seen. Answers are greedy and do not end before ``--tokens``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import llama_cpp
import serving_servers
from bench_common import RESULTS, machine
from serving_servers import ROWS, Running

LEVELS, LENGTHS, TOKENS = (1, 2, 4, 8), (128, 1024, 4096), 32
#: Seconds that a request may take.
SECONDS = 3600
WORDS = ("time", "river", "stone", "morning", "letter", "garden", "window", "number", "summer", "paper", "journey")
#: Whatever the server's defaults are: the most likely token, of all of them, and nothing from earlier requests.
SAMPLING = {
    "temperature": 0,
    "repeat_penalty": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "cache_prompt": False,
}


def post(url: str, body: dict[str, Any]) -> Any:
    """The open reply to a body of JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=SECONDS)


def prompt(server: Running, tokens: int, salt: int) -> list[int]:
    """Token ids by the server's own tokenizer, of a text that begins with ``tokens`` and ``salt``."""
    text = f"{tokens} {salt} " + " ".join(WORDS[(i * 7 + salt + i // 11) % len(WORDS)] for i in range(tokens))
    with post(f"{server.url}/tokenize", {"prompt": text, "content": text, "add_special": True}) as reply:
        ids: list[int] = json.load(reply)["tokens"]
    if len(ids) < tokens:
        raise SystemExit(f"{server.url}: its tokenizer makes {len(ids)} tokens of {tokens} words")
    return ids[:tokens]


def completion(server: Running, ids: list[int], count: int) -> list[float]:
    """Times of one streamed completion of ``count`` tokens: of its request, and of each chunk with text.

    Raises:
        RuntimeError: the server reports an error, or other numbers of tokens. OSError: it does not answer.
    """
    body = {"prompt": ids, "max_tokens": count, "stream": True, "stream_options": {"include_usage": True}, **SAMPLING}
    times, usage = [time.perf_counter()], {}
    with post(f"{server.url}/v1/completions", body) as reply:
        for line in reply:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                times.append(time.perf_counter())
    counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if counted != (len(ids), count) or len(times) < 2:
        raise RuntimeError(f"asked for {len(ids)} + {count} tokens, it counts {counted} in {len(times) - 1} chunks")
    return times


def together(server: Running, prompts: list[list[int]], count: int) -> tuple[list[list[float]], float]:
    """Send requests at the same time; the times of each, and the seconds until the last has ended."""
    results: list[list[float]] = []
    failures: list[Exception] = []

    def one(ids: list[int]) -> None:
        try:
            results.append(completion(server, ids, count))
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
        reason = failures[0].read().decode() if isinstance(failures[0], urllib.error.HTTPError) else failures[0]
        raise SystemExit(f"{server.url}: {reason}")
    return results, seconds


def measure(server: Running, requests: int, length: int, count: int, salt: int) -> dict[str, Any]:
    """The figures of a cell."""
    prompts = [prompt(server, length, salt + i) for i in range(requests)]
    results, seconds = together(server, prompts, count)
    gaps = sorted(b - a for times in results for a, b in itertools.pairwise(times[1:]))
    return {
        "seconds": seconds,
        "new_tokens_per_second": requests * count / seconds,
        "first_token_seconds": statistics.median(times[1] - times[0] for times in results),
        "between_tokens_seconds": {
            "median": statistics.median(gaps),
            "p95": gaps[int(len(gaps) * 0.95)],
            "longest": gaps[-1],
        },
        "resident_bytes": server.resident_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for bundles, llama.cpp and logs")
    parser.add_argument("--llama-server", type=Path, metavar="PROGRAM", help="default: built in the work folder")
    parser.add_argument("--weights", nargs="+", choices=serving_servers.WEIGHTS, default=["int4"])
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="requests at the same time")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of an answer (default: {TOKENS})")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--remark", default="", metavar="TEXT", help="what readers of the tables must know of this run")
    args = parser.parse_args()
    if max(args.levels) > ROWS or min(args.levels) < 1 or args.tokens < 2 or min(args.lengths) < 1:
        parser.error(f"--levels must be in 1..{ROWS}, --tokens at least 2, --lengths at least 1")
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if args.llama_server is None:
        program, version = serving_servers.llama_server(work), llama_cpp.PACKAGE
    else:
        program = args.llama_server.absolute()
        version = serving_servers.version(program)
    facts = {
        "model": serving_servers.MODEL,
        "threads": serving_servers.THREADS,
        "rows": ROWS,
        "tokens": args.tokens,
        "llama_cpp": version,
        "remark": args.remark,
        "machine": machine(),
    }
    report = json.loads(args.out.read_text()) if args.out.exists() else {**facts, "servers": {}, "cells": []}
    if changed := [name for name, fact in facts.items() if report[name] != fact]:
        raise SystemExit(f"{args.out} was measured with another {changed[0]}: move it, or choose another --out")
    context = max(*args.lengths, *LENGTHS) + args.tokens
    servers = []
    for weights in args.weights:
        servers.append(serving_servers.ours(weights, work))
        servers.append(serving_servers.llama_cpp(weights, program, work, context))
    with contextlib.ExitStack() as stack:
        started = {s.name: stack.enter_context(serving_servers.running(s, work)) for s in servers}
        for server in servers:
            together(started[server.name], [prompt(started[server.name], 512, i) for i in range(ROWS)], 2)  # warm-up
            options = [Path(x).name if "/" in x else x for x in server.command]
            report["servers"][server.name] = {
                "weights": server.weights,
                "stored": server.stored,
                "cache": server.cache,
                "command": " ".join(options),
            }
        done = {(c["server"], c["requests"], c["prompt_tokens"], c["round"]) for c in report["cells"]}
        cells = itertools.product(range(args.rounds), args.lengths, args.levels, started)
        for turn, length, level, name in cells:  # the servers take turns, so that a slow minute slows all
            if (name, level, length, turn) in done:
                continue
            figures = measure(started[name], level, length, args.tokens, 1000 * (turn + 1) + 100 * level)
            place = {"server": name, "requests": level, "prompt_tokens": length, "round": turn}
            report["cells"].append({**place, **figures})
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            rate = figures["new_tokens_per_second"]
            print(f"{name}: {level} requests of {length} tokens: {rate:.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
