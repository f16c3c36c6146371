"""A training run: fit layer by layer from the lowest, tune all together, choose state or slots, write the file.

Until the file is written, finished work stays beside the output in a hidden folder whose name is a fingerprint of
model, data and options. Rerunning the same command resumes; other options start from the beginning.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bundle.files import is_special, write_atomically
from ..contract import LayerSpec
from ..errors import LessExportError, UsageError
from ..hf import calibration, running
from ..hf.layerwise import LayerwiseDecoder
from ..less.feature_maps import FeatureMap, Kernels, random_kernels
from ..plan import resized
from ..progress import AnyProgress, as_progress
from . import allocate, card, collect, end_to_end, fit, work
from .additions import Addition, additions
from .options import DEFAULT_HIDDEN, DEFAULT_RANK, Processes, TrainConfig
from .preparation import TrainJob, prepare


@dataclass(frozen=True)
class LayerReport:
    """One layer: its errors when it was fitted, see :class:`~less_export.training.fit.Errors`.

    slots: those to serve it with: others than it was fitted with if the budget was divided again, and more, in the
    bytes of its low-rank term, if the file has no kernels for it. used: whether the file has kernels for it. gain: how
    much larger the divergence of the model on held-back text is with these bytes in slots, in nats per token, once all
    layers have been tuned together; None if they were not.
    """

    layer: int
    slots: int
    sparse: float
    start: float
    less: float
    used: bool
    seconds: float
    gain: float | None = None


def train(
    model: str, out: str | Path, texts: Sequence[str] = (), config: TrainConfig | None = None, *,
    progress: AnyProgress | None = None, **options: Any,
) -> tuple[LayerReport, ...]:  # fmt: skip
    """Train the kernels of a model and write them to ``out``, and a model card beside it, ``out`` with ``.md`` added.

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
    begin = time.perf_counter()
    try:
        job = prepare(model, out, texts, config, processes, first_progress)
        with work.alone(job.work) if processes.first else contextlib.nullcontext():
            processes.wait()
            return _train(job, out, begin)
    except OSError as error:
        raise LessExportError(f"cannot write {out} or beside it: {error.strerror or error}") from error
    finally:
        processes.leave()


def _train(job: TrainJob, out: Path, begin: float) -> tuple[LayerReport, ...]:
    try:
        _centre(job)
        if job.config.divided:
            _divide(job)
        _fit_all(job)
        if job.config.divided and job.config.end_to_end:
            maps = _used(_fitted(job))
            if maps:
                _divide(job, maps)
        return _finish(job, out, begin)
    except BaseException:
        with contextlib.suppress(OSError):  # fails, and keeps the folder, if it holds finished layers
            job.work.rmdir()
        raise


def _centre(job: TrainJob) -> None:
    """Measure the keys of int8 slots; the first process does, and saves the constants beside the layers."""
    if not any(layer.int8 for layer in job.plan):
        return
    file = job.work / "centring.safetensors"
    ids = job.ids[: len(job.ids) - job.validation][: calibration.SEQUENCES]
    sequences = {"count": len(ids), "length": ids.shape[1]}
    job.facts["centring"] = {"rotated": not job.rotary, "sequences": sequences}
    if job.processes.first and work.load_kernels(file, job.progress) is None:
        measured = calibration.measure(job.model(), ids, job.plan, job.progress, job.rotary)
        work.save_kernels(file, Kernels({}, {}, measured))
    job.processes.wait()
    job.centring = work.written(work.load_kernels(file), file).centring


def _divide(job: TrainJob, maps: Mapping[int, FeatureMap] | None = None) -> None:
    """Divide the budget among the layers; the first process measures the costs and saves them beside the layers.

    ``maps``: kernels that were fitted with the present division; by default there are none yet.
    """
    name, ids = "eviction_costs", job.ids
    if maps:  # on sequences that they were not fitted on
        name, ids = "eviction_costs_with_kernels", job.ids[-job.validation :]
    file = job.work / f"{name}.json"
    if job.processes.first and work.load(file, job.progress) is None:
        used = {i: m.to(job.device) for i, m in (maps or {}).items()}
        measured = allocate.measure(
            LayerwiseDecoder(job.model(), job.plan), ids, job.plan, job.layers, job.progress, job.centring, job.rotary,
            used, most=job.context,
        )  # fmt: skip
        work.save(file, json.dumps([[i, *x] for i, at in measured.items() for x in at.items()]).encode())
    job.processes.wait()
    costs: dict[int, dict[int, float]] = {i: {} for i in job.layers}
    for i, slots, cost in json.loads(work.written(work.load(file), file)):
        costs[i][slots] = cost
    divided = allocate.divide(costs, job.plan)
    plan = list(job.plan)
    for i, slots in divided.items():
        plan[i] = resized(plan[i], slots)
    job.plan = tuple(plan)
    job.facts |= {
        **allocate.provenance(plan),
        name: {str(i): {str(n): round(x, 5) for n, x in at.items()} for i, at in costs.items()},
    }
    job.progress.say(f"budgets of the layers: {job.facts['layer_budgets']}")


