"""Errors that a user can cause or fix: one family, one line each, exit code 1 at the command line.

Any other exception is a bug in this package and keeps its traceback.
"""

from __future__ import annotations


def install_hint(*extras: str) -> str:
    """The command that installs extras of this package, as pyproject.toml names them."""
    return f"pip install 'less-export[{','.join(extras)}]'"


class LessExportError(Exception):
    """Base of all expected errors; the message says what is wrong and what to do about it."""


class UsageError(LessExportError):
    """Options that contradict each other or the model (budget, dtype, target, prompt)."""


class ModelError(LessExportError):
    """A model that cannot be found or read."""


class GatedModelError(ModelError):
    """A model whose weights can be downloaded only after its licence has been accepted."""

    def __init__(self, message: str, hub: str) -> None:
        super().__init__(message)
        self.hub = hub


class UnsupportedModelError(LessExportError):
    """A decoder that LESS does not support; the message names the layer and the reason."""


class KernelError(LessExportError):
    """A kernel file that is damaged or was trained for another model."""


class BundleError(LessExportError):
    """A bundle that is incomplete, damaged or written by a newer version."""


class ValidationError(LessExportError):
    """An exported graph that does not compute what the model computes."""


class BackendError(LessExportError):
    """A runtime that is missing, or input that the contract forbids."""


class EngineError(LessExportError):
    """TensorRT is missing, or rejected the graph, the plan or the machine."""


def printable(text: str, keep: str = "") -> str:
    r"""``text`` with escapes for what a terminal would obey: control characters, changes of direction, surrogates.

    Names and templates come from bundles, and an escape sequence in one could rewrite what the terminal shows.
    Characters in ``keep``, such as ``"\n\t"``, stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(text: object, width: int = 200) -> str:
    """``text`` for a message: on one line, without control characters, cut to ``width`` characters."""
    try:
        plain = str(text)[: 4 * width]
    except Exception:  # str() of foreign objects may raise anything
        plain = type(text).__name__
    plain = " ".join(plain.split())
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return plain if len(plain) <= width else plain[: width - 3] + "..."
