"""The tables of ``benchmarks/results/quality.json``: perplexities, shares of the gap, sweeps, domains, memory, time."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from less_export.evaluation import statistics

#: ``domain | setting | less R8 hidden 128 exp steps 500 seed 0 | chunk 1``
_LESS = re.compile(
    r"less R(\d+) hidden (\d+) (\w+) steps (\d+) seed (\d+)(?: (\d+) sequences)?(?: \+ (\d+) end to end)?$"
)

_SEED = re.compile(r" seed \d+")
#: Suffix of settings whose budget is divided among the layers.
DIVIDED = ", divided"


@dataclass(frozen=True, order=True)
class KernelRecipe:
    """How kernels were trained; ``sequences`` 0 is the results' ``train_sequences``, ``tuned`` the end-to-end steps."""

    rank: int = 8
    hidden: int = 128
    kind: str = "exp"
    steps: int = 500
    sequences: int = 0
    tuned: int = 0

    @property
    def trained(self) -> str:
        """Name of the training before the end-to-end stage, without the seed and what follows it."""
        return f"R{self.rank} hidden {self.hidden} {self.kind} steps {self.steps}"


PLAIN = KernelRecipe()
TUNED = KernelRecipe(tuned=96)
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Measurement:
    """A row of the results, with its key split into parts."""

    domain: str
    setting: str
    cache: str
    how: str
    recipe: KernelRecipe | None
    seed: int
    row: dict[str, Any]

    @property
    def nll(self) -> np.ndarray:
        return np.array(self.row["sequences"])[:, None]


