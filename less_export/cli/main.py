"""The command line: ``less-export MODEL --out ...`` and its companions generate, check, info, recipes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..config import BACKENDS, GRAPH_BACKENDS, TARGETS, WEIGHTS, ExportConfig
from ..dtypes import COMPUTE_DTYPES
from ..errors import LessExportError, UsageError, install_hint
from ..hf import recipes
from .options import Parser as _Parser
from .options import cache_options
from .options import common as _common
from .options import token_ids as _token_ids
from .progress import library_log, spinner

_DESCRIPTION = """\
Export a Hugging Face decoder with a LESS cache (a fixed number of tokens plus a small state that absorbs
every evicted token) to ONNX and TensorRT. Memory stays constant however long the sequence.

  less-export MODEL --out DIR|x.onnx|x.plan   export (this command)
  less-export generate BUNDLE --prompt TEXT   generate with what was exported
  less-export train MODEL --data TEXT --out FILE  train the kernels of the low-rank term
  less-export eval BUNDLE|MODEL --data TEXT   what the cache costs in perplexity, against sparse and full
  less-export import-kernels DIR --out FILE   read the paper's authors' kernels
  less-export check BUNDLE                    compare it with the torch reference
  less-export info BUNDLE                     show what is in it
  less-export recipes                         list the named models
  less-export build-plugin                    build the TensorRT plugin for other tools
