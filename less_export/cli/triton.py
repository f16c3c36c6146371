"""``less-export triton``: a model repository for Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._version import __version__
from ..config import BACKENDS
from ..errors import UsageError
from .options import Parser, general_options, trust_option


def parser() -> Parser:
    parser = Parser(
        "triton",
        "BUNDLE --out REPO [options]",
        "Write a model repository for Triton Inference Server: its python backend over the engine of less-export "
        "serve. Every token of an answer is a response of its own. less-export must be installed for Triton's Python.",
        (
            "less-export triton gemma --out repository --name chat --sequences 64",
            "less-export triton gemma --out repository --name steps --implicit-state",
        ),
    )
    model = parser.add_argument_group("model")
    model.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan; it stays where it is")
    model.add_argument("--out", type=Path, required=True, metavar="REPO", help="the repository, which may have others")
    model.add_argument("--name", metavar="NAME", help="the model's name, and its folder's (default: the bundle's)")
    model.add_argument("--backend", choices=BACKENDS, help="what runs the bundle (default: by its contents)")
    model.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: one per core)")
    trust_option(model)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-rows", type=int, metavar="N", help="sequences that run at a time (default: the bundle's --max-batch)"
    )
    limits.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="requests that may wait for a row (default: 64)"
    )
    limits.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of a prompt between two tokens of the others (default: the bundle's --chunk)",
    )
    limits.add_argument(
        "--sequences",
        type=int,
        default=0,
        metavar="N",
        help="requests belong to sequences, and the states of N are kept between them (default: 0, no sequences)",
    )
    limits.add_argument(
        "--implicit-state",
        action="store_true",
        help="a model without Python, whose state Triton keeps: a request is one step, and clients choose the tokens",
    )
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..bundle.artifact import Bundle
    from ..runtime.open import backend_name
    from ..serving.triton_implicit import write_implicit
    from ..serving.triton_repository import TritonOptions, write_repository

    opened = Bundle.open(args.bundle)
    path = Path(args.bundle).resolve()
    if args.implicit_state:
        taken = (args.threads, args.max_rows, args.prefill_chunk, args.sequences or None, args.trust_code or None)
        if any(value is not None for value in taken):
            raise UsageError("--implicit-state takes --name and --backend only: its rows are the bundle's --max-batch")
        kind = backend_name(opened, args.backend)
        print(write_implicit(args.out, args.name or path.name, path, kind, __version__))
        return 0
    options = TritonOptions(
        path,
        backend_name(opened, args.backend),
        args.threads,
        args.max_rows,
        args.prefill_chunk,
        args.max_queue,
        args.sequences,
        args.trust_code,
    )
    print(write_repository(args.out, args.name or path.name, options, __version__))
    return 0
