"""``less-export build-operator``: the operator for ONNX Runtime's CPU provider on its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import write
from .options import Parser, general_options
from .progress import spinner


def parser() -> Parser:
    parser = Parser(
        "build-operator",
        "[options]",
        "Compile the operator for ONNX Runtime's CPU provider, or take it from the cache of earlier builds, and print "
        "its path. Bundles that run on a CPU do so themselves when they are opened; other programs register the file "
        "(SessionOptions.register_custom_ops_library), and an image for containers is built with it.",
        (
            "less-export build-operator",
            "less-export build-operator --out libless_ort.so",
        ),
    )
    library = parser.add_argument_group("library")
    library.add_argument("--out", type=Path, metavar="FILE", help="copy the library to FILE")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..native import ort_operator

    with spinner() as progress:
        library = ort_operator.library(progress=progress)
    if args.out is not None:
        write(args.out, library.read_bytes())
    print(args.out or library)
    return 0