def _fit_all(job: TrainJob) -> None:
    """Fit every layer that has no whole file yet, from the lowest to the highest."""
    pending = [i for i in job.layers if work.load_layer(job.layer_file(i), i, job.progress) is None]
    finished = len(job.layers) - len(pending)
    if finished:
        job.progress.say(f"{finished} of {len(job.layers)} layers were trained before")
    if not pending:
        job.processes.wait()
        return
    folder = job.work / str(job.dtype).replace("torch.", "activations_")
    activations = collect.Activations(folder, job.plan, len(job.ids), job.length, job.width, job.dtype)
    decoder = LayerwiseDecoder(job.model(), job.plan)
    added = additions(job.model(), job.plan)
    _check_memory(job, pending, activations)
    job.processes.wait()  # all check before the first writes
    for layer in pending:
        try:
            _collect(job, layer, decoder, added[layer], activations)
            if job.processes.first:
                _fit_layer(job, layer, activations, added[layer])
        except BaseException as error:
            # Incomplete activations are useless, and so are complete ones if the same command would fail again.
            if isinstance(error, LessExportError) or not activations.marked():
                activations.remove()
            raise
        job.processes.wait()
    if job.processes.first:
        activations.remove()
    job.processes.wait()


def _check_memory(job: TrainJob, layers: list[int], activations: collect.Activations) -> None:
    """Report the disk space and memory that fitting and tuning take, beside the model.

    Raises:
        LessExportError: not enough memory.
    """
    itemsize = job.dtype.itemsize
    shapes = {i: activations.shapes(i)[f"layer_{i}"] for i in layers}
    hidden = job.config.hidden or DEFAULT_HIDDEN
    needed = max(fit.memory(job.plan[i], job.width, hidden, shapes[i], itemsize, job.device) for i in layers)
    disk = 2 * max(map(activations.nbytes, layers))  # those of the layer below are deleted last
    job.progress.say(
        f"{len(layers)} layers, {len(job.ids)} sequences: up to {disk / 1e9:.2f} GB of activations on disk, and "
        f"{needed / 1e9:.2f} GB of memory beside the model while a layer is fitted"
    )
    _require(job, needed, "fitting a layer takes", "use fewer --seqs or a shorter --seq-len")
    if not (job.config.end_to_end and job.config.tune_step_count and job.processes.first):
        return
    maps = random_kernels(
        job.plan, job.layers, job.config.rank or DEFAULT_RANK, hidden, job.config.parametrisation
    ).layers
    needed = end_to_end.memory(
        LayerwiseDecoder(job.model(), job.plan), job.corpus.ids, job.length, job.plan, maps,
        end_to_end.Tuning(), job.centring, job.rotary,
    )  # fmt: skip
    job.progress.say(f"about {needed / 1e9:.2f} GB of memory beside the model when all kernels are tuned together")
    _require(job, needed, "tuning all kernels together takes about", "use a shorter --seq-len, or --no-end-to-end")


def _require(job: TrainJob, needed: int, what: str, advice: str) -> None:
    """Raise :class:`LessExportError` unless ``needed`` bytes of memory are free."""
    free = running.free_memory(job.device)
    if free is not None and needed > free:
        raise LessExportError(f"{what} {needed / 1e9:.2f} GB of memory, and {free / 1e9:.2f} GB are free: {advice}")