class Quality:
    """The measured rows, with lookups."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.measurements: list[Measurement] = []
        self.training: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.tuning: dict[tuple[str, str], float] = {}
        self.paces: dict[str, dict[str, Any]] = {}
        self.budgets: dict[str, str] = {}
        for row in data["rows"]:
            parts = row["key"].split(" | ")
            if parts[0] == "train":
                if "layers" in row:
                    self.training[parts[1], parts[2]] = row["layers"]
                else:
                    self.tuning[parts[1], parts[2]] = row["seconds"]
                continue
            if parts[0] == "divide":
                self.budgets[parts[1]] = row["layer_budgets"]
                continue
            if parts[0] == "pace":
                self.paces[parts[1]] = row
                continue
            setting, cache, how = [*parts[1:], "", ""][:3] if len(parts) > 2 else ("", "full", "")
            recipe, seed = None, 0
            if match := _LESS.match(cache):
                rank, hidden, kind, steps, seed_, more, tuned = match.groups()
                recipe = KernelRecipe(int(rank), int(hidden), kind, int(steps), int(more or 0), int(tuned or 0))
                seed, cache = int(seed_), "less"
            self.measurements.append(Measurement(parts[0], setting, cache, how, recipe, seed, row))

    def one(self, domain: str, setting: str, cache: str, how: str = "chunk 1") -> Measurement | None:
        key = (domain, setting, cache, how) if cache != "full" else (domain, "", "full", "")
        return next((f for f in self.measurements if (f.domain, f.setting, f.cache, f.how) == key), None)

    def less(self, domain: str, setting: str, recipe: KernelRecipe = PLAIN, how: str = "chunk 1") -> list[Measurement]:
        """The measurements of a recipe, one for each seed."""
        key = (domain, setting, "less", how, recipe)
        matches = [f for f in self.measurements if (f.domain, f.setting, f.cache, f.how, f.recipe) == key]
        return sorted(matches, key=lambda f: f.seed)

    def share(self, domain: str, baseline: Measurement | None, less: list[Measurement]) -> statistics.Interval | None:
        """Share of the gap that LESS closes; its log likelihoods are averaged over the seeds, sequence by sequence."""
        full = self.one(domain, "", "full")
        if full is None or baseline is None or not less:
            return None
        return statistics.share_of_gap(full.nll, baseline.nll, np.mean([f.nll for f in less], 0))

    def settings(self) -> list[str]:
        """Settings of the main table: those with budgets in percent."""
        return [s for s in dict.fromkeys(f.setting for f in self.measurements if "%" in f.setting) if DIVIDED not in s]

    def divided(self) -> list[str]:
        """Settings whose budget is divided by the cost of eviction."""
        return [s for s in dict.fromkeys(f.setting for f in self.measurements) if DIVIDED in s]

    def splits(self) -> list[str]:
        """The first setting, and those that divide its bytes differently: budgets in tokens."""
        others = dict.fromkeys(f.setting for f in self.measurements if f.setting and "%" not in f.setting)
        return [self.settings()[0], *others]


def _ppl(measurement: Measurement | None) -> str:
    return f"{measurement.row['perplexity']:.2f}" if measurement else NOT_YET


def _seeds(less: list[Measurement]) -> str:
    if not less:
        return NOT_YET
    values = [f.row["perplexity"] for f in less]
    spread = f" ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    return f"{np.mean(values):.2f}{spread}"


def _share(share: statistics.Interval | None) -> str:
    return share.text(".2f") if share else NOT_YET


def settings(q: Quality) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in q.settings():
        less = q.less("in", name)
        four, same = q.one("in", name, "sparse+4"), q.one("in", name, "sparse+bytes R8")
        shares = [_share(q.share("in", b, less)) for b in (same, four)]
        rows.append([name, _ppl(q.one("in", name, "sparse")), _ppl(four), _ppl(same), _seeds(less), *shares])
    header = ["setting, R = 8", "sparse", "+4 tokens", "= bytes", "LESS", "share of the gap (= bytes)", "share (+4)"]
    return header, rows


def divided(q: Quality) -> tuple[list[str], list[list[str]]]:
    """The same bytes, divided among the layers by the cost of eviction, against both sparse caches of as many bytes."""
    rows = []
    for name in q.divided():
        even = name.removesuffix(DIVIDED)
        baselines = [q.one("in", n, "sparse+bytes R8") for n in (even, name)]
        recipes = {f.recipe for f in q.measurements if f.setting == name and f.recipe and f.domain == "in"}
        for recipe in sorted(r for r in recipes if r):
            less = q.less("in", name, recipe)
            how = f"{recipe.sequences or q.data['train_sequences']} sequences"
            how += f", {recipe.tuned} steps end to end" if recipe.tuned else ""
            same = q.less("in", even, recipe)
            shares = [_share(q.share("in", b, less)) for b in baselines]
            figures = [*map(_ppl, baselines), _seeds(same) if same else "", _seeds(less), *shares]
            rows.append([even, q.budgets[even], how, *figures])
    header = ["setting", "slots of the layers", "trained on", "= bytes", "= bytes, divided", "LESS", "LESS, divided"]
    return [*header, "share of the gap (= bytes)", "share (= bytes, divided)"], rows


def sweep(q: Quality) -> tuple[list[str], list[list[str]]]:
    setting = q.settings()[0]
    recipes = dict.fromkeys(f.recipe for f in q.measurements if f.setting == setting and f.recipe and f.domain == "in")
    rows = []
    for recipe in sorted(r for r in recipes if r):
        less = q.less("in", setting, recipe)
        if not less:
            continue
        baseline = q.one("in", setting, f"sparse+bytes R{recipe.rank}")
        more = f" {recipe.sequences} sequences" if recipe.sequences else ""
        name = f"{recipe.trained} seed {less[0].seed}{more}"
        layers = [] if recipe.tuned else q.training.get((setting, name), [])
        error = f"{np.mean([x['less'] for x in layers]):.4f}" if layers else ""
        kernel = f"{less[0].row['kernel_bytes'] / 1e6:.2f}"
        cells = [
            str(recipe.rank),
            str(recipe.hidden),
            recipe.kind,
            str(recipe.steps) + (f" + {recipe.tuned} end to end" if recipe.tuned else ""),
            str(recipe.sequences or q.data["train_sequences"]),
            kernel,
            error,
            _seeds(less),
            _share(q.share("in", baseline, less)),
        ]
        rows.append(cells)
    header = [
        "R",
        "hidden",
        "parametrisation",
        "steps",
        "sequences",
        "kernels, MB",
        "layers' error",
        "LESS",
        "share of the gap (= bytes)",
    ]
    return header, rows


def splits(q: Quality) -> tuple[list[str], list[list[str]]]:
    """The same bytes used for slots or for rank, all against the sparse cache with the bytes of the first."""
    first, *_ = names = q.splits()
    baseline = q.one("in", first, "sparse+bytes R8")
    rows = []
    for name in names:
        key = (name, "less", "in", 0, "chunk 1")
        matches = [f for f in q.measurements if (f.setting, f.cache, f.domain, f.seed, f.how) == key]
        matches = [f for f in matches if f.recipe and replace(f.recipe, rank=8) == PLAIN]
        if name == first:
            matches = [f for f in matches if f.recipe == PLAIN]
        for f in matches:
            state, rank = f"{f.row['state_bytes'] / 1e6:.3f}", str(f.recipe.rank if f.recipe else "")
            rows.append([name, rank, state, _ppl(f), _share(q.share("in", baseline, [f]))])
    return ["setting", "R", "state, MB", "LESS", "share of the gap (= bytes of the first)"], rows


def domains(q: Quality) -> tuple[list[str], list[list[str]]]:
    rows = []
    names = {"in": "WikiText-2 test", "shipped": "held-out part of the shipped text", "out": "Python reference manual"}
    recipes = {f.recipe for f in q.measurements if f.domain != "in" and f.recipe}
    for setting in [*q.settings(), *q.divided()]:
        if not any(q.less(d, setting) for d in ("out", "shipped")):
            continue
        for domain, label in names.items():
            full, baseline = q.one(domain, "", "full"), q.one(domain, setting, "sparse+bytes R8")
            for recipe in sorted(recipes):
                less = q.less(domain, setting, recipe)
                if less:
                    how = f"{recipe.sequences or q.data['train_sequences']} sequences"
                    how += f", {recipe.tuned} steps end to end" if recipe.tuned else ""
                    share = _share(q.share(domain, baseline, less))
                    rows.append([setting, label, how, _ppl(full), _ppl(baseline), _seeds(less), share])
    return ["setting", "text", "trained on", "full", "= bytes", "LESS", "share of the gap"], rows


def orders(q: Quality) -> tuple[list[str], list[list[str]]]:
    """The same kernels in chunks of 256, and streamed through a backend next to a simulation of the same sequences."""
    rows = []
    for setting in q.settings():
        one, streamed, large = (q.less("in", setting, how=h)[:1] for h in ("chunk 1", "streamed", "chunk 256"))
        for label, less, how in (("one token a step", one, "chunk 1"), ("256 tokens a step", large, "chunk 256")):
            if less and large:
                baseline = q.one("in", setting, "sparse+bytes R8", how)
                cells = [str(len(less[0].nll)), _ppl(baseline), _ppl(less[0]), _share(q.share("in", baseline, less))]
                rows.append([setting, label, *cells])
        if streamed and one:
            count = len(streamed[0].nll)
            for label, measurement in (("one token a step, simulated", one[0]), ("the same, streamed", streamed[0])):
                value = f"{statistics.perplexity(measurement.nll[:count]).value:.2f}"
                rows.append([setting, label, str(count), "", value, ""])
    return ["setting", "order", "sequences", "= bytes", "LESS", "share of the gap"], rows


def memory(q: Quality) -> tuple[list[str], list[list[str]]]:
    """Bytes of a sequence and of the kernels, and the batch from which LESS takes less memory in total."""
    rows = []
    full = q.one("in", "", "full")
    for setting in q.settings():
        less, same = q.less("in", setting), q.one("in", setting, "sparse+bytes R8")
        if not less or same is None or full is None:
            continue
        kernels, state = less[0].row["kernel_bytes"], less[0].row["state_bytes"]
        cells = [f"{full.row['state_bytes'] / 1e6:.3f}", f"{same.row['state_bytes'] / 1e6:.3f}", f"{state / 1e6:.3f}"]
        cells += [f"{kernels / 1e6:.2f}", _batch(kernels, full.row["state_bytes"] - state)]
        rows.append([setting, *cells, _batch(kernels, same.row["state_bytes"] - state)])
    header = [
        "setting",
        "full cache, MB",
        "= bytes, MB",
        "LESS, MB",
        "kernels, MB",
        "less than full from",
        "less than = bytes from",
    ]
    return header, rows


def _batch(kernels: int, saved: int) -> str:
    return f"batch {kernels // saved + 1:,}" if saved > 0 else "never"


def times(q: Quality) -> tuple[list[str], list[list[str]]]:
    """Seconds of training per layer and in total."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for (setting, recipe), layers in q.training.items():
        grouped[setting, _SEED.sub("", recipe)] += layers
    rows = []
    for (setting, recipe), layers in grouped.items():
        prepare, fit = (np.array([x[n] for x in layers]) for n in ("prepare_seconds", "fit_seconds"))
        used = len({x["layer"] for x in layers})
        typical = np.median(prepare) + np.median(fit)
        cells = [f"{np.median(prepare):.0f}", f"{fit.min():.0f} to {fit.max():.0f}", f"{typical * used:.0f}"]
        rows.append([setting, recipe, str(used), *cells])
    for (setting, recipe), seconds in q.tuning.items():
        rows.append([setting, _SEED.sub("", recipe), "all at once", "", "", f"{seconds:.0f}"])
    return ["setting", "recipe", "layers", "prepare a layer, s", "fit a layer, s", "all layers, s"], rows


