"""The commands around kernels: train, import-kernels, eval."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.files import refuse_unwritable
from ..config import BACKENDS, ExportConfig
from ..errors import LessExportError, UsageError
from ..hf import recipes
from . import reporting
from .options import Parser, cache_options, common
from .progress import Bars

if TYPE_CHECKING:
    from ..evaluation.statistics import Interval

_PARAMETRISATIONS = ("exp", "paper")


def train(arguments: list[str]) -> int:
    """``less-export train``"""
    parser = Parser(
        "less-export train",
        description="Train the kernels of the low-rank term on text, layer by layer. What is finished survives an "
        "interrupt: the same command goes on. Under torchrun the processes share the layers.",
    )
    parser.add_argument("model", metavar="MODEL", help="recipe name, hub id (org/name), checkpoint folder or GGUF file")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="kernel file (.safetensors) to write")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="TEXT",
        help="UTF-8 files, folders of .txt, hf:NAME[/CONFIG][:SPLIT], or 'calibration' (the text that ships with "
        "less-export, and the default); several are mixed in equal shares",
    )  # fmt: skip
    cache_options(parser, more="; auto divides the budget by what eviction costs in each layer")
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("--rank", type=int, metavar="R", help="features (default: recipe's, or 8)")
    kernels.add_argument("--hidden", type=int, metavar="N", help="hidden width (default: recipe's, or 128)")
    kernels.add_argument("--parametrisation", choices=_PARAMETRISATIONS, default="exp", help="default: exp")
    kernels.add_argument("--layers", metavar="0-7", help="train these layers only")
    fit = parser.add_argument_group("training")
    fit.add_argument(
        "--quality", choices=("fast", "high"), default="fast",
        help="fast: 48 sequences, layer by layer (default); high: 192, and --end-to-end",
    )  # fmt: skip
    fit.add_argument("--steps", type=int, metavar="N", help="steps a layer; 0 keeps the k-means start")
    fit.add_argument("--seqs", type=int, metavar="N", help="training sequences")
    fit.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence (default: 1024)")
    fit.add_argument("--end-to-end", action=argparse.BooleanOptionalAction, help="tune all kernels together at the end")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same kernels (default: 0)")
    fit.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    common(parser)
    options = vars(parser.parse_args(arguments))
    model, out, texts = (options.pop(n) for n in ("model", "out", "data"))
    options.pop("verbose")
    recipes.refuse_unknown(model)

    from ..training import job
    from ..training.options import Processes, TrainConfig

    reports = job.train(model, out, texts, TrainConfig(**options), progress=Bars())
    if Processes.here().first:
        made = reporting.table(
            "relative error of the layers' outputs", "layer", "slots", "sparse", "start", "LESS", "seconds", ""
        )
        for r in reports:
            used = "" if r.used else "switched off"
            figures = (f"{x:.4f}" for x in (r.sparse, r.start, r.less))
            made.add_row(str(r.layer), str(r.slots), *figures, f"{r.seconds:.0f}", used)
        reporting.show(made)
        if options["layer_budgets"] == "auto":
            print("give exports and evaluations --layer-budgets " + ",".join(f"{r.layer}:{r.slots}" for r in reports))
        print(out)
    return 0


def evaluate(arguments: list[str]) -> int:
    """``less-export eval``"""
    parser = Parser(
        "less-export eval",
        description="Measure what the cache does to the model: perplexity of LESS beside the full cache and sparse "
        "caches of equal bytes (default), ROUGE of summaries, or a task of lm-evaluation-harness.",
    )
    parser.add_argument(
        "target", metavar="BUNDLE|MODEL", help="what was exported, or a model with the options of its cache"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="TEXT",
        help="texts of the kind the kernels were trained on, as for train (default: held_out, which ships with "
        "less-export); for summarize one .jsonl with text and summary",
    )  # fmt: skip
    parser.add_argument("--out-of-domain", nargs="+", default=[], metavar="TEXT", help="texts of other kinds")
    parser.add_argument(
        "--task", nargs="+", default=["perplexity"], metavar="TASK",
        help="perplexity (default), summarize, or lm-eval TASK [FOLDER of task files]",
    )  # fmt: skip
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="trained kernels, for a MODEL")
    cache_options(parser)
    what = parser.add_argument_group("perplexity")
    what.add_argument(
        "--compare", metavar="A,B", help="of full, sparse, sparse+4, sparse+bytes, less (default: all there are)"
    )
    what.add_argument(
        "--seqs", type=int, metavar="N", help="sequences of each text (default: 16), or items of a task (default: all)"
    )
    what.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence (default: 1024)")
    what.add_argument(
        "--chunk", type=int, metavar="N",
        help="tokens per step (default: 1, decoding); for summaries of a MODEL those of a prompt (default: 256)",
    )  # fmt: skip
    what.add_argument("--positions", type=int, metavar="N", help="scored positions (default: 256)")
    what.add_argument("--budgets", metavar="A,B", help="more budgets, e.g. 2%%,5%%,10%% (MODEL only)")
    what.add_argument(
        "--backend", choices=BACKENDS,
        help="stream step by step through it, as generation does (default for perplexity: simulate, faster)",
    )  # fmt: skip
    what.add_argument("--max-new-tokens", type=int, metavar="N", help="of a summary (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against the state's bytes (.png)")
    common(parser)
    args = parser.parse_args(arguments)
    task = args.task[0]
    if task not in _USED or len(args.task) not in ((2, 3) if task == "lm-eval" else (1,)):
        raise UsageError(f"--task {' '.join(args.task)}: choose perplexity, summarize, or lm-eval TASK [FOLDER]")
    _refuse_unused(args, task)
    if args.json:
        refuse_unwritable(args.json)
    return {"perplexity": _perplexity, "summarize": _summarize, "lm-eval": _lm_eval_task}[task](args)


_CACHE = {"kernels", "policy", "budget", "layer_budgets", "context", "compress_sliding"}
#: The options that each task uses, besides --json.
_USED = {
    "perplexity": _CACHE
    | {"data", "out_of_domain", "compare", "seqs", "seq_len", "chunk", "positions", "budgets", "backend", "plot"},
    "summarize": _CACHE | {"data", "compare", "seqs", "chunk", "backend", "max_new_tokens"},
    "lm-eval": {"seqs", "backend"},
}


def _refuse_unused(args: argparse.Namespace, task: str) -> None:
    for name, value in vars(args).items():
        if name not in {"target", "task", "json", "verbose"} | _USED[task] and value not in (None, []):
            raise UsageError(f"--task {task} does not use --{name.replace('_', '-')}: drop it")


def _summarize(args: argparse.Namespace) -> int:
    recipes.refuse_unknown(args.target)
    from ..evaluation import summarize

    compare = () if args.compare is None else args.compare.split(",")
    new = 64 if args.max_new_tokens is None else args.max_new_tokens
    cache = _cache(args, chunk=args.chunk)
    rows = summarize.summarize(
        args.target, args.data, args.seqs, new, compare, cache, args.kernels, args.backend, Bars()
    )
    made = reporting.table(
        f"ROUGE F1 of {len(rows[0].texts)} summaries, at most {new} tokens each", "cache", *summarize.METRICS, "how"
    )
    for r in rows:
        made.add_row(r.cache, *(_interval(x, 4) for x in r.scores.values()), f"generated, {r.backend}")
    reporting.show(made)
    _write_json(args.json, summarize.as_json(rows, args.target))
    return 0


def _lm_eval_task(args: argparse.Namespace) -> int:
    from ..evaluation.harness import run_task

    figures = run_task(args.target, args.task[1], (*args.task, None)[2], args.backend, args.seqs)
    made = reporting.table("scores", "task", "metric", "value")
    for task, scores in figures["scores"].items():
        for name, value in scores.items():
            made.add_row(task, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    reporting.show(made)
    _write_json(args.json, figures)
    return 0


def lm_eval() -> int:
    """``less-lm-eval``: the command line of lm-evaluation-harness, with the model ``less``; our errors in one line."""
    try:
        from ..evaluation import harness

        harness.main()
    except LessExportError as error:
        print(f"less-export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _cache(args: argparse.Namespace, **more: Any) -> ExportConfig:
    given = {n: getattr(args, n) for n in ("policy", "budget", "layer_budgets", "context", "compress_sliding")}
    return ExportConfig(**given, **more)


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is None:
        return
    from ..bundle.files import write_atomically

    try:
        write_atomically(path, (json.dumps(figures, indent=1) + "\n").encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def _perplexity(args: argparse.Namespace) -> int:
    recipes.refuse_unknown(args.target)
    from ..evaluation import run
    from ..evaluation.subject import open_subject
    from ..training import data

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
    subject = open_subject(args.target, cache, args.kernels, args.backend is not None)
    rows = run.evaluate(subject, inside, outside, config, bars)
    made = reporting.table(
        f"perplexity, sequences of {config.seq_len} tokens, {config.chunk} a step",
        "text", "domain", "sequences", "budget", "cache", "perplexity", "state", "share of gap", "against", "how",
    )  # fmt: skip
    for r in rows:
        against = next(iter(r.share), "")
        gap = r.share.get(against)
        share = "" if gap is None else _interval(gap)
        figures = (_interval(r.perplexity), reporting.size(r.state_bytes), share)
        made.add_row(r.text, r.domain, str(r.sequences), r.budget, r.kind, *figures, against, r.how)
    reporting.show(made)
    if subject.kernels.layers:
        print(f"kernels' weights, once for all sequences: {reporting.size(subject.kernels.nbytes())}")
    _write_json(args.json, run.as_json(rows, subject, config))
    if args.plot:
        run.plot(rows, subject, args.plot)
    return 0


def _interval(x: Interval, digits: int = 2) -> str:
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def import_kernels(arguments: list[str]) -> int:
    """``less-export import-kernels``"""
    parser = Parser(
        "less-export import-kernels",
        description="Read the checkpoints of the LESS authors' code (layer_{i}.pth) into a kernel file. Only tensors "
        "are read; nothing that a checkpoint holds is run.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with layer_0.pth, layer_1.pth, ...")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="kernel file (.safetensors) to write")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model they were trained for")
    common(parser)
    args = parser.parse_args(arguments)
    recipes.refuse_unknown(args.model)
    from ..training.authors import import_folder

    layers = import_folder(args.folder, args.model, args.out)
    print(f"{args.out}: {len(layers)} layers")
    return 0
