"""A training run: collect activations, fit layer by layer, switch off layers that do not gain, write the file.

Until the file is written, finished work stays beside the output in a hidden folder whose name is a fingerprint of
model, data and options. Rerunning the same command resumes; other options start from the beginning.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..bundle.files import is_special
from ..errors import LessExportError, UsageError
from ..hf import calibration, running
from ..less.feature_maps import FeatureMap, Kernels
from ..plan import sparse_layer
from ..progress import AnyProgress, as_progress
from . import allocate, collect, end_to_end, fit, work
from .options import DEFAULT_HIDDEN, DEFAULT_RANK, Processes, TrainConfig
from .preparation import TrainJob, prepare

#: Most bytes of activations on disk at a time; layers that exceed it are collected in several groups.
DISK = 16 << 30


@dataclass(frozen=True)
class LayerReport:
    """Errors of one layer, see :class:`~less_export.training.fit.Errors`; ``used``: whether LESS reduces them.

    ``less`` is the error of the kernels in the file, after end-to-end tuning if there was any.
    """

    layer: int
    slots: int
    sparse: float
    start: float
    less: float
    used: bool
    seconds: float


def train(
    model: str, out: str | Path, texts: Sequence[str] = (), config: TrainConfig | None = None, *,
    progress: AnyProgress | None = None, **options: Any,
) -> tuple[LayerReport, ...]:  # fmt: skip
    """Train the kernels of a model and write them to ``out``.

    Args:
        model: recipe name, hub id, checkpoint folder or GGUF file.
        out: the kernel file (.safetensors) to write.
        texts: training texts, see :func:`less_export.hf.data.read`; default: the text in the package.
        config: options; keyword arguments replace its fields.
        progress: where to report: a :class:`~less_export.progress.Progress`, or a function that is called with a
            short text as each phase begins; default: nowhere.

    Returns:
        A report for each trained layer.

    Raises:
        LessExportError: a problem that the user can fix; finished layers stay for the next run.
    """
    processes = Processes.here()
    first_progress = as_progress(progress if processes.first else None)
    config = replace(config or TrainConfig(), **options)
    out = Path(out)
    if out.is_dir() or not out.name:
        raise UsageError(f"--out {out} is a folder: give the name of a .safetensors file")
    if is_special(out):
        raise UsageError(f"--out {out} is a device or a pipe: give the name of a .safetensors file")
    processes.join()
    try:
        job = prepare(model, out, texts, config, processes, first_progress)
        job.other_progress = as_progress(None if processes.first else progress)
        with work.alone(job.work) if processes.first else contextlib.nullcontext():
            processes.wait()
            return _train(job, out)
    except OSError as error:
        raise LessExportError(f"cannot write {out} or beside it: {error.strerror or error}") from error
    finally:
        processes.leave()


def _train(job: TrainJob, out: Path) -> tuple[LayerReport, ...]:
    try:
        _centre(job)
        if job.config.divided:
            _divide(job)
        _fit_all(job)
        return _finish(job, out)
    except BaseException:
        with contextlib.suppress(OSError):  # fails, and keeps the folder, if it holds finished layers
            job.work.rmdir()
        raise


def _load(job: TrainJob) -> PreTrainedModel:
    job.progress.say(f"loading {job.source.name}")
    # Not with transformers' device_map, which needs accelerate even for a single device.
    return job.source.load(job.dtype).to(torch.device(job.device))


def _centre(job: TrainJob) -> None:
    """Measure the keys of int8 slots; the first process does, and saves the constants beside the layers."""
    if not any(layer.int8 for layer in job.plan):
        return
    file = job.work / "centring.safetensors"
    ids = job.corpus.ids[: len(job.corpus.ids) - job.validation][: calibration.SEQUENCES]
    sequences = {"count": len(ids), "length": ids.shape[1]}
    job.facts["centring"] = {"rotated": not job.rotary, "sequences": sequences}
    if job.processes.first and work.load_kernels(file, job.progress) is None:
        measured = calibration.measure(_load(job), ids, job.plan, job.progress, job.rotary)
        work.save_kernels(file, Kernels({}, {}, measured))
    job.processes.wait()
    job.centring = work.written(work.load_kernels(file), file).centring


def _divide(job: TrainJob) -> None:
    """Divide the budget among the layers; the first process measures the costs and saves them beside the layers."""
    file = job.work / "layer_budgets.json"
    if job.processes.first and work.load(file, job.progress) is None:
        measured = allocate.measure(
            _load(job), job.corpus.ids, job.plan, job.layers, job.progress, job.centring, job.rotary
        )
        work.save(file, json.dumps([[i, *x] for i, at in measured.items() for x in at.items()]).encode())
    job.processes.wait()
    costs: dict[int, dict[int, float]] = {i: {} for i in job.layers}
    for i, slots, cost in json.loads(work.written(work.load(file), file)):
        costs[i][slots] = cost
    divided = allocate.divide(costs, job.plan)
    plan = list(job.plan)
    for i, slots in divided.items():
        plan[i] = replace(sparse_layer(plan[i], slots), absorb=True, rank=plan[i].rank, state_bits=plan[i].state_bits)
    job.plan = tuple(plan)
    job.facts |= {
        "layer_budgets": allocate.option(divided),
        "slots": {str(i): [plan[i].heavy, plan[i].recent] for i in divided},
        "eviction_costs": {str(i): {str(n): round(x, 5) for n, x in at.items()} for i, at in costs.items()},
    }
    job.progress.say(f"budgets of the layers: {job.facts['layer_budgets']}")


def _fit_all(job: TrainJob) -> None:
    """Fit every layer that has no whole file yet, in groups whose activations fit on disk."""
    pending = [i for i in job.layers if work.load_layer(job.layer_file(i), i, job.progress) is None]
    finished = len(job.layers) - len(pending)
    if finished:
        job.progress.say(f"{finished} of {len(job.layers)} layers were trained before")
    if pending:
        ids = job.corpus.ids
        folder = job.work / str(job.dtype).replace("torch.", "activations_")
        activations = collect.Activations(folder, job.plan, len(ids), ids.shape[1], job.dtype)
        groups = collect.groups(pending, activations, DISK)
        _check_memory(job, groups, activations)
    job.processes.wait()  # all check before the first allocates memory or writes
    if not pending:
        return
    for group in groups:
        try:
            projections = _collect(job, group, activations)
            for layer in group[job.processes.rank :: job.processes.count]:
                _fit_layer(job, layer, activations.tensor(layer), projections[layer])
        except BaseException as error:
            # Incomplete activations are useless, and so are complete ones if the same command would fail again.
            if isinstance(error, LessExportError) or not set(group) <= activations.marked():
                activations.remove()
            raise
        job.processes.wait()
        if job.processes.first:
            activations.drop()
        job.processes.wait()


def _check_memory(job: TrainJob, groups: list[list[int]], activations: collect.Activations) -> None:
    """Report the disk space and memory that fitting takes.

    Raises:
        LessExportError: not enough memory.
    """
    layers = [i for group in groups for i in group]
    matrices = 4 * job.width * max(sum(job.plan[i].query_heads * job.plan[i].head_dim for i in g) for g in groups)
    itemsize = job.dtype.itemsize
    needed = matrices + max(fit.memory(job.plan[i], job.width, activations.shape(i), itemsize) for i in layers)
    sharing = min(job.processes.on_machine, len(layers)) if torch.device(job.device).type == "cpu" else 1
    disk = max(sum(activations.nbytes(i) for i in g) for g in groups)
    job.progress.say(
        f"{len(layers)} layers, {len(job.corpus.ids)} sequences: {disk / 1e9:.2f} GB of activations on disk, "
        f"up to {needed / 1e9:.2f} GB of memory while a layer is fitted"
    )
    free = running.free_memory(job.device)
    if free is not None and sharing * needed > free:
        per_process = f", in each of {sharing} processes" if sharing > 1 else ""
        raise LessExportError(
            f"fitting a layer takes {needed / 1e9:.2f} GB of memory{per_process}, and {free / 1e9:.2f} GB are free: "
            "use fewer --seqs or a shorter --seq-len"
        )


def _collect(job: TrainJob, group: list[int], activations: collect.Activations) -> dict[int, torch.Tensor]:
    """Collect the activations of ``group`` and return its output projections; the model is freed afterwards."""
    model = _load(job)
    projections = collect.output_projections(model, job.plan)
    complete = set(group) <= activations.done()
    job.processes.wait()  # all have looked before the first writes
    if not complete:
        if job.processes.first:
            activations.reserve(group)
        job.processes.wait()
        share = (job.processes.rank, job.processes.count)
        collect.collect(model, job.corpus.ids, job.plan, group, activations, share, job.progress, job.rotary)
        job.processes.wait()
        if job.processes.first:
            activations.mark_done(group)
    return {i: projections[i] for i in group}


def _fit_layer(job: TrainJob, layer: int, activations: torch.Tensor, projection: torch.Tensor) -> None:
    begin = time.perf_counter()
    config = job.config
    recipe = fit.Fit(steps=config.step_count)
    with job.progress.phase(f"layer {layer}", recipe.steps + 1) as step:
        constants = job.centring.get(layer), job.angles(layer)
        prepared = fit.prepare(activations, job.plan[layer], projection, job.device, *constants)
        step()
        training = len(activations) - job.validation
        feature_map, errors = fit.fit(
            prepared.rows(slice(0, training)),
            prepared.rows(slice(training, None)),
            config.parametrisation,
            config.rank or DEFAULT_RANK,
            config.hidden or DEFAULT_HIDDEN,
            recipe,
            config.seed,
            step,
        )
        step(f"error {errors.less:.4f}, without LESS {errors.sparse:.4f}", 0)
    seconds = round(time.perf_counter() - begin, 1)
    facts = {**vars(errors), "used": errors.less < errors.sparse, "seconds": seconds}
    job.other_progress.say(f"layer {layer}: {seconds:.0f} s, error {errors.less:.4f}, without LESS {errors.sparse:.4f}")
    work.save_layer(job.layer_file(layer), layer, feature_map.cpu(), facts)


def _finish(job: TrainJob, out: Path) -> tuple[LayerReport, ...]:
    """Join the layers, tune them together if configured, and write the file (first process only)."""
    files = {i: job.layer_file(i) for i in job.layers}
    loaded = {i: work.written(work.load_layer(file, i), file) for i, file in files.items()}
    job.processes.wait()  # all must have read them before the first deletes them
    reports = tuple(LayerReport(i, job.plan[i].capacity, **k.provenance) for i, k in loaded.items())
    maps = {r.layer: loaded[r.layer].layers[r.layer] for r in reports if r.used}
    device = torch.cuda.get_device_name(job.device) if torch.device(job.device).type == "cuda" else job.device
    facts = {**job.facts, "torch": torch.__version__, "device": device}
    if job.processes.first:
        if job.config.tuned and maps:
            maps, facts["end_to_end"], errors = _tune(job, maps)
            reports = tuple(replace(r, less=errors.get(r.layer, r.less)) for r in reports)
        facts["layers"] = {str(r.layer): {n: v for n, v in vars(r).items() if n != "layer"} for r in reports}
        Kernels(dict(maps), facts, job.centring).save(out)
        shutil.rmtree(job.work, ignore_errors=True)
        unused = [r.layer for r in reports if not r.used]
        if unused:
            warnings.warn(
                f"layers {unused}: LESS does not beat plain eviction on validation text, so they have no low-rank term",
                stacklevel=3,
            )
    job.processes.wait()
    return reports


def _tune(job: TrainJob, maps: dict[int, FeatureMap]) -> tuple[dict[int, FeatureMap], dict[str, Any], dict[int, float]]:
    """Tune the layers' kernels together; returns them, their provenance, and the errors of the layers with them."""
    model = _load(job)
    training, validation = job.corpus.ids.split([len(job.corpus.ids) - job.validation, job.validation])
    state_file = job.work / "end_to_end.pt"
    tuned, facts = end_to_end.tune(
        model, training, validation, job.plan, maps, job.config.seed, job.progress, state_file=state_file,
        centring=job.centring, rotary=job.rotary,
    )  # fmt: skip
    errors: dict[int, float] = {}
    if facts["used"]:
        activations = collect.Activations(job.work / "tuned", job.plan, len(validation), validation.shape[1], job.dtype)
        activations.reserve(list(tuned))
        projections = collect.output_projections(model, job.plan)
        collect.collect(model, validation, job.plan, list(tuned), activations, (0, 1), job.progress, job.rotary)
        for i, feature_map in tuned.items():
            own = job.centring.get(i), job.angles(i)
            prepared = fit.prepare(activations.tensor(i), job.plan[i], projections[i], job.device, *own)
            errors[i] = fit.relative_error(prepared, feature_map.to(job.device))
            feature_map.cpu()
    return tuned, facts, errors
