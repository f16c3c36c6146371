"""``less-export kernels``: what a kernel file holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import printable
from .options import Parser, general_options


def parser() -> Parser:
    parser = Parser(
        "kernels",
        "info FILE",
        "Show the model card of a kernel file: the model and cache that it is for, the texts that it was trained on, "
        "and what held-back text says about it. train writes the same beside the file, as Markdown.",
        ("less-export kernels info kernels.safetensors", "less-export kernels info ./gemma/kernels.safetensors"),
    )
    what = parser.add_argument_group("what to show")
    what.add_argument("what", choices=("info",), metavar="info", help="the model card")
    what.add_argument("file", type=Path, metavar="FILE", help="kernel file (.safetensors)")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..less.feature_maps import Kernels
    from ..training.card import card

    for line in card(Kernels.load(args.file)).splitlines():
        print(printable(line))
    return 0
