"""What trained kernels add to int8 slots: KL from the full cache, against a sparse cache of the same bytes.

Sequences of held-out text run through the simulation, one token a step. Every cache takes the bytes of the given budget
in 16-bit slots, in all evicting layers together: LESS has fewer slots than the sparse cache, as its state costs bytes.
Train its kernels with the number that ``--print-slots`` shows, in every layer or divided among them; where they are
divided, a sparse cache with the bytes of LESS in each layer is measured too. The last cache has the slots of LESS and
no state: what the state does, and what its bytes would do as slots. Layers that evict nothing are exact in all of them.
Positions count from where the first layer of a cache evicts (``first``; in rows without it, from where all layers do).
``benchmarks/results/kernels.json`` is written after every text; texts that are in it already, with the same kernels,
are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import RESULTS, Rows, encoder_and_model, parsed, read_rows, write_rows
from bench_slots import sequences, texts

from less_export.cli.progress import Bars
from less_export.config import ExportConfig, HalfLife
from less_export.contract import LayerSpec
from less_export.evaluation import statistics
from less_export.hf import calibration
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.less.memory import layer_bytes
from less_export.plan import resized, sparse_layer
from less_export.training.end_to_end import Comparison, slots_instead
from less_export.training.options import DEFAULT_RANK

FILE = RESULTS / "kernels.json"
#: Context that a budget in percent refers to.
CONTEXT = 1024
STRIDE, DTYPE = 8, "bfloat16"
KINDS = ("16-bit", "sparse", "divided", "less", "fewer")
#: Largest part of the bytes that LESS may leave to the other caches: slots are whole.
UNUSED = 0.02


def most(layer: LayerSpec, room: int) -> LayerSpec:
    """The layer with as many slots as fit in ``room`` bytes."""
    slots = range(1, room // (2 * layer.kv_heads * layer.head_dim) + 1)
    return resized(layer, max(n for n in slots if layer_bytes(layer, DTYPE, n) <= room))


def caches(layer: LayerSpec, slots: int, trained: int | None, used: bool = True) -> dict[str, LayerSpec]:
    """The caches of a layer by kind, see above.

    Args:
        layer: has a state and int8 slots. slots: those in 16 bits whose bytes the caches of a layer take.
        trained: slots of LESS; None for as many as fit. used: whether LESS has a state in this layer.
    """
    wide, plain = replace(sparse_layer(layer, slots), slot_dtype="model"), layer.without_state()
    room = layer_bytes(wide, DTYPE)
    less = most(layer, room) if trained is None else resized(layer, trained)
    divided = most(plain, layer_bytes(less, DTYPE))
    fewer = sparse_layer(layer, less.capacity)
    same = (less, fewer) if used else (divided, divided)
    return dict(zip(KINDS, (wide, most(plain, room), divided, *same), strict=True))


def slots_of(kernels: Kernels, layer: int, spec: LayerSpec) -> int:
    """The slots that a layer had beside its state in training; the bytes of a state that does not pay become slots."""
    stated = kernels.slots[layer]
    if layer in kernels.layers:
        return stated
    before = (n for n in range(stated, 0, -1) if slots_instead(resized(spec, n)).capacity == stated)
    return next(before, stated)


def half_life_of(kernels: Path) -> HalfLife:
    """The half-life of scores that kernels of policy h2o were trained with."""
    return Kernels.load(kernels).provenance["score_half_life"] or "none"


def training(kernels: Kernels) -> dict[str, Any]:
    """On what kernels were trained: their texts, and the sequences that they were fitted and judged on."""
    facts = kernels.provenance
    names = sorted({str(source["name"]).partition(".")[0] for source in facts["data"]})
    return {"texts": names, "sequences": facts["sequences"]["count"]}


def measure(name: str, kernels: Path | None, args: argparse.Namespace, rows: Rows) -> None:
    """Measure a model and its kernels on every text that ``rows`` lacks, writing them all after each.

    Without kernels, print the slots of the caches.
    """
    source, progress = resolve(name), Bars()
    half_life = None if kernels is None or args.policy != "h2o" else half_life_of(kernels)
    config = ExportConfig(
        policy=args.policy, budget=args.budget, context=CONTEXT, kernels=kernels, score_half_life=half_life
    )
    opened = open_model(source, config, rank=args.rank if kernels is None else None, equal_budgets=True)
    loaded = opened.kernels
    evicting = [i for i, s in enumerate(opened.plan) if s.policy.evicts]
    ranks = {i: opened.plan[i].rank for i in evicting if opened.plan[i].absorb}
    if not ranks:
        raise SystemExit(f"{kernels} has no low-rank term: the cache is the sparse one")
    plans = {kind: list(opened.plan) for kind in KINDS}
    for i in evicting:
        layer = replace(opened.plan[i], absorb=True, rank=ranks.get(i, min(ranks.values())))
        stated = None if kernels is None else slots_of(loaded, i, layer)
        own = caches(layer, layer.capacity, stated, i in ranks)
        for kind, plan in plans.items():
            plan[i] = own[kind]
    counts = {kind: [plan[i].capacity for i in evicting] for kind, plan in plans.items()}
    if kernels is None:
        print(f"train with --budget {counts['less'][0]}; the caches have {counts} slots")
        return
    room, taken = (sum(layer_bytes(plans[kind][i], DTYPE) for i in evicting) for kind in ("16-bit", "less"))
    if not (1 - UNUSED) * room <= taken <= room:
        raise SystemExit(f"{kernels} was trained with slots of {taken:,} bytes, not {room:,}: see --print-slots")
    if counts["divided"] == counts["sparse"]:
        del plans["divided"], counts["divided"]
    if calibration.lacking(loaded, opened.plan):
        raise SystemExit(f"{kernels} holds no constants of int8 slots: train with int8 slots")
    digest = hashlib.sha256(kernels.read_bytes()).hexdigest()[:12]
    encode, bos, model = encoder_and_model(source, opened)
    used = {i: loaded.layers[i] for i in ranks}
    decoder = LayerwiseDecoder(model, opened.plan)
    length = args.length
    at = torch.arange(min(map(min, counts.values())) + 1, length - 1, STRIDE)
    for text, content in texts(args.text):
        key = (name, opened.plan[evicting[0]].policy.name, text, length, digest)
        if key in rows or (args.only and text not in args.only):
            continue
        ids = sequences(content, encode, bos, args.sequences, length)
        progress.say(f"{name} on {text}: {len(ids)} sequences")
        compared = Comparison(decoder, ids, opened.plan, min(evicting), loaded.centring, opened.rotary_tables(length))
        found: dict[str, list[list[float]]] = {kind: [] for kind in plans}
        with torch.no_grad():
            for row in range(len(ids)):
                for kind, plan in plans.items():
                    maps = used if kind == "less" else {}
                    kl = compared.divergence(row, length, at, maps, plan)
                    found[kind].append([round(x, 5) for x in kl.tolist()])
        rows[key] = {
            "model": name, "policy": key[1], "text": text, "length": length, "kernels": digest,
            "half_life": opened.plan[evicting[0]].score_half_life,
            "first": int(at[0]), "rank": max(ranks.values()), "trained": training(loaded), "slots": counts, "kl": found,
        }  # fmt: skip
        write_rows(args.out, rows, {"stride": STRIDE})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--kernels", type=Path, metavar="FILE", help="kernels that less-export train wrote")
    group.add_argument("--print-slots", action="store_true", help="show the slots of every cache, and measure nothing")
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, help="for --print-slots (default: %(default)s)")
    parser.add_argument("--policy", default="h2o", help="as in training (default: h2o)")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="measure its last fifth too")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="of these texts (default: all)")
    parser.add_argument(
        "--length", type=int, default=CONTEXT, metavar="N", help="tokens of a sequence (default: %(default)s)"
    )
    args = parsed(parser, FILE, sequences=8)
    rows = read_rows(args.out, "model", "policy", "text", "length", "kernels")
    measure(args.model, args.kernels, args, rows)
    if args.print_slots:
        return
    for row in rows.values():
        kl = {n: torch.tensor(v).double() for n, v in row["kl"].items()}
        print(
            f"{row['model']}, {row['policy']}, {row['text']}: "
            + ", ".join(f"{n} {x.mean():.4f}" for n, x in kl.items())
        )
        slots = kl.get("divided", kl["sparse"])
        change = statistics.mean((kl["less"] - slots).mean(1).numpy())
        tokens = (kl["less"] - slots).flatten()
        rest = tokens[tokens.abs().argsort()[: len(tokens) * 99 // 100]]
        interval = change.text("+.4f")
        print(f"  less - slots {interval}, without the 1% of tokens that change most {rest.mean():+.4f}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
