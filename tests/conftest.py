"""Fixtures that export each tiny model once a session; torch and transformers are imported only when needed."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from .sharing import once, shared_folder

if TYPE_CHECKING:
    from less_export.runtime.backend import Backend

    from .families import Tiny

#: Architecture that the tests compile the plugin and engines for.
PLUGIN_ARCH = "sm_89"

# CI draws the same examples every time; ``--hypothesis-profile thorough`` draws more, random ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile(
    "thorough", deadline=None, max_examples=3000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

#: ``exported(family, variant) -> Tiny`` and ``opened(family, variant, backend) -> Backend``, both cached.
Exported = Callable[..., "Tiny"]
Opened = Callable[..., "Backend"]


def pytest_configure() -> None:
    """Interrupts work as at a terminal: in a job that a shell started in the background, SIGINT is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """One thread, enough for tiny tensors, and fewer garbage collections, which take a sixth of tracing time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    gc.set_threshold(*before)
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled plugins go into LESS_EXPORT_CACHE if set, else into a folder of the session."""
    with pytest.MonkeyPatch.context() as patch:
        if "LESS_EXPORT_CACHE" not in os.environ:
            patch.setenv("LESS_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def plugin_library(_cache: None) -> Path:
    """The TensorRT plugin, compiled for one architecture, once a session."""
    from less_export.tensorrt import plugin

    return plugin.library((PLUGIN_ARCH,))


@pytest.fixture(scope="session")
def operator_library(_cache: None) -> Path:
    """The operator for ONNX Runtime's CPU provider, compiled once a session."""
    from less_export.native import ort_operator

    return ort_operator.library()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Bundles of the tiny families, exported on first use, shared by all workers.

    Variants: ``h2o`` (two layers, 24 slots, random kernels of rank 4, logits of the last token) and ``full``
    (one layer of each kind, all logits).
    """
    from . import families

    folder = shared_folder(tmp_path_factory, "families")

    def make(family: str, variant: str, bundle: Path) -> None:
        checkpoint = bundle.with_name(f"{bundle.name}.model")
        if variant == "h2o":
            families.save(family, checkpoint)
            kernels = families.kernels(families.load(checkpoint), folder / f"{family}.kernels.safetensors")
            families.export(checkpoint, bundle, budget=str(families.BUDGET), kernels=kernels)
        else:
            families.save(families.shallow(family), checkpoint)
            families.export(checkpoint, bundle, policy="full", context=families.CONTEXT, logits="all")

    def export(family: str, variant: str) -> Tiny:
        bundle = once(folder / f"{family}.{variant}", lambda path: make(family, variant, path))
        return families.Tiny(bundle.with_name(f"{bundle.name}.model"), bundle)

    return export


@pytest.fixture(scope="session")
def opened(exported: Exported) -> Opened:
    """Backends of those bundles, reset to three empty rows at every call."""
    backends: dict[tuple[str, str, str, int], Backend] = {}

    def open_backend(family: str, variant: str, name: str, rows: int = 3, copy: int = 0) -> Backend:
        key = (family, variant, name, copy)
        if key not in backends:
            backends[key] = exported(family, variant).backend(name, rows)
        backends[key].open(rows)
        return backends[key]

    return open_backend


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """A folder to export into that must be empty at the end."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir()), "a failed export left something behind"
