"""Recall of a sentence after some distance: the loss of its last words, once planted in the text and once not.

Streams of the texts that ``--text`` names run through the simulation, one token a step, with 256 slots and without
kernels; with ``--kernels``, LESS and the slots alone that take the same bytes. Each has a sentence planted, goes on for
some distance, and then asks for it; its twin has other text in the sentence's place. The result is
``benchmarks/results/recall.json``, written after every cache.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_beyond import CACHES, SLOTS, Opened, simulated, with_kernels
from bench_common import RESULTS, machine
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.hf import data
from less_export.hf.sources import resolve

FILE = RESULTS / "recall.json"
#: Where the sentence is planted, and the tokens until it is asked for.
PLANTED, DISTANCES = 300, (500, 2000, 6000)
QUESTION, ANSWER = " The password of the northern gate is", " amber falcon seventeen quiet harbour."


def pair(ids: list[int], sentence: list[int], distance: int) -> list[list[int]]:
    """A stream with the sentence planted, and one with text in its place; both end with the sentence."""
    before, after = ids[:PLANTED], ids[PLANTED : PLANTED + distance]
    return [before + told + after + sentence for told in (sentence, ids[-len(sentence) :])]


def recall(
    model: PreTrainedModel, cache: Opened, texts: list[list[int]], encode: data.Encode
) -> dict[str, list[list[float]]]:
    """Mean loss of the answer's tokens, [told, not told] for every text, by distance."""
    found: dict[str, list[list[float]]] = {}
    sentence, asked = encode(QUESTION + ANSWER), len(encode(ANSWER))
    for distance in DISTANCES:
        stream = np.array([row for ids in texts for row in pair(ids, sentence, distance)])
        positions = torch.arange(stream.shape[1] - asked - 1, stream.shape[1] - 1)
        nll = simulated(model, cache, stream, lambda rows: None, positions).mean(1)
        found[str(distance)] = [[round(float(x), 3) for x in nll[i : i + 2]] for i in range(0, len(nll), 2)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="MODEL (default: smollm2-135m)")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="a stream; give several")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--caches", nargs="+", metavar="NAME", help="caches of bench_beyond.py, by name (default: all)")
    group.add_argument("--kernels", type=Path, metavar="FILE", help="LESS with these, and the same bytes in slots")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source, length = resolve(args.model), PLANTED + max(DISTANCES) + 256
    encode, bos = data.encoder(source.tokenizer())
    texts = [Path(text.partition("=")[2]).read_text(encoding="utf-8")[: 8 * length] for text in args.text]
    ids = [(([] if bos is None else [bos]) + encode(text))[:length] for text in texts]
    file: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    file |= {"slots": SLOTS, "pairs": len(ids), "machine": machine()}
    model, progress = source.load(torch.float32), Bars()
    done = {r["cache"] for r in file["rows"] if r["model"] == source.name}
    if args.kernels:
        caches = with_kernels(args.model, args.kernels, length)
    else:
        wanted = [c for c in CACHES if not args.caches or c.name in args.caches]
        caches = [c.open(args.model, length) for c in wanted if c.name not in done]
    for cache in caches:
        if cache.name in done:
            continue
        progress.say(f"{source.name}, {cache.name}")
        row = {"model": source.name, "cache": cache.name, "losses": recall(model, cache, ids, encode)}
        file["rows"].append(row)
        write_atomically(FILE, (json.dumps(file, separators=(",", ":")) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
