"""What the parsers of all commands share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .._version import __version__
from ..config import DEFAULT_BUDGET, DEFAULT_POLICY
from ..errors import UsageError
from ..less.policies import choosable


class Parser(argparse.ArgumentParser):
    """One line per mistake, exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def token_ids(words: str) -> list[int]:
    """The type of ``--token-ids``: whole numbers with commas between."""
    return [int(word) for word in words.split(",")]


def common(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    parser.add_argument("--verbose", action="store_true", help="library warnings, and tracebacks of errors")
    parser.add_argument("--version", action="version", version=f"less-export {__version__}")


def cache_options(parser: argparse.ArgumentParser, *, full: bool = False, more: str = "") -> argparse._ArgumentGroup:
    """Options of a cache; with ``full``, of one that may also keep everything. ``more`` is said of layer budgets."""
    group = parser.add_argument_group("cache")
    group.add_argument(
        "--policy",
        choices=choosable(evicting=not full),
        help=f"which tokens keep a slot (default: recipe's, or {DEFAULT_POLICY})",
    )
    group.add_argument(
        "--budget", metavar="N|P%", help=f"slots per layer and KV head (default: recipe's, or {DEFAULT_BUDGET}%)"
    )
    group.add_argument(
        "--layer-budgets", metavar="LAYER:N|P%,...", help="layers with another budget, e.g. 5:42,11:88,17:20" + more
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that a percentage refers to" + ("; slots of policy full" if full else ""),
    )
    group.add_argument(
        "--compress-sliding",
        action=argparse.BooleanOptionalAction,
        help="give sliding layers the policy too (default: recipe's, or not)",
    )
    return group
