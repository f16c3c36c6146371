"""What int8 slots cost and gain: the error of rounding alone, and KL and perplexity against 16-bit slots of equal size.

Sequences of held-out text run through the simulation, one token a step, without kernels. The keys of int8 slots are
centred by what the calibration text of the package says. ``benchmarks/results/slots.json`` is written after every text;
texts that are in it already, of the same sequences and slots, are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_common import RESULTS, machine
from torch import Tensor
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.evaluation import perplexity, statistics
from less_export.evaluation.variants import Variant, layer_bytes
from less_export.hf import calibration, data
from less_export.hf.model import OpenModel, open_model
from less_export.hf.sources import resolve
from less_export.hf.surgery import AttentionCall, less_attention
from less_export.less import int8, simulate
from less_export.less.feature_maps import Kernels
from less_export.plan import exact_layer, sparse_layer

FILE = RESULTS / "slots.json"
MODELS = ("gemma3-270m", "smollm2-135m")
SEQUENCES, LENGTH, STRIDE = 4, 1024, 4
SHIPPED = importlib.resources.files("less_export.data") / "held_out"
#: Positions whose logits are compared at a time: those of a large vocabulary take a megabyte each.
_ROWS = 64


def texts(extra: list[str]) -> Iterator[tuple[str, str]]:
    """Held-out texts of the package, and the last fifth of the files given as NAME=FILE."""
    for file in sorted(SHIPPED.iterdir(), key=lambda f: f.name):
        yield file.name.removesuffix(".txt"), file.read_text(encoding="utf-8")
    named = {file.name.removesuffix(".txt") for file in SHIPPED.iterdir()} & {item.partition("=")[0] for item in extra}
    if named:
        raise SystemExit(f"--text {', '.join(sorted(named))}: the package has a text of that name; give another one")
    yield from fifths(extra, 4)


def fifths(named: list[str], number: int) -> Iterator[tuple[str, str]]:
    """A fifth of each file that is given as NAME=FILE; the first has number 0."""
    for item in named:
        name, _, path = item.partition("=")
        text = Path(path).read_text(encoding="utf-8")
        yield name, text[len(text) * number // 5 : len(text) * (number + 1) // 5]


def sequences(text: str, encode: data.Encode, bos: int | None, most: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """[N, length] token ids, spread over the text; N is at most ``most``."""
    start, body = ([] if bos is None else [bos]), encode(text)
    size = length - len(start)
    count = min(most, len(body) // size)
    gap = (len(body) - size) // max(count - 1, 1)
    return torch.tensor([start + body[i * gap : i * gap + size] for i in range(count)])


def equal_bytes(layer: LayerSpec) -> LayerSpec:
    """The int8 layer with as many slots as the bytes of the 16-bit layer pay for; a sliding layer keeps its window."""
    rounded = replace(layer, slot_dtype="int8")
    if not layer.policy.evicts:
        return rounded
    token = layer_bytes(rounded, "bfloat16", 2) - layer_bytes(rounded, "bfloat16", 1)
    return sparse_layer(rounded, layer_bytes(layer, "bfloat16") // token)


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, row: Tensor, variant: Variant, positions: Tensor) -> Tensor:
    """[P,V] log probabilities after the ``positions`` of a sequence [T], with the caches of ``variant``."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, positions], *args[1:]))
    try:
        with less_attention(model, perplexity.attention(variant, 1)):
            steps = torch.arange(len(row))[None]
            logits = model(input_ids=row[None], position_ids=steps, use_cache=False).logits[0]
    finally:
        hook.remove()
    return torch.log_softmax(logits.float(), -1)


def compare(
    model: PreTrainedModel, ids: Tensor, variants: dict[str, Variant], first: int = 0
) -> dict[str, dict[str, list[float]]]:
    """KL from the full cache and negative log likelihood in nats, by cache: the mean of each sequence, over positions
    from ``first`` on at which all caches may have evicted."""
    positions = torch.arange(max(first, *(v.first() for v in variants.values())), LENGTH - 1, STRIDE)
    found: dict[str, dict[str, list[float]]] = {n: {"kl": [], "nll": []} for n in variants}
    for row in ids:
        targets, exact = row[positions + 1], None
        for name, variant in variants.items():
            logs = log_probabilities(model, row, variant, positions)
            exact = logs if exact is None else exact
            kl = [(a.exp() * (a - b)).sum(-1) for a, b in zip(exact.split(_ROWS), logs.split(_ROWS), strict=True)]
            found[name]["kl"].append(float(torch.cat(kl).double().mean()))
            found[name]["nll"].append(-float(logs.gather(1, targets[:, None]).double().mean()))
    return found


