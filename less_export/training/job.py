"""A whole training: collect, fit layer by layer, switch off what does not help, write the file.

What is done is kept beside the output, in a hidden folder named by a fingerprint of model, data and options, until
the file is written: the same command goes on where it was interrupted, another one starts anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .._version import __version__
from ..config import default_context, plan_layers
from ..contract import LayerSpec
from ..errors import LessExportError, UsageError
from ..exporter import weights
from ..feature_maps import Kernels
from ..files import sha256
from ..progress import Progress, Silent
from ..sources import ModelSource, checkpoint_files, resolve
from ..surgery import discover, learned_positions
from . import collect, data, end_to_end, fit
from .options import DEFAULT_HIDDEN, DEFAULT_LENGTH, DEFAULT_RANK, Processes, TrainConfig, compute_dtype, parse_layers
from .options import device as choose_device

#: Most bytes of activations on disk at a time; more layers than fit are collected in turns.
DISK = 16 << 30
#: One validation sequence for so many training sequences.
_VALIDATION = 12


@dataclass(frozen=True)
class LayerReport:
    """How one layer fared: see :class:`~less_export.training.fit.Errors`; ``used`` is False where LESS lost."""

    layer: int
    sparse: float
    start: float
    less: float
    used: bool
    seconds: float


@dataclass
class _Job:
    source: ModelSource
    config: TrainConfig
    plan: tuple[LayerSpec, ...]
    layers: list[int]
    corpus: data.Corpus
    facts: dict[str, Any]
    device: str
    work: Path
    processes: Processes
    progress: Progress

    @property
    def validation(self) -> int:
        return max(1, len(self.corpus.ids) // (_VALIDATION + 1))

    def layer_file(self, layer: int) -> Path:
        return self.work / f"layer_{layer}.safetensors"


def train(
    model: str, out: str | Path, texts: Sequence[str] = (), config: TrainConfig | None = None, *,
    progress: Progress | None = None, **options: Any,
) -> tuple[LayerReport, ...]:  # fmt: skip
    """Train the kernels of a model and write them to ``out``.

    Args:
        model: recipe name, hub id, checkpoint folder or GGUF file.
        out: kernel file (.safetensors) to write.
        texts: what to train on, see :func:`less_export.training.data.read`; default the package's own text.
        config: options, or give their fields as keyword arguments.
        progress: where to report; default nowhere.

    Returns:
        One report per trained layer.

    Raises:
        LessExportError: anything the user can mend; finished layers stay for the next run.
    """
    processes = Processes.here()
    shown: Progress = (progress if processes.first else None) or Silent()
    config = replace(config or TrainConfig(), **options)
    out = Path(out)
    if out.is_dir() or not out.name:
        raise UsageError(f"--out {out} is a folder: give the name of a .safetensors file")
    processes.join()
    try:
        job = _prepare(model, out, texts, config, processes, shown)
        _fit_all(job)
        return _finish(job, out)
    except OSError as error:
        raise LessExportError(f"cannot write {out} or beside it: {error.strerror or error}") from error
    finally:
        processes.leave()


def _prepare(
    model: str, out: Path, texts: Sequence[str], config: TrainConfig, processes: Processes, progress: Progress
) -> _Job:
    """Everything that can be wrong, before anything takes long."""
    if not texts and processes.first:
        warnings.warn("no --data given: training on the text that ships with less-export", stacklevel=3)
    sources = data.read(texts or ["calibration"])
    device = choose_device(config.device)
    source = resolve(model)
    recipe = source.recipe
    hf_config = source.config()
    text_config = hf_config.get_text_config()
    bare = weights.bare_model(hf_config, torch.float32)
    layers = discover(bare)
    config = replace(
        config,
        rank=config.rank or (recipe.rank if recipe else DEFAULT_RANK),
        hidden=config.hidden or (recipe.hidden if recipe else DEFAULT_HIDDEN),
    )
    limit = getattr(text_config, "max_position_embeddings", None)
    cache = config.cache().with_defaults(recipe.options() if recipe else {})
    context = cache.context or default_context(limit)
    length = config.seq_len or min(DEFAULT_LENGTH, learned_positions(bare) or DEFAULT_LENGTH)
    plan = plan_layers(layers, cache, context, dict.fromkeys(range(len(layers)), config.rank or DEFAULT_RANK))
    able = [i for i, s in enumerate(plan) if s.absorb]
    if not able:
        raise UsageError("no layer evicts anything: every layer slides and keeps its window; see --compress-sliding")
    chosen = parse_layers(config.layers, able)
    slots = max(plan[i].capacity for i in chosen)
    if length < slots + 2:
        raise UsageError(
            f"--seq-len {length} is shorter than the budget of {slots} tokens, so nothing is evicted: "
            "raise it, or lower --budget"
        )
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UsageError(f"{source.name} ships no tokenizer, which training needs: put one beside the weights")
    encode, bos = data.encoder(tokenizer)
    wanted = config.sequence_count + max(1, config.sequence_count // _VALIDATION)
    corpus = data.sequences(sources, encode, bos, wanted, length, config.seed)
    if len(corpus.ids) < 2:
        raise UsageError(f"the text has one sequence of {length} tokens; training and validation need two: give more")
    if len(corpus.ids) < wanted and processes.first:
        warnings.warn(f"the text has {len(corpus.ids)} sequences of {length} tokens, not {wanted}", stacklevel=3)
    facts = {
        "model": source.name,
        "model_sha256": _model_hash(source),
        "policy": cache.policy or plan[chosen[0]].policy.label,
        "slots": {str(i): [plan[i].heavy, plan[i].recent] for i in chosen},
        "compress_sliding": bool(cache.compress_sliding),
        "data": [s.facts() for s in sources],
        "sequences": {"count": len(corpus.ids), "length": length, "sha256": corpus.hash()},
        "rank": config.rank,
        "hidden": config.hidden,
        "parametrisation": config.parametrisation,
        "fit": asdict(fit.Fit(steps=config.step_count)),
        "end_to_end": config.end_to_end,
        "seed": config.seed,
        "less_export": __version__,
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    work = out.parent / f".{out.name}.{mark}"
    work.mkdir(parents=True, exist_ok=True)
    return _Job(source, config, plan, chosen, corpus, facts, device, work, processes, progress)


def _model_hash(source: ModelSource) -> str:
    """Hash of the weights, over the hashes of their files."""
    source.fetch()
    files = [source.gguf] if source.gguf else checkpoint_files(source.folder)
    return hashlib.sha256("".join(sha256(f) for f in files if f).encode()).hexdigest()


def _load(job: _Job) -> PreTrainedModel:
    job.progress.say(f"loading {job.source.name}")
    config = job.source.config()
    # Moved as a whole: transformers' own placement would need accelerate for a single device.
    return job.source.load(compute_dtype(config, job.device)).to(torch.device(job.device))


def _fit_all(job: _Job) -> None:
    """Every layer that has no file yet, in groups whose activations fit on disk."""
    todo = [i for i in job.layers if not job.layer_file(i).exists()]
    finished = len(job.layers) - len(todo)
    if finished:
        job.progress.say(f"{finished} of {len(job.layers)} layers were trained before")
    job.processes.wait()  # all must have looked before the first writes
    if not todo:
        return
    model = _load(job)
    projections = collect.output_projections(model, job.plan)
    dtype = next(model.parameters()).dtype
    ids = job.corpus.ids
    into = collect.Activations(
        job.work / str(dtype).replace("torch.", "activations_"), job.plan, len(ids), ids.shape[1], dtype
    )
    split = collect.groups(todo, into, DISK)
    size = max(sum(into.nbytes(i) for i in g) for g in split)
    shapes = {i: into.shape(i) for i in todo}
    most = max(fit.memory(job.plan[i], projections[i], s, dtype.itemsize) for i, s in shapes.items())
    job.progress.say(
        f"{len(todo)} layers, {len(ids)} sequences: {size / 1e9:.2f} GB of activations on disk, "
        f"up to {most / 1e9:.2f} GB of memory while a layer is fitted"
    )
    for group in split:
        if not set(group) <= into.done():
            share = (job.processes.rank, job.processes.count)
            collect.collect(model, ids, job.plan, group, into, share, job.progress)
            job.processes.wait()
            if job.processes.first:
                into.mark_done(group)
        if group is split[-1]:
            del model  # the fits need its memory, not its weights
        for layer in group[job.processes.rank :: job.processes.count]:
            _fit_layer(job, layer, into.tensor(layer), projections[layer])
        job.processes.wait()
        if job.processes.first:
            into.drop()
        job.processes.wait()


def _fit_layer(job: _Job, layer: int, activations: torch.Tensor, projection: torch.Tensor) -> None:
    begin = time.perf_counter()
    config = job.config
    recipe = fit.Fit(steps=config.step_count)
    with job.progress.phase(f"layer {layer}", recipe.steps + 1) as step:
        ready = fit.prepare(activations, job.plan[layer], projection, job.device)
        step()
        cut = len(activations) - job.validation
        made, errors = fit.fit(
            ready.rows(slice(0, cut)),
            ready.rows(slice(cut, None)),
            config.parametrisation,
            config.rank or DEFAULT_RANK,
            config.hidden or DEFAULT_HIDDEN,
            recipe,
            config.seed + layer,
            step,
        )
        step(f"error {errors.less:.4f}, without LESS {errors.sparse:.4f}", 0)
    facts = {**vars(errors), "used": errors.less < errors.sparse, "seconds": round(time.perf_counter() - begin, 1)}
    Kernels({layer: made.cpu()}, facts).save(job.layer_file(layer))


def _finish(job: _Job, out: Path) -> tuple[LayerReport, ...]:
    """Put the layers together, tune them if asked to, and write the file (first process only)."""
    loaded = {i: Kernels.load(job.layer_file(i)) for i in job.layers}
    reports = tuple(LayerReport(i, **k.provenance) for i, k in loaded.items())
    maps = {r.layer: loaded[r.layer].layers[r.layer] for r in reports if r.used}
    facts = {**job.facts, "layers": {str(r.layer): {n: v for n, v in vars(r).items() if n != "layer"} for r in reports}}
    if job.processes.first:
        if job.config.end_to_end and maps:
            learn, check = job.corpus.ids.split([len(job.corpus.ids) - job.validation, job.validation])
            maps, tuned = end_to_end.tune(_load(job), learn, check, job.plan, maps, job.config.seed, job.progress)
            facts["end_to_end"] = tuned
        Kernels(dict(maps), facts).save(out)
        shutil.rmtree(job.work, ignore_errors=True)
        off = [r.layer for r in reports if not r.used]
        if off:
            warnings.warn(
                f"layers {off}: LESS does not beat plain eviction on validation text, so they have no low-rank term",
                stacklevel=3,
            )
    job.processes.wait()
    return reports
