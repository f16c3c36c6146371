"""``less-export serve``: an OpenAI-compatible server for an exported bundle."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import BACKENDS
from ..errors import UsageError, install_hint, one_line
from ..serving.options import MAX_PROMPT
from .ending import tell
from .files import read_text
from .options import Parser, general_options, trust_option

if TYPE_CHECKING:
    from ..runtime.generate import Generator


def parser() -> Parser:
    parser = Parser(
        "serve",
        "BUNDLE [options]",
        "Serve a bundle over OpenAI's API: completions and chats, streamed or not, for many clients at a time. "
        "Requests come and go at any step; each gets what it gets alone.",
        (
            "less-export serve gemma",
            "less-export serve gemma --port 8080 --max-rows 4 --state-dir sessions",
        ),
    )
    bundle = parser.add_argument_group("bundle")
    bundle.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    bundle.add_argument("--backend", choices=BACKENDS, help="what runs the bundle (default: by its contents)")
    bundle.add_argument("--threads", type=int, metavar="N", help="threads of ONNX Runtime (default: one per core)")
    bundle.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template of conversations (default: the model's own)"
    )
    trust_option(bundle)
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="port, 0 for a free one (default: 8000)")
    network.add_argument("--served-model-name", metavar="NAME", help="the model's name (default: the bundle's)")
    network.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send (default: that in LESS_EXPORT_API_KEY, or none)"
    )
    network.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may call it, * for all",
    )
    network.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="certificate for TLS, as PEM")
    network.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its key, as PEM")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-rows", type=int, metavar="N", help="sequences that run at a time (default: the bundle's --max-batch)"
    )
    limits.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="sequences that may wait for a row (default: 64)"
    )
    limits.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of a prompt between two tokens of the others (default: the bundle's --chunk)",
    )
    limits.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=MAX_PROMPT,
        metavar="N",
        help=f"longest prompt, for which others may have to wait (default: {MAX_PROMPT})",
    )
    limits.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="longest answer (default: 2048)")
    limits.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds that a request may take (default: 600)"
    )
    sessions = parser.add_argument_group("sessions")
    sessions.add_argument(
        "--state-dir",
        metavar="DIR",
        help="folder of saved sessions, or a URL of fsspec such as s3://bucket/sessions (default: no sessions)",
    )
    sessions.add_argument(
        "--state-limit", type=float, default=10.0, metavar="GB", help="most that they may take (default: 10)"
    )
    log = parser.add_argument_group("log")
    log.add_argument("--log-requests", action="store_true", help="show a line for each request, without its prompt")
    log.add_argument("--log-prompts", action="store_true", help="show prompts too")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    try:
        from ..serving.options import ServerOptions
        from ..serving.server import Listening, Server, environment_key
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}: {install_hint('serve')}") from None
    from ..runtime.engine import Engine

    if not math.isfinite(args.state_limit):
        raise UsageError(f"--state-limit must be a number of GB, not {args.state_limit}")
    template = None if args.chat_template is None else read_text(args.chat_template)
    key = environment_key() if args.api_key is None else args.api_key
    options = ServerOptions(
        args.served_model_name or Path(args.bundle).resolve().name,
        key,
        args.max_prompt_tokens,
        args.max_new_tokens,
        args.timeout,
        tuple(args.cors),
        args.state_dir,
        int(args.state_limit * 10**9),
        args.log_prompts,
    )
    listening = Listening(args.host, args.port, args.ssl_certfile, args.ssl_keyfile)
    with listening.open() as opened:
        model = open_model(args.bundle, args.backend, args.threads, args.trust_code)
        if template is not None:
            if model.tokenizer is None:
                raise UsageError("--chat-template needs a tokenizer, and this bundle has none")
            model.tokenizer.chat_template = template
        with Engine(model, rows=args.max_rows, piece=args.prefill_chunk, max_queue=args.max_queue) as engine:
            server = Server(engine, options, listening, opened, _shown if _logs(args) else lambda line: None)
            if args.host not in ("127.0.0.1", "localhost", "::1") and key is None:
                tell("warning: anyone who reaches this machine may use the server: set an --api-key")
            tell(f"serving {one_line(options.model_name)} at {listening.url(opened)} (Ctrl-C ends it)")
            server.run()
    return 0


def open_model(bundle: str, backend: str | None, threads: int | None, trust_code: bool) -> Generator:
    """A generator over a bundle, with ``threads`` where the backend has them."""
    from ..bundle.artifact import Bundle
    from ..runtime.open import backend_name, load_backend, load_generator

    opened = Bundle.open(bundle)
    options = {} if threads is None else {"threads": threads}
    if options and backend_name(opened, backend) != "ort":
        raise UsageError("--threads is for ONNX Runtime: leave it out")
    return load_generator(opened, load_backend(opened, backend, trust_code=trust_code, **options))


def _logs(args: argparse.Namespace) -> bool:
    return bool(args.log_requests or args.log_prompts)


def _shown(line: str) -> None:
    tell(line, prefix="")
