"""TensorRT's log and call-backs: messages in one line, interruption, exceptions across its frames.

All that TensorRT reports goes to the logger ``less_export.tensorrt``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .. import interrupts
from ..errors import EngineError

_LOGGER = logging.getLogger("less_export.tensorrt")
#: TensorRT's severities as those of logging; its internal errors are errors.
_LEVELS = {"VERBOSE": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING}


def implement(interface: Any, **methods: Callable[..., Any]) -> Any:
    """An object that implements TensorRT's ``interface`` with these functions (called without self)."""
    body = {"__init__": lambda self: interface.__init__(self)}
    body.update({name: staticmethod(f) for name, f in methods.items()})
    return type(f"Less{interface.__name__}", (interface,), body)()


class Log:
    """TensorRT's logger: passes everything on, and stores the errors.

    TensorRT uses the first logger of the process and ignores others, so there is one of these per flavour.
    No exception may pass through TensorRT's frames: one inside a call-back is stored in ``stopped``,
    call-backs that can cancel the work do, and :meth:`listening` raises it at the end.
    """

    def __init__(self, module: Any) -> None:
        self.errors: list[str] = []
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
        _LOGGER.log(_LEVELS.get(severity.name, logging.ERROR), message)

    def error(self, message: str) -> None:
        """Record an error that TensorRT does not report itself."""
        self.errors.append(message)
        _LOGGER.error(message)

    def guarded(self, function: Callable[..., Any], failed: Any = None) -> Callable[..., Any]:
        """``function`` for TensorRT to call: an exception is stored, and from then on every call returns ``failed``."""

        def call(*args: Any) -> Any:
            try:
                with self._lock:
                    return failed if self.stopped else function(*args)
            except BaseException as error:
                self.stopped = error
                return failed

        return call

    @contextlib.contextmanager
    def listening(self, watch: Callable[[str], None] | None = None) -> Iterator[None]:
        """Clear the errors on entry; on exit raise what a call-back raised, in preference to anything else.

        ``watch`` is called with every message.
        """
        self.errors, self.watch, self.stopped = [], watch, None
        try:
            yield
        except EngineError:
            if self.stopped is None:
                raise
        finally:
            self.watch = None
        if self.stopped is not None:
            raise self.stopped

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C stops the work at its next call-back (an exception raised there would be lost in TensorRT)."""
        with interrupts.taken(self._stop):
            yield

    def _stop(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            self.stopped = error

    def reason(self) -> str:
        """The most useful of the errors: the first that neither frames nor repeats another."""
        echoes = ("While parsing node", "--- Begin node", "--- End node", "catchCudaError")
        causes = [e for e in self.errors if not any(echo in e for echo in echoes)]
        if not causes:
            return "no reason given (--verbose shows its log)"
        if re.search(r"cudaError (35|100)\b", causes[0]):
            return "no CUDA driver, or none recent enough, or no GPU: run nvidia-smi"
        return one_line(causes[0])


@functools.cache
def log_of(module: ModuleType) -> Log:
    """The logger of a flavour."""
    return Log(module)


def one_line(message: str) -> str:
    """A message from TensorRT without line breaks and source positions."""
    text = " ".join(message.split())
    text = re.sub(r"^(\S+\.cpp:\d+:? |ERROR: |In function \w+: |\[\d+\] )+", "", text)
    text = re.sub(r"[. ]*In \w+ at /\S+:\d+", "", text)
    return text if len(text) <= 300 else text[:297] + "..."