def _collect(
    job: TrainJob, layer: int, decoder: LayerwiseDecoder, addition: Addition, activations: collect.Activations
) -> None:
    """Collect what a layer gets and is to give, unless an interrupted run has."""
    begin = activations.done()
    if begin is not None and begin > layer:  # a finished layer was damaged
        begin = None
    job.processes.wait()  # all have looked before the first writes
    if begin == layer:
        return
    below = _used(_fitted(job, layer))
    maps = {i: m.to(job.device) for i, m in below.items()}
    if job.processes.first:
        activations.reserve(layer)
    job.processes.wait()
    share = (job.processes.rank, job.processes.count)
    collect.collect(
        decoder, job.ids, job.plan, layer, addition, activations, maps, share, job.progress, job.centring, job.rotary,
        begin,
    )  # fmt: skip
    job.processes.wait()
    if job.processes.first:
        activations.mark_done(layer)


def _fit_layer(job: TrainJob, layer: int, activations: collect.Activations, addition: Addition) -> None:
    begin = time.perf_counter()
    config = job.config
    recipe = fit.Fit(steps=config.step_count)
    inputs, targets, _ = activations.tensors(layer)
    with job.progress.phase(f"layer {layer}", recipe.steps + 1) as step:
        angles = job.angles(layer)
        constants = job.centring.get(layer), None if angles is None else angles[: job.length]
        prepared = fit.prepare(inputs, targets, job.plan[layer], addition, job.device, *constants)
        step()
        training = len(inputs) - job.validation
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
    work.save_layer(job.layer_file(layer), layer, feature_map.cpu(), facts)


def _fitted(job: TrainJob, end: int | None = None) -> dict[int, Kernels]:
    """The fitted layers, or those below ``end``, each in kernels of its own."""
    files = {i: job.layer_file(i) for i in job.layers if end is None or i < end}
    return {i: work.written(work.load_layer(file, i), file) for i, file in files.items()}


def _used(fitted: Mapping[int, Kernels]) -> dict[int, FeatureMap]:
    """The feature maps that make their layers better."""
    return {i: kernels.layers[i] for i, kernels in fitted.items() if kernels.provenance["used"]}


def _finish(job: TrainJob, out: Path, begin: float) -> tuple[LayerReport, ...]:
    """Join the layers, tune them together if configured, and write the file (first process only).

    ``begin``: when the run began.
    """
    loaded = _fitted(job)
    job.processes.wait()  # all must have read them before the first deletes them
    reports = tuple(LayerReport(i, job.plan[i].capacity, **k.provenance) for i, k in loaded.items())
    maps = _used(loaded)
    for feature_map in maps.values():
        feature_map.length = job.length
    device = torch.cuda.get_device_name(job.device) if torch.device(job.device).type == "cuda" else job.device
    facts = {**job.facts, "torch": torch.__version__, "device": device}
    if job.processes.first:
        gains: dict[int, float] = {}
        plan: Sequence[LayerSpec] = [
            end_to_end.slots_instead(s) if i in job.layers and i not in maps else s for i, s in enumerate(job.plan)
        ]
        if job.config.end_to_end and maps:
            maps, plan, tuning = _tune(job, maps, plan)
            facts["end_to_end"] = tuning
            gains = {int(i): gain for i, gain in tuning["gains"].items()}
        facts |= allocate.provenance(plan)
        reports = tuple(
            replace(r, slots=plan[r.layer].capacity, used=r.layer in maps, gain=gains.get(r.layer)) for r in reports
        )
        seconds = round(time.perf_counter() - begin)
        facts["run"] = {"seconds": seconds, "peak_memory_bytes": running.peak_memory(job.device)}
        facts["layers"] = {str(r.layer): {n: v for n, v in vars(r).items() if n != "layer"} for r in reports}
        trained = Kernels(dict(maps), facts, job.centring)
        trained.save(out)
        shutil.rmtree(job.work, ignore_errors=True)
        write_atomically(card.file_of(out), card.card(trained).encode())
        for line in card.doubts(facts):
            warnings.warn(line, stacklevel=3)
    job.processes.wait()
    return reports


def _tune(
    job: TrainJob, maps: dict[int, FeatureMap], plan: Sequence[LayerSpec]
) -> tuple[dict[int, FeatureMap], Sequence[LayerSpec], dict[str, Any]]:
    """Tune the layers' kernels together; returns those that pay, the plan, and their provenance."""
    training, validation = job.corpus.ids.split([len(job.corpus.ids) - job.validation, job.validation])
    return end_to_end.tune(
        LayerwiseDecoder(job.model(), plan), training, validation, job.length, plan, maps,
        end_to_end.Tuning(steps=job.config.tune_step_count), job.config.seed, job.progress,
        state_file=job.work / "end_to_end.pt", centring=job.centring, rotary=job.rotary,
    )  # fmt: skip
