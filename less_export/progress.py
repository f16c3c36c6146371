"""Progress of long work: bars with a live figure on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol


class Step(Protocol):
    """Called after each piece of work, with a few words such as the current error."""

    def __call__(self, words: str = "", pieces: int = 1) -> None: ...


class Progress(Protocol):
    """Where long work reports: phases made of pieces, and remarks between them."""

    def phase(self, name: str, total: int) -> contextlib.AbstractContextManager[Step]: ...

    def say(self, text: str) -> None: ...


class Silent:
    """For libraries and for all but the first of several processes."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        yield lambda words="", pieces=1: None

    def say(self, text: str) -> None:
        pass


class Bars:
    """On stderr: one bar per phase on a terminal; elsewhere one line when a phase has ended."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if not self._console.is_terminal:
            latest, begin = "", time.perf_counter()

            def note(words: str = "", pieces: int = 1) -> None:
                nonlocal latest
                latest = words or latest

            yield note
            words = f", {latest}" if latest else ""
            self.say(f"{name}: {time.perf_counter() - begin:.0f} s{words}")
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with RichProgress(*columns, TextColumn("{task.fields[words]}"), console=self._console) as bars:
            task = bars.add_task(name, total=total, words="")

            def step(words: str = "", pieces: int = 1) -> None:
                if words:
                    bars.update(task, words=words)
                bars.advance(task, pieces)

            yield step

    def say(self, text: str) -> None:
        print(f"less-export: {text}", file=sys.stderr, flush=True)
