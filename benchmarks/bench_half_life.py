"""How the half-life of scores changes the predictions of a cache of int8 slots: KL from the full cache.

Sequences of each text run through the simulation, one token a step, without kernels, in as many int8 slots as the bytes
of 5% of the context in 16-bit slots hold. The texts are files given as NAME=FILE. Their fourth fifth is read, as the
other benchmarks of quality read the last. ``benchmarks/results/half_life.json`` is written after every text; texts that
are in it already are not measured again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from bench_common import RESULTS, Rows, encoder_and_model, parsed, read_rows, write_rows
from bench_kernels import CONTEXT, STRIDE, caches
from bench_slots import MODELS, fifths, sequences

from less_export.cli.progress import Bars
from less_export.config import ExportConfig
from less_export.hf import calibration
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.training.end_to_end import Comparison
from less_export.training.options import DEFAULT_RANK

FILE = RESULTS / "half_life.json"
#: The fifth of each file that is read.
PART = 3
#: In tokens; None: scores never fade.
HALF_LIVES = (32, 64, 128, 256, 512, None)


def measure(name: str, args: argparse.Namespace, rows: Rows) -> None:
    """Measure a model on every text that ``rows`` lacks, writing them all after each."""
    source, progress = resolve(name), Bars()
    opened = open_model(
        source, ExportConfig(budget=args.budget, context=CONTEXT), rank=DEFAULT_RANK, equal_budgets=True
    )
    evicting = [i for i, s in enumerate(opened.plan) if s.policy.evicts]
    plans = {}
    for half_life in HALF_LIVES:
        plan = list(opened.plan)
        for i in evicting:
            plan[i] = replace(caches(plan[i], plan[i].capacity)["sparse"], score_half_life=half_life)
        plans[half_life] = plan
    slots = plans[None][evicting[0]].capacity
    encode, bos, model = encoder_and_model(source, opened)
    tables = opened.rotary_tables(CONTEXT)
    corpus, _ = calibration.shipped_corpus(encode, bos, opened.trained_length)
    centring = calibration.measure(model, corpus.ids, opened.plan, progress, tables)
    decoder = LayerwiseDecoder(model, opened.plan)
    at = torch.arange(slots + 1, CONTEXT - 1, STRIDE)
    for text, content in fifths(args.text, PART):
        if (name, text) in rows:
            continue
        ids = sequences(content, encode, bos, args.sequences, CONTEXT)
        progress.say(f"{name} on {text}: {len(ids)} sequences")
        compared = Comparison(decoder, ids, opened.plan, min(evicting), centring, tables)
        with torch.no_grad():
            found = {
                str(half_life): [
                    round(float(compared.divergence(r, CONTEXT, at, {}, plan).mean()), 5) for r in range(len(ids))
                ]
                for half_life, plan in plans.items()
            }
        rows[name, text] = {"model": name, "text": text, "slots": slots, "kl": found}
        write_rows(args.out, rows, {"length": CONTEXT, "stride": STRIDE}, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="read its fourth fifth")
    args = parsed(parser, FILE, sequences=6)
    rows = read_rows(args.out, "model", "text")
    for name in args.models:
        measure(name, args, rows)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
