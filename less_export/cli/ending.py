"""How a program of the command line ends: with an exit code, and one line on stderr for whatever stopped it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from .. import panics
from ..errors import LessExportError, install_hint, one_line, printable

#: Exit codes of errors, and of an interrupt (Ctrl-C or SIGTERM).
FAILED, INTERRUPTED = 1, 130


#: Seconds after which an interrupt that Python dropped is sent again.
_AGAIN = 0.05


class Interrupts:
    """The interrupts of a program.

    Libraries turn a KeyboardInterrupt into errors of their own, above all while they are imported. So whatever is
    raised after one was ``heard`` comes from it. Python drops one that is raised in a destructor or in the callback
    of a weak reference (an import has both), and goes on: then the signal is sent again.
    """

    def __init__(self) -> None:
        self.heard = False
        #: Whether the program is about to end: then nothing interrupts it any more.
        self.over = False
        self._again: threading.Timer | None = None

    def _take(self, number: int, _: object) -> None:
        if not self.over:
            self.heard = True
            self._number = number
            raise KeyboardInterrupt

    def _dropped(self) -> None:
        """A KeyboardInterrupt was raised where Python cannot pass it on."""
        if self.heard and not self.over:
            self._again = threading.Timer(_AGAIN, os.kill, (os.getpid(), self._number))
            self._again.daemon = True
            self._again.start()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, where they are not ignored; no library prints a KeyboardInterrupt that it drops."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        handlers = {n: signal.signal(n, self._take) for n in signals}
        hooks = sys.excepthook, sys.unraisablehook
        sys.excepthook = lambda kind, *rest: None if issubclass(kind, KeyboardInterrupt) else hooks[0](kind, *rest)
        sys.unraisablehook = lambda what: (
            self._dropped() if issubclass(what.exc_type, KeyboardInterrupt) else hooks[1](what)
        )
        try:
            yield
        finally:
            if self._again is not None:
                self._again.cancel()
                self._again.join()
            sys.excepthook, sys.unraisablehook = hooks
            for number, handler in handlers.items():
                signal.signal(number, handler)


def ended(run: Callable[[], int], interrupted: Callable[[], str], verbose: bool = False) -> int:
    """Run a program; returns its exit code.

    Args:
        run: the program. What it raises, bugs of this package excepted, becomes one line.
        interrupted: the message after an interrupt, unless the KeyboardInterrupt has one of its own.
        verbose: raise errors instead, with their traceback.
    """
    _open_streams()
    interrupts = Interrupts()
    with interrupts.listening():
        try:
            code = run()
            interrupts.over = True
        except BaseException as error:
            interrupts.over = True
            if interrupts.heard or isinstance(error, KeyboardInterrupt):
                own = str(error) if isinstance(error, KeyboardInterrupt) else ""
                code = report_error(own or interrupted(), INTERRUPTED)
            elif isinstance(error, SystemExit):  # after the help; of the harness
                if isinstance(error.code, int | None):
                    error.code = _flush(error.code or 0)
                raise
            elif verbose and not isinstance(error, BrokenPipeError):
                raise
            else:
                code = _explain(error)
        return _flush(code)


def report_error(message: str, code: int = FAILED) -> int:
    """Print an error as one line on stderr; returns the exit code."""
    tell(f"error: {' '.join(message.split())}")
    return code


def tell(text: str, prefix: str = "less-export: ") -> None:
    """Print one line on stderr, if that can be written to."""
    with contextlib.suppress(OSError):
        print(f"{prefix}{printable(text)}", file=sys.stderr, flush=True)


def _explain(error: BaseException) -> int:
    """Report an error that is not a bug; raises all others."""
    if isinstance(error, LessExportError):
        return report_error(str(error))
    if isinstance(error, BrokenPipeError):  # whoever read the output has had enough
        return 0
    if isinstance(error, ImportError) and error.name is not None and not error.name.startswith("less_export"):
        return report_error(f"{error.name} is not installed: {install_hint('export', 'cpu')}")
    if isinstance(error, OSError) and error.strerror is not None:
        what = "write the output" if error.filename is None else f"read or write {error.filename}"
        _flush(FAILED)
        return report_error(f"cannot {what}: {error.strerror}")
    if isinstance(error, MemoryError):
        return report_error(f"not enough memory: {one_line(error) or 'an allocation failed'}")
    if panics.is_panic(error):
        return report_error(f"a library failed: {one_line(error)}")
    raise error


def _flush(code: int) -> int:
    """Write what is left of the output; returns the exit code. Reports only what failed after success."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not (code or isinstance(error, BrokenPipeError)):
            code = report_error(f"cannot write the output: {error.strerror or error}")
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Send what a stream could not write to nowhere: Python would try again at the end, and report it."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_streams() -> None:
    """Open closed standard streams to nowhere: a file that is opened later must not become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            stream: Any = open(os.devnull, "w" if number else "r")  # noqa: SIM115
            setattr(sys, name, stream)
