"""Errors a user can cause or mend: one family, one line each, exit code 1 at the command line.

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


def install_hint(*extras: str) -> str:
    """The command that installs what is missing: the extras of this package, as pyproject.toml names them."""
    return f"pip install 'less-export[{','.join(extras)}]'"


class LessExportError(Exception):
    """Base of all expected failures; the message says what is wrong and what to do about it."""


class UsageError(LessExportError):
    """Options that contradict each other or the model (budget, dtype, target, prompt)."""


class ModelError(LessExportError):
    """A model that cannot be found or read."""


class GatedModelError(ModelError):
    """A model whose weights the hub keeps until its licence is accepted."""

    def __init__(self, message: str, hub: str) -> None:
        super().__init__(message)
        self.hub = hub


class UnsupportedModelError(LessExportError):
    """A decoder that LESS cannot express; names the layer and the reason."""


class KernelError(LessExportError):
    """A kernel file that is damaged or was trained for another model."""


class BundleError(LessExportError):
    """A bundle that is incomplete, damaged or written by a newer version."""


class ValidationError(LessExportError):
    """An exported graph that does not compute what the model computes."""


class BackendError(LessExportError):
    """A runtime that is missing, or was fed what the contract forbids."""


class EngineError(LessExportError):
    """TensorRT refused the graph, the plan or the machine."""


def one_line(text: object, width: int = 200) -> str:
    """``text`` for a message: on one line, without control characters, cut to ``width`` characters."""
    try:
        plain = str(text)[: 4 * width]
    except Exception:  # whatever the objects of others do
        plain = type(text).__name__
    plain = " ".join(plain.split())
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)
    return plain if len(plain) <= width else plain[: width - 3] + "..."
