"""``less-export eval``: what the cache does to the model, as perplexity, summaries or a task."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.files import refuse_unwritable
from ..config import BACKENDS, CACHE_OPTIONS, ExportConfig
from ..errors import UsageError
from ..hf import recipes
from .files import write_json
from .options import Parser, cache_options, general_options, trust_option
from .progress import Bars
from .tables import interval, show, size, table

if TYPE_CHECKING:
    from ..evaluation.run import Row

#: The options that each task uses, besides those of every task.
_TASK_OPTIONS: dict[str, set[str]] = {
    "perplexity": {"kernels", *CACHE_OPTIONS, "data", "out_of_domain", "compare", "seqs", "seq_len", "chunk"}
    | {"positions", "budgets", "backend", "plot"},
    "summarize": {"kernels", *CACHE_OPTIONS, "data", "compare", "seqs", "chunk", "backend", "max_new_tokens"},
    "lm-eval": {"seqs", "backend"},
}
_COMMON_OPTIONS = {"target", "task", "json", "verbose", "trust_code"}


def parser() -> Parser:
    parser = Parser(
        "eval",
        "BUNDLE|MODEL [options]",
        "Measure what the cache does to the model: perplexity and KL divergence of LESS beside the full cache and "
        "sparse caches of equal bytes (default), ROUGE of summaries, or a task of lm-evaluation-harness.",
        (
            "less-export eval gemma3-270m --kernels kernels.safetensors --budgets 2%,5%,10%",
            "less-export eval gemma --task summarize --data articles.jsonl",
        ),
    )
    subject = parser.add_argument_group("what to measure")
    subject.add_argument(
        "target", metavar="BUNDLE|MODEL", help="exported bundle, or a model with the options of its cache"
    )
    trust_option(subject)
    subject.add_argument(
        "--task",
        nargs="+",
        default=["perplexity"],
        metavar="TASK",
        help="perplexity (default), summarize, or lm-eval TASK [FOLDER of task files]",
    )
    subject.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts of the kind the kernels were trained on, as for train (default: held_out, the text in the "
        "package); for summarize one .jsonl with text and summary",
    )
    subject.add_argument("--out-of-domain", nargs="+", default=[], metavar="TEXT", help="texts of other kinds")
    subject.add_argument("--kernels", type=Path, metavar="FILE", help="trained kernels (MODEL only)")
    cache_options(parser)
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument(
        "--compare",
        metavar="A,B",
        help="which of full, sparse, sparse+4, sparse16+bytes, sparse+bytes, less (default: all that apply); "
        "perplexity without --backend adds full",
    )
    measurement.add_argument(
        "--seqs",
        type=int,
        metavar="N",
        help="sequences of each text (default: 16), or items of a task (default: all)",
    )
    measurement.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="tokens per step (default: 1, as in decoding); for summaries with a MODEL, tokens per step of the prompt "
        "(default: 256)",
    )
    measurement.add_argument(
        "--backend",
        choices=BACKENDS,
        help="run step by step on this backend, as generation does (default for perplexity: simulate, faster)",
    )
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--seq-len", type=int, metavar="N", help="tokens per sequence (default: 1024)")
    perplexity.add_argument("--positions", type=int, metavar="N", help="scored positions (default: 256)")
    perplexity.add_argument(
        "--budgets", metavar="A,B", help="more budgets, the same in all layers, e.g. 2%%,5%%,10%% (MODEL only)"
    )
    summaries = parser.add_argument_group("summaries")
    summaries.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of a summary (default: 64)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot perplexity against the state's bytes, e.g. to x.png"
    )
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    task = args.task[0]
    if task not in _TASK_OPTIONS or len(args.task) not in ((2, 3) if task == "lm-eval" else (1,)):
        raise UsageError(f"--task {' '.join(args.task)}: choose perplexity, summarize, or lm-eval TASK [FOLDER]")
    _refuse_unused(args, task)
    if args.json:
        refuse_unwritable(args.json)
    return {"perplexity": _perplexity, "summarize": _summarize, "lm-eval": _lm_eval}[task](args)


def _refuse_unused(args: argparse.Namespace, task: str) -> None:
    for name, value in vars(args).items():
        if name not in _COMMON_OPTIONS | _TASK_OPTIONS[task] and value not in (None, []):
            raise UsageError(f"--task {task} does not use --{name.replace('_', '-')}: drop it")


def _cache(args: argparse.Namespace, **more: Any) -> ExportConfig:
    return ExportConfig(**{name: getattr(args, name) for name in CACHE_OPTIONS}, **more)


def _perplexity(args: argparse.Namespace) -> int:
    recipes.refuse_unknown(args.target)
    from ..evaluation import run
    from ..evaluation.subject import open_subject
    from ..hf import data

    numbers = {n: getattr(args, n) for n in ("seqs", "seq_len", "chunk", "positions") if getattr(args, n) is not None}
    config = run.EvalConfig(
        compare=None if args.compare is None else tuple(args.compare.split(",")),
        backend=args.backend,
        budgets=() if args.budgets is None else tuple(args.budgets.split(",")),
        **numbers,
    )
    cache = _cache(args)
    if args.plot:
        refuse_unwritable(args.plot)
        run.refuse_plot(args.plot)
    inside, outside = data.read(args.data or ["held_out"]), data.read(args.out_of_domain)
    bars = Bars()
    bars.say(f"loading {args.target}")
    subject = open_subject(args.target, cache, args.kernels, args.backend is not None, args.trust_code, bars)
    rows = run.evaluate(subject, inside, outside, config, bars)
    figures = table(
        f"perplexity, sequences of {config.seq_len} tokens, {config.chunk} per step",
        "text", "domain", "sequences", "budget", "cache", "perplexity", "state", "share of gap", "against", "how",
    )  # fmt: skip
    for r in rows:
        against = next(iter(r.share), "")
        gap = r.share.get(against)
        share = "" if gap is None else interval(gap)
        cells = (interval(r.perplexity), size(r.state_bytes), share)
        figures.add_row(r.text, r.domain, str(r.sequences), r.budget, r.kind, *cells, against, r.how)
    show(figures)
    _show_divergences(rows)
    if subject.kernels.layers:
        print(f"kernels' weights, once for all sequences: {size(subject.kernels.nbytes())}")
    write_json(args.json, run.as_json(rows, subject, config))
    if args.plot:
        run.plot(rows, subject, args.plot)
    return 0


def _show_divergences(rows: Sequence[Row]) -> None:
    """The divergences from the full cache, where they were measured."""
    figures = table(
        "KL(full cache || cache) of the next token, in nats",
        "text", "budget", "cache", "all tokens", "copied", "other", "LESS minus this",
    )  # fmt: skip
    measured = [r for r in rows if r.divergence is not None]
    for r in measured:
        less = next((x for x in rows if (x.text, x.budget, x.kind) == (r.text, r.budget, "less")), None)
        change = None if less is None else less.change.get(r.kind)
        cells = (r.divergence, r.divergence_copied, r.divergence_other, change)
        figures.add_row(r.text, r.budget, r.kind, *("" if x is None else interval(x, 4) for x in cells))
    if measured:
        show(figures)


def _summarize(args: argparse.Namespace) -> int:
    recipes.refuse_unknown(args.target)
    from ..evaluation import summarize

    compare = () if args.compare is None else args.compare.split(",")
    tokens = 64 if args.max_new_tokens is None else args.max_new_tokens
    cache = _cache(args, chunk=args.chunk)
    rows = summarize.summarize(
        args.target, args.data, args.seqs, tokens, compare, cache, args.kernels, args.backend, Bars(), args.trust_code
    )
    title = f"ROUGE F1 of {len(rows[0].texts)} summaries, at most {tokens} tokens each"
    scores = table(title, "cache", *summarize.METRICS, "how")
    for r in rows:
        scores.add_row(r.cache, *(interval(x, 4) for x in r.scores.values()), f"generated, {r.backend}")
    show(scores)
    write_json(args.json, summarize.as_json(rows, args.target))
    return 0


def _lm_eval(args: argparse.Namespace) -> int:
    from ..evaluation.harness import run_task

    folder = args.task[2] if len(args.task) > 2 else None
    figures = run_task(args.target, args.task[1], folder, args.backend, args.seqs, args.trust_code)
    scores = table("scores", "task", "metric", "value")
    for task, metrics in figures["scores"].items():
        for metric, value in metrics.items():
            scores.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
    show(scores)
    write_json(args.json, figures)
    return 0
