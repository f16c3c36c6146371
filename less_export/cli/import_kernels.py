"""``less-export import-kernels``: the kernels that the paper's authors' code trains."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..hf import recipes
from .options import Parser, general_options


def parser() -> Parser:
    parser = Parser(
        "import-kernels",
        "DIR --model MODEL --out FILE [options]",
        "Convert the checkpoints of the LESS authors' code (layer_{i}.pth) to a kernel file. Only tensors are read; "
        "no code in a checkpoint is run.",
        (
            "less-export import-kernels llama --model llama2-7b --out llama.safetensors",
            "less-export import-kernels falcon --model falcon-7b --out falcon.safetensors",
        ),
    )
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument("folder", type=Path, metavar="DIR", help="folder with layer_0.pth, layer_1.pth, ...")
    kernels.add_argument("--model", required=True, metavar="MODEL", help="the model they were trained for")
    kernels.add_argument("--out", required=True, type=Path, metavar="FILE", help="kernel file to write (.safetensors)")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    recipes.refuse_unknown(args.model)
    from ..training.authors import import_folder

    layers = import_folder(args.folder, args.model, args.out)
    print(f"{args.out}: {len(layers)} layers")
    return 0
