"""Continuous batching in one process: concurrent requests against sequential ones, and what a long prompt stops.

    python benchmarks/bench_engine.py --work FOLDER

Gemma 3 270M in float32 on ONNX Runtime's CPU; the bundle is exported into ``FOLDER`` unless it is there. The first part
runs the same 8 requests one after another and all at the same time, in turns. In the second, 7 requests decode while a
prompt of 768 tokens arrives: the longest time between two tokens of the others, until that prompt's first token,
beside the times of the engine's steps in the same window.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import serving_servers
from bench_common import write_results
from serving_servers import ROWS

import less_export
from less_export.hf import data
from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generator
from less_export.runtime.scheduler import Event
from less_export.runtime.sequence import Sequence

#: Tokens of the prompts and of the answers of the first part, and of the long prompt.
PROMPTS, TOKENS, LONG = (16, 128), 32, 768


class Requests:
    """Requests that are running, and the times of their tokens."""

    def __init__(self, engine: Engine, prompts: list[list[int]], tokens: int) -> None:
        self._engine, self._ended = engine, threading.Semaphore(0)
        self.error: Exception | None = None
        self.sequences = [engine.sequence(p, max_new_tokens=tokens, ignore_eos=True) for p in prompts]
        self.times: dict[Sequence, list[float]] = {s: [] for s in self.sequences}
        engine.submit(self.sequences, self._take)

    def _take(self, event: Event) -> None:
        self.times[event.sequence].append(time.perf_counter())
        self.error = self.error or event.error
        if event.error is not None or (event.token is not None and event.token.finish_reason is not None):
            self._ended.release()

    def wait(self) -> list[list[int]]:
        """The tokens of all, once they have ended."""
        for _ in self.sequences:
            self._ended.acquire()
        if self.error is not None:
            raise self.error
        return [s.token_ids for s in self.sequences]

    def cancel(self) -> None:
        self._engine.cancel(self.sequences)


def throughput(engine: Engine, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Seconds of all requests, one after another and at the same time, by round; and how many got the
    same tokens in each of them."""
    seconds: dict[str, list[float]] = {"sequential": [], "concurrent": []}
    answers: dict[str, list[list[int]]] = {}
    same = len(prompts)
    for _ in range(rounds):
        for name, parts in (("sequential", [[p] for p in prompts]), ("concurrent", [prompts])):
            begin = time.perf_counter()
            answers[name] = [ids for part in parts for ids in Requests(engine, part, TOKENS).wait()]
            seconds[name].append(time.perf_counter() - begin)
        same = min(same, sum(a == b for a, b in zip(*answers.values(), strict=True)))
    return {"prompt_tokens": len(prompts[0]), "seconds": seconds, "same_answers": same}


def stall(engine: Engine, prompts: list[list[int]], long: list[int]) -> dict[str, float]:
    """What the others wait while a long prompt is fed, in seconds."""
    steps: list[tuple[bool, float]] = []
    step = engine.backend.step

    def timed(input_ids: Any, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return step(input_ids, *args)
        finally:
            steps.append((input_ids.shape[1] > 1, time.perf_counter() - begin))

    others = Requests(engine, prompts, 4 * LONG)
    while others.error is None and min(map(len, others.times.values())) < 8:
        time.sleep(0.01)
    engine.backend.step = timed  # type: ignore[method-assign]
    try:
        begin = time.perf_counter()
        arrival = Requests(engine, [long], 1)
        arrival.wait()
    finally:
        engine.backend.step = step  # type: ignore[method-assign]
        others.cancel()
    if others.error is not None:
        raise others.error
    (end,) = arrival.times[arrival.sequences[0]]
    gaps = [b - a for t in others.times.values() for a, b in itertools.pairwise(t) if b > begin and a < end]
    pieces, decodes = ([s for fed, s in steps if fed is kind] for kind in (True, False))
    return {
        "longest_gap": max(gaps),
        "piece": statistics.median(pieces),
        "decode": statistics.median(decodes),
        "first_token": end - begin,
    }


def text_ids(model: Generator, count: int, place: int) -> list[int]:
    """``count`` tokens of the calibration text, of another part of it for every ``place``."""
    assert model.tokenizer is not None
    text = data.shipped("calibration").text
    ids = model.tokenizer.encode(text[10_000 * place :][: 16 * count])
    assert len(ids) >= count
    return ids[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remark", default="", metavar="TEXT", help="what readers of the tables must know of this run")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = less_export.open_bundle(serving_servers.bundle("f32", args.work))
    results: dict[str, Any] = {"remark": args.remark, "model": serving_servers.MODEL, "weights": "f32"}
    results |= {"rows": ROWS, "tokens": TOKENS}
    with Engine(model, rows=ROWS) as engine:
        Requests(engine, [text_ids(model, 300, i) for i in range(ROWS)], 4).wait()  # warm-up
        results["throughput"] = [
            throughput(engine, [text_ids(model, n, i) for i in range(ROWS)], args.rounds) for n in PROMPTS
        ]
        prompts = [text_ids(model, PROMPTS[0], i) for i in range(ROWS - 1)]
        stalls = [stall(engine, prompts, text_ids(model, LONG, ROWS + i)) for i in range(args.rounds)]
    results["stall"] = {"prompt_tokens": LONG, "piece_tokens": model.backend.contract.chunk, "rounds": stalls}
    write_results("engine", results)


if __name__ == "__main__":
    main()
