"""``less-export generate``: text from an exported bundle."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..config import BACKENDS
from ..errors import UsageError, printable
from .ending import tell
from .files import read_text
from .options import Parser, general_options, token_ids, trust_option


def parser() -> Parser:
    parser = Parser(
        "generate",
        "BUNDLE (--prompt TEXT | --prompt-file FILE |\n"
        "                                    --chat TEXT | --token-ids N,N,...) [options]",
        "Generate text with an exported bundle. A bundle without a tokenizer takes and prints token ids.",
        (
            'less-export generate gemma --prompt "Once upon a time"',
            "less-export generate gemma --prompt-file story.txt --temperature 0.7 --seed 1",
        ),
    )
    bundle = parser.add_argument_group("bundle")
    bundle.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    bundle.add_argument("--backend", choices=BACKENDS, help="what runs the bundle (default: by its contents)")
    trust_option(bundle)
    prompt = parser.add_argument_group("prompt (give one)").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue, or - for stdin")
    prompt.add_argument("--chat", metavar="TEXT", help="a user's message, passed through the model's chat template")
    prompt.add_argument("--token-ids", type=token_ids, metavar="N,N,...", help="token ids to continue")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to generate (default: 128)"
    )
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 always takes the most likely token (default: 0)"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the most likely tokens whose probabilities add up to P (default: 1, all)",
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens (default: 0, all)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, help="print text while it is generated (default: yes)"
    )
    parser.set_defaults(stream=True)
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..runtime.open import open_bundle
    from ..runtime.sampling import SamplingParams

    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    text = next((t for t in (args.prompt, args.chat, args.prompt_file) if t is not None), "")
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # bytes that Python could not decode
        raise UsageError("the prompt is not UTF-8 text")
    generator = open_bundle(args.bundle, args.backend, trust_code=args.trust_code)
    prompt: Any = text if args.token_ids is None else args.token_ids
    if args.chat is not None:
        if generator.tokenizer is None:
            raise UsageError("--chat needs a tokenizer, and this bundle has no tokenizer: give --token-ids")
        prompt = generator.tokenizer.encode_chat([{"role": "user", "content": text}])
    if generator.tokenizer is None:
        print(*generator.generate([prompt], params)[0].token_ids, sep=",")
    elif args.stream:
        for token in generator.stream([prompt], params):
            print(_shown(token.text), end="", flush=True)
        print()
    else:
        print(_shown(generator.generate([prompt], params)[0].text))
    timing = generator.timing
    tell(
        f"prompt {timing.prefill_tokens} tokens in {timing.prefill_seconds:.2f} s, "
        f"{timing.decode_tokens} tokens at {timing.decode_rate:.1f} tokens/s",
        prefix="",
    )
    return 0


def _shown(text: str) -> str:
    """Generated text as it is, but at a terminal without control characters, which a model may learn or be made to."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text
