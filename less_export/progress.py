"""Where long work reports. The library never prints: it is given a :class:`Progress`, or reports nowhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol


class Step(Protocol):
    """Called after each piece of work, with a few words such as the current error."""

    def __call__(self, words: str = "", pieces: int = 1) -> None: ...


class Progress(Protocol):
    """Takes reports of exports, trainings, evaluations and builds."""

    def say(self, text: str) -> None:
        """Take a few words on what begins now, or a remark."""

    def phase(self, name: str, total: int) -> contextlib.AbstractContextManager[Step]:
        """Work that is made of ``total`` pieces; what is entered is called after each."""


class Silent:
    """Reports nowhere: the default, and that of all but the first of several processes."""

    def say(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        yield lambda words="", pieces=1: None


class Spoken:
    """Calls a function with a few words as each phase begins."""

    def __init__(self, function: Callable[[str], object]) -> None:
        self._function = function

    def say(self, text: str) -> None:
        self._function(text)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        self.say(name)
        yield lambda words="", pieces=1: None


#: What public functions accept.
AnyProgress = Progress | Callable[[str], object]


def as_progress(progress: AnyProgress | None) -> Progress:
    """A :class:`Progress`, a function that is called with a few words as each phase begins, or None for nowhere."""
    if progress is None:
        return Silent()
    if callable(progress) and not hasattr(progress, "phase"):
        return Spoken(progress)
    return progress  # type: ignore[return-value]


def prefixed(progress: Progress, prefix: str) -> Progress:
    """A progress whose words are said to ``progress`` after ``prefix``."""
    return Spoken(lambda text: progress.say(prefix + text))
