"""Progress of long-running work. The library never prints: it reports to a :class:`Progress`, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol


class Step(Protocol):
    """Called after each piece of work, with a short note such as the current error."""

    def __call__(self, note: str = "", pieces: int = 1, /) -> None: ...


class Progress(Protocol):
    """Receives reports from exports, trainings, evaluations and builds."""

    def say(self, text: str) -> None:
        """Receive a short text on the work that begins now, or a remark."""

    def phase(self, name: str, total: int) -> contextlib.AbstractContextManager[Step]:
        """Enter a phase of ``total`` pieces; the value of the context is called after each of them."""


class Silent:
    """Ignores all reports: the default, and for all but the first of several processes."""

    def say(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        yield lambda note="", pieces=1: None


class Spoken:
    """Calls a function with a short text as each phase begins."""

    def __init__(self, function: Callable[[str], object]) -> None:
        self._function = function

    def say(self, text: str) -> None:
        self._function(text)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        self.say(name)
        yield lambda note="", pieces=1: None


#: What public functions accept.
AnyProgress = Progress | Callable[[str], object]


def as_progress(progress: AnyProgress | None) -> Progress:
    """A :class:`Progress` from itself, from a function to call with a short text as each phase begins, or from None."""
    if progress is None:
        return Silent()
    if callable(progress) and not hasattr(progress, "phase"):
        return Spoken(progress)
    return progress  # type: ignore[return-value]


def prefixed(progress: Progress, prefix: str) -> Progress:
    """A progress that reports to ``progress`` with ``prefix`` before each text."""
    return Spoken(lambda text: progress.say(prefix + text))
