"""Streams past the length that a model was trained for: loss by position, and what slots hold at the end.

Streams of the texts that ``--text`` names run through the torch backend, 64 tokens a step, with 256 slots. With
``--kernels``, two caches are compared instead: LESS with the slots that its kernels were trained with, and the slots
alone that take the same bytes. With ``--simulate``, the simulation computes every 8th loss of streams of one token a
step, many times faster. With ``--rotations``, every text becomes as many streams, each of which begins where
another has one part less, so that every part of the positions holds the same text. The result is
``benchmarks/results/beyond.json``, written after every cache; what it holds of the same model, length, texts and
options is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import RESULTS, machine
from torch import Tensor
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.config import ExportConfig, HalfLife
from less_export.contract import Contract, LayerSpec, SlotDtype
from less_export.evaluation import perplexity, variants
from less_export.hf import data
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.less.rotary import RotaryTable
from less_export.progress import Progress, Step
from less_export.runtime.torch import ModelBackend

FILE = RESULTS / "beyond.json"
SLOTS, CHUNK = 256, 64
#: Every how many positions the simulation gives a loss.
STRIDE = 8
#: The dtype in which bytes are compared.
BYTES = "bfloat16"


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

    def open(self, model: str, length: int) -> Opened:
        source = resolve(model)
        trained = open_model(source, ExportConfig(policy="full", context=1)).trained_length or length
        opened = open_model(
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
        return Opened(self.name, opened.plan, opened.kernels, opened.rotary_tables(length))


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


@dataclass(frozen=True)
class Opened:
    """A cache of a model: its name, the plan of its layers, kernels with constants and tables, and tables of all
    distances in a stream."""

    name: str
    plan: tuple[LayerSpec, ...]
    kernels: Kernels
    tables: Sequence[RotaryTable]


def with_kernels(model: str, file: Path, length: int) -> list[Opened]:
    """LESS as its kernels were trained, and slots alone that take the same bytes, in the defaults of an export."""
    slots = Kernels.load(file).provenance["slots"]
    config = ExportConfig(
        kernels=file, budget=str(max(map(sum, slots.values()))), context=length, chunk=CHUNK,
        layer_budgets=",".join(f"{i}:{sum(x)}" for i, x in slots.items()),
    )  # fmt: skip
    opened = open_model(resolve(model), config)
    built = variants.build(("sparse+bytes", "less"), opened.plan, opened.kernels, length, BYTES)

    def name(variant: variants.Variant) -> str:
        least, most = min(variant.slots()), max(variant.slots())
        return f"{variant.kind}, {most if least == most else f'{least} to {most}'} slots"

    return [
        Opened(
            name(v),
            v.plan,
            replace(opened.kernels, layers=v.kernels.layers),
            opened.rotary_tables(length),
        )
        for v in built
    ]


def backend_of(model: PreTrainedModel, cache: Opened, rows: int) -> ModelBackend:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return ModelBackend(model, Contract(cache.plan, vocabulary, "float32", CHUNK, rows, logits="all"), cache.kernels)


def losses(model: PreTrainedModel, cache: Opened, ids: np.ndarray, step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    """[N, length - 1] losses in nats, and how old the tokens are that slots of evicting layers hold at the end."""
    last = ids.shape[1] - 1
    if not any(s.policy.evicts for s in cache.plan):
        exact = variants.Variant("full", cache.plan, Kernels({}, {}))
        return perplexity.simulated(model, torch.from_numpy(ids), exact, CHUNK, torch.arange(last)), {}
    backend = backend_of(model, cache, len(ids))
    nll = perplexity.streamed(backend, ids, CHUNK, range(last), step)
    evicting = [i for i, s in enumerate(cache.plan) if s.policy.evicts]
    held = [backend.read_row(row).tensors[f"past.{i}.position"] for row in range(len(ids)) for i in evicting]
    positions = np.concatenate([x[x >= 0] for x in held])
    ages = last - positions
    quantiles = {str(q): int(np.quantile(ages, q)) for q in (0.25, 0.5, 0.75, 0.95)}
    return nll, {"age_quantiles": quantiles, "first_1024": round(float((positions < 1024).mean()), 4)}


def simulated(model: PreTrainedModel, cache: Opened, ids: np.ndarray, step: Step, positions: Tensor) -> np.ndarray:
    """[N,P] losses in nats at ``positions``, one token a step."""
    variant = variants.Variant("less" if cache.kernels.layers else "sparse", cache.plan, cache.kernels)
    rows = torch.from_numpy(ids)
    found = [perplexity.simulated(model, row[None], variant, 1, positions, step, cache.tables) for row in rows]
    return np.concatenate(found)


def measure(
    model: PreTrainedModel, cache: Opened, ids: np.ndarray, simulate: bool, progress: Progress
) -> dict[str, Any]:
    start, held = time.perf_counter(), dict[str, Any]()
    with progress.phase(cache.name, len(ids) if simulate else ids.shape[1] // CHUNK) as step:
        if simulate:
            at = torch.arange(STRIDE - 1, ids.shape[1] - 1, STRIDE)
            nll, size = simulated(model, cache, ids, lambda rows: step("", rows), at), CHUNK // STRIDE
        else:
            (nll, held), size = losses(model, cache, ids, step), CHUNK
    # One number for every CHUNK tokens; the last lacks the token after the stream.
    steps = [[round(float(row[i : i + size].mean()), 4) for i in range(0, len(row), size)] for row in nll]
    seconds = round(time.perf_counter() - start)
    return {"cache": cache.name, "length": ids.shape[1], "nll": steps, **held, "seconds": seconds}


def entry_of(file: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The entry of ``file`` with these facts, which is made if there is none."""
    entries: list[dict[str, Any]] = file.setdefault("streams", [])
    for entry in entries:
        if {n: entry[n] for n in facts} == facts:
            return entry
    entries.append({**facts, "rows": []})
    return entries[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="MODEL (default: smollm2-135m)")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="a stream; give several")
    parser.add_argument("--length", type=int, default=16384, metavar="N", help="tokens of a stream (default: 16384)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--caches", nargs="+", metavar="NAME", help="some of the caches, by name (default: all)")
    group.add_argument("--kernels", type=Path, metavar="FILE", help="LESS with these, and the same bytes in slots")
    parser.add_argument("--rotations", type=int, default=1, metavar="N", help="streams of every text (default: 1)")
    parser.add_argument("--simulate", action="store_true", help="one token a step, by simulation")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source = resolve(args.model)
    encode, bos = data.encoder(source.tokenizer())
    texts = dict(pair.split("=", 1) for pair in args.text)
    contents = {name: Path(file).read_text(encoding="utf-8") for name, file in texts.items()}
    rows = [([] if bos is None else [bos]) + encode(text[: 8 * args.length]) for text in contents.values()]
    part = args.length // args.rotations
    ids = np.array([np.roll(row[: args.length], -part * i) for row in rows for i in range(args.rotations)], np.int64)
    trained = open_model(source, ExportConfig(policy="full", context=1)).trained_length or args.length
    digest = hashlib.sha256(args.kernels.read_bytes()).hexdigest()[:12] if args.kernels else None
    file = json.loads(FILE.read_text()) if FILE.exists() else {}
    file |= {"slots": SLOTS, "chunk": CHUNK}
    entry = entry_of(
        file,
        {
            "model": source.name,
            "length": args.length,
            "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()},
            "rotations": args.rotations,
            "kernels": digest,
            "simulated": args.simulate,
            "trained_length": trained,
        },
    )
    done = {r["cache"] for r in entry["rows"]}
    order = [c.name for c in CACHES]
    wanted = [c for c in CACHES if not args.caches or c.name in args.caches]
    if args.kernels:
        caches = with_kernels(args.model, args.kernels, args.length)
    else:
        caches = [c.open(args.model, args.length) for c in wanted if c.name not in done]
    model, progress = source.load(torch.float32), Bars()
    for cache in caches:
        if cache.name in done:
            continue
        whole = not any(s.policy.evicts for s in cache.plan)
        mine = ids[:, : min(args.length, trained, 8192)] if whole else ids
        row = measure(model, cache, mine, args.simulate, progress)
        entry["rows"].append(row)
        if not args.kernels:
            entry["rows"].sort(key=lambda r: order.index(r["cache"]))
        entry["machine"] = machine()
        write_atomically(FILE, (json.dumps(file, separators=(",", ":")) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
