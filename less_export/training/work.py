"""Finished work of a training, in a hidden folder beside the kernel file until that is written.

Every file states a hash of its content: one that is damaged counts as missing, so its work is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..bundle import temporary
from ..bundle.files import write_atomically
from ..errors import KernelError, LessExportError
from ..less.feature_maps import FeatureMap, Kernels
from ..progress import Progress

T = TypeVar("T")
_HASH = hashlib.sha256().digest_size


def folder(out: Path, facts: Mapping[str, Any], hf_config: Any) -> Path:
    """The folder for the kernel file ``out`` of a training that these facts and the model's configuration determine."""
    config = {n: v for n, v in hf_config.to_dict().items() if n not in ("_name_or_path", "transformers_version")}
    text = json.dumps({**facts, "config": config}, sort_keys=True, default=str)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
    return out.parent / f".{out.name}.{fingerprint}"


def warn_of_others(out: Path, work: Path) -> None:
    """Warn of unfinished trainings beside ``out`` with other options, unless they are known to be running."""
    name = re.compile(re.escape(f".{out.name}.") + "[0-9a-f]{12}")
    others = [p for p in sorted(out.parent.glob(".*")) if name.fullmatch(p.name) and p.is_dir() and p != work]
    unfinished = [p for p in others if not _is_running(p)]
    if unfinished:
        size = sum(f.stat().st_size for p in unfinished for f in p.rglob("*") if f.is_file())
        warnings.warn(
            f"unfinished trainings of {out.name} with other options or texts hold {size / 1e9:.2f} GB; delete those "
            f"that are not running: {', '.join(map(str, unfinished))}",
            stacklevel=4,
        )


def _is_running(work: Path) -> bool:
    handle = os.open(work, os.O_RDONLY)
    try:
        return temporary.lock(handle, alone=True) is False
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Keep other trainings out of the folder, which is created.

    Raises:
        LessExportError: another one is at work there. OSError: it cannot be created.
    """
    while True:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
        try:
            if temporary.lock(handle, alone=True) is False:
                raise LessExportError(
                    f"another training with the same options is at work in {work}: wait until it has ended, or choose "
                    "another --out"
                )
            if not work.is_dir() or not os.path.samestat(work.stat(), os.fstat(handle)):
                continue  # the other one has just ended
            yield
            return
        finally:
            os.close(handle)


def save(file: Path, data: bytes) -> None:
    """Write ``data`` after its hash."""
    write_atomically(file, hashlib.sha256(data).digest() + data)


def load(file: Path, progress: Progress | None = None) -> bytes | None:
    """What :func:`save` wrote; None if the file is missing or damaged (which ``progress`` is told).

    Raises:
        LessExportError: the file cannot be read.
    """
    content = _read(file) or b""
    data = content[_HASH:]
    if content[:_HASH] == hashlib.sha256(data).digest():
        return data
    _report(file, progress)
    return None


def save_kernels(file: Path, kernels: Kernels) -> None:
    """Write kernels with their hash."""
    Kernels(kernels.layers, {**kernels.provenance, "sha256": _hash(kernels)}, kernels.centring).save(file)


def load_kernels(file: Path, progress: Progress | None = None) -> Kernels | None:
    """What :func:`save_kernels` wrote; None if the file is missing or damaged (which ``progress`` is told).

    Raises:
        LessExportError: the file cannot be read.
    """
    if _read(file) is not None:
        with contextlib.suppress(KernelError):
            kernels = Kernels.load(file)
            facts = dict(kernels.provenance)
            stated, kernels = facts.pop("sha256", None), replace(kernels, provenance=facts)
            if stated == _hash(kernels):
                return kernels
    _report(file, progress)
    return None


def save_layer(file: Path, layer: int, feature_map: FeatureMap, facts: Mapping[str, Any]) -> None:
    """Write the kernels of one layer, and what is known of them."""
    save_kernels(file, Kernels({layer: feature_map}, dict(facts)))


def load_layer(file: Path, layer: int, progress: Progress | None = None) -> Kernels | None:
    """What :func:`save_layer` wrote; None if the file is missing or damaged (which ``progress`` is told).

    Raises:
        LessExportError: the file cannot be read.
    """
    kernels = load_kernels(file, progress)
    if kernels is None or [*kernels.layers] == [layer]:
        return kernels
    _report(file, progress)
    return None


def written(content: T | None, file: Path) -> T:
    """The content of a file that was whole, or has been written, in this run.

    Raises:
        LessExportError: it no longer is.
    """
    if content is None:
        raise LessExportError(f"{file} was deleted or damaged while training ran: rerun the same command")
    return content


def _hash(kernels: Kernels) -> str:
    digest = hashlib.sha256(json.dumps(kernels.provenance, sort_keys=True).encode())
    for name, tensor in sorted(kernels.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LessExportError(
            f"cannot read {file} of an interrupted training ({error.strerror or error}): delete {file.parent} to train "
            "from the beginning"
        ) from error


def _report(file: Path, progress: Progress | None) -> None:
    if progress is not None and file.exists():
        progress.say(f"{file} is damaged: its work is done again")
