"""How well a fixed number of slots predicts long streams: mean loss by position, for each eviction policy.

Streams of shipped text run through the torch backend, 64 tokens a step, without kernels. The result is
``benchmarks/results/long.json``: for every cache and stream the mean loss of each step, written as soon as a cache is
measured; ``--resume`` keeps the caches that are there, if they are of the same model and length.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from bench_common import RESULTS, machine
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.config import ExportConfig, HalfLife
from less_export.contract import Contract
from less_export.errors import UsageError
from less_export.evaluation import perplexity, variants
from less_export.hf import data
from less_export.hf.model import OpenModel, open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.progress import Step
from less_export.runtime.torch import ModelBackend

FILE = RESULTS / "long.json"
SLOTS, CHUNK = 256, 64
SHIPPED = importlib.resources.files("less_export.data")
#: Shipped texts that are joined into one stream each; the last one changes its subject every 3,000 tokens.
STREAMS = {
    "novel": ("calibration/austen.txt", "held_out/austen.txt"),
    "speeches and optics": ("calibration/presidents.txt", "calibration/newton.txt"),
    "mixed": tuple(f"calibration/{n}.txt" for n in ("newton", "code", "presidents", "shakespeare", "jargon")),
}
_TURN = 3000
#: Caches: policy and half-life. The full cache goes no further than the model was trained for.
CACHES: tuple[tuple[str, HalfLife], ...] = (
    ("full", "none"), ("h2o", "none"), ("h2o", 128), ("h2o", 256), ("h2o", 512), ("h2o", 1024), ("h2o", 4096),
    ("tova", "none"), ("sink", "none"),
)  # fmt: skip


def streams(encode: data.Encode, bos: int | None, length: int) -> np.ndarray:
    """[N, length] token ids."""
    rows = []
    for name, files in STREAMS.items():
        parts = [encode((SHIPPED / f).read_text(encoding="utf-8")) for f in files]
        ids = [] if bos is None else [bos]
        if name == "mixed":
            for begin in range(0, max(map(len, parts)), _TURN):
                ids += [t for p in parts for t in p[begin : begin + _TURN]]
        else:
            ids += [t for p in parts for t in p]
        if len(ids) < length:
            raise UsageError(f"stream '{name}' has {len(ids)} tokens, fewer than --length {length}")
        rows.append(ids[:length])
    return np.array(rows, np.int64)


def name_of(policy: str, half_life: HalfLife) -> str:
    return policy if half_life == "none" else f"{policy}, half-life {half_life}"


def measure(model: PreTrainedModel, opened: OpenModel, ids: np.ndarray, step: Step) -> np.ndarray:
    """[N, length - 1] losses in nats, streamed in steps of ``CHUNK``; without eviction, where the steps change nothing,
    in a single one."""
    length = ids.shape[1]
    if not any(s.policy.evicts for s in opened.plan):
        exact = variants.Variant("full", opened.plan, Kernels({}, {}))
        return perplexity.simulated(model, torch.from_numpy(ids), exact, CHUNK, torch.arange(length - 1))
    vocabulary = opened.text_config.vocab_size
    contract = Contract(opened.plan, vocabulary, "float32", CHUNK, len(ids), logits="all")
    backend = ModelBackend(model, contract, opened.kernels)
    return perplexity.streamed(backend, ids, CHUNK, range(length - 1), step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="MODEL, as for less-export eval (default: smollm2-135m)"
    )
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a stream (default: 8192)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the results already")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    source = resolve(args.model)
    encode, bos = data.encoder(source.tokenizer())
    ids = streams(encode, bos, args.length)
    rows: dict[str, dict[str, Any]] = {}
    if args.resume and FILE.exists():
        written = json.loads(FILE.read_text())
        same = written["model"] == source.name
        rows = {r["cache"]: r for r in written["rows"] if same and r["length"] == args.length}
    model, progress, order = source.load(torch.float32), Bars(), [name_of(*c) for c in CACHES]
    for (policy, half_life), name in zip(CACHES, order, strict=True):
        if name in rows:
            continue
        budget = None if policy == "full" else str(SLOTS)
        config = ExportConfig(
            policy=policy, score_half_life=half_life, budget=budget, context=args.length, slots="model",
            max_distance="none",
        )  # fmt: skip
        opened = open_model(source, config)
        if policy == "full" and args.length > (opened.trained_length or args.length):
            continue
        start = time.perf_counter()
        with progress.phase(name, args.length // CHUNK) as step:
            nll = measure(model, opened, ids, step)
        # One number a step; the last step lacks the token after the stream.
        steps = [nll[:, i : i + CHUNK].mean(1) for i in range(0, nll.shape[1], CHUNK)]
        rows[name] = {
            "cache": name,
            "length": args.length,
            "nll": {s: [round(float(x[i]), 4) for x in steps] for i, s in enumerate(STREAMS)},
            "seconds": round(time.perf_counter() - start),
        }
        facts = {
            "machine": machine(),
            "model": source.name,
            "trained_length": opened.trained_length,
            "slots": SLOTS,
            "chunk": CHUNK,
            "rows": sorted(rows.values(), key=lambda r: order.index(r["cache"])),
        }
        write_atomically(FILE, (json.dumps(facts, separators=(",", ":")) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
