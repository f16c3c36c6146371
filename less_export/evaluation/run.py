"""The table of perplexities and divergences: every variant on every text, by streaming or by simulation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..contract import LayerSpec
from ..errors import UsageError, install_hint
from ..hf import data
from ..progress import Progress
from . import perplexity, statistics
from .perplexity import Scores
from .statistics import Interval
from .subject import Subject
from .variants import BASELINES, Kind, Variant, build, chosen, kinds_for

#: Sequences streamed at a time.
BATCH = 8


@dataclass(frozen=True)
class EvalConfig:
    """Options of an evaluation.

    compare: variants to compare; None for all that the subject supports; a simulation adds the full cache. seqs,
    seq_len: sequences of each text, and tokens in each. chunk: tokens per step. positions: scored positions of a
    sequence, spread evenly from where the first layer evicts. backend: stream through it; None simulates. budgets: more
    budgets, the same in all layers.
    """

    compare: tuple[Kind, ...] | None = None
    seqs: int = 16
    seq_len: int = 1024
    chunk: int = 1
    positions: int = 256
    backend: str | None = None
    budgets: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seqs", "seq_len", "chunk", "positions"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        chosen(self.compare or ())
        if not all(self.budgets):
            raise UsageError("--budgets names an empty budget: give some like 2%,5%,10%")


@dataclass(frozen=True)
class Row:
    """One row of the table. ``sequences``: number of sequences that were measured.

    ``share``: how much of the gap in perplexity between full and each baseline LESS closes; None where there is no gap.
    ``divergence``: mean KL(full cache || this one) of the next token in nats, and of those tokens alone that are copied
    from further back, and of the others; None unless both were simulated. ``change``: LESS's divergence less that of
    each baseline, on the same tokens.
    """

    text: str
    domain: str
    budget: str
    kind: Kind
    how: str
    sequences: int
    perplexity: Interval
    state_bytes: int
    share: dict[str, Interval | None]
    divergence: Interval | None
    divergence_copied: Interval | None
    divergence_other: Interval | None
    change: dict[str, Interval]


def evaluate(
    subject: Subject,
    inside: Sequence[data.Source],
    outside: Sequence[data.Source],
    config: EvalConfig,
    progress: Progress,
) -> list[Row]:
    """Perplexity and divergence of every variant on each text.

    Args:
        inside: texts from the domain that the kernels were trained on. outside: texts from other domains.

    Raises:
        UsageError: a text is too short, or a variant or chunk is impossible; raised before anything runs.
    """
    kinds = chosen(config.compare or kinds_for(subject.plan, subject.kernels))
    if config.backend is None:  # divergences are from the full cache
        kinds = chosen([*kinds, "full"])
    plans: list[tuple[str, Sequence[LayerSpec]]] = [(_slots(subject.plan), subject.plan)]
    if config.budgets:
        if subject.plan_for is None:
            raise UsageError("--budgets needs a MODEL: a bundle has one budget")
        for budget in config.budgets:
            plan = subject.plan_for(budget)
            if plan not in [p for _, p in plans]:
                plans.append((budget, plan))
    _warn_of_training_text(subject, [*inside, *outside])
    compared = [(budget, build(kinds, p, subject.kernels, config.seq_len, subject.cache_dtype)) for budget, p in plans]
    slots = [n for _, variants in compared for v in variants for n in v.slots()] or [0]
    if max(slots) + 1 > config.seq_len - 2:
        raise UsageError(f"--seq-len {config.seq_len} ends before a budget of {max(slots)} tokens is full: increase it")
    first = min(slots) + 1  # where a layer of one of them begins to evict; all are scored at the same positions
    _refuse_backend(subject, [v for _, variants in compared for v in variants], config)
    positions = torch.linspace(first, config.seq_len - 2, config.positions).long().unique()
    texts = [(domain, s, _ids(subject, s, config)) for domain, x in (("in", inside), ("out", outside)) for s in x]
    rows: list[Row] = []
    for domain, source, ids in texts:
        for budget, variants in compared:
            scores = _scores(subject, variants, ids, positions, config, progress, source.name)
            split = statistics.copied(ids.numpy(), positions.numpy())
            rows += [_row((source.name, domain, budget), v, scores, split, subject, config) for v in variants]
    return rows


def _refuse_backend(subject: Subject, variants: Sequence[Variant], config: EvalConfig) -> None:
    subject.refuse_backend(config.backend)
    if config.backend not in (None, "torch") and subject.own and any(map(subject.exported, variants)):
        perplexity.refuse_chunk(subject.own(config.backend).contract, config.chunk)


def _ids(subject: Subject, source: data.Source, config: EvalConfig) -> torch.Tensor:
    """The sequences of a text, [N,L]; warns if there are fewer than ``config.seqs``."""
    data.warn_of_special_tokens([source], subject.special_tokens)
    ids = data.sequences([source], subject.encode, subject.bos, config.seqs, config.seq_len, None).ids
    if len(ids) < config.seqs:
        available = f"{len(ids)} sequence{'s' if len(ids) > 1 else ''} of {config.seq_len} tokens"
        warnings.warn(f"{source.name} has {available}, not {config.seqs}", stacklevel=3)
    return ids


def _slots(plan: Sequence[LayerSpec]) -> str:
    sizes = sorted({s.capacity for s in plan if s.absorb} or {min(s.capacity for s in plan)})
    return "/".join(map(str, sizes)) + " tokens"


def _scores(
    subject: Subject,
    variants: Sequence[Variant],
    ids: torch.Tensor,
    positions: torch.Tensor,
    config: EvalConfig,
    progress: Progress,
    text: str,
) -> dict[Kind, tuple[Scores, str]]:
    """What each variant does on a text, and how that was computed."""
    measured: dict[Kind, tuple[Scores, str]] = {}
    simulated = [v for v in variants if not _streams(subject, v, config)]
    if simulated:
        with progress.phase(text, len(ids) * len(simulated)) as step:
            scores = perplexity.compared(
                subject.model, ids, simulated, config.chunk, positions, lambda rows: step("", rows),
                lambda variant: subject.rotary_tables(variant.plan, ids.shape[1]),
            )  # fmt: skip
        measured = {v.kind: (x, "simulated") for v, x in zip(simulated, scores, strict=True)}
    for variant in variants:
        if variant.kind in measured:
            continue
        assert config.backend is not None
        backend = subject.backend(variant, config.backend, min(BATCH, len(ids)), config.chunk)
        steps = -(-len(ids) // backend.contract.max_batch) * -(-(int(positions[-1]) + 1) // config.chunk)
        with progress.phase(f"{text}: {variant.kind}", steps) as step:
            nll = perplexity.streamed(backend, ids.numpy(), config.chunk, positions.tolist(), step)
        backend.close()
        measured[variant.kind] = Scores(nll), f"streamed, {config.backend}"
    return measured


def _streams(subject: Subject, variant: Variant, config: EvalConfig) -> bool:
    """Whether a variant runs step by step on a backend."""
    return config.backend == "torch" or (config.backend is not None and subject.exported(variant))


def _row(
    place: tuple[str, str, str], variant: Variant, scores: dict[Kind, tuple[Scores, str]],
    copied: npt.NDArray[np.bool_], subject: Subject, config: EvalConfig,
) -> Row:  # fmt: skip
    """The row of a variant at ``place``: text, domain and budget."""
    seed, (own, how) = config.seed, scores[variant.kind]
    share: dict[str, Interval | None] = {}
    change: dict[str, Interval] = {}
    baselines = {b: scores[b][0] for b in BASELINES if b in scores} if variant.kind == "less" else {}
    if "full" in scores:
        full = scores["full"][0].nll
        share = {b: statistics.share_of_gap(full, x.nll, own.nll, seed) for b, x in baselines.items()}
    divergence = own.divergence
    mean = on_copied = on_other = None
    if divergence is not None:
        mean = statistics.mean(divergence.mean(1), seed)
        on_copied, on_other = (statistics.mean_of_some(divergence, x, seed) for x in (copied, ~copied))
        for name, other in baselines.items():
            if other.divergence is not None:
                change[name] = statistics.mean((divergence - other.divergence).mean(1), seed)
    size, perplexities = variant.state_bytes(subject.cache_dtype), statistics.perplexity(own.nll, seed)
    return Row(*place, variant.kind, how, len(own.nll), perplexities, size, share, mean, on_copied, on_other, change)


def _warn_of_training_text(subject: Subject, sources: Sequence[data.Source]) -> None:
    hashes = {x.get("sha256") for x in subject.kernels.provenance.get("data", ()) if isinstance(x, dict)}
    trained_on = [s.name for s in sources if s.facts()["sha256"] in hashes]
    if trained_on:
        warnings.warn(f"the kernels were trained on {trained_on[0]}: perplexity on it is optimistic", stacklevel=3)


def as_json(rows: Sequence[Row], subject: Subject, config: EvalConfig) -> dict[str, Any]:
    """The table, the options and the provenance of the kernels, for a JSON file."""
    table = [asdict(r) for r in rows]
    layers = subject.kernels.provenance.get("layers", {})
    facts = {n: v for n, v in vars(config).items() if v is not None}
    return {
        "subject": subject.name,
        "options": facts,
        "kernel_bytes": subject.kernels.nbytes(),
        "kernels": dict(subject.kernels.provenance),
        "layers": layers,
        "rows": table,
    }


def refuse_plot(path: Path) -> None:
    """Raise :class:`UsageError` if matplotlib is missing or does not support the suffix of ``path``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UsageError(f"--plot needs matplotlib: {install_hint('eval')}") from None
    supported = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in supported:
        raise UsageError(f"--plot {path} must end in one of {', '.join('.' + n for n in sorted(supported))}")


