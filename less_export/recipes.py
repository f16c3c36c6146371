"""Named models: a recipe is a TOML file under ``models/`` with a source and the options that suit it."""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from dataclasses import dataclass, fields
from typing import Any

from .config import ExportConfig, budget_tokens
from .errors import UsageError

_OPTIONS = ("policy", "budget", "context", "chunk")


@dataclass(frozen=True)
class Recipe:
    """One file under ``models/``.

    hub: Hugging Face id. gguf_package: Python package that ships the model as GGUF, tried first.
    policy, budget, context, chunk: defaults of :class:`~less_export.config.ExportConfig`. rank and hidden
    are what kernels for this model are trained with, dtype is what TensorRT computes in.
    """

    name: str
    hub: str
    policy: str
    budget: str
    context: int
    rank: int
    hidden: int
    chunk: int
    dtype: str
    gguf_package: str | None = None

    def __post_init__(self) -> None:
        ExportConfig(**self.options(), rank=self.rank, dtype=self.dtype)
        budget_tokens(self.budget, self.context)
        if self.hidden < 1 or "/" not in self.hub:
            raise UsageError(f"recipe {self.name}: hidden must be positive and hub an id like org/name")

    def options(self) -> dict[str, Any]:
        """Defaults for :meth:`ExportConfig.with_defaults`."""
        return {name: getattr(self, name) for name in _OPTIONS}


def _files() -> dict[str, Any]:
    folder = importlib.resources.files("less_export.models")
    return {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}


def names() -> list[str]:
    """The recipes there are."""
    return sorted(_files())


def load(name: str) -> Recipe | None:
    """The recipe called ``name``, or None; raises :class:`UsageError` for a damaged one."""
    file = _files().get(name)
    if file is None:
        return None
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        return Recipe(name=name, **data)
    except (ValueError, TypeError, UsageError) as error:
        known = ", ".join(f.name for f in fields(Recipe) if f.name != "name")
        raise UsageError(f"recipe {name}.toml is not valid ({error}); its keys are {known}") from error


def unknown(name: str) -> UsageError:
    """The error for a MODEL that is no recipe, folder, GGUF file or hub id."""
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return UsageError(
        f"unknown model '{name}': {hint}MODEL is a recipe ({', '.join(names())}), "
        "a hub id like org/name, a checkpoint folder or a .gguf file"
    )
