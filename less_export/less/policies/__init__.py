"""Eviction policies: which tokens keep a slot.

A policy is one file with three things: how a budget is split (``split``), whether queries leave a score
(``scoring``), and which tokens keep their slot, once for torch (``keep``) and once as ONNX nodes
(``keep_onnx``). The mechanics (attention, slots, absorption) live in ``less.reference`` and
``exporter.onnx_op`` and are the same for all. Torch and ONNX are only imported by their callers, so
that a runtime without them can read the table.
"""

from __future__ import annotations

from ...contract import Policy
from .base import EvictionPolicy
from .h2o import H2O
from .sink import Sink
from .tova import Tova
from .window import Full, Window

POLICIES: dict[Policy, EvictionPolicy] = {p.code: p for p in (H2O(), Tova(), Sink(), Window(), Full())}

__all__ = ["POLICIES", "EvictionPolicy"]
