"""The command line: chooses the command, and turns errors, warnings and interrupts into one line each."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LessExportError, UsageError, install_hint, printable
from . import commands
from .progress import library_log

#: Options that need neither a command nor a MODEL.
_OVERVIEW_OPTIONS = {"-h", "--help", "--verbose", "--version"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 1 with one line on stderr."""
    argv = _kebab_options(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 gets question marks
        sys.stdout.reconfigure(errors="replace")
    command, arguments = commands.split(argv)
    try:
        with _one_line_warnings(verbose), library_log(verbose):
            if _OVERVIEW_OPTIONS.issuperset(argv):
                _show_overview(argv)
            return command.run(command.parser().parse_args(arguments))
    except LessExportError as error:
        if verbose:
            raise
        return report_error(str(error))
    except KeyboardInterrupt as error:
        return report_error(str(error) or command.interrupted)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except ImportError as error:
        if verbose or error.name is None or error.name.startswith("less_export"):
            raise
        return report_error(f"{error.name} is not installed: {install_hint('export', 'cpu')}")


def report_error(message: str) -> int:
    """Print an error as one line on stderr; returns the exit code."""
    print(f"less-export: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 1


def _show_overview(argv: Sequence[str]) -> NoReturn:
    """Show the help or the version; without either of these options, the help and an error."""
    parser = commands.overview()
    parser.parse_args(argv)
    parser.print_help()
    raise UsageError("the following arguments are required: MODEL, --out; or give a command")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


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
            print(f"less-export: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    sys.exit(main())
