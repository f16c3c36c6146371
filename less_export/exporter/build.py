"""One export from MODEL to files: resolve, plan, check, trace, bind, build, describe, rename."""

from __future__ import annotations

import concurrent.futures
import json
import textwrap
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..bundle import artifact
from ..bundle.artifact import Artifact, Layout, Manifest, WeightFile
from ..bundle.files import scratch_folder, sha256
from ..config import DEFAULT_CHUNK, DEFAULT_POLICY, ExportConfig
from ..contract import Contract
from ..dtypes import COMPUTE_DTYPES, from_torch, torch_dtype
from ..errors import GatedModelError, LessExportError, UnsupportedModelError, UsageError
from ..hf import checkpoint, recipes, weights
from ..hf.config_layers import keep_first
from ..hf.decoder import LessDecoder
from ..hf.random_checkpoint import RandomSource, random_source
from ..hf.sources import ModelSource, resolve
from ..hf.surgery import discover, learned_positions
from ..less.feature_maps import Kernels
from ..less.policies import by_name
from ..plan import AttentionLayer, default_context, plan_layers, unused_kernels
from ..progress import AnyProgress, Progress, as_progress, prefixed
from ..tensorrt import engine, plugin
from . import onnx_op, package, quantise
from .bind import bind
from .check import self_check
from .trace import trace


