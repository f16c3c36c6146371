"""The layers of a model's configuration: their kinds, and configurations with only some of them."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import UsageError


def layer_kinds(text: Any) -> list[str]:
    """A description of each layer in a config; equal strings mean equal layers."""
    count = text.num_hidden_layers
    lists, single = _lists(text), _overrides(text)
    own = count - _shared_layers(text)
    return [repr([*(v[i] for v in lists.values()), single.get(i), i >= own]) for i in range(count)]


def keep_first(text: Any, count: int) -> None:
    """Reduce a config to its first ``count`` layers, for trials; raises :class:`UsageError` for too many.

    Warns if all of them slide and a later one does not.
    """
    if count > text.num_hidden_layers:
        raise UsageError(f"--num-hidden-layers {count}: the model has {text.num_hidden_layers}")
    full = [i for i, kind in enumerate(getattr(text, "layer_types", None) or []) if kind == "full_attention"]
    if full and full[0] >= count:
        warnings.warn(
            f"the first {count} layers all slide: use --num-hidden-layers {full[0] + 1} or more, layer {full[0]} is "
            "the first that does not",
            stacklevel=2,
        )
    keep_layers(text, list(range(count)))


def keep_layers(text: Any, indices: list[int]) -> None:
    """Reduce a config to some of its layers, keeping their entries."""
    lists, single = _lists(text), _overrides(text)
    own = text.num_hidden_layers - _shared_layers(text)
    for name, values in lists.items():
        setattr(text, name, [values[i] for i in indices])
    if own < text.num_hidden_layers:
        text.num_kv_shared_layers = sum(i >= own for i in indices)
    text.num_hidden_layers = len(indices)
    if single:
        text.per_layer_config = {new: single[old] for new, old in enumerate(indices) if old in single}


def _lists(text: Any) -> dict[str, list[Any]]:
    """The lists of a config with one value a layer."""
    return {n: v for n, v in vars(text).items() if isinstance(v, list) and len(v) == text.num_hidden_layers}


def _overrides(text: Any) -> dict[int, dict[str, Any]]:
    """Entries of a config that differ for single layers (heads in Gemma 4)."""
    return {int(i): v for i, v in (text.to_dict().get("per_layer_config") or {}).items()}


def _shared_layers(text: Any) -> int:
    """How many of the last layers take the keys and values of earlier ones (Gemma 4)."""
    return int(getattr(text, "num_kv_shared_layers", None) or 0)
