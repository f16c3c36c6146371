"""TensorRT's log and call-backs: messages in one line, interruption, exceptions across its frames."""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ..errors import EngineError


def implement(interface: Any, **methods: Callable[..., Any]) -> Any:
    """An object of TensorRT's ``interface`` whose methods are these functions (called without self)."""
    body = {"__init__": lambda self: interface.__init__(self)}
    body.update({name: staticmethod(f) for name, f in methods.items()})
    return type(f"Less{interface.__name__}", (interface,), body)()


class Log:
    """TensorRT's logger: keeps the errors, prints everything when verbose.

    TensorRT takes one logger per process and keeps the first, so there is one of these per flavour.
    Nothing may be raised through TensorRT's frames: an exception inside a call-back waits in ``stopped``,
    call-backs that can cancel do, and :meth:`listening` raises it at the end.
    """

    def __init__(self, module: Any) -> None:
        self.errors: list[str] = []
        self.verbose = False
        self.watch: Callable[[str], None] | None = None
        self.stopped: BaseException | None = None
        self._lock = threading.RLock()  # TensorRT calls from several threads
        self._serious = (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR)
        self.interface = implement(module.ILogger, log=self.guarded(self._take))

    def _take(self, severity: Any, message: str) -> None:
        if severity in self._serious:
            self.errors.append(message)
        if self.watch is not None:
            self.watch(message)
        if self.verbose:
            print(f"[{severity.name}] {message}", file=sys.stderr)

    def error(self, message: str) -> None:
        """Take an error that does not come through TensorRT."""
        self.errors.append(message)
        if self.verbose:
            print(f"[ERROR] {message}", file=sys.stderr)

    def guarded(self, function: Callable[..., Any], failed: Any = None) -> Callable[..., Any]:
        """``function`` for TensorRT to call: an exception is kept, and ``failed`` returned from then on."""

        def call(*args: Any) -> Any:
            try:
                with self._lock:
                    return failed if self.stopped else function(*args)
            except BaseException as error:
                self.stopped = error
                return failed

        return call

    @contextlib.contextmanager
    def listening(self, verbose: bool = False, watch: Callable[[str], None] | None = None) -> Iterator[None]:
        """Start with no errors; on the way out raise what a call-back raised, before anything else.

        ``verbose`` prints every message to stderr, ``watch`` is called with each.
        """
        self.errors, self.verbose, self.watch, self.stopped = [], verbose, watch, None
        try:
            yield
        except EngineError:
            if self.stopped is None:
                raise
        finally:
            self.verbose, self.watch = False, None
        if self.stopped is not None:
            raise self.stopped

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C stops what goes on at its next call-back (raised there, TensorRT would swallow it)."""
        usual, main = signal.default_int_handler, threading.main_thread()
        if threading.current_thread() is not main or signal.getsignal(signal.SIGINT) is not usual:
            yield
            return
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopped", KeyboardInterrupt()))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)

    def reason(self) -> str:
        """The most useful of the errors: the first that is neither a frame nor an echo of another."""
        echoes = ("While parsing node", "--- Begin node", "--- End node", "catchCudaError")
        causes = [e for e in self.errors if not any(echo in e for echo in echoes)]
        if not causes:
            return "it gave no reason (--verbose shows its log)"
        if re.search(r"cudaError (35|100)\b", causes[0]):
            return "no CUDA driver, or none recent enough, or no GPU: run nvidia-smi"
        return one_line(causes[0])


@functools.cache
def log_of(module: ModuleType) -> Log:
    """The one logger of a flavour."""
    return Log(module)


def one_line(message: str) -> str:
    """A message of TensorRT's without line breaks and source positions."""
    text = " ".join(message.split())
    text = re.sub(r"^(\S+\.cpp:\d+:? |ERROR: |In function \w+: |\[\d+\] )+", "", text)
    text = re.sub(r"[. ]*In \w+ at /\S+:\d+", "", text)
    return text if len(text) <= 300 else text[:297] + "..."