@dataclass
class _Job:
    """What the steps of one export hand on."""

    source: ModelSource
    config: ExportConfig
    hf_config: Any
    layers: tuple[AttentionLayer, ...]
    kernels: Kernels
    tensors: dict[str, weights.Stored]
    model_facts: dict[str, Any]
    position_limit: int | None
    tokenizer: Any = None
    #: The plugin library, where an engine is built with it.
    library: Path | None = None

    def contract(self, dtype: str) -> Contract:
        text = self.hf_config.get_text_config()
        context = self.config.context or default_context(getattr(text, "max_position_embeddings", None))
        ranks = {i: m.rank for i, m in self.kernels.layers.items()}
        return Contract(
            plan_layers(self.layers, self.config, context, ranks),
            int(text.vocab_size),
            dtype,
            self.config.chunk or DEFAULT_CHUNK,
            self.config.max_batch,
            self.config.logits,
            self.position_limit,
            getattr(text, "max_position_embeddings", None),
        )


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
        progress: where to report: a :class:`~less_export.progress.Progress`, or a function that is called with a few
            words as each phase begins; default nowhere.

    Returns:
        The path of what was written.

    Raises:
        LessExportError: anything the user can mend; nothing is left half written.
    """
    config, progress = replace(config or ExportConfig(), **options), as_progress(progress)
    layout, kinds = _plan_files(out, config, engine_plan)
    flavour = engine.flavour() if "plan" in kinds else None
    if flavour is not None:
        engine.parse_gpu_arch(flavour, config.gpu_arch)
    elif config.gpu_arch is not None:
        raise UsageError("--gpu-arch is for engines: add --engine, or --out x.plan")
    destination = layout.folder if layout.stem is None else layout.folder / str(layout.artifact)
    source = _source(model, config, destination, progress)
    config = config.with_defaults(source.recipe.options() if source.recipe else {})
    try:
        with scratch_folder(destination) as scratch:
            job = _prepare(source, config, kinds, scratch, progress)
            if config.validate:
                progress.say("checking the export on two layers of each kind against Hugging Face")
                self_check(job.hf_config, job.contract("float32"), scratch)
            manifest = _write(job, layout, kinds, scratch, progress, flavour)
            (scratch / layout.manifest).write_bytes(manifest.dump())
            progress.say("renaming")
            package.publish_bundle(scratch, layout, {layout.manifest, *package.files_of(manifest)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LessExportError(f"cannot write {destination}: {reason}; {_left(source)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_left(source)}") from None
    return destination


def _left(source: ModelSource) -> str:
    """What is on the disk after an export that failed."""
    kept = f"but the random checkpoint {source.folder} " if isinstance(source, RandomSource) else ""
    return f"nothing {kept if kept and source.folder.exists() else ''}was left behind"


def _source(model: str, config: ExportConfig, destination: Path, progress: Progress) -> ModelSource:
    """MODEL on disk, or what is to be made up; where it is gated, the recipe that needs no access is named."""
    try:
        return random_source(model, config, destination, progress) if config.random_weights else resolve(model)
    except GatedModelError as error:
        named = next((r.name for r in recipes.all_recipes() if r.hub == error.hub), None)
        if named is None:
            raise
        hint = f"{error} (to measure without weights: less-export {named} --random-weights)"
        raise GatedModelError(hint, error.hub) from None


def _plan_files(out: str | Path, config: ExportConfig, engine_plan: bool) -> tuple[Layout, list[str]]:
    """Layout of the output and the artifacts to make, refused early when they contradict each other."""
    layout = Layout.of(out)
    described = layout.folder / layout.manifest
    if described.exists() and not artifact.is_manifest(described):
        raise UsageError(f"--out {out} would replace {described}, which is not of a bundle: choose another name")
    if layout.stem is None:
        if Path(out).suffix in artifact.SINGLE_SUFFIXES and not Path(out).is_dir():
            raise UsageError(f"--out {out} lies in a bundle: give the bundle's folder, or a name outside of it")
        target = config.target or "ort"
        kinds = {"ort": ["ort"], "trt": ["trt"], "both": ["ort", "trt"]}[target]
        if engine_plan:
            if target == "ort":
                raise UsageError("--engine needs --target trt or both")
            kinds = [*kinds, "plan"]
        folder = layout.folder
        if not folder.name:
            raise UsageError(f"--out '{out}' names no folder of its own: give it a name")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file: give a folder, x.onnx or x.plan")
        foreign = artifact.foreign_files(folder)
        if foreign:
            raise UsageError(
                f"--out {folder} holds {foreign[0]}, which is not of a bundle: give an empty or new folder"
            )
        return layout, kinds
    if (layout.folder / str(layout.artifact)).is_dir():
        raise UsageError(f"--out {out} is a folder: give a name without .onnx or .plan for a bundle")
    if str(layout.artifact).endswith(".onnx"):
        if config.target == "both" or engine_plan:
            raise UsageError("--out x.onnx is one graph: give a folder for both targets or for an engine")
        return layout, [config.target or "ort"]
    if config.target in ("ort", "both"):
        raise UsageError("--out x.plan is a TensorRT engine: drop --target or give a folder")
    return layout, ["plan"]


def _prepare(source: ModelSource, config: ExportConfig, kinds: list[str], scratch: Path, progress: Progress) -> _Job:
    """Read everything that can be wrong before anything is made."""
    hf_config = source.config()
    text = hf_config.get_text_config()
    quantised = getattr(hf_config, "quantization_config", None)
    if quantised is not None and source.gguf is None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        how = method or "by a method that config.json does not name"
        raise UnsupportedModelError(f"{source.name} is quantised ({how}): give the checkpoint in 16 or 32 bits")
    if config.num_hidden_layers is not None:
        keep_first(text, config.num_hidden_layers)
    try:
        bare = weights.bare_model(hf_config, torch.float32)
    except Exception as error:  # whatever a model's constructor makes of a config
        reason = textwrap.shorten(str(error), 160) or type(error).__name__
        raise UnsupportedModelError(f"transformers makes no decoder of this config.json: {reason}") from error
    layers = discover(bare)
    heads = [x.heads for x in layers]
    kernels = Kernels({}, {})
    if config.kernels is not None:
        kernels = Kernels.load(config.kernels)
        kernels.check(heads)
        for index, layer in kernels.layers.items():
            if config.rank is not None and config.rank != layer.rank:
                raise UsageError(f"--rank {config.rank}, but the kernels of layer {index} have rank {layer.rank}")
    job = _Job(source, config, hf_config, layers, kernels, {}, {}, learned_positions(bare))
    contracts = {k: job.contract(_compute_dtype(k, job)) for k in kinds}
    if "plan" in contracts:
        if config.plugin:
            archs = engine.parse_gpu_arch(engine.flavour(), config.gpu_arch)
            job.library = plugin.library(archs, progress=progress)
            plugin.check_layers(job.library, contracts["plan"])
        else:
            engine.check_limits(contracts["plan"])
    if config.weights is not None:
        quantise.load_quantiser()  # refuses where it is not installed
    job.tokenizer = source.tokenizer()
    bare, job.tensors = checkpoint.take(source, config, hf_config, bare, scratch, progress)
    job.model_facts = {
        "name": source.name,
        "class": type(bare).__name__,
        "parameters": sum(p.numel() for p in bare.parameters()),
        "config": json.loads(json.dumps(hf_config.to_dict(), default=str)),
        "max_position_embeddings": getattr(text, "max_position_embeddings", None),
    }
    for words in kernels.doubts(source.names, contracts[kinds[0]].layers):
        warnings.warn(words, stacklevel=2)
    unused = unused_kernels(contracts[kinds[0]].layers, kernels.layers)
    if unused:
        warnings.warn(f"kernels of layers {unused} are not used: these layers keep all they see", stacklevel=2)
    evicting = [x for x in contracts[kinds[0]].layers if x.policy.evicts]
    if evicting and not kernels.layers:
        warnings.warn(
            "no --kernels given: evicted tokens are forgotten (plain sparse eviction, low-rank term off)", stacklevel=2
        )
    if not evicting and not by_name(config.policy or DEFAULT_POLICY).keeps_all:
        warnings.warn("every layer slides and keeps its window: see --compress-sliding", stacklevel=2)
    return job


def _compute_dtype(kind: str, job: _Job) -> str:
    """Compute dtype of an artifact: f32 on a CPU, the checkpoint's own for TensorRT."""
    chosen = job.config.dtype
    model_type = str(job.hf_config.get_text_config().model_type)
    if chosen == "float16" and model_type.startswith("gemma"):
        raise UsageError("Gemma overflows float16: take --dtype bfloat16 or float32")
    if kind == "ort":
        if chosen == "bfloat16":
            raise UsageError(
                "ONNX Runtime's CPU kernels have no bfloat16: drop --dtype (weights stay bfloat16 on disk)"
            )
        return chosen or "float32"
    if chosen is None and job.source.recipe is not None:
        chosen = job.source.recipe.dtype
    if chosen is not None:
        return chosen
    stored = from_torch(getattr(job.hf_config, "dtype", None) or "bfloat16")
    if model_type.startswith("gemma") and stored == "float16":
        return "bfloat16"
    return stored if stored in COMPUTE_DTYPES else "bfloat16"


