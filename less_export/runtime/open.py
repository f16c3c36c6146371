"""Open bundles: choose the artifact and the backend, and make a generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.artifact import Artifact, Bundle
from ..config import BACKENDS
from ..errors import BackendError, UsageError, install_hint
from ..tensorrt.trust import PluginFacts
from .backend import Backend
from .generate import Generator
from .tokenizer import Tokenizer


def open_bundle(path: str | Path, backend: str | None = None, *, trust_code: bool = False, **options: Any) -> Generator:
    """Open and verify a bundle folder, an ``x.onnx`` or an ``x.plan``, ready to generate.

    Args:
        path: the output of ``less-export``.
        backend: ``"ort"``, ``"trt"`` or ``"torch"``; default by the bundle's artifacts.
        trust_code: also load native code that the bundle brings or names (a plugin library, a plan with one inside)
            and that this machine did not build. Only for bundles whose source you trust.
        options: arguments of the backend (``threads`` and ``provider`` for ONNX Runtime; ``cuda_graphs`` for GPUs;
            ``device`` for torch).

    Raises:
        BundleError: missing or damaged files. BackendError: the runtime or its artifact is missing.
    """
    bundle = Bundle.open(path)
    return load_generator(bundle, load_backend(bundle, backend, trust_code=trust_code, **options))


def load_generator(bundle: Bundle, backend: Backend) -> Generator:
    """A generator over a backend of an open bundle, with the bundle's tokenizer if it has one."""
    return Generator(backend, load_tokenizer(bundle), eos_ids=bundle.manifest.eos_ids())


def load_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer of an open bundle, if it has one."""
    facts = bundle.manifest.tokenizer
    if facts is None:
        return None
    return Tokenizer(
        bundle.path(facts.file),
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        add_bos=facts.add_bos,
        chat_template=facts.chat_template,
        special_tokens=facts.special_tokens,
        split_special_tokens=facts.split_special_tokens,
    )


def load_backend(bundle: Bundle, name: str | None = None, *, trust_code: bool = False, **options: Any) -> Backend:
    """The backend of a bundle, by name or by the bundle's artifacts; its runtime is imported here."""
    backend = _load(bundle, name, trust_code, **options)
    backend.identity = bundle.identity()
    return backend


def backend_name(bundle: Bundle, name: str | None = None) -> str:
    """``name``, or that of the backend that a bundle's artifacts are for."""
    return name or ("ort" if bundle.artifact("ort") else "trt")


def _load(bundle: Bundle, name: str | None, trust_code: bool, **options: Any) -> Backend:
    name = backend_name(bundle, name)
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}': choose one of {', '.join(BACKENDS)}")
    if name == "ort":
        from .ort import OrtBackend

        graph = _artifact(bundle, ("ort",), "model.onnx (--target ort)")
        return OrtBackend(graph.contract, bundle.path(graph.file), **options)
    if name == "trt":
        from .trt import TrtBackend

        plan = _artifact(bundle, ("plan",), "engine.plan (--out x.plan, or --engine)")
        facts = plan.details.get("plugin")
        if facts:  # a library beside the plan may be named by its file name
            options.setdefault("plugin", PluginFacts(**{**facts, "library": str(bundle.path(facts["library"]))}))
        return TrtBackend(plan.contract, bundle.path(plan.file), trust_code=trust_code, **options)
    try:
        from .torch import TorchBackend
    except ImportError as error:
        raise BackendError(
            f"the torch backend needs {error.name}: {install_hint('export')}, or choose another --backend"
        ) from None
    return TorchBackend(bundle, _artifact(bundle, ("ort", "trt", "plan"), "graph"), **options)


def _artifact(bundle: Bundle, kinds: tuple[str, ...], what: str) -> Artifact:
    for kind in kinds:
        artifact = bundle.artifact(kind)
        if artifact is not None:
            return artifact
    raise BackendError(f"this bundle has no {what}: export again, or choose another backend")
