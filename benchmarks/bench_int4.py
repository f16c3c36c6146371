"""What slots in four bits would give: KL from the full cache at the bytes of 16-bit and int8 slots, SmolLM2 135M.

Not a feature: keys (centred as for int8) and values are rounded to 15 levels in groups of channels, each with a scale
of 16 bits, inside the simulation. Texts, sequences and budget are those of ``bench_slots.py``. The result is
``benchmarks/results/int4.json``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import bench_slots
import torch
from bench_common import write_results
from torch import Tensor

from less_export.cli.progress import Bars
from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.evaluation.variants import Variant, layer_bytes
from less_export.hf import calibration, data
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.less import int8
from less_export.less.feature_maps import Kernels
from less_export.plan import exact_layer, sparse_layer

MODEL, BUDGET = "smollm2-135m", "5%"
GROUPS = (32, 64)
LEVELS = 7


def rounded(x: Tensor, group: int) -> Tensor:
    """``x`` [...,D] after a stay in four bits."""
    parts = x.float().unflatten(-1, (-1, min(group, x.shape[-1])))
    scale = (parts.abs().amax(-1, keepdim=True) / LEVELS).half().float()
    return ((parts / torch.where(scale == 0, 1.0, scale)).round().clamp(-LEVELS, LEVELS) * scale).flatten(-2)


def four_bits(group: int) -> ExitStack:
    """Slots in int8 are in four bits while this is open."""
    stack = ExitStack()

    def keys(k: Tensor, centring: int8.Centring) -> Tensor:
        mean, std = (x[:, None] for x in centring)
        return rounded((k.float() - mean) / std, group) * std + mean

    patches: dict[str, Callable[..., Tensor]] = {"rounded_keys": keys, "rounded_values": lambda v: rounded(v, group)}
    for name, function in patches.items():
        stack.enter_context(mock.patch.object(int8, name, function))
    return stack


def equal_bytes(layer: LayerSpec, group: int) -> LayerSpec:
    """The layer with as many four-bit slots as the bytes of the 16-bit layer pay for."""
    dim, heads = layer.head_dim, layer.kv_heads
    token = heads * (2 * (dim // 2 + 2 * -(-dim // group)) + 8)  # keys and values, their scales, score and position
    return sparse_layer(replace(layer, slot_dtype="int8"), layer_bytes(layer, "bfloat16") // token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="measure its last fifth too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the texts (default: all)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source, progress = resolve(MODEL), Bars()
    config = ExportConfig(budget=BUDGET, context=bench_slots.LENGTH, slots="model", max_distance="none")
    plan = open_model(source, config).plan
    encode, bos = data.encoder(source.tokenizer())
    model = source.load(torch.float32)
    corpus, _ = calibration.shipped_corpus(encode, bos, None)
    constants = Kernels({}, {}, calibration.measure(model, corpus.ids, plan, progress))
    full = Variant("full", tuple(exact_layer(s, bench_slots.LENGTH) for s in plan), Kernels({}, {}))
    plans = {"16-bit": plan, "int8": tuple(map(bench_slots.equal_bytes, plan))}
    plans |= {f"int4, groups of {n}": tuple(equal_bytes(s, n) for s in plan) for n in GROUPS}
    first = max(Variant("sparse", p, Kernels({}, {})).first() for p in plans.values())
    rows: list[dict[str, Any]] = []
    for name, content in bench_slots.texts(args.text):
        if args.only and name not in args.only:
            continue
        ids, caches = bench_slots.sequences(content, encode, bos), {}
        for cache, layers in plans.items():
            group = next((n for n in GROUPS if cache.endswith(f" {n}")), None)
            both = {"full": full, cache: Variant("sparse", layers, Kernels({}, {}) if cache == "16-bit" else constants)}
            with four_bits(group) if group else ExitStack():
                caches[cache] = bench_slots.compare(model, ids, both, first)[cache]["kl"]
            progress.say(f"{name}, {cache}: {sum(caches[cache]) / len(ids):.4f}")
        slots = {cache: layers[0].capacity for cache, layers in plans.items()}
        rows.append({"text": name, "sequences": len(ids), "slots": slots, "kl": caches})
        write_results("int4", {"model": MODEL, "length": bench_slots.LENGTH, "rows": rows})


if __name__ == "__main__":
    main()
