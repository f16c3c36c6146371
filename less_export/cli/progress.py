"""What the command line shows of long work, on stderr: bars, a spinner, the library's log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from ..errors import printable
from ..progress import Progress, Spoken, Step
from .ending import tell


class Bars:
    """One bar per phase at a terminal; elsewhere one line when a phase has ended."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        tell(text)

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
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, TextColumn("{task.fields[words]}", markup=False), console=self._console) as bars:
            task = bars.add_task(name, total=total, words="")

            def step(words: str = "", pieces: int = 1) -> None:
                if words:
                    bars.update(task, words=words)
                bars.advance(task, pieces)

            yield step


@contextlib.contextmanager
def spinner() -> Iterator[Progress]:
    """A spinner with the latest words at a terminal, one line each elsewhere."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Spoken(tell)
        return
    with console.status("starting") as status:
        yield Spoken(lambda text: status.update(escape(printable(text))))


@contextlib.contextmanager
def library_log(verbose: bool) -> Iterator[None]:
    """Print all that less-export logs while the context is open (TensorRT's log, compilers), if ``verbose``."""
    if not verbose:
        yield
        return
    logger, handler = logging.getLogger("less_export"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
