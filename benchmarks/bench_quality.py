"""Effect of LESS on Gemma 3 270M's perplexity: kernels trained here, against sparse baselines of equal bytes.

Every result is a row of ``benchmarks/results/quality.json``, written as soon as it is measured; ``--resume``
continues an interrupted run. Rows are simulated in the order of decoding (one token a step) unless their keys say
otherwise; ``tests/test_simulate.py`` compares the simulation with the operator.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import RESULTS, machine
from quality_settings import SETTINGS, SPLITS, TRAIN, Recipe, Setting

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.contract import Contract, LayerSpec
from less_export.evaluation import perplexity, statistics, variants
from less_export.hf import data
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.sources import resolve
from less_export.hf.surgery import discover
from less_export.less.feature_maps import FeatureMap, Kernels
from less_export.plan import plan_layers
from less_export.runtime.torch import ModelBackend
from less_export.training import allocate, collect, end_to_end, fit

MODEL, LENGTH = "gemma3-270m", 1024
EVALUATION = 16
#: Training sequences of the rows that use all of the shipped text, and as much of the other.
MANY = 207
#: Sequences of the rows that are streamed step by step: the first of the evaluated ones.
STREAMED = 4
#: The authors' training script for a layer: 40 epochs of 512 sequences, 2 a step, all positions, 512 hidden features.
AUTHORS_STEPS, AUTHORS_HIDDEN = 40 * 512 // 2, 512
#: Steps of either recipe that are timed.
TIMED = 12
#: Every fourth position past the largest budget of the table.
POSITIONS = torch.arange(127, LENGTH - 1, 4)
FILE = RESULTS / "quality.json"
#: WikiText, the held-out part of the shipped text, the reference manual.
DOMAINS = ("in", "shipped", "out")


class Bench:
    """The model, the texts and the rows measured so far."""

    def __init__(self, work: Path, train_text: Path, eval_text: Path, other: Path | None, resume: bool) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        if resume and FILE.exists():
            self.rows = {r["key"]: r for r in json.loads(FILE.read_text())["rows"]}
        source = resolve(MODEL)
        encode, bos = data.encoder(source.tokenizer())
        texts = data.read([str(train_text), "calibration"])
        self.training_text = functools.partial(data.sequences, texts, encode, bos, length=LENGTH, seed=0)
        outside = data.read([str(other)]) if other else [data.Source("Python reference (pydoc_data)", _pydoc())]
        read = {"in": data.read([str(eval_text)]), "out": outside, "shipped": data.read(["held_out"])}
        self.eval = {n: data.sequences(s, encode, bos, EVALUATION, LENGTH, None) for n, s in read.items()}
        self.texts = {"train": [s.facts() for s in texts]} | {n: [s.facts() for s in x] for n, x in read.items()}
        self.model = source.load(torch.bfloat16)
        self.layers = discover(self.model)
        self.projections: dict[int, torch.Tensor] = {}
        self.bars = Bars()

    # ------------------------------------------------------------ rows

    def row(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with this key, measured now if it is missing."""
        if key not in self.rows:
            begin = time.perf_counter()
            self.rows[key] = {"key": key, **make(), "seconds": round(time.perf_counter() - begin, 1)}
            self._write()
            summary = {n: v for n, v in self.rows[key].items() if n not in ("sequences", "layers", "key")}
            print(key, summary, flush=True)
        return self.rows[key]

    def _write(self) -> None:
        facts = {"model": MODEL, "length": LENGTH, "positions": len(POSITIONS), "texts": self.texts}
        facts |= {"train_sequences": TRAIN, "validation_sequences": _validation_count(TRAIN), "linears": "bfloat16"}
        rows = list(self.rows.values())
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(FILE, (json.dumps({"machine": machine(), **facts, "rows": rows}, indent=1) + "\n").encode())

    def perplexity(self, variant: variants.Variant, domain: str, chunk: int) -> dict[str, Any]:
        nll = perplexity.simulated(self.model, self.eval[domain].ids, variant, chunk, POSITIONS)
        return {"state_bytes": variant.state_bytes("bfloat16"), **self._figures(nll)}

    def _figures(self, nll: statistics.Nll) -> dict[str, Any]:
        """A perplexity with its interval, and the mean of every sequence, needed for shares of gaps."""
        interval = statistics.perplexity(nll)
        means = [round(float(x), 6) for x in nll.mean(1)]
        return {"perplexity": interval.value, "low": interval.low, "high": interval.high, "sequences": means}

    def full(self, domain: str = "in") -> None:
        variant = self._variant("full", SETTINGS[0], {}, 8)
        self.row(f"{domain} | full", lambda: self.perplexity(variant, domain, 1))

    def _variant(self, kind: variants.Kind, s: Setting, maps: Mapping[int, FeatureMap], rank: int) -> variants.Variant:
        """A cache of the setting; without kernels, every compressed layer counts as one of ``rank``."""
        ranks = {i: m.rank for i, m in maps.items()} or dict.fromkeys(range(len(self.layers)), rank)
        plan = plan_layers(self.layers, s.config(), LENGTH, ranks)
        return variants.build([kind], plan, Kernels(maps, {}), LENGTH, "bfloat16")[0]

    def baseline(self, s: Setting, kind: variants.Kind, domain: str = "in", chunk: int = 1, rank: int = 8) -> None:
        """A sparse cache; ``sparse+bytes`` adds the bytes of a low-rank state of ``rank`` in every compressed layer."""
        suffix = f" R{rank}" if kind == "sparse+bytes" else ""
        key = f"{domain} | {s.name} | {kind}{suffix} | chunk {chunk}"
        self.row(key, lambda: self.perplexity(self._variant(kind, s, {}, rank), domain, chunk))

    def divided(self, s: Setting) -> Setting:
        """The setting with its budget divided, by measurements on the training text."""

        def make() -> dict[str, Any]:
            plan, used = self._plan(s)
            ids = self.training_text(count=TRAIN + _validation_count(TRAIN)).ids
            costs = allocate.measure(LayerwiseDecoder(self.model, plan), ids, plan, used, self.bars)
            rounded = {str(i): {str(n): round(x, 5) for n, x in at.items()} for i, at in costs.items()}
            return {"costs": rounded, "layer_budgets": allocate.option(allocate.divide(costs, plan))}

        return replace(s, layer_budgets=self.row(f"divide | {s.name}", make)["layer_budgets"])

    def _plan(self, s: Setting) -> tuple[tuple[LayerSpec, ...], list[int]]:
        """The cache that kernels are trained for, and the layers that have kernels."""
        plan = plan_layers(self.layers, s.config(), LENGTH, dict.fromkeys(range(len(self.layers)), 8))
        return plan, [i for i, spec in enumerate(plan) if spec.absorb]

    def less(self, s: Setting, *recipes: Recipe, domain: str = "in", chunk: int = 1) -> None:
        """Measure LESS; kernels of missing rows are trained together."""
        keys = {r: f"{domain} | {s.name} | less {r.name} | chunk {chunk}" for r in recipes}
        self.trained(s, [r for r, key in keys.items() if key not in self.rows])

        def make(r: Recipe) -> dict[str, Any]:
            kernels = Kernels.load(self._file(s, r))
            variant = self._variant("less", s, kernels.layers, r.rank)
            return {"kernel_bytes": kernels.nbytes(), **self.perplexity(variant, domain, chunk)}

        for r, key in keys.items():
            self.row(key, functools.partial(make, r))

    def sweep(self, s: Setting, *recipes: Recipe) -> None:
        """Other kernels for one setting, each with the sparse cache of the same bytes."""
        self.less(s, *recipes)
        for r in recipes:
            self.baseline(s, "sparse+bytes", rank=r.rank)

    def stream(self, s: Setting, r: Recipe) -> None:
        """Measure a row again, token by token through a backend."""
        key = f"in | {s.name} | less {r.name} | streamed"
        self.trained(s, [] if key in self.rows else [r])

        def make() -> dict[str, Any]:
            variant = self._variant("less", s, Kernels.load(self._file(s, r)).layers, r.rank)
            contract = Contract(variant.plan, int(self.model.config.vocab_size), "bfloat16", 1, STREAMED)
            backend = ModelBackend(self.model, contract, variant.kernels)
            ids = self.eval["in"].ids[:STREAMED].numpy()
            with self.bars.phase(f"streaming {s.name}", LENGTH) as step:
                nll = perplexity.streamed(backend, ids, 1, POSITIONS.tolist(), step)
            backend.close()
            return self._figures(nll)

        self.row(key, make)

    # ------------------------------------------------------------ training

    def _file(self, s: Setting, r: Recipe) -> Path:
        name = f"{s.name} {r.name}".replace(" ", "_").replace("%", "").replace(",", "")
        return self.work / f"{name}.safetensors"

    def trained(self, s: Setting, recipes: list[Recipe]) -> None:
        """Train missing kernels; recipes of one setting share the prepared layers."""
        for r in recipes:
            if r.end_to_end:
                self._tuned(s, r)
        for count in {r.sequences for r in recipes}:
            candidates = [r for r in recipes if r.sequences == count and not r.end_to_end]
            missing = [
                r
                for r in candidates
                if f"train | {s.name} | {r.name}" not in self.rows or not self._file(s, r).exists()
            ]
            if missing:
                self._train(s, missing, count)

    def _train(self, s: Setting, recipes: list[Recipe], count: int) -> None:
        plan, used = self._plan(s)
        activations = self._activations(used, count)
        maps: dict[Recipe, dict[int, Any]] = {r: {} for r in recipes}
        figures: dict[Recipe, list[dict[str, Any]]] = {r: [] for r in recipes}
        for layer in used:
            begin = time.perf_counter()
            prepared = fit.prepare(activations.tensor(layer), plan[layer], self.projections[layer], "cpu")
            train, validation = prepared.rows(slice(0, count)), prepared.rows(slice(count, None))
            prepare_seconds = time.perf_counter() - begin
            for r in recipes:
                begin = time.perf_counter()
                recipe = replace(fit.Fit(), steps=r.steps)
                feature_map, errors = fit.fit(
                    train, validation, r.parametrisation, r.rank, r.hidden, recipe, r.seed, lambda _: None
                )
                seconds = time.perf_counter() - begin
                if errors.less < errors.sparse:
                    maps[r][layer] = feature_map
                facts = {"layer": layer, **vars(errors), "prepare_seconds": prepare_seconds, "fit_seconds": seconds}
                figures[r].append({n: round(x, 5) for n, x in facts.items()})
                print(s.name, r.name, figures[r][-1], flush=True)
        for r in recipes:
            Kernels(maps[r], {"model": MODEL, "setting": s.name, "recipe": r.name}).save(self._file(s, r))
            key = f"train | {s.name} | {r.name}"
            self.rows.pop(key, None)
            self.row(key, lambda r=r: {"layers": figures[r]})  # type: ignore[misc]

    def paces(self, s: Setting) -> None:
        """Seconds of a training step, ours and the authors', layer by layer in this process."""

        def make() -> dict[str, Any]:
            plan, used = self._plan(s)
            activations = self._activations(used, TRAIN)
            layers = []
            for layer in used:
                prepared = fit.prepare(activations.tensor(layer)[:4], plan[layer], self.projections[layer], "cpu")
                ours = _pace(prepared, "exp", 128, fit.Fit(steps=TIMED))
                theirs = _pace(prepared, "paper", AUTHORS_HIDDEN, fit.Fit(steps=TIMED, positions=LENGTH))
                layers.append({"layer": layer, "ours": ours, "authors": theirs})
            return {"layers": layers, "steps": {"ours": fit.Fit().steps, "authors": AUTHORS_STEPS}}

        self.row(f"pace | {s.name}", make)

    def _tuned(self, s: Setting, r: Recipe) -> None:
        """Train the kernels of the recipe without end-to-end steps, then tune them end to end."""
        if self._file(s, r).exists():
            return
        untuned = replace(r, end_to_end=0)
        self.trained(s, [untuned])
        maps = Kernels.load(self._file(s, untuned)).layers
        plan = plan_layers(self.layers, s.config(), LENGTH, {i: m.rank for i, m in maps.items()})
        ids = self.training_text(count=r.sequences + _validation_count(r.sequences)).ids
        training, validation = ids.split([r.sequences, _validation_count(r.sequences)])

        def make() -> dict[str, Any]:
            texts = training, validation
            tuned, facts = end_to_end.tune(self.model, *texts, plan, maps, r.seed, self.bars, r.end_to_end)
            Kernels(tuned, {"model": MODEL, "setting": s.name, "recipe": r.name}).save(self._file(s, r))
            return {"end_to_end": facts}

        key = f"train | {s.name} | {r.name}"
        self.rows.pop(key, None)
        self.row(key, make)

    def _activations(self, layers: list[int], sequences: int) -> collect.Activations:
        """Activations of ``layers``; of all layers where every setting can reuse them."""
        count = sequences + _validation_count(sequences)
        plan = plan_layers(self.layers, SETTINGS[0].config(), LENGTH, dict.fromkeys(range(len(self.layers)), 8))
        collected = list(range(len(plan))) if sequences == TRAIN else layers
        activations = collect.Activations(self.work / f"activations_{count}", plan, count, LENGTH, torch.bfloat16)
        if not self.projections:
            self.projections = collect.output_projections(self.model, plan)
        if not set(collected) <= activations.done():
            ids = self.training_text(count=count).ids
            collect.collect(self.model, ids, plan, collected, activations, (0, 1), self.bars)
            activations.mark_done(collected)
        return activations


