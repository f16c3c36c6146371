"""Eviction policies: which tokens keep a slot.

A policy is one file: how a budget is split (``split``), whether queries leave a score (``scoring``), which tokens
keep their slot, once for torch (``keep``) and once as ONNX nodes (``keep_onnx``), and the facts that the rest of the
package asks for (see :class:`EvictionPolicy`). The mechanics (attention, slots, absorption) live in ``less.reference``
and ``exporter.onnx_op`` and are the same for all. :func:`register` adds a policy from outside.
"""

from __future__ import annotations

from typing import Final

from .base import (
    Candidates,
    EvictionPolicy,
    LayerNumbers,
    PositionalPolicy,
    ScoredPolicy,
    by_code,
    by_name,
    choosable,
    register,
    registered,
    unregister,
)
from .h2o import H2O
from .sink import Sink
from .tova import Tova
from .window import Full, Window


class Policy:
    """The policies of this package."""

    H2O: Final = register(H2O())
    TOVA: Final = register(Tova())
    SINK: Final = register(Sink())
    WINDOW: Final = register(Window())
    FULL: Final = register(Full())


__all__ = [
    "Candidates",
    "EvictionPolicy",
    "LayerNumbers",
    "Policy",
    "PositionalPolicy",
    "ScoredPolicy",
    "by_code",
    "by_name",
    "choosable",
    "register",
    "registered",
    "unregister",
]
