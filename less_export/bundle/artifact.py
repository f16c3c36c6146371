"""Bundles: the files of one export, the manifest that describes them, and the checks of opening them.

A bundle is a folder with ``manifest.json``, or a single artifact ``x.onnx`` / ``x.plan`` with ``x.json``
and its companions beside it. The manifest carries a hash of itself and of graphs, kernels, tokenizer and
plan, checked at every opening; weights are checked by size and header, and whole by ``check``. A manifest comes from
strangers: ``schema`` bounds it, and nothing that it names is a reason to run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contract import Contract
from ..errors import BundleError
from . import schema, strict_json
from .files import sha256

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
#: Artifact kinds and their file names in a folder bundle.
ARTIFACT_FILES = {"ort": "model.onnx", "trt": "model.trt.onnx", "plan": "engine.plan"}
KERNELS = "kernels.safetensors"
TOKENIZER = "tokenizer.json"
CONVERTED_WEIGHTS = "converted.safetensors"
QUANTISED_WEIGHTS = "quantised.safetensors"
#: Every name in a folder bundle but those of the checkpoint's weight files.
FIXED_NAMES = (*ARTIFACT_FILES.values(), KERNELS, TOKENIZER, CONVERTED_WEIGHTS, QUANTISED_WEIGHTS)
#: Suffixes of a bundle that is one artifact with companions.
SINGLE_SUFFIXES = (".onnx", ".plan", ".engine")


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of ours, even a damaged one."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b'"manifest_sha256"' in file.read(strict_json.MAX_BYTES)


def is_bundle(path: str | Path) -> bool:
    """Whether a path names a bundle: a folder with a manifest, or the file of an artifact."""
    path = Path(path)
    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix in SINGLE_SUFFIXES)


def foreign_files(layout: Layout) -> list[str]:
    """Names in the layout's folder that its manifest does not list: an export must not touch them.

    A manifest that cannot be read lists the names that every bundle has.
    """
    folder, own = layout.folder, set[str]()
    if is_manifest(folder / layout.manifest):
        own = {layout.manifest, *_listed(folder / layout.manifest)}
        own = own if len(own) > 1 else {layout.manifest, *map(layout.companion, FIXED_NAMES)}
    return sorted({p.name for p in folder.iterdir()} - own) if folder.is_dir() else []


def _listed(file: Path) -> set[str]:
    """The files that a manifest lists, even one whose hash is wrong; none if it cannot be read."""
    try:
        data = strict_json.read_json(file.read_bytes())
        schema.MANIFEST.check(data, "")
    except (OSError, strict_json.SchemaError):
        return set()
    entries = [*data["artifacts"], *data["weights"], data["tokenizer"], data["kernels"]]
    return {entry["file"] for entry in entries if entry is not None} - {""}


@dataclass(frozen=True)
class Layout:
    """Where the files of an export are: a folder, or one artifact with companions named after it."""

    folder: Path
    stem: str | None = None
    artifact: str | None = None

    @classmethod
    def of(cls, path: str | Path) -> Layout:
        """Layout of a bundle folder, an .onnx file or a .plan file (``.engine`` too), existing or not."""
        path = Path(path)
        if path.suffix not in SINGLE_SUFFIXES or path.is_dir():
            return cls(path)
        if path.name in ARTIFACT_FILES.values() and (path.parent / MANIFEST).is_file():
            return cls(path.parent)
        return cls(path.parent, path.stem, path.name)

    @property
    def manifest(self) -> str:
        return MANIFEST if self.stem is None else f"{self.stem}.json"

    def companion(self, name: str) -> str:
        """File name of a companion (tokenizer, kernels, weights) in this layout."""
        return name if self.stem is None else f"{self.stem}.{name}"


@dataclass(frozen=True)
class Artifact:
    """One runnable file: kind ``ort`` or ``trt`` (a graph) or ``plan`` (a TensorRT engine)."""

    kind: str
    file: str
    sha256: str
    contract: Contract
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file that graphs point into; ``header_sha256`` covers its length prefix and header."""

    file: str
    bytes: int
    header_sha256: str
    sha256: str


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer file and the facts that it does not hold.

    ``chat_template`` is one template, or several by name. ``special_tokens`` are the variables of chat templates,
    such as ``bos_token``; None in bundles of earlier versions, which know bos and eos only.
    """

    file: str
    sha256: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, str] | None = None
    split_special_tokens: bool = False


@dataclass(frozen=True)
class KernelFacts:
    """A summary of the kernel file. Without feature maps: no parametrisation, rank and hidden 0, no layers."""

    file: str
    sha256: str
    bytes: int
    parametrisation: str | None
    rank: int
    hidden: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class OnDisk:
    """The files of a bundle as the export left them: time and inode of the weights by name, and the manifest's inode.

    Weights that are hard links change with the checkpoint. A copy of the bundle has another manifest inode and no links
    to a checkpoint, so these values say nothing about it.
    """

    manifest_inode: int
    weights: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, manifest: Path, weights: Iterable[Path]) -> OnDisk:
        """The facts of files as they are now."""
        facts = {w.name: w.stat() for w in weights}
        times = {name: {"mtime_ns": s.st_mtime_ns, "inode": s.st_ino} for name, s in facts.items()}
        return cls(manifest.stat().st_ino, times)


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle. ``model`` holds name, source, parameter count and Hugging Face config."""

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    artifacts: tuple[Artifact, ...]
    weights: tuple[WeightFile, ...]
    tools: Mapping[str, str]
    tokenizer: TokenizerFacts | None = None
    kernels: KernelFacts | None = None
    on_disk: OnDisk | None = None

    def files(self) -> Iterator[str]:
        """Names of the files that it describes."""
        yield from (a.file for a in self.artifacts)
        yield from (w.file for w in self.weights)
        yield from (x.file for x in (self.tokenizer, self.kernels) if x is not None and x.file)

    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the tokenizer's; without one what the settings state, or the model's config."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_ids
        config = self.model.get("config") or {}
        config = config.get("text_config") or config
        stated = self.settings.get("eos_ids", config.get("eos_token_id"))
        return tuple(i for i in (stated if isinstance(stated, list) else [stated]) if type(i) is int)

    def dump(self) -> bytes:
        """JSON with its own hash in ``manifest_sha256``."""
        data: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "artifacts": [
                {**vars(a), "contract": a.contract.to_dict(), "details": dict(a.details)} for a in self.artifacts
            ],
            "weights": [vars(w) for w in self.weights],
            "tokenizer": vars(self.tokenizer) if self.tokenizer else None,
            "kernels": vars(self.kernels) if self.kernels else None,
            "tools": dict(self.tools),
        }
        if self.on_disk is not None:
            data["on_disk"] = vars(self.on_disk)
        data = json.loads(json.dumps(strict_json.tag_floats(data)))
        return json.dumps({"manifest_sha256": _digest(data), **data}, indent=1).encode()

    @classmethod
    def parse(cls, text: bytes, where: str) -> Manifest:
        """Manifest of a file's contents; raises :class:`BundleError` when damaged or too new."""
        try:
            data = strict_json.read_json(text)
            schema.HEAD.check(data, "")
            version = data["format_version"]
            if version > FORMAT_VERSION:
                raise BundleError(f"{where} has format {version}, written by a newer less-export: upgrade to open it")
            if data.pop("manifest_sha256") != _digest(data):
                raise BundleError(f"{where} was changed after the export (its hash differs): export again")
            schema.MANIFEST.check(data, "")
        except strict_json.SchemaError as error:
            raise BundleError(f"{where} is not a usable manifest ({error}): export again") from error
        return cls(
            model=data["model"],
            settings=data["settings"],
            artifacts=tuple(
                Artifact(**{**a, "contract": Contract.from_dict(a["contract"])}) for a in data["artifacts"]
            ),
            weights=tuple(WeightFile(**w) for w in data["weights"]),
            tools=data["tools"],
            tokenizer=_optional(TokenizerFacts, data["tokenizer"], "eos_ids"),
            kernels=_optional(KernelFacts, data["kernels"], "layers"),
            on_disk=OnDisk(**data["on_disk"]) if "on_disk" in data else None,
        )


