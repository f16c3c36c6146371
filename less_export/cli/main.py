"""The command line: chooses the command, and turns errors, warnings and interrupts into one line each.

Importing this module imports nothing of weight: an interrupt after that ends with one line too.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError
from .ending import ended, tell

#: Options that need neither a command nor a MODEL.
_OVERVIEW_OPTIONS = {"-h", "--help", "--verbose", "--version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 with one line on stderr, or 130 if it was interrupted."""
    argv = _kebab_options(sys.argv[1:] if argv is None else argv)
    verbose, interrupted = "--verbose" in argv, ["interrupted"]

    def run() -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 gets question marks
            sys.stdout.reconfigure(errors="replace")
        from . import commands
        from .progress import library_log

        command, arguments = commands.split(argv)
        interrupted[0] = command.interrupted
        with _one_line_warnings(verbose), library_log(verbose):
            if _OVERVIEW_OPTIONS.issuperset(argv):
                _show_overview(argv)
            return command.run(command.parser().parse_args(arguments))

    return ended(run, lambda: interrupted[0], verbose)


def _show_overview(argv: Sequence[str]) -> NoReturn:
    """Show the help or the version; without either of these options, the help and an error."""
    from .commands import overview

    parser = overview()
    parser.parse_args(argv)
    parser.print_help()
    raise UsageError("the following arguments are required: MODEL, --out; or give a command")


def _kebab_options(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``--snake_case`` options spelled ``--kebab-case``; values stay as they are."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_kebab(word) if word.startswith("--") else word for word in argv[:end]] + list(argv[end:])


def _kebab(option: str) -> str:
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


@contextlib.contextmanager
def _one_line_warnings(verbose: bool) -> Iterator[None]:
    """Our own warnings as one line each; those of libraries only with --verbose."""

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if verbose or "less_export" in Path(filename).parts:
            tell(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    sys.exit(main())