def pace(q: Quality) -> tuple[list[str], list[list[str]]]:
    """Our recipe and the authors': seconds of a step, and of all steps at that rate."""
    rows = []
    for setting, row in q.paces.items():
        for name, label in (("ours", "ours"), ("authors", "the authors'")):
            steps = row["steps"][name]
            seconds = [x[name] for x in row["layers"]]
            cells = [f"{np.mean(seconds):.3f}", f"{steps:,}", f"{np.mean(seconds) * steps / 60:.1f}"]
            rows.append([setting, label, *cells, f"{np.sum(seconds) * steps / 60:.1f}"])
    return ["setting", "recipe", "a step, s", "steps", "a layer, min", "all layers, min"], rows


PARTS = ("settings", "divided", "splits", "sweep", "domains", "orders", "memory", "times", "pace")


def note(q: Quality, part: str) -> str:
    """Text that explains a table's figures; it precedes the machine."""
    d = q.data
    if part in ("times", "pace"):
        return "one thread, beside other work on the machine; "
    if part == "memory":
        return f"16-bit cache, f32 state, one sequence of {d['length']:,} tokens; "
    full = q.one("in", "", "full") if part == "settings" else None
    return (
        (f"full cache {full.row['perplexity']:.2f}; " if full else "")
        + f"{len(q.measurements[0].row['sequences'])} sequences of {d['length']:,} tokens, "
        f"{d['positions']} positions each; "
        "95% intervals by bootstrap over sequences; "
    )