def plot(rows: Sequence[Row], subject: Subject, path: Path) -> None:
    """Perplexity against budget for every variant and text, and the layers' errors from the kernel file.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(r.text for r in rows))
    layers = subject.kernels.provenance.get("layers", {})
    figure, axes = plt.subplots(
        1, len(texts) + bool(layers), figsize=(5 * (len(texts) + bool(layers)), 4), squeeze=False
    )
    for ax, text in zip(axes[0], texts, strict=False):
        for kind in dict.fromkeys(r.kind for r in rows):
            line = sorted((r for r in rows if r.text == text and r.kind == kind), key=lambda r: r.state_bytes)
            x = np.array([r.state_bytes for r in line]) / 1e3
            if kind == "full":
                ax.axhline(line[0].perplexity.value, color="black", linestyle=":", label=kind)
                continue
            values = np.array([r.perplexity.value for r in line])
            ends = [(r.perplexity.low or r.perplexity.value, r.perplexity.high or r.perplexity.value) for r in line]
            spread = np.abs(np.array(ends).T - values)
            ax.errorbar(x, values, spread, marker="o", capsize=2, label=kind)
        ax.set_title(text)
        ax.set_xlabel("state of one sequence, kB")
        ax.set_ylabel("perplexity")
        ax.grid(alpha=0.3)
        ax.legend()
    if layers:
        ax, at = axes[0][-1], np.arange(len(layers))
        for shift, name in ((-0.2, "sparse"), (0.2, "less")):
            ax.bar(at + shift, [x[name] for x in layers.values()], 0.4, label=name)
        ax.set_xticks(at, list(layers))
        ax.set_xlabel("layer")
        ax.set_ylabel("relative error")
        ax.legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)
