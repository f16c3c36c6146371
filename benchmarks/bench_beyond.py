"""Streams past the length that a model was trained for: loss by position, what slots hold at the end, and recall.

Streams of the texts that ``--text`` names run through the torch backend, 64 tokens a step, without kernels, with 256
slots. For recall, a sentence is planted in each text and asked for again after some distance: the loss of its last
words, once planted and once not. With ``--rotations``, every text becomes as many streams, each of which begins where
another has one part less, so that every part of the positions holds the same text. The result is
``benchmarks/results/beyond.json``, written after every cache; what it holds of the same model, length, texts and
rotations is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import RESULTS, machine
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.config import ExportConfig, HalfLife
from less_export.contract import Contract, SlotDtype
from less_export.evaluation import perplexity, variants
from less_export.hf import data
from less_export.hf.model import OpenModel, open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.progress import Progress, Step
from less_export.runtime.torch import ModelBackend

FILE = RESULTS / "beyond.json"
SLOTS, CHUNK = 256, 64
#: Where the sentence is planted, and the tokens until it is asked for.
PLANTED, DISTANCES = 1000, (500, 2000, 6000)
QUESTION, ANSWER = " The password of the northern gate is", " amber falcon seventeen quiet harbour."


@dataclass(frozen=True)
class Cache:
    """Options of a cache; ``clamped``: distances stay within the trained length."""

    policy: str
    half_life: HalfLife = "none"
    clamped: bool = False
    slots: SlotDtype = "model"

    @property
    def name(self) -> str:
        parts = [self.policy] if self.half_life == "none" else [self.policy, f"half-life {self.half_life}"]
        return ", ".join([*parts, *["clamped"] * self.clamped, *["int8"] * (self.slots == "int8")])

    def open(self, model: str, length: int) -> OpenModel:
        source = resolve(model)
        trained = open_model(source, ExportConfig(policy="full", context=1)).trained_length or length
        return open_model(
            source,
            ExportConfig(
                policy=self.policy,
                score_half_life=None if self.policy == "full" else self.half_life if self.policy == "h2o" else None,
                slots=self.slots,
                max_distance=trained - CHUNK if self.clamped else "none",
                budget=None if self.policy == "full" else str(SLOTS),
                context=length,
                chunk=CHUNK,
            ),
        )


CACHES = (
    Cache("full"),
    Cache("h2o"),
    Cache("h2o", clamped=True),
    Cache("h2o", 512),
    Cache("h2o", 512, clamped=True),
    Cache("h2o", 512, clamped=True, slots="int8"),
    Cache("tova"),
    Cache("tova", clamped=True),
    Cache("sink"),
    Cache("sink", clamped=True),
)


def backend_of(model: PreTrainedModel, opened: OpenModel, rows: int) -> ModelBackend:
    contract = Contract(opened.plan, opened.text_config.vocab_size, "float32", CHUNK, rows, logits="all")
    return ModelBackend(model, contract, opened.kernels)


def losses(model: PreTrainedModel, opened: OpenModel, ids: np.ndarray, step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    """[N, length - 1] losses in nats, and how old the tokens are that slots of evicting layers hold at the end."""
    last = ids.shape[1] - 1
    if not any(s.policy.evicts for s in opened.plan):
        exact = variants.Variant("full", opened.plan, Kernels({}, {}))
        return perplexity.simulated(model, torch.from_numpy(ids), exact, CHUNK, torch.arange(last)), {}
    backend = backend_of(model, opened, len(ids))
    nll = perplexity.streamed(backend, ids, CHUNK, range(last), step)
    evicting = [i for i, s in enumerate(opened.plan) if s.policy.evicts]
    held = [backend.read_row(row).tensors[f"past.{i}.position"] for row in range(len(ids)) for i in evicting]
    positions = np.concatenate([x[x >= 0] for x in held])
    ages = last - positions
    quantiles = {str(q): int(np.quantile(ages, q)) for q in (0.25, 0.5, 0.75, 0.95)}
    return nll, {"age_quantiles": quantiles, "first_1024": round(float((positions < 1024).mean()), 4)}


def recall(model: PreTrainedModel, opened: OpenModel, texts: list[list[int]], encode: data.Encode) -> dict[str, Any]:
    """Mean loss of the answer's tokens by distance, planted and never planted."""
    question, answer = encode(QUESTION), encode(ANSWER)
    sentence, results = question + answer, {}
    for distance in DISTANCES:
        rows = []
        for ids in texts:
            before, after = ids[:PLANTED], ids[PLANTED : PLANTED + distance]
            rows += [before + sentence + after + sentence, before + ids[-len(sentence) :] + after + sentence]
        stream = np.array(rows, np.int64)
        asked = range(stream.shape[1] - len(answer) - 1, stream.shape[1] - 1)
        backend = backend_of(model, opened, len(rows))
        nll = perplexity.streamed(backend, stream, CHUNK, list(asked)).mean(1)
        results[str(distance)] = {"planted": round(float(nll[::2].mean()), 3), "not": round(float(nll[1::2].mean()), 3)}
    return results


