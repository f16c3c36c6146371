"""Steps that an interrupt must not cut in two."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def taken(take: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Call ``take`` with what an interrupt (SIGINT, SIGTERM) does, instead of doing it: it usually raises.

    Signals without a handler in Python act at once. Only the main thread receives signals, so others need no care.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {n: handler for n in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(n))}
    try:
        for number, handler in handlers.items():
            signal.signal(number, lambda *arguments, handler=handler: take(functools.partial(handler, *arguments)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Deliver interrupts at the end of the block. For short steps, such as a few renames."""
    received: list[Callable[[], object]] = []
    try:
        with taken(received.append):
            yield
    finally:
        for act in received[:1]:
            act()
