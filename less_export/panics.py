"""Panics of libraries written in Rust: what they raise is no Exception, and Rust reports them on stderr by itself."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from .errors import one_line


def is_panic(error: BaseException) -> bool:
    """Whether Rust code failed where its author had not expected it."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Turn panics into a RuntimeError, without Rust's report.

    What others write to stderr meanwhile comes at the end of the block: it must be short.
    """
    with tempfile.TemporaryFile() as report, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # stderr may be closed
            stderr = os.dup(2)
            stack.callback(os.close, stderr)
            stack.callback(os.dup2, stderr, 2)
            os.dup2(report.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            if not is_panic(error):
                raise
            panicked = True
            raise RuntimeError(f"it is damaged ({one_line(error)})") from error
        finally:
            stack.close()
            if not panicked and report.seek(0, os.SEEK_END):  # of other threads
                report.seek(0)
                with contextlib.suppress(OSError):
                    os.write(2, report.read())
