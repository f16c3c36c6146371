"""less-export: Hugging Face decoders with a constant-memory LESS cache, as ONNX and TensorRT.

``less_export.export(model, out, ...)`` writes a bundle, ``less_export.open_bundle(path)`` opens it for
generation. Opening and generating need neither torch nor transformers; modules that do are imported on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import ExportConfig
    from .errors import LessExportError
    from .exporter.build import export
    from .hf.calibration import calibrate
    from .runtime.backend import RowState
    from .runtime.open import open_bundle
    from .runtime.sampling import SamplingParams
    from .training.job import train

logging.getLogger(__name__).addHandler(logging.NullHandler())

_WHERE = {
    "calibrate": ".hf.calibration",
    "export": ".exporter.build",
    "open_bundle": ".runtime.open",
    "ExportConfig": ".config",
    "LessExportError": ".errors",
    "RowState": ".runtime.backend",
    "SamplingParams": ".runtime.sampling",
    "train": ".training.job",
}

__all__ = [
    "ExportConfig",
    "LessExportError",
    "RowState",
    "SamplingParams",
    "__version__",
    "calibrate",
    "export",
    "open_bundle",
    "train",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
