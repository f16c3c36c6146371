"""The commands of ``less-export``: one table, and the help that lists them.

A command is a module with ``parser()``, which runs nothing, and ``run(args)``, which returns the exit code. None of
them imports torch before it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import (
    build_operator,
    build_plugin,
    calibrate,
    check,
    export,
    generate,
    import_kernels,
    info,
    inspect,
    kernels,
    recipes,
    serve,
    train,
    triton,
)
from . import eval as evaluate
from .options import Parser, general_options, wrapped


@dataclass(frozen=True)
class Command:
    """A command: its name, what it does in one line, its parser and what runs it.

    interrupted: the message after an interrupt, unless the command raises one of its own.
    """

    name: str
    summary: str
    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]
    interrupted: str = "interrupted"


_TABLE = (
    Command(
        "export",
        "export a model with a LESS cache",
        export.parser,
        export.run,
        interrupted="interrupted; nothing was left behind",
    ),
    Command("generate", "generate text with an exported bundle", generate.parser, generate.run),
    Command("serve", "serve an exported bundle over OpenAI's API", serve.parser, serve.run),
    Command("check", "compare a bundle with the torch reference", check.parser, check.run),
    Command("triton", "write a model repository for Triton Inference Server", triton.parser, triton.run),
    Command("inspect", "show which tokens of a text keep a slot, as an HTML file", inspect.parser, inspect.run),
    Command("info", "show what a bundle holds and what it costs", info.parser, info.run),
    Command(
        "train",
        "train the kernels of the low-rank term",
        train.parser,
        train.run,
        interrupted="interrupted; rerun the same command to resume",
    ),
    Command("kernels", "show what a kernel file is for and what it is worth", kernels.parser, kernels.run),
    Command("calibrate", "measure on text what int8 slots need", calibrate.parser, calibrate.run),
    Command("import-kernels", "convert the paper's authors' kernels", import_kernels.parser, import_kernels.run),
    Command("eval", "measure what the cache does to quality", evaluate.parser, evaluate.run),
    Command("recipes", "list the named models", recipes.parser, recipes.run),
    Command("build-operator", "compile the operator for ONNX Runtime", build_operator.parser, build_operator.run),
    Command("build-plugin", "build the TensorRT plugin on its own", build_plugin.parser, build_plugin.run),
)
#: Every command by its name, in the order of the help.
COMMANDS = {command.name: command for command in _TABLE}


def split(argv: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command that ``argv`` names, and its arguments; ``export`` where it names none."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]], argv[1:]
    return COMMANDS["export"], argv


def overview() -> Parser:
    """The parser behind ``less-export --help``."""
    parser = Parser(
        "",
        "COMMAND [options]\n       less-export MODEL --out PATH [options]",
        "",
        (
            "less-export export gemma3-270m --out gemma",
            "less-export llama2-7b --out engine.plan",
            'less-export generate gemma --prompt "Once upon a time"',
        ),
    )
    purpose = wrapped(
        "Export Hugging Face decoders with a LESS cache to ONNX and TensorRT. A LESS cache keeps a fixed number of "
        "tokens and a small state that absorbs every evicted token, so memory stays constant however long the "
        "sequence. The word export may be left out. Write ./NAME for a folder that is named like a command."
    )
    names = "\n".join(f"  {c.name:<16}{c.summary}" for c in COMMANDS.values())
    parser.description = f"{purpose}\n\ncommands (less-export COMMAND --help shows the options):\n{names}"
    general_options(parser)
    return parser
