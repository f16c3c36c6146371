"""``less-export build-operator``: the operator for ONNX Runtime on its own, for CPUs or for CUDA."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from .files import write
from .options import Parser, general_options
from .progress import spinner


def parser() -> Parser:
    parser = Parser(
        "build-operator",
        "[options]",
        "Compile the operator for ONNX Runtime's CPU provider, or with --cuda for its CUDA provider, or take it from "
        "the cache of earlier builds, and print its path. On a CPU, bundles do so themselves when they are opened; "
        "for CUDA it is built once. Other programs register the file (SessionOptions.register_custom_ops_library).",
        (
            "less-export build-operator --out libless_ort.so",
            "less-export build-operator --cuda --gpu-arch sm_89 --out libless_ort_cuda.so",
        ),
    )
    library = parser.add_argument_group("library")
    library.add_argument("--cuda", action="store_true", help="for the CUDA provider; needs nvcc, but no GPU")
    library.add_argument("--gpu-arch", metavar="SM", help="with --cuda: architectures, e.g. sm_89,sm_90 (default: all)")
    library.add_argument("--out", type=Path, metavar="FILE", help="copy the library to FILE")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..native import nvcc, ort_cuda, ort_operator

    if args.gpu_arch is not None and not args.cuda:
        raise UsageError("--gpu-arch goes with --cuda")
    archs = nvcc.parse_archs(args.gpu_arch, "operator") if args.cuda else ()
    with spinner() as progress:
        if args.cuda:
            library = ort_cuda.library(archs, progress=progress)
        else:
            library = ort_operator.library(progress=progress)
    if args.out is not None:
        write(args.out, library.read_bytes())
    print(args.out or library)
    return 0