@torch.inference_mode()
def rounding_errors(
    model: PreTrainedModel, ids: Tensor, opened: OpenModel, centring: dict[int, int8.Centring]
) -> dict[str, list[float]]:
    """Relative squared error of each layer's attention when only rounding is added: keys as they are, and centred."""
    sums = {name: torch.zeros(len(opened.plan), 2, dtype=torch.float64) for name in ("plain", "calibrated")}

    def record(call: AttentionCall) -> Tensor:
        layer = replace(exact_layer(opened.plan[call.layer], LENGTH), slot_dtype="int8")
        exact = simulate.full(call.q, call.k, call.v, opened.plan[call.layer])
        for name, constants in (("plain", None), ("calibrated", centring[call.layer])):
            rounded = simulate.attend(call.q, call.k, call.v, layer, None, 1, constants)
            error = (rounded.double() - exact.double()).square().sum()
            sums[name][call.layer] += torch.stack([error, exact.double().square().sum()])
        return exact

    with less_attention(model, record):
        for row in ids:
            model(input_ids=row[None], position_ids=torch.arange(len(row))[None], use_cache=False)
    return {name: [round(float(e / n), 7) for e, n in total] for name, total in sums.items()}


def measure(name: str, extra: list[str], rows: dict[tuple[str, str], dict[str, Any]], budget: str) -> None:
    """Measure a model on every text that ``rows`` lacks, writing them all after each."""
    source, progress = resolve(name), Bars()
    opened = open_model(source, ExportConfig(budget=budget, context=LENGTH, slots="model", max_distance="none"))
    encode, bos = data.encoder(source.tokenizer())
    model = source.load(torch.float32)
    corpus, _ = calibration.shipped_corpus(encode, bos, opened.trained_length)
    constants = Kernels({}, {}, calibration.measure(model, corpus.ids, opened.layers, progress))
    plan = opened.plan
    evicting = next(s for s in plan if s.policy.evicts)
    variants = {
        "full": Variant("full", tuple(exact_layer(s, LENGTH) for s in plan), Kernels({}, {})),
        "16-bit": Variant("sparse", plan, Kernels({}, {})),
        "int8": Variant("sparse", tuple(map(equal_bytes, plan)), constants),
        "int8, as many slots": Variant("sparse", tuple(replace(s, slot_dtype="int8") for s in plan), constants),
    }
    slots = {n: next(s.capacity for s in v.plan if s.policy.evicts) for n, v in variants.items() if n != "full"}
    for text, content in texts(extra):
        if (name, text) in rows:
            continue
        ids, start = sequences(content, encode, bos), time.perf_counter()
        progress.say(f"{name} on {text}: {len(ids)} sequences")
        rows[name, text] = {
            "model": name,
            "text": text,
            "policy": evicting.policy.name,
            "slots": slots,
            "sequences": len(ids),
            "rounding": rounding_errors(model, ids, opened, dict(constants.centring)),
            "caches": compare(model, ids, variants),
            "seconds": round(time.perf_counter() - start),
        }
        facts = {"machine": machine(), "length": LENGTH, "stride": STRIDE, "rows": list(rows.values())}
        write_atomically(FILE, (json.dumps(facts, separators=(",", ":")) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="measure its last fifth too")
    parser.add_argument("--budget", default="5%", metavar="N|P%%", help="of the 16-bit slots (default: 5%%)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    written = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    rows = {(r["model"], r["text"]): r for r in written}
    for model in args.models:
        measure(model, args.text, rows, args.budget)
    for row in rows.values():
        caches = {n: {k: torch.tensor(v) for k, v in c.items()} for n, c in row["caches"].items()}
        change = 1 - caches["int8"]["kl"] / caches["16-bit"]["kl"]
        interval = statistics.mean(change.numpy())
        kls = ", ".join(f"{n} {c['kl'].mean():.4f}" for n, c in caches.items() if n != "full")
        print(f"{row['model']}, {row['text']}: KL {kls}; int8 {interval.value:.0%} lower")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
