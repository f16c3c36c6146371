"""The releases of other packages that less-export is tested with, and a warning for those that it is not.

``nox`` runs the core of the test suite with the oldest, the pinned and the newest releases; a test compares this table
with its results (``benchmarks/results/versions.json``).
"""

from __future__ import annotations

import functools
import re
import warnings
from importlib import metadata

#: Package -> oldest and newest tested release. Patch releases of these count as tested.
TESTED = {
    "torch": ("2.13.0", "2.15.0"),
    "transformers": ("5.20.0", "5.24.0"),
    "onnx": ("1.19.0", "1.23.2"),
    "onnx-ir": ("0.1.16", "1.1.0"),
    "onnxscript": ("0.6.0", "0.7.2"),
    "onnxruntime": ("1.28.0", "1.32.0"),
}
#: What an export, a training and an evaluation depend on.
EXPORT_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


@functools.cache
def warn_if_untested(*packages: str) -> None:
    """Warn in one line, once per process, of installed releases outside the tested ones."""
    untested = [reason for package in packages if (reason := _untested(package))]
    if untested:
        warnings.warn(f"not tested with {', '.join(untested)}: if something fails, install one of these", stacklevel=3)


def _untested(package: str) -> str | None:
    """``"torch 3.0.1 (tested: 2.13 to 2.15)"``, or None for a tested or missing package."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    oldest, newest = (_minor(v) for v in TESTED[package])
    if oldest <= _minor(version) <= newest:
        return None
    return f"{package} {version} (tested: {'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))})"


def _minor(version: str) -> tuple[int, ...]:
    """Major and minor number of a release."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
