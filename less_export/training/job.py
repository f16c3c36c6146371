"""A whole training: collect, fit layer by layer, switch off what does not help, write the file.

What is done is kept beside the output, in a hidden folder named by a fingerprint of model, data and options, until
the file is written: the same command goes on where it was interrupted, another one starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .._version import __version__
from ..bundle.files import sha256, write_atomically
from ..contract import LayerSpec
from ..errors import LessExportError, UsageError
from ..hf.model import open_model
from ..hf.sources import ModelSource, checkpoint_files, resolve
from ..less.feature_maps import FeatureMap, Kernels
from ..plan import sparse_layer
from ..progress import AnyProgress, Progress, Silent, as_progress
from . import allocate, collect, data, end_to_end, fit, resources
from .options import DEFAULT_HIDDEN, DEFAULT_LENGTH, DEFAULT_RANK, Processes, TrainConfig, compute_dtype, parse_layers
from .options import device as choose_device

#: Most bytes of activations on disk at a time; more layers than fit are collected in turns.
DISK = 16 << 30
#: One validation sequence for so many training sequences.
_VALIDATION = 12


@dataclass(frozen=True)
class LayerReport:
    """How one layer fared: see :class:`~less_export.training.fit.Errors`; ``used`` is False where LESS lost.

    ``less`` is the error of the kernels in the file: after they were tuned together, if they were.
    """

    layer: int
    slots: int
    sparse: float
    start: float
    less: float
    used: bool
    seconds: float


@dataclass
class TrainJob:
    """What the steps of one training share.

    layers: those to train. corpus: training sequences, then validation. facts: provenance, for the kernel file.
    width: hidden size of the model. work: folder of what is finished, until the kernel file is written.
    """

    source: ModelSource
    config: TrainConfig
    plan: tuple[LayerSpec, ...]
    layers: list[int]
    corpus: data.Corpus
    facts: dict[str, Any]
    device: str
    dtype: torch.dtype
    width: int
    work: Path
    processes: Processes
    progress: Progress
    #: Where the other processes say what they have done; the first has ``progress``.
    aloud: Progress

    @property
    def validation(self) -> int:
        return max(1, len(self.corpus.ids) // (_VALIDATION + 1))

    def layer_file(self, layer: int) -> Path:
        return self.work / f"layer_{layer}.safetensors"


def train(
    model: str, out: str | Path, texts: Sequence[str] = (), config: TrainConfig | None = None, *,
    progress: AnyProgress | None = None, **options: Any,
) -> tuple[LayerReport, ...]:  # fmt: skip
    """Train the kernels of a model and write them to ``out``.

    Args:
        model: recipe name, hub id, checkpoint folder or GGUF file.
        out: kernel file (.safetensors) to write.
        texts: what to train on, see :func:`less_export.training.data.read`; default the package's own text.
        config: options, or give their fields as keyword arguments.
        progress: where to report: a :class:`~less_export.progress.Progress`, or a function that is called with a few
            words as each phase begins; default nowhere.

    Returns:
        One report per trained layer.

    Raises:
        LessExportError: anything the user can mend; finished layers stay for the next run.
    """
    processes = Processes.here()
    shown = as_progress(progress if processes.first else None)
    config = replace(config or TrainConfig(), **options)
    out = Path(out)
    if out.is_dir() or not out.name:
        raise UsageError(f"--out {out} is a folder: give the name of a .safetensors file")
    processes.join()
    try:
        job = _prepare(model, out, texts, config, processes, shown)
        job.aloud = as_progress(None if processes.first else progress)
        try:
            if config.divided:
                _divide(job)
            _fit_all(job)
            return _finish(job, out)
        except BaseException:
            with contextlib.suppress(OSError):  # what is finished stays
                job.work.rmdir()
            raise
    except OSError as error:
        raise LessExportError(f"cannot write {out} or beside it: {error.strerror or error}") from error
    finally:
        processes.leave()


def _prepare(
    model: str, out: Path, texts: Sequence[str], config: TrainConfig, processes: Processes, progress: Progress
) -> TrainJob:
    """Everything that can be wrong, before anything takes long."""
    if not texts and processes.first:
        warnings.warn("no --data given: training on the text that ships with less-export", stacklevel=3)
    sources, again = data.distinct(data.read(texts or ["calibration"]))
    if again and processes.first:
        warnings.warn(f"--data {', '.join(again)}: the text of another source once more, left out", stacklevel=3)
    device = choose_device(config.device)
    source = resolve(model)
    recipe = source.recipe
    rank = config.rank or (recipe.rank if recipe else DEFAULT_RANK)
    config = replace(config, rank=rank, hidden=config.hidden or (recipe.hidden if recipe else DEFAULT_HIDDEN))
    opened = open_model(source, config.cache(), rank=rank, equal_budgets=config.divided)
    cache, plan, limit = opened.config, opened.plan, opened.trained_length
    length = config.seq_len or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if length > (opened.position_limit or length):
        raise UsageError(f"--seq-len {length} is more than the {limit} positions that the model has: lower it")
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
    if length > (limit or length) and processes.first:
        warnings.warn(
            f"--seq-len {length} is past the {limit} positions the model was trained for: quality may suffer",
            stacklevel=3,
        )
    shares = Counter(corpus.origin)
    facts = {
        "model": source.name,
        "model_sha256": _model_hash(source, progress),
        "policy": cache.policy or plan[chosen[0]].policy.name,
        "slots": {str(i): [plan[i].heavy, plan[i].recent] for i in chosen},
        "compress_sliding": bool(cache.compress_sliding),
        "data": [s.facts() for s in sources],
        "sequences": {"count": len(corpus.ids), "length": length, "sha256": corpus.hash(), "shares": shares},
        "rank": config.rank,
        "hidden": config.hidden,
        "parametrisation": config.parametrisation,
        "fit": asdict(fit.Fit(steps=config.step_count)),
        "layer_budgets": config.layer_budgets if config.divided else cache.layer_budgets,
        "end_to_end": config.tuned,
        "seed": config.seed,
        "less_export": __version__,
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    work = out.parent / f".{out.name}.{mark}"
    if processes.first:
        _tell_of_others(out, work)
    work.mkdir(parents=True, exist_ok=True)
    dtype, width = compute_dtype(opened.hf_config, device), int(getattr(opened.text_config, "hidden_size", 0))
    return TrainJob(
        source, config, plan, chosen, corpus, facts, device, dtype, width, work, processes, progress, Silent()
    )  # fmt: skip


def _model_hash(source: ModelSource, progress: Progress) -> str:
    """Hash of the weights, over the hashes of their files."""
    source.fetch()
    files = [f for f in ([source.gguf] if source.gguf else checkpoint_files(source.folder)) if f]
    progress.say(f"hashing {sum(f.stat().st_size for f in files) / 1e9:.2f} GB of weights")
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _tell_of_others(out: Path, work: Path) -> None:
    """Say what trainings with other options have left beside ``out``: they may still run, so it stays."""
    name = re.compile(re.escape(f".{out.name}.") + "[0-9a-f]{12}")
    left = [p for p in sorted(out.parent.glob(".*")) if name.fullmatch(p.name) and p.is_dir() and p != work]
    if left:
        size = sum(f.stat().st_size for p in left for f in p.rglob("*") if f.is_file())
        warnings.warn(
            f"unfinished trainings of {out.name} with other options or texts hold {size / 1e9:.2f} GB; delete what "
            f"no longer runs: {', '.join(map(str, left))}",
            stacklevel=4,
        )


def _load(job: TrainJob) -> PreTrainedModel:
    job.progress.say(f"loading {job.source.name}")
    # Moved as a whole: transformers' own placement would need accelerate for a single device.
    return job.source.load(job.dtype).to(torch.device(job.device))


def _divide(job: TrainJob) -> None:
    """Give every layer its share of the budget; the first process measures, what it finds is kept beside the layers."""
    file = job.work / "layer_budgets.json"
    if job.processes.first and not file.exists():
        found = allocate.measure(_load(job), job.corpus.ids, job.plan, job.layers, job.progress)
        write_atomically(file, json.dumps([[i, *x] for i, at in found.items() for x in at.items()]).encode())
    job.processes.wait()
    costs: dict[int, dict[int, float]] = {i: {} for i in job.layers}
    for i, slots, cost in json.loads(file.read_text()):
        costs[i][slots] = cost
    divided = allocate.divide(costs, job.plan)
    plan = list(job.plan)
    for i, slots in divided.items():
        plan[i] = replace(sparse_layer(plan[i], slots), absorb=True, rank=plan[i].rank)
    job.plan = tuple(plan)
    job.facts |= {
        "layer_budgets": allocate.option(divided),
        "slots": {str(i): [plan[i].heavy, plan[i].recent] for i in divided},
        "eviction_costs": {str(i): {str(n): round(x, 5) for n, x in at.items()} for i, at in costs.items()},
    }
    job.progress.say(f"budgets of the layers: {job.facts['layer_budgets']}")


def _fit_all(job: TrainJob) -> None:
    """Every layer that has no file yet, in groups whose activations fit on disk."""
    todo = [i for i in job.layers if not job.layer_file(i).exists()]
    finished = len(job.layers) - len(todo)
    if finished:
        job.progress.say(f"{finished} of {len(job.layers)} layers were trained before")
    if todo:
        ids = job.corpus.ids
        folder = job.work / str(job.dtype).replace("torch.", "activations_")
        into = collect.Activations(folder, job.plan, len(ids), ids.shape[1], job.dtype)
        split = collect.groups(todo, into, DISK)
        _need_memory(job, split, into)
    job.processes.wait()  # all must have looked before the first takes memory and writes
    if not todo:
        return
    for group in split:
        try:
            projections = _collect(job, group, into)
            for layer in group[job.processes.rank :: job.processes.count]:
                _fit_layer(job, layer, into.tensor(layer), projections[layer])
        except BaseException as error:
            # Half of the activations are of no use, nor are all of them where the same command would fail again.
            if isinstance(error, LessExportError) or not set(group) <= into.done():
                into.remove()
            raise
        job.processes.wait()
        if job.processes.first:
            into.drop()
        job.processes.wait()


def _need_memory(job: TrainJob, split: list[list[int]], into: collect.Activations) -> None:
    """Say what the fits take of disk and memory.

    Raises:
        LessExportError: there is less memory.
    """
    todo = [i for group in split for i in group]
    matrices = 4 * job.width * max(sum(job.plan[i].query_heads * job.plan[i].head_dim for i in g) for g in split)
    most = matrices + max(fit.memory(job.plan[i], job.width, into.shape(i), job.dtype.itemsize) for i in todo)
    sharing = min(job.processes.on_machine, len(todo)) if torch.device(job.device).type == "cpu" else 1
    disk = max(sum(into.nbytes(i) for i in g) for g in split)
    job.progress.say(
        f"{len(todo)} layers, {len(job.corpus.ids)} sequences: {disk / 1e9:.2f} GB of activations on disk, "
        f"up to {most / 1e9:.2f} GB of memory while a layer is fitted"
    )
    free = resources.free_memory(job.device)
    if free is not None and sharing * most > free:
        each = f", in each of {sharing} processes" if sharing > 1 else ""
        raise LessExportError(
            f"fitting a layer takes {most / 1e9:.2f} GB of memory{each}, and {free / 1e9:.2f} GB are free: "
            "give fewer --seqs or a shorter --seq-len"
        )


def _collect(job: TrainJob, group: list[int], into: collect.Activations) -> dict[int, torch.Tensor]:
    """Have the activations of ``group``, and return its output projections; the model is gone afterwards."""
    model = _load(job)
    projections = collect.output_projections(model, job.plan)
    if not set(group) <= into.done():
        if job.processes.first:
            into.reserve(group)
        job.processes.wait()
        share = (job.processes.rank, job.processes.count)
        collect.collect(model, job.corpus.ids, job.plan, group, into, share, job.progress)
        job.processes.wait()
        if job.processes.first:
            into.mark_done(group)
    return {i: projections[i] for i in group}


def _fit_layer(job: TrainJob, layer: int, activations: torch.Tensor, projection: torch.Tensor) -> None:
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
            config.seed,
            step,
        )
        step(f"error {errors.less:.4f}, without LESS {errors.sparse:.4f}", 0)
    seconds = round(time.perf_counter() - begin, 1)
    facts = {**vars(errors), "used": errors.less < errors.sparse, "seconds": seconds}
    job.aloud.say(f"layer {layer}: {seconds:.0f} s, error {errors.less:.4f}, without LESS {errors.sparse:.4f}")
    Kernels({layer: made.cpu()}, facts).save(job.layer_file(layer))


def _finish(job: TrainJob, out: Path) -> tuple[LayerReport, ...]:
    """Put the layers together, tune them if asked to, and write the file (first process only)."""
    loaded = {i: Kernels.load(job.layer_file(i)) for i in job.layers}
    job.processes.wait()  # all must have read before the first removes them
    reports = tuple(LayerReport(i, job.plan[i].capacity, **k.provenance) for i, k in loaded.items())
    maps = {r.layer: loaded[r.layer].layers[r.layer] for r in reports if r.used}
    where = torch.cuda.get_device_name(job.device) if torch.device(job.device).type == "cuda" else job.device
    facts = {**job.facts, "torch": torch.__version__, "device": where}
    if job.processes.first:
        if job.config.tuned and maps:
            maps, facts["end_to_end"], errors = _tune(job, maps)
            reports = tuple(replace(r, less=errors.get(r.layer, r.less)) for r in reports)
        facts["layers"] = {str(r.layer): {n: v for n, v in vars(r).items() if n != "layer"} for r in reports}
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


def _tune(job: TrainJob, maps: dict[int, FeatureMap]) -> tuple[dict[int, FeatureMap], dict[str, Any], dict[int, float]]:
    """Tune the layers' kernels together; also what was found, and the layers' errors with what came out."""
    model = _load(job)
    learn, check = job.corpus.ids.split([len(job.corpus.ids) - job.validation, job.validation])
    kept = job.work / "end_to_end.pt"
    tuned, facts = end_to_end.tune(model, learn, check, job.plan, maps, job.config.seed, job.progress, keep=kept)
    errors: dict[int, float] = {}
    if facts["used"]:
        into = collect.Activations(job.work / "tuned", job.plan, len(check), check.shape[1], job.dtype)
        into.reserve(list(tuned))
        projections = collect.output_projections(model, job.plan)
        collect.collect(model, check, job.plan, list(tuned), into, (0, 1), job.progress)
        for i, made in tuned.items():
            ready = fit.prepare(into.tensor(i), job.plan[i], projections[i], job.device)
            errors[i] = fit.relative_error(ready, made.to(job.device))
            made.cpu()
    return tuned, facts, errors
