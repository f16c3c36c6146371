"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

from .._version import __version__
from ..config import (
    DEFAULT_BUDGET,
    DEFAULT_FARTHEST,
    DEFAULT_HALF_LIFE,
    DEFAULT_POLICY,
    DEFAULT_SLOTS,
    DEFAULT_STATE,
)
from ..contract import SLOT_DTYPES, STATE_BITS
from ..errors import UsageError
from ..less.policies import choosable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MODEL_HELP = "recipe name, hub id (org/name), checkpoint folder or GGUF file"
DATA_HELP = (
    "UTF-8 files, folders of .txt, hf:NAME[/CONFIG][:SPLIT], or 'calibration', the text in the package (default); "
    "several are mixed in equal shares"
)


class Parser(argparse.ArgumentParser):
    """The parser of one command: a short usage line, options in titled groups, examples at the end.

    The command adds :func:`general_options` after its own. A mistake raises :class:`UsageError`.
    """

    def __init__(self, command: str, usage: str, description: str, examples: Sequence[str]) -> None:
        """``usage`` follows the command's name; ``examples`` are complete command lines."""
        prog = f"less-export {command}".rstrip()
        super().__init__(
            prog,
            usage=f"{prog} {usage}",
            description=wrapped(description),
            epilog="\n  ".join(("examples:", *examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Unlike argparse, which ignores a full disk."""
        (file or sys.stderr).write(message)


def wrapped(text: str) -> str:
    """``text`` in lines that fit the terminal; argparse leaves descriptions beside raw examples as they are."""
    return textwrap.fill(text, max(shutil.get_terminal_size().columns - 2, 40))


def token_ids(text: str) -> list[int]:
    """The type of ``--token-ids``: whole numbers with commas between."""
    return [int(number) for number in text.split(",")]


def tokens_or_none(text: str) -> int | Literal["none"]:
    """The type of ``--score-half-life`` and ``--max-distance``: a whole number, or ``none``."""
    if text == "none":
        return "none"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of tokens nor none") from None


def distance_option(group: argparse._ArgumentGroup) -> None:
    """``--max-distance``, for commands that plan a cache or measure its keys."""
    group.add_argument(
        "--max-distance",
        type=tokens_or_none,
        metavar="N|none",
        help=(
            "largest distance that a slot is seen at, or absolute positions (default: recipe's, or the trained length "
            f"less the chunk, at least half of it, at most {DEFAULT_FARTHEST}; none for policy full)"
        ),
    )


def trust_option(group: argparse._ArgumentGroup) -> None:
    """``--trust-code``, for commands that open bundles."""
    group.add_argument(
        "--trust-code",
        action="store_true",
        help="load native code that the bundle brings and this machine did not build; only for sources you trust",
    )


def general_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    group = parser.add_argument_group("general options")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("--verbose", action="store_true", help="show warnings of libraries, and tracebacks of errors")
    group.add_argument(
        "--version", action="version", version=f"less-export {__version__}", help="show the version and exit"
    )


def cache_options(
    parser: argparse.ArgumentParser, *, full: bool = False, layer_budgets_note: str = " (default: kernels' or recipe's)"
) -> argparse._ArgumentGroup:
    """Options of a cache; with ``full``, of one that may also keep every token."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--policy",
        choices=choosable(evicting=not full),
        help=f"which tokens keep a slot (default: recipe's, or {DEFAULT_POLICY})",
    )
    default_budget = DEFAULT_BUDGET.replace("%", "%%")
    group.add_argument(
        "--budget", metavar="N|P%", help=f"slots per layer and KV head (default: recipe's, or {default_budget})"
    )
    group.add_argument(
        "--layer-budgets",
        metavar="LAYER:N|P%,...",
        help=f"layers with a budget of their own, e.g. 5:42,11:88,17:20{layer_budgets_note}",
    )
    group.add_argument(
        "--score-half-life",
        type=tokens_or_none,
        metavar="N|none",
        help=f"tokens after which the score of policy h2o counts half (default: recipe's, or {DEFAULT_HALF_LIFE})",
    )
    group.add_argument(
        "--slots",
        choices=SLOT_DTYPES,
        help=(
            f"keep keys and values in the compute dtype, or in int8 (default: recipe's, or {DEFAULT_SLOTS}; model for "
            "policy full)"
        ),
    )
    group.add_argument(
        "--state",
        type=int,
        choices=STATE_BITS,
        help=f"bits of the low-rank state (default: recipe's, or {DEFAULT_STATE} with int8 slots, which it needs)",
    )
    distance_option(group)
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that a percentage refers to" + ("; slots of policy full" if full else ""),
    )
    group.add_argument(
        "--compress-sliding",
        action=argparse.BooleanOptionalAction,
        help="apply the policy to sliding-window layers too (default: recipe's, or no)",
    )
    return group
