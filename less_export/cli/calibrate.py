"""``less-export calibrate``: the constants with which int8 slots centre keys, measured on text."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..hf import recipes
from .options import DATA_HELP, MODEL_HELP, Parser, distance_option, general_options
from .progress import Bars


def parser() -> Parser:
    parser = Parser(
        "calibrate",
        "MODEL --out FILE [options]",
        "Measure mean and standard deviation of every key channel on text, for int8 slots. The file is given to export "
        "and eval with --kernels. train does the same for the kernels it trains, unless --slots model.",
        (
            "less-export calibrate gemma3-270m --out centring.safetensors",
            "less-export calibrate ./checkpoint --data a.txt --kernels k.st --out k8.st",
        ),
    )
    paths = parser.add_argument_group("model, texts and output")
    paths.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    paths.add_argument("--out", required=True, type=Path, metavar="FILE", help="kernel file to write (.safetensors)")
    paths.add_argument("--data", nargs="+", default=[], metavar="TEXT", help=DATA_HELP)
    paths.add_argument(
        "--kernels", type=Path, metavar="FILE", help="trained kernels, which are written to --out too (default: none)"
    )
    distance_option(paths)
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument("--seqs", type=int, default=8, metavar="N", help="sequences (default: 8)")
    measurement.add_argument("--seq-len", type=int, metavar="N", help="tokens per sequence (default: 1024)")
    measurement.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    options = dict(vars(args))
    model, out, texts = (options.pop(name) for name in ("model", "out", "data"))
    options.pop("verbose")
    recipes.refuse_unknown(model)

    from ..hf.calibration import calibrate

    print(calibrate(model, out, texts, **options, progress=Bars()))
    return 0