def measure(model: PreTrainedModel, opened: OpenModel, cache: Cache, ids: np.ndarray, encode: data.Encode,
            with_recall: bool, progress: Progress) -> dict[str, Any]:  # fmt: skip
    start = time.perf_counter()
    with progress.phase(cache.name, ids.shape[1] // CHUNK) as step:
        nll, held = losses(model, opened, ids, step)
    # One number a step; the last step lacks the token after the stream.
    steps = [[round(float(row[i : i + CHUNK].mean()), 4) for i in range(0, len(row), CHUNK)] for row in nll]
    row = {"cache": cache.name, "length": ids.shape[1], "nll": steps, **held}
    if with_recall:
        row["recall"] = recall(model, opened, ids.tolist(), encode)
    return {**row, "seconds": round(time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="MODEL (default: smollm2-135m)")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="a stream; give several")
    parser.add_argument("--length", type=int, default=16384, metavar="N", help="tokens of a stream (default: 16384)")
    parser.add_argument("--caches", nargs="+", metavar="NAME", help="some of the caches, by name (default: all)")
    parser.add_argument("--rotations", type=int, default=1, metavar="N", help="streams of every text (default: 1)")
    parser.add_argument("--no-recall", action="store_true", help="streams alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source = resolve(args.model)
    encode, bos = data.encoder(source.tokenizer())
    texts = dict(pair.split("=", 1) for pair in args.text)
    contents = {name: Path(file).read_text(encoding="utf-8") for name, file in texts.items()}
    rows = [([] if bos is None else [bos]) + encode(text[: 8 * args.length]) for text in contents.values()]
    part = args.length // args.rotations
    ids = np.array([np.roll(row[: args.length], -part * i) for row in rows for i in range(args.rotations)], np.int64)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    file = json.loads(FILE.read_text()) if FILE.exists() else {}
    facts = {"length": args.length, "texts": hashes} | ({"rotations": args.rotations} if args.rotations > 1 else {})
    models = file.setdefault("models" if args.rotations == 1 else "rotated", {})
    entry = models.get(source.name, {})
    done = {r["cache"]: r for r in entry.get("rows", [])} if {n: entry.get(n) for n in facts} == facts else {}
    model, progress = source.load(torch.float32), Bars()
    for cache in CACHES:
        if cache.name in done or (args.caches and cache.name not in args.caches):
            continue
        whole = cache.policy == "full"
        opened = cache.open(args.model, args.length)
        trained = opened.trained_length or args.length
        mine = ids[:, : min(args.length, trained, 8192)] if whole else ids
        done[cache.name] = measure(model, opened, cache, mine, encode, not (args.no_recall or whole), progress)
        order = [c.name for c in CACHES]
        measured = sorted(done.values(), key=lambda r: order.index(r["cache"]))
        models[source.name] = {**facts, "trained_length": trained, "machine": machine(), "rows": measured}
        file |= {"slots": SLOTS, "chunk": CHUNK}
        write_atomically(FILE, (json.dumps(file, separators=(",", ":")) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
