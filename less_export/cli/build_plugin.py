"""``less-export build-plugin``: the TensorRT plugin library on its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import write
from .options import Parser, general_options
from .progress import spinner


def parser() -> Parser:
    parser = Parser(
        "build-plugin",
        "[options]",
        "Build the TensorRT plugin library, or take it from the cache of earlier builds, and print its path. Exports "
        "build it themselves; other tools that load an engine need it as a file.",
        (
            "less-export build-plugin --gpu-arch sm_89",
            "less-export build-plugin --gpu-arch sm_89,sm_90 --out libless_plugins.so",
        ),
    )
    library = parser.add_argument_group("library")
    library.add_argument("--gpu-arch", metavar="SM", help="GPU architectures, e.g. sm_89,sm_90 (default: all)")
    library.add_argument("--out", type=Path, metavar="FILE", help="copy the library to FILE")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..native import nvcc
    from ..tensorrt import plugin

    archs = nvcc.parse_archs(args.gpu_arch)
    with spinner() as progress:
        library = plugin.library(archs, progress=progress)
    if args.out is not None:
        write(args.out, library.read_bytes())
    print(args.out or library)
    return 0
