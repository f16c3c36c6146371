"""One export from MODEL to files: plan the targets, prepare, check, write the files, rename."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors import SafetensorError

from .. import interrupts
from ..bundle import artifact
from ..bundle.artifact import Artifact, Manifest, OnDisk, WeightFile
from ..bundle.files import flush, scratch_folder, sha256
from ..config import ExportConfig
from ..errors import EngineError, GatedModelError, LessExportError
from ..hf import recipes
from ..hf.random_checkpoint import RandomSource, random_source
from ..hf.sources import ModelSource, resolve
from ..hf.special_tokens import eos_ids
from ..native import cache
from ..progress import AnyProgress, Progress, as_progress, prefixed
from ..tensorrt import engine
from . import fuse, graphs, onnx_op, package
from .check import require_runtime, self_check
from .job import ExportJob, prepare
from .targets import contract, plan_targets


def export(
    model: str,
    out: str | Path,
    config: ExportConfig | None = None,
    *,
    engine_plan: bool = False,
    progress: AnyProgress | None = None,
    **options: Any,
) -> Path:
    """Export a decoder with LESS.

    Args:
        model: recipe name, hub id, checkpoint folder or GGUF file.
        out: bundle folder, ``x.onnx`` or ``x.plan``; written under a temporary name and renamed.
        config: options, or give their fields as keyword arguments.
        engine_plan: also build ``engine.plan`` into a folder bundle (implied by ``x.plan``).
        progress: where progress is reported: a :class:`~less_export.progress.Progress`, or a function that is called
            with a short text as each phase begins; default: nowhere.

    Returns:
        The path that was written, the folder or the file.

    Raises:
        LessExportError: anything the user can fix; no partial output is left behind.
    """
    config, progress = replace(config or ExportConfig(), **options), as_progress(progress)
    package.restore(out)
    if config.validate:
        require_runtime()
    targets = plan_targets(out, config, engine_plan)
    destination, layout = targets.destination, targets.layout
    source, published = _source(model, config, destination, progress), False
    try:
        with scratch_folder(destination) as scratch:
            job = prepare(source, config, targets, scratch, progress)
            if config.validate:
                progress.say("checking the export on two layers of each kind against Hugging Face")
                self_check(job.model.hf_config, contract(job.model, "float32"), scratch)
            manifest = _write(job, scratch, progress)
            file = scratch / layout.manifest
            file.touch()
            on_disk = OnDisk.of(file, [scratch / w.file for w in manifest.weights])
            file.write_bytes(replace(manifest, on_disk=on_disk).dump())
            progress.say("renaming")
            flush(scratch)
            with interrupts.deferred():
                package.publish_bundle(scratch, layout, {layout.manifest, *manifest.files()})
                published = True
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LessExportError(f"cannot write {destination}: {reason}; {_remains(source)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {'all was written' if published else _remains(source)}") from None
    return destination


def _remains(source: ModelSource) -> str:
    """What a failed export leaves on disk."""
    if isinstance(source, RandomSource) and source.folder.exists():
        return f"nothing but the random checkpoint {source.folder} was left behind"
    return "nothing was left behind"


def _source(model: str, config: ExportConfig, destination: Path, progress: Progress) -> ModelSource:
    """MODEL on disk, or with random weights; where it is gated, the error names the recipe that needs no access."""
    try:
        return random_source(model, config, destination, progress) if config.random_weights else resolve(model)
    except GatedModelError as error:
        recipe = next((r.name for r in recipes.all_recipes() if r.hub == error.hub), None)
        if recipe is None:
            raise
        hint = f"{error} (to measure without weights: less-export {recipe} --random-weights)"
        raise GatedModelError(hint, error.hub) from None


def _write(job: ExportJob, scratch: Path, progress: Progress) -> Manifest:
    """Write every file into ``scratch`` under its final name; returns the manifest that describes them."""
    model, targets, layout = job.model, job.targets, job.targets.layout
    quantised = model.config.weights is not None
    # The weights are linked under their names in the bundle; graphs (and the engine builder) look there.
    files = [] if quantised else sorted({t.file for t in job.tensors.values()})
    names = package.weight_names(files, layout, scratch, artifact.foreign_files(layout))
    copied = package.place_weights(names, scratch, progress)
    if copied and targets.with_weights:
        warnings.warn(f"hard links are not possible here: copied {', '.join(copied)}", stacklevel=2)
    kernels = package.place_kernels(model.kernels, layout, scratch)
    artifacts = []
    with _hashing() as hashed:
        hashes = {n: hashed(scratch / n) for n in names.values() if targets.with_weights}
        models = {}
        for kind in targets.traced:
            progress.say(f"tracing for {'ONNX Runtime' if kind == 'ort' else 'TensorRT'}")
            models[kind] = graphs.traced(job, job.contracts[kind])
        if quantised:
            progress.say(f"quantising the weights to {model.config.weights}")
            path = scratch / layout.companion(artifact.QUANTISED_WEIGHTS)
            graphs.quantise_weights(job, models[targets.traced[0]], path)
            names = {path: path.name}
            hashes = {n: hashed(scratch / n) for n in names.values() if targets.with_weights}
        for kind, graph in models.items():
            graphs.bind_weights(job, graph, names, scratch / layout.companion(artifact.KERNELS))
            if kind == "ort":
                fuse.fuse(graph)
            if kind in targets.kinds:
                artifacts.append(_save_graph(job, kind, graph, scratch))
        if "plan" in targets.kinds:
            artifacts.append(_build_engine(job, models["trt"], scratch, progress))
        progress.say("writing tokenizer and manifest")
        tokenizer = package.place_tokenizer(model.source, model.hf_config, job.tokenizer, layout, scratch)
        weight_files = tuple(
            WeightFile(n, (scratch / n).stat().st_size, artifact.header_sha256(scratch / n), digest.result())
            for n, digest in hashes.items()
        )
    if not targets.with_weights:
        for name in [*names.values(), *([kernels.file] if kernels else [])]:
            (scratch / name).unlink(missing_ok=True)
        kernels = replace(kernels, file="", sha256="") if kernels else None
    chosen = {f.name: getattr(model.config, f.name) for f in fields(model.config)}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items() if v is not None}
    if tokenizer is None:
        settings["eos_ids"] = list(eos_ids(model.source, model.hf_config, None))
    tools = package.tools(targets.flavour)
    return Manifest(job.facts, settings, tuple(artifacts), weight_files, tools, tokenizer, kernels)


@contextlib.contextmanager
def _hashing() -> Iterator[Callable[[Path], concurrent.futures.Future[str]]]:
    """Hash files in a thread; if the block fails, it stops where it is."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            yield lambda path: pool.submit(sha256, path, stop)
        except BaseException:
            stop.set()
            raise