def _write(
    job: _Job, layout: Layout, kinds: list[str], scratch: Path, progress: Progress, flavour: engine.Flavour | None
) -> Manifest:
    """Make every file in ``scratch`` under its final name, and the manifest that describes them."""
    # The weights are linked under their names in the bundle; graphs (and the engine builder) look there.
    used = sorted({t.file for t in job.tensors.values()}) if job.config.weights is None else []
    names = package.weight_names(used, layout, scratch)
    copied = package.place_weights(names, scratch, progress)
    keep_weights = kinds != ["plan"]  # a plan carries its weights
    if copied and keep_weights:
        warnings.warn(f"hard links are not possible here: copied {', '.join(copied)}", stacklevel=2)
    kernel_facts = package.place_kernels(job.kernels, layout, scratch)
    artifacts = []
    traced = [k for k in ("ort", "trt") if k in kinds or (k == "trt" and "plan" in kinds)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hashes = {f: pool.submit(sha256, f) for f in used} if keep_weights else {}
        graphs = {}
        for kind in traced:
            progress.say(f"tracing for {'ONNX Runtime' if kind == 'ort' else 'TensorRT'}")
            contract = job.contract(_compute_dtype(kind, job))
            graphs[kind] = (_graph(job, contract), contract)
        if job.config.weights is not None:
            progress.say(f"quantising the weights to {job.config.weights}")
            made = scratch / layout.companion(artifact.QUANTISED_WEIGHTS)
            _quantise(job, graphs[traced[0]][0], made)
            names = {made: made.name}
            hashes = {made: pool.submit(sha256, made)} if keep_weights else {}
        for kind, (graph, contract) in graphs.items():
            _bind(job, graph, names, scratch / layout.companion(artifact.KERNELS))
            if kind not in kinds:
                continue
            (onnx_op.add_bodies if kind == "ort" else onnx_op.strip_bodies)(graph)
            file = layout.artifact or artifact.ARTIFACT_FILES[kind]
            ir.save(graph, scratch / file)
            artifacts.append(Artifact(kind, file, sha256(scratch / file), contract))
        if "plan" in kinds:
            graph, contract = graphs["trt"]
            progress.say(f"building the engine with {flavour.name if flavour else 'TensorRT'}")
            file = layout.artifact or artifact.ARTIFACT_FILES["plan"]
            (onnx_op.strip_bodies if job.library else onnx_op.add_bodies)(graph)
            info = engine.build_plan(
                ir.to_proto(graph).SerializeToString(),
                contract,
                weights_dir=scratch,
                gpu_arch=job.config.gpu_arch,
                library=job.library,
                out=scratch / file,
                progress=prefixed(progress, "building the engine: "),
            )
            artifacts.append(Artifact("plan", file, sha256(scratch / file), contract, package.details(info)))
        progress.say("writing tokenizer and manifest")
        tokenizer = package.place_tokenizer(job.source, job.hf_config, job.tokenizer, layout, scratch)
        stored = tuple(
            WeightFile(names[f], f.stat().st_size, artifact.header_sha256(f), hashes[f].result()) for f in hashes
        )
    if not keep_weights:
        for name in [*names.values(), *([kernel_facts.file] if kernel_facts else [])]:
            (scratch / name).unlink(missing_ok=True)
        kernel_facts = replace(kernel_facts, file="", sha256="") if kernel_facts else None
    chosen = {f.name: getattr(job.config, f.name) for f in fields(job.config)}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items() if v is not None}
    return Manifest(
        job.model_facts, settings, tuple(artifacts), stored, package.tools(flavour), tokenizer, kernel_facts
    )


