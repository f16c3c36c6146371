"""The commands around kernels: train, import-kernels, eval."""

from __future__ import annotations

from pathlib import Path

from . import reporting
from .arguments import Parser, cache_options, common

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
    cache_options(parser)
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("--rank", type=int, metavar="R", help="features (default: recipe's, or 8)")
    kernels.add_argument("--hidden", type=int, metavar="N", help="hidden width (default: recipe's, or 128)")
    kernels.add_argument("--parametrisation", choices=_PARAMETRISATIONS, default="exp", help="default: exp")
    kernels.add_argument("--layers", metavar="0-7", help="train these layers only")
    fit = parser.add_argument_group("training")
    fit.add_argument(
        "--quality", choices=("fast", "high"), default="fast",
        help="fast: 500 steps a layer on 32 sequences (default); high: 1500 on 64",
    )  # fmt: skip
    fit.add_argument("--steps", type=int, metavar="N", help="steps a layer; 0 keeps the k-means start")
    fit.add_argument("--seqs", type=int, metavar="N", help="training sequences")
    fit.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence (default: 1024)")
    fit.add_argument("--end-to-end", action="store_true", help="tune all kernels together at the end")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same kernels (default: 0)")
    fit.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    common(parser)
    options = vars(parser.parse_args(arguments))
    model, out, texts = (options.pop(n) for n in ("model", "out", "data"))
    options.pop("verbose")

    from .progress import Bars
    from .training import job
    from .training.options import Processes, TrainConfig

    reports = job.train(model, out, texts, TrainConfig(**options), progress=Bars())
    if Processes.join().first:
        made = reporting.table(
            "relative error of the layers' outputs", "layer", "sparse", "start", "LESS", "seconds", ""
        )
        for r in reports:
            used = "" if r.used else "switched off"
            figures = (f"{x:.4f}" for x in (r.sparse, r.start, r.less))
            made.add_row(str(r.layer), *figures, f"{r.seconds:.0f}", used)
        reporting.show(made)
        print(out)
    return 0