def _save_graph(job: ExportJob, kind: str, graph: ir.Model, scratch: Path) -> Artifact:
    """Save a graph, with the operator's body for ONNX Runtime, without it for TensorRT."""
    (onnx_op.add_bodies if kind == "ort" else onnx_op.strip_bodies)(graph)
    file = job.targets.file(kind)
    ir.save(graph, scratch / file)
    return Artifact(kind, file, sha256(scratch / file), job.contracts[kind])


def _build_engine(job: ExportJob, graph: ir.Model, scratch: Path, progress: Progress) -> Artifact:
    """Build the engine from the graph for TensorRT, which has bodies where no plugin runs the operator."""
    progress.say(f"building the engine with {job.targets.flavour.name if job.targets.flavour else 'TensorRT'}")
    if job.library:
        onnx_op.strip_bodies(graph)
    else:
        onnx_op.add_bodies(graph, decoding=False)
    file, planned = job.targets.file("plan"), job.contracts["plan"]
    info = engine.build_plan(
        onnx_op.with_own_names(graph).SerializeToString(),
        planned,
        weights_dir=scratch,
        gpu_arch=job.model.config.gpu_arch,
        library=job.library,
        out=scratch / file,
        progress=prefixed(progress, "building the engine: "),
    )
    digest = sha256(scratch / file)
    if info.plugin is not None and info.plugin.inside:
        _record(digest)
    return Artifact("plan", file, digest, planned, package.details(info))


def _record(digest: str) -> None:
    """Note that this machine built the code in an engine, so that opening it needs no further word."""
    try:
        cache.record(digest)
    except (OSError, EngineError) as error:
        warnings.warn(f"this engine will need --trust-code to be opened: {error}", stacklevel=2)
