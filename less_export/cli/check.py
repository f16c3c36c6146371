"""``less-export check``: a bundle's backend against the torch reference."""

from __future__ import annotations

import argparse
import importlib.resources
from typing import TYPE_CHECKING, Any

from ..config import GRAPH_BACKENDS
from ..errors import UsageError
from .files import read_text, write_json
from .options import Parser, general_options, trust_option
from .progress import spinner
from .tables import show, table

if TYPE_CHECKING:
    from ..evaluation.parity import Report
    from ..runtime.generate import Generator


def parser() -> Parser:
    parser = Parser(
        "check",
        "BUNDLE [options]",
        "Compare a bundle's backend with the torch reference: logits, kept positions, H and z, step by step from the "
        "same state. When they differ, it prints the worst tensors and exits with code 1.",
        ("less-export check gemma", "less-export check gemma --text-file story.txt --tokens 500 --json check.json"),
    )
    bundle = parser.add_argument_group("bundle")
    bundle.add_argument("bundle", metavar="BUNDLE", help="bundle folder or x.onnx")
    bundle.add_argument(
        "--backend", choices=GRAPH_BACKENDS, help="backend to check (default: by the bundle's contents)"
    )
    weights = bundle.add_mutually_exclusive_group()
    weights.add_argument("--quick", action="store_true", help="do not verify the hashes of the weights")
    weights.add_argument("--full", action="store_true", help="verify the hashes of the weights (default)")
    trust_option(bundle)
    text = parser.add_argument_group("text")
    text.add_argument("--text-file", metavar="FILE", help="text to feed (default: a story in the package)")
    text.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="how many of its tokens (default: enough to fill every budget and window; all of FILE)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..bundle.artifact import Bundle
    from ..runtime.open import load_backend, load_generator

    bundle = Bundle.open(args.bundle, full=not args.quick)
    backend = load_backend(bundle, args.backend, trust_code=args.trust_code)
    reference = load_backend(bundle, "torch")
    from ..evaluation import parity

    text = read_text(args.text_file) if args.text_file else story()
    ids = enough_tokens(load_generator(bundle, backend), text, args.tokens, own_text=bool(args.text_file))
    with spinner() as progress:
        progress.say(f"comparing {backend.name} with torch over {len(ids)} tokens")
        rounded = backend.name == "ort" and bundle.manifest.settings.get("weights") is not None
        report = parity.check(reference, backend, ids, precision=parity.QUANTISED_PRECISION if rounded else None)
    write_json(args.json or None, _figures(report))
    _print_report(report)
    return 0 if report.passed else 1


def story() -> str:
    """The opening of a book in the public domain: what ``check`` feeds by default."""
    return (importlib.resources.files("less_export") / "data" / "alice.txt").read_text(encoding="utf-8")


def enough_tokens(generator: Generator, text: str, count: int | None, own_text: bool) -> list[int]:
    """Token ids for a check: ``count``, or enough that every layer evicts; the story is repeated if need be.

    A bundle without a tokenizer gets the text's bytes, folded into its vocabulary.

    Raises:
        UsageError: the user's own text has fewer than ``count`` tokens.
    """
    contract = generator.backend.contract
    if generator.tokenizer is not None:
        ids = generator.tokenizer.encode(text)
    else:
        ids = [b % contract.vocab_size for b in text.encode()]
    evicting = [s.capacity for s in contract.layers if not s.policy.keeps_all]
    wanted = min(max(evicting, default=contract.chunk) + 64, 2048) if count is None else max(count, 0)
    limit = contract.token_limit()
    if limit is not None:
        wanted = min(wanted, limit)
    if own_text:
        if count is not None and count > len(ids):
            raise UsageError(f"--tokens {count}, but the text has {len(ids)} tokens: give a longer text")
        return ids[: limit if count is None else wanted]
    return (ids * (wanted // len(ids) + 1))[:wanted]


def _print_report(report: Report) -> None:
    """The outcome in one line, and the worst tensors where it failed."""
    state = "low-rank term off"
    if any(name.endswith(".h") for name in report.differences):
        state = f"H {report.largest('h'):.1e}, z {report.largest('z'):.1e}"
    print(
        f"{'passed' if report.passed else 'FAILED'}: {report.tokens} tokens in {report.steps} steps, "
        f"{report.evicted} evicted; largest error: logits {report.largest('logits'):.1e}, "
        f"positions {report.largest('position'):.1%} of slots, {state}"
    )
    if report.passed:
        return
    worst = table("worst tensors (error as a share of the largest value)", "tensor", "error", "limit", "step", "")
    for d in report.worst():
        worst.add_row(d.tensor, f"{d.error:.2e}", f"{d.limit:.0e}", str(d.step), "" if d.passed else "too large")
    show(worst)


def _figures(report: Report) -> dict[str, Any]:
    """The outcome as JSON."""
    return {
        "passed": report.passed,
        "tokens": report.tokens,
        "steps": report.steps,
        "evicted": report.evicted,
        "differences": [vars(d) | {"passed": d.passed} for d in report.worst(len(report.differences))],
    }