def _validation_count(sequences: int) -> int:
    """Number of validation sequences for so many training sequences."""
    return sequences // 12


def _pace(prepared: fit.Prepared, parametrisation: str, hidden: int, recipe: fit.Fit) -> float:
    """Median seconds of a training step."""
    stamps: list[float] = []

    def step(_: str) -> None:
        stamps.append(time.perf_counter())

    fit.fit(prepared, prepared.rows(slice(0, 1)), parametrisation, 8, hidden, recipe, 0, step)
    return round(median(b - a for a, b in pairwise(stamps)), 4)


def _pydoc() -> str:
    """The reference manual in every CPython: a domain that no kernels here are trained on."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[n] for n in sorted(topics))


def measure(b: Bench) -> None:
    """Measure all rows, the most informative first."""
    plain, seeds = Recipe(), [Recipe(seed=1), Recipe(seed=2)]
    first, whole = SETTINGS[0], SETTINGS[4]
    b.full()
    for s in SETTINGS:
        b.baseline(s, "sparse+bytes")
        b.less(s, plain)
    for s in SETTINGS:
        b.baseline(s, "sparse+4")
    for domain in ("out", "shipped"):
        b.full(domain)
        b.baseline(first, "sparse+bytes", domain)
        b.less(first, plain, domain=domain)
    b.stream(first, plain)
    b.less(first, *seeds)
    for s in SETTINGS:
        b.baseline(s, "sparse")
    for s, rank in SPLITS:
        b.less(s, Recipe(rank=rank))
    for s in SETTINGS[1:4]:
        b.less(s, *seeds)
    b.sweep(first, Recipe(steps=0), Recipe(rank=16), Recipe(rank=4), Recipe(hidden=64), Recipe(hidden=32))
    b.sweep(first, Recipe(steps=1500), Recipe(parametrisation="paper", hidden=512))
    for s in (first, SETTINGS[2]):
        b.baseline(s, "sparse+bytes", chunk=256)
        b.less(s, plain, chunk=256)
    b.stream(SETTINGS[2], plain)
    b.paces(first)
    for steps in (96, 0):
        r = Recipe(sequences=MANY, end_to_end=steps)
        for domain in DOMAINS:
            b.less(first, r, domain=domain)
    d = b.divided(first)
    b.less(d, Recipe(end_to_end=96))
    for domain in DOMAINS:
        for r in (Recipe(sequences=MANY, end_to_end=96), plain):
            b.less(d, r, domain=domain)
        b.baseline(d, "sparse+bytes", domain)
    b.less(d, *seeds)
    for s in SETTINGS[1:]:
        b.baseline(s, "sparse+bytes", "out")
        b.less(s, plain, domain="out")
    b.less(whole, *seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train-text", type=Path, required=True, help="WikiText-2 valid, one half of the training text"
    )
    parser.add_argument("--eval-text", type=Path, required=True, help="WikiText-2 test")
    parser.add_argument("--other-text", type=Path, help="another domain (default: Python's reference manual)")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="activations and kernels (3 GB)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are already measured")
    args = parser.parse_args()
    measure(Bench(args.work, args.train_text, args.eval_text, args.other_text, args.resume))


if __name__ == "__main__":
    main()
