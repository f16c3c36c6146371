"""``less-export inspect``: what the state holds of a text, as an HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import BACKENDS
from ..errors import UsageError, one_line
from .files import read_text, write
from .options import Parser, general_options, trust_option


def parser() -> Parser:
    parser = Parser(
        "inspect",
        "BUNDLE --prompt-file FILE --html FILE [options]",
        "Show what the state holds after a text: which tokens still have a slot, by layer and head, with which score; "
        "how much was absorbed; and the bytes of the state against those of a full cache. The HTML file shows it "
        "offline, in any browser.",
        (
            "less-export inspect gemma --prompt-file story.txt --html story.html",
            "less-export inspect engine.plan --prompt-file - --html story.html",
        ),
    )
    bundle = parser.add_argument_group("bundle")
    bundle.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    bundle.add_argument("--backend", choices=BACKENDS, help="what runs the bundle (default: by its contents)")
    trust_option(bundle)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt-file", required=True, metavar="FILE", help="file with the text, or - for stdin")
    files.add_argument("--html", required=True, metavar="FILE", help="the file to write")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..runtime.open import open_bundle
    from ..view.occupancy import Occupancy, Pieces, view
    from ..view.pages import document

    text = read_text(args.prompt_file)
    model = open_bundle(args.bundle, args.backend, trust_code=args.trust_code)
    if model.tokenizer is None:
        raise UsageError("inspect needs a tokenizer, and this bundle has none")
    ids = model.tokenizer.encode(text) if text else []
    pieces = Pieces(model.tokenizer)
    pieces.extend(ids)
    model.prefill(ids)
    contract = model.backend.contract
    occupancy = Occupancy.read(model.backend, 0)
    shown = view(occupancy, contract, pieces.texts, layers=range(len(contract.layers)))
    names = (one_line(Path(p).resolve().name) for p in (args.bundle, args.prompt_file))
    write(args.html, document(shown, ": what the state holds of ".join(names)).encode())
    kept = sum(n > 0 for n in shown["held"])
    print(
        f"{args.html}: {kept:,} of {shown['length']:,} tokens have a slot somewhere; "
        f"{shown['state_bytes']:,} bytes of state, {shown['full_bytes']:,} in a full cache"
    )
    return 0