def _optional(cls: Any, data: dict[str, Any] | None, listed: str) -> Any:
    return None if data is None else cls(**{**data, listed: tuple(data[listed])})


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def header_sha256(path: Path) -> str:
    """Hash of a safetensors file's length prefix and header."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = min(int.from_bytes(prefix, "little"), path.stat().st_size)
        return hashlib.sha256(prefix + file.read(length)).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its layout and its manifest, both verified."""

    layout: Layout
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, full: bool = False) -> Bundle:
        """Read and verify a bundle; ``full`` hashes the weights too. Warns of weights that changed on the disk.

        Raises:
            BundleError: missing, damaged, changed or newer files; names the file.
        """
        layout = Layout.of(path)
        manifest_file = layout.folder / layout.manifest
        if not manifest_file.is_file():
            what = f"{path} does not exist" if not Path(path).exists() else f"{path} has no {layout.manifest}"
            raise BundleError(f"{what}: give a bundle folder, or an .onnx or .plan made by less-export")
        try:
            with open(manifest_file, "rb") as file:
                manifest = Manifest.parse(file.read(strict_json.MAX_BYTES + 1), str(manifest_file))
            bundle = cls(layout, manifest)
            for problem in bundle._problems(full):
                raise BundleError(f"{problem}: export again, or copy the bundle again")
            for name in () if full else bundle._changed_weights():
                warnings.warn(
                    f"{bundle.path(name)} is not as the export left it (another date or file): less-export check "
                    "compares its hash; export again if the weights are meant to be new",
                    stacklevel=2,
                )
        except OSError as error:
            raise BundleError(f"cannot read {manifest_file}: {error.strerror or error}") from error
        return bundle

    def identity(self) -> str:
        """Hash of what a sequence's state depends on: model, weights and kernels."""
        m = self.manifest
        kernels = m.kernels.sha256 if m.kernels else None
        return _digest({"model": dict(m.model), "weights": [w.sha256 for w in m.weights], "kernels": kernels})

    def path(self, file: str) -> Path:
        return self.layout.folder / file

    def artifact(self, kind: str) -> Artifact | None:
        """The artifact of a kind, or None."""
        return next((a for a in self.manifest.artifacts if a.kind == kind), None)

    def _changed_weights(self) -> list[str]:
        """Weight files with another date or inode than after the export; none in a copy of the bundle."""
        facts = self.manifest.on_disk
        if facts is None or self.path(self.layout.manifest).stat().st_ino != facts.manifest_inode:
            return []
        now = OnDisk.of(self.path(self.layout.manifest), [self.path(w.file) for w in self.manifest.weights])
        return [name for name, stated in facts.weights.items() if now.weights.get(name, stated) != stated]

    def _problems(self, full: bool) -> Iterator[str]:
        m = self.manifest
        hashed = [(a.file, a.sha256) for a in m.artifacts]
        hashed += [(x.file, x.sha256) for x in (m.tokenizer, m.kernels) if x is not None and x.file]
        for file, expected in hashed:
            if not self.path(file).is_file():
                yield f"{file} is missing from the bundle"
            elif self._leaves(file):
                yield f"{file} is a link to a file outside the bundle"
            elif sha256(self.path(file)) != expected:
                yield f"{file} is damaged (its hash differs from the manifest's)"
        for weight in m.weights:
            path = self.path(weight.file)
            if not path.is_file():
                yield f"{weight.file} is missing from the bundle"
            elif path.stat().st_size != weight.bytes or header_sha256(path) != weight.header_sha256:
                yield f"{weight.file} is damaged (its size or header differs from the manifest's)"
            elif (full or self._leaves(weight.file)) and sha256(path) != weight.sha256:
                yield f"{weight.file} is damaged (its hash differs from the manifest's)"

    def _leaves(self, file: str) -> bool:
        """Whether a file is a link out of the bundle's folder; weights may be, if their hash is the manifest's."""
        return Path(os.path.realpath(self.path(file))).parent != Path(os.path.realpath(self.layout.folder))
