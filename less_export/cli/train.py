"""``less-export train``: kernels of the low-rank term, trained on text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..hf import recipes
from .options import DATA_HELP, MODEL_HELP, Parser, cache_options, general_options
from .progress import Bars
from .tables import show, table

if TYPE_CHECKING:
    from ..training.job import LayerReport


def parser() -> Parser:
    parser = Parser(
        "train",
        "MODEL --out FILE [options]",
        "Train the kernels of the low-rank term on text: layer by layer, then all together. Finished layers and steps "
        "survive an interrupt: rerun the same command to resume. Under torchrun, the processes share the sequences "
        "while the inputs of a layer are collected.",
        (
            "less-export train gemma3-270m --out kernels.safetensors",
            "less-export train ./checkpoint --data a.txt b.txt --out k.safetensors",
        ),
    )
    paths = parser.add_argument_group("model, texts and output")
    paths.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    paths.add_argument("--out", required=True, type=Path, metavar="FILE", help="kernel file to write (.safetensors)")
    paths.add_argument("--data", nargs="+", default=[], metavar="TEXT", help=DATA_HELP)
    note = "; auto divides the budget by what eviction costs in each layer, equal does not (default: recipe's, or auto)"
    cache_options(parser, layer_budgets_note=note)
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("--rank", type=int, metavar="R", help="number of features (default: recipe's, or 4)")
    kernels.add_argument("--hidden", type=int, metavar="N", help="hidden width (default: recipe's, or 128)")
    kernels.add_argument(
        "--parametrisation",
        choices=("exp", "paper"),
        default="exp",
        help="form of the feature maps: exp (default), or paper, as the LESS paper defines them",
    )
    kernels.add_argument("--layers", metavar="0-7,9", help="train only these layers (default: all that evict)")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--quality",
        choices=("fast", "high"),
        default="fast",
        help="fast: 48 sequences, 200 steps a layer, 120 end to end (default); high: 192, 500 and 480",
    )
    training.add_argument(
        "--steps", type=int, metavar="N", help="steps per layer (default: by --quality); 0 keeps the k-means start"
    )
    training.add_argument("--seqs", type=int, metavar="N", help="training sequences (default: by --quality)")
    training.add_argument("--seq-len", type=int, metavar="N", help="tokens per sequence (default: 1024)")
    training.add_argument(
        "--end-to-end",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tune all kernels together at the end (default: yes)",
    )
    training.add_argument("--tune-steps", type=int, metavar="N", help="steps of --end-to-end (default: by --quality)")
    training.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same kernels (default: 0)"
    )
    training.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    options = dict(vars(args))
    model, out, texts = (options.pop(name) for name in ("model", "out", "data"))
    options.pop("verbose")
    recipes.refuse_unknown(model)

    from ..training import job
    from ..training.options import Processes, TrainConfig

    config = TrainConfig(**options)
    reports = job.train(model, out, texts, config, progress=Bars())
    if Processes.here().first:
        _print_layers(reports)
        if len({r.slots for r in reports}) > 1:
            budgets = ",".join(f"{r.layer}:{r.slots}" for r in reports)
            print(f"layer budgets, used by exports and evaluations with these kernels: {budgets}")
        print(out)
    return 0


def _print_layers(reports: Sequence[LayerReport]) -> None:
    layers = table(
        "relative error of the layers' outputs", "layer", "slots", "sparse", "start", "LESS", "seconds", "gain", ""
    )
    for r in reports:
        errors = (f"{x:.4f}" for x in (r.sparse, r.start, r.less))
        gain = "" if r.gain is None else f"{r.gain:+.4f}"
        layers.add_row(str(r.layer), str(r.slots), *errors, f"{r.seconds:.0f}", gain, "" if r.used else "slots instead")
    show(layers)