def _bare(job: _Job, dtype: str) -> PreTrainedModel:
    """The decoder without weights, as it is traced."""
    bare = weights.bare_model(job.hf_config, torch_dtype(dtype))
    if job.config.weights is not None:  # a quantised output embedding is not the input's table
        weights.untie(bare)
    return bare


def _graph(job: _Job, contract: Contract) -> ir.Model:
    """The traced graph of one artifact, its weights not yet bound."""
    decoder = LessDecoder(_bare(job, contract.dtype), contract, job.kernels).eval()
    maps = [f"maps.{n.removeprefix('layers.')}" for n in job.kernels.tensors()]
    return trace(decoder, contract, [*(f"model.{n}" for n in job.tensors), *maps])


def _quantise(job: _Job, graph: ir.Model, path: Path) -> None:
    """Write all weights to ``path``, quantised as the options say, and let the job have them from there."""
    bare = _bare(job, "float32")
    left = quantise.write(path, bare, graph.graph, job.tensors, str(job.config.weights))
    if left:
        warnings.warn(
            f"not quantised: {left[0]} (and {len(left) - 1} more); experts of mixtures, and linear layers "
            "whose sizes no block divides, stay as they are",
            stacklevel=2,
        )
    job.tensors, lost = weights.locate(bare, [path])
    if lost:
        raise UnsupportedModelError(
            f"{lost[0]} (and {len(lost) - 1} more) cannot be found among the quantised weights: drop --weights"
        )


def _bind(job: _Job, graph: ir.Model, names: dict[Path, str], kernel_file: Path) -> None:
    """Point a graph's initializers at the bundle's files."""
    tensors, files = {f"model.{n}": t for n, t in job.tensors.items()}, dict(names)
    if job.kernels.layers:
        header = weights.read_header(kernel_file)
        tensors |= {f"maps.{n.removeprefix('layers.')}": t for n, t in header.items()}
        files[kernel_file] = kernel_file.name
    bind(graph, tensors, files, kernel_file.parent)
