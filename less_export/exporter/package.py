"""The files of a bundle besides its graphs (weights, kernels, tokenizer), and publishing them all at once."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..bundle import artifact
from ..bundle.artifact import KernelFacts, Layout, TokenizerFacts
from ..bundle.files import apply_umask, copy, link, publish, put_back, replace, sha256
from ..errors import LessExportError
from ..hf.sources import ModelSource
from ..hf.special_tokens import adds_bos, eos_ids
from ..less.feature_maps import Kernels
from ..progress import Progress
from ..tensorrt import engine

_SUFFIX = ".safetensors"


def weight_names(files: Iterable[Path], layout: Layout, scratch: Path, foreign: Iterable[str] = ()) -> dict[Path, str]:
    """The name of every weight file in the bundle: its own, unless another file (``foreign`` ones too) has that name.

    Files in ``scratch`` (converted weights) have fixed names.
    """
    names = {f: layout.companion(f.name) for f in files if f.parent == scratch}
    reserved = (artifact.KERNELS, artifact.CONVERTED_WEIGHTS, artifact.QUANTISED_WEIGHTS)
    taken = {name.casefold() for name in (*map(layout.companion, reserved), *foreign)}
    for file in files:
        if file in names:
            continue
        stem, name, number = file.name.removesuffix(_SUFFIX), layout.companion(file.name), 2
        while name.casefold() in taken or not name.endswith(_SUFFIX):
            name = layout.companion(f"{stem}-{number}{_SUFFIX}")
            number += 1
        names[file] = name
        taken.add(name.casefold())
    return names


def place_weights(names: Mapping[Path, str], scratch: Path, progress: Progress) -> list[str]:
    """Put the weight files into the bundle under their ``names``; returns the names of those that had to be copied.

    Raises:
        LessExportError: copies do not fit on the disk.
    """
    left = []
    for file, name in names.items():
        if file.parent == scratch:
            replace(file, scratch / name)
        elif not link(file, scratch / name):
            left.append(file)
    if left:
        size, free = sum(f.stat().st_size for f in left), shutil.disk_usage(scratch).free
        if free < size:
            raise LessExportError(
                f"hard links to {left[0].parent} are not possible, copies of its weights take {size / 1e9:.1f} GB, and "
                f"{scratch.parent} has {free / 1e9:.1f} GB free: make room, or choose an --out on the checkpoint's disk"
            )
        progress.say(f"copying {size / 1e9:.2f} GB of weights, because hard links are not possible here")
        for file in left:
            copy(file, scratch / names[file])
    return [f.name for f in left]


def place_kernels(kernels: Kernels, layout: Layout, scratch: Path) -> KernelFacts | None:
    """Write the kernel file of the bundle; None if there is nothing to write."""
    if not kernels.tensors():
        return None
    path = scratch / layout.companion(artifact.KERNELS)
    kernels.save(path)
    rank = max((m.rank for m in kernels.layers.values()), default=0)
    return KernelFacts(
        path.name,
        sha256(path),
        kernels.nbytes(),
        kernels.parametrisation,
        rank,
        int(kernels.hidden or 0),
        tuple(sorted(kernels.layers)),
    )


def place_tokenizer(
    source: ModelSource, hf_config: Any, tokenizer: Any | None, layout: Layout, scratch: Path
) -> TokenizerFacts | None:
    """Write ``tokenizer.json`` (converted where the model ships another format); None without a tokenizer."""
    if tokenizer is None:
        return None
    path = scratch / layout.companion(artifact.TOKENIZER)
    path.write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    templates = tokenizer.chat_template
    return TokenizerFacts(
        path.name,
        sha256(path),
        tokenizer.bos_token_id,
        eos_ids(source, hf_config, tokenizer),
        adds_bos(tokenizer),
        dict(templates) if isinstance(templates, dict) else templates,
        {n: str(token) for n, token in tokenizer.special_tokens_map.items()},
        bool(getattr(tokenizer, "split_special_tokens", False)),
    )


def details(info: engine.PlanInfo) -> dict[str, Any]:
    """What the manifest states about a plan, as JSON values."""
    return {**vars(info), "plugin": vars(info.plugin) if info.plugin else None}


def tools(flavour: engine.Flavour | None) -> dict[str, str]:
    """Versions of the packages that made the bundle."""
    versions = {"less-export": __version__}
    for package in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"):
        versions[package] = importlib.metadata.version(package)
    if flavour is not None:
        versions[flavour.name] = flavour.version
    return versions


def restore(out: str | Path) -> None:
    """Put the bundle at ``out`` back if an export was killed while it renamed files.

    Raises:
        LessExportError: a file cannot be renamed.
    """
    layout = Layout.of(out)
    try:
        for last in (layout.folder, layout.folder / layout.manifest):
            put_back(last)
    except OSError as error:
        raise LessExportError(
            f"an export over {out} was killed, and the files that it had set aside cannot be put back: "
            f"{error.strerror or error}"
        ) from error


def publish_bundle(scratch: Path, layout: Layout, files: set[str]) -> None:
    """Rename the finished files into place. They replace what the manifest there lists, and nothing else.

    A folder that holds nothing else is replaced at once; in another the manifest comes last.

    Raises:
        LessExportError: a file that is not the bundle's own has one of the names.
    """
    for path in scratch.iterdir():
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    apply_umask(scratch)
    foreign = artifact.foreign_files(layout)
    for name in sorted((files - {layout.artifact}) & {*foreign}):
        raise LessExportError(
            f"the export would replace {layout.folder / name}, which no manifest there lists: rename it, or choose "
            "another --out; nothing was left behind"
        )
    if layout.stem is None and not foreign:
        publish([(scratch, layout.folder)])
        return
    stale = {p.name for p in layout.folder.iterdir()} - {*foreign, *files} if layout.stem is None else set[str]()
    names = sorted(files, key=lambda n: (n == layout.manifest, n))
    publish([(scratch / n, layout.folder / n) for n in names], [layout.folder / n for n in sorted(stale)])