"""
_EPILOG = """\
examples:
  less-export llama2-7b --out engine.plan
  less-export ./my-checkpoint --out bundle --policy sink --budget 256
  less-export gemma3-270m --out bundle --target both --engine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 1 with one line on stderr."""
    arguments = _kebab(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 gets question marks
        sys.stdout.reconfigure(errors="replace")
    commands: dict[str, Callable[[list[str]], int]] = {
        "generate": _generate,
        "check": _check,
        "info": _info,
        "recipes": _recipes,
        "build-plugin": _build_plugin,
        "train": lambda words: _quality("train", words),
        "import-kernels": lambda words: _quality("import_kernels", words),
        "eval": lambda words: _quality("evaluate", words),
    }
    try:
        with _plain_warnings(verbose), library_log(verbose):
            if arguments and arguments[0] in commands:
                return commands[arguments[0]](arguments[1:])
            return _export(arguments)
    except LessExportError as error:
        if verbose:
            raise
        return _fail(str(error))
    except KeyboardInterrupt as error:
        command = arguments[0] if arguments and arguments[0] in commands else None
        kept = {None: "interrupted; nothing was left behind", "train": "interrupted; the same command goes on"}
        return _fail(str(error) or kept.get(command, "interrupted"))
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except ImportError as error:
        if verbose or error.name is None or error.name.startswith("less_export"):
            raise
        return _fail(f"{error.name} is not installed: {install_hint('export', 'cpu')}")


def _fail(message: str) -> int:
    print(f"less-export: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _kebab(arguments: Sequence[str]) -> list[str]:
    """``--snake_case`` options spelled ``--kebab-case``; values stay as they are."""
    spelled: list[str] = []
    for index, word in enumerate(arguments):
        if word == "--":
            return [*spelled, *arguments[index:]]
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return spelled


@contextlib.contextmanager
def _plain_warnings(verbose: bool) -> Iterator[None]:
    """Our own warnings as one line each; those of libraries only with --verbose."""

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if verbose or "less_export" in Path(filename).parts:
            print(f"less-export: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


# ------------------------------------------------------------------ export


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "less-export", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="recipe name, hub id (org/name), checkpoint folder or GGUF file")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="bundle folder, x.onnx, or x.plan (TensorRT engine)"
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="graph for ONNX Runtime, TensorRT or both (default: ort; trt for a .plan)"
    )
    parser.add_argument("--engine", action="store_true", help="also build engine.plan into a folder bundle")
    cache = cache_options(parser, full=True)
    cache.add_argument(
        "--heavy", type=int, metavar="N", help="slots for heavy hitters or sinks (default: by the policy)"
    )
    cache.add_argument("--recent", type=int, metavar="N", help="slots for the newest tokens (default: by the policy)")
    cache.add_argument("--kernels", type=Path, metavar="FILE", help="trained phi/psi kernels (.safetensors)")
    cache.add_argument("--rank", type=int, metavar="R", help="refuse kernels of another rank")
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--dtype", choices=COMPUTE_DTYPES, help="compute dtype (default: f32 for ort, the model's for trt)"
    )
    graph.add_argument(
        "--weights", choices=WEIGHTS, help="quantise the weights of linear layers (default: leave them as they are)"
    )
    graph.add_argument("--max-batch", type=int, default=8, metavar="N", help="most sequences at a time (default: 8)")
    graph.add_argument(
        "--chunk", type=int, metavar="N", help="most tokens per prefill step (default: recipe's, or 256)"
    )
    graph.add_argument(
        "--logits", choices=("last", "all"), default="last", help="of the last token, or of all (evaluation)"
    )
    graph.add_argument("--num-hidden-layers", type=int, metavar="N", help="keep only the first N layers, for trials")
    graph.add_argument(
        "--random-weights",
        action="store_true",
        help="make the weights up: a checkpoint of the model's true shape is written beside PATH and kept",
    )
    graph.add_argument("--seed", type=int, metavar="N", help="of --random-weights (default: 0)")
    graph.add_argument("--gpu-arch", metavar="SM", help="GPU architectures of the engine, e.g. sm_89 (TensorRT-RTX)")
    graph.add_argument("--no-plugin", action="store_true", help="engine of standard operators, without the plugin")
    graph.add_argument("--no-validate", action="store_true", help="skip the check against Hugging Face")
    _common(parser)
    return parser


def _export(arguments: list[str]) -> int:
    options = vars(_export_parser().parse_args(arguments))
    model, out = options.pop("model"), options.pop("out")
    engine_plan = options.pop("engine")
    options["validate"] = not options.pop("no_validate")
    options["plugin"] = not options.pop("no_plugin")
    options.pop("verbose")
    config = ExportConfig(**options)
    recipes.refuse_unknown(model)
    from ..exporter.build import export

    with spinner() as progress:
        written = export(model, out, config, engine_plan=engine_plan, progress=progress)
    print(written)
    return 0


# ------------------------------------------------------------------ generate


def _generate(arguments: list[str]) -> int:
    parser = _Parser("less-export generate", description="Generate text with an exported bundle.")
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue ('-' for stdin)")
    prompt.add_argument("--chat", metavar="TEXT", help="a user's message, through the model's chat template")
    prompt.add_argument("--token-ids", type=_token_ids, metavar="N,N,...", help="token ids to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; 1 is all (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="the K most likely; 0 is all (default)")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--backend", choices=BACKENDS, help="default: by what the bundle holds")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=True, help="print text as it comes (default)"
    )
    _common(parser)
    args = parser.parse_args(arguments)

    from ..runtime.open import open_bundle
    from ..runtime.sampling import SamplingParams

    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    text = next((t for t in (args.prompt, args.chat, args.prompt_file) if t is not None), "")
    if args.prompt_file is not None:
        text = _read_text(args.prompt_file)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # bytes that Python could not decode
        raise UsageError("the prompt is not UTF-8 text")
    generator = open_bundle(args.bundle, args.backend)
    prompt_: Any = text if args.token_ids is None else args.token_ids
    if args.chat is not None:
        if generator.tokenizer is None:
            raise UsageError("this bundle has no tokenizer, so no --chat")
        prompt_ = generator.tokenizer.encode_chat([{"role": "user", "content": text}])
    if generator.tokenizer is None:
        print(*generator.generate([prompt_], params)[0].token_ids, sep=",")
    elif args.stream:
        for token in generator.stream([prompt_], params):
            print(token.text, end="", flush=True)
        print()
    else:
        print(generator.generate([prompt_], params)[0].text)
    timing, steps = generator.timing, generator.timing.decode_tokens
    print(
        f"prompt {timing.prefill_tokens} tokens in {timing.prefill_seconds:.2f} s, "
        f"{steps} tokens at {timing.decode_rate:.1f} tokens/s",
        file=sys.stderr,
    )
    return 0


def _read_text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}") from error


# ------------------------------------------------------------------ kernels


def _quality(command: str, arguments: list[str]) -> int:
    from . import quality as cli_quality

    return int(getattr(cli_quality, command)(arguments))


# ------------------------------------------------------------------ check, info, recipes


def _check(arguments: list[str]) -> int:
    parser = _Parser(
        "less-export check",
        description="Compare a bundle's backend with the torch reference: logits, kept positions, H and z, "
        "step by step from the same state. Exit code 1 and the worst tensors when they differ.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder or x.onnx")
    parser.add_argument(
        "--text-file", metavar="FILE", help="text to feed (default: a story that ships with less-export)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of it (default: past the budget and the windows)"
    )
    parser.add_argument("--backend", choices=GRAPH_BACKENDS, help="default: by what the bundle holds")
    parser.add_argument("--full", action="store_true", help="hash the weights too")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    _common(parser)
    args = parser.parse_args(arguments)

    from ..bundle.artifact import Bundle
    from ..runtime.open import load_backend, load_generator
    from . import reporting

    bundle = Bundle.open(args.bundle, full=args.full)
    backend = load_backend(bundle, args.backend)
    reference = load_backend(bundle, "torch")
    from ..evaluation import parity

    text = _read_text(args.text_file) if args.text_file else reporting.story()
    ids = reporting.enough_tokens(load_generator(bundle, backend), text, args.tokens, own_text=bool(args.text_file))
    with spinner() as progress:
        progress.say(f"comparing {backend.name} with torch over {len(ids)} tokens")
        rounded = backend.name == "ort" and bundle.manifest.settings.get("weights") is not None
        report = parity.check(reference, backend, ids, precision=parity.QUANTISED_PRECISION if rounded else None)
    if args.json:
        from ..bundle.files import write_atomically

        try:
            write_atomically(args.json, (json.dumps(reporting.figures(report), indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(f"cannot write {args.json}: {error.strerror or error}") from error
    reporting.print_report(report)
    return 0 if report.passed else 1


def _info(arguments: list[str]) -> int:
    parser = _Parser("less-export info", description="Show what a bundle holds and what it costs.")
    parser.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    parser.add_argument("--json", action="store_true", help="the manifest as JSON")
    parser.add_argument("--polygraphy", action="store_true", help="options for polygraphy convert of model.trt.onnx")
    _common(parser)
    args = parser.parse_args(arguments)
    from ..bundle.artifact import Bundle
    from . import reporting

    bundle = Bundle.open(args.bundle)
    if args.json:
        print(bundle.manifest.dump().decode())
    elif args.polygraphy:
        from ..tensorrt.engine import polygraphy_options

        graph = bundle.artifact("trt")
        if graph is None:
            raise UsageError(f"{args.bundle} has no graph for TensorRT: export it with --target trt or both")
        print(*polygraphy_options(graph.contract))
    else:
        reporting.print_info(bundle)
    return 0


def _recipes(arguments: list[str]) -> int:
    parser = _Parser(
        "less-export recipes",
        description="List the named models, with the bytes that one sequence takes in a 16-bit cache.",
    )
    parser.add_argument("--json", action="store_true", help="everything about them as JSON")
    _common(parser)
    args = parser.parse_args(arguments)
    from . import reporting

    found = recipes.all_recipes()
    if args.json:
        print(json.dumps([reporting.recipe_figures(r) for r in found], indent=1))
    else:
        reporting.print_recipes(found)
    return 0


def _build_plugin(arguments: list[str]) -> int:
    parser = _Parser(
        "less-export build-plugin",
        description="Build the TensorRT plugin library, or take it from the cache; prints its path.",
    )
    parser.add_argument("--gpu-arch", metavar="SM", help="GPU architectures, e.g. sm_89,sm_90 (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="copy it here")
    _common(parser)
    args = parser.parse_args(arguments)
    from ..tensorrt import plugin

    archs = plugin.parse_archs(args.gpu_arch)
    with spinner() as progress:
        built = plugin.library(archs, progress=progress)
    if args.out is not None:
        from ..bundle.files import write_atomically

        try:
            write_atomically(args.out, built.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot write {args.out}: {error.strerror or error}") from error
    print(args.out or built)
    return 0


if __name__ == "__main__":
    sys.exit(main())
