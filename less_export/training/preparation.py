"""What a training run begins with: its input, checked before anything slow happens, and the state its steps share."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .._version import __version__
from ..bundle.files import sha256
from ..config import DEFAULT_BUDGET
from ..contract import LayerSpec
from ..errors import UsageError
from ..hf import data, running
from ..hf.model import open_model
from ..hf.sources import ModelSource, resolve
from ..hf.weight_files import checkpoint_files
from ..less.int8 import Centring
from ..less.rotary import RotaryTable, table_of
from ..plan import budget_tokens
from ..progress import Progress
from . import allocate, end_to_end, fit, work
from .options import AUTO, DEFAULT_HIDDEN, DEFAULT_LENGTH, DEFAULT_RANK, EQUAL, Processes, TrainConfig, parse_layers

#: Training sequences per validation sequence.
_VALIDATION = 8


@dataclass
class TrainJob:
    """State that the steps of one training run share.

    layers: layers to train. corpus: training sequences, then validation. length: tokens of each that layers are
    fitted on. facts: provenance, for the kernel file. width: hidden size of the model. context: tokens that
    percentages refer to. work: folder of finished work, until the kernel file is written. centring: of the keys of
    every layer with int8 slots, once it is measured. rotary: tables of distances within a sequence, where the plan
    limits distances.
    """

    source: ModelSource
    config: TrainConfig
    plan: tuple[LayerSpec, ...]
    layers: list[int]
    corpus: data.Corpus
    length: int
    facts: dict[str, Any]
    device: str
    dtype: torch.dtype
    width: int
    context: int
    work: Path
    processes: Processes
    progress: Progress
    rotary: tuple[RotaryTable, ...]
    centring: Mapping[int, Centring] = field(default_factory=dict)
    _model: PreTrainedModel | None = None

    @property
    def validation(self) -> int:
        return max(1, len(self.corpus.ids) // (_VALIDATION + 1))

    @property
    def ids(self) -> torch.Tensor:
        """What layers are fitted on: [N, length]."""
        return self.corpus.ids[:, : self.length]

    def model(self) -> PreTrainedModel:
        """The model, loaded once."""
        if self._model is None:
            self.progress.say(f"loading {self.source.name}")
            # Not with transformers' device_map, which needs accelerate even for a single device.
            self._model = self.source.load(self.dtype).to(torch.device(self.device))
        return self._model

    def angles(self, layer: int) -> torch.Tensor | None:
        """The rotary table of a layer."""
        kind = table_of(self.rotary, layer)
        return None if kind is None else kind.angles

    def layer_file(self, layer: int) -> Path:
        return self.work / f"layer_{layer}.safetensors"


def prepare(
    model: str, out: Path, texts: Sequence[str], config: TrainConfig, processes: Processes, progress: Progress
) -> TrainJob:
    """Check all input before anything slow begins."""
    if not texts and processes.first:
        warnings.warn("no --data given: training on the text that ships with less-export", stacklevel=3)
    sources, duplicates = data.distinct(data.read(texts or ["calibration"]))
    if duplicates and processes.first:
        warnings.warn(f"--data {', '.join(duplicates)}: ignored, same text as another source", stacklevel=3)
    device = running.device(config.device)
    source = resolve(model)
    recipe = source.recipe
    rank = config.rank or (recipe.rank if recipe else DEFAULT_RANK)
    config = replace(config, rank=rank, hidden=config.hidden or (recipe.hidden if recipe else DEFAULT_HIDDEN))
    opened = open_model(source, config.cache(), rank=rank, equal_budgets=config.division_by_training)
    cache, plan, limit = opened.config, opened.plan, opened.trained_length
    length = config.seq_len or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if length > (opened.position_limit or length):
        raise UsageError(
            f"--seq-len {length} is more than the {opened.position_limit} positions that the model has: reduce it"
        )
    evicting = [i for i, s in enumerate(plan) if s.absorb]
    if not evicting:
        raise UsageError("no layer evicts anything: all layers keep their sliding window; see --compress-sliding")
    chosen = parse_layers(config.layers, evicting)
    if config.layer_budgets is None and cache.layer_budgets is None and len(chosen) > 1:
        config = replace(config, layer_budgets=AUTO)
    slots = max(plan[i].capacity for i in chosen)
    if length < slots + 2:
        raise UsageError(
            f"--seq-len {length} is shorter than the budget of {slots} tokens, so nothing is evicted: "
            "raise it, or lower --budget"
        )
    tokenizer, reason = source.tokenizer_or_reason()
    if tokenizer is None:
        raise UsageError(f"{reason}; training of {source.name} needs one: add one to its folder")
    encode, bos = data.encoder(tokenizer)
    if processes.first:
        data.warn_of_special_tokens(sources, data.special_tokens(tokenizer))
    count = config.sequence_count + max(1, config.sequence_count // _VALIDATION)
    corpus = _corpus(sources, encode, bos, count, length, opened.trained_length, config)
    if len(corpus.ids) < 2:
        raise UsageError(f"the text has one sequence of {length} tokens; training and validation need two: add text")
    if len(corpus.ids) < count and processes.first:
        warnings.warn(f"the text has {len(corpus.ids)} sequences of {length} tokens, not {count}", stacklevel=3)
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
        **allocate.provenance(plan),
        "budget": budget_tokens(cache.budget or DEFAULT_BUDGET, opened.context),
        "score_half_life": plan[chosen[0]].score_half_life,
        "slot_dtype": plan[chosen[0]].slot_dtype,
        "state_bits": plan[chosen[0]].state_bits,
        "rotated": not opened.rotations,
        "max_distance": max((s.max_distance for s in plan if s.max_distance is not None), default=None),
        "compress_sliding": bool(cache.compress_sliding),
        "data": [s.facts() for s in sources],
        "sequences": {
            "count": len(corpus.ids),
            "length": length,
            "longest": corpus.ids.shape[1],
            "sha256": corpus.hash(),
            "shares": shares,
        },
        "rank": config.rank,
        "hidden": config.hidden,
        "parametrisation": config.parametrisation,
        "fit": asdict(fit.Fit(steps=config.step_count)),
        "division": config.layer_budgets if config.division_by_training else "given" if cache.layer_budgets else EQUAL,
        "end_to_end": asdict(end_to_end.Tuning(steps=config.tune_step_count)) if config.end_to_end else False,
        "seed": config.seed,
        "less_export": __version__,
    }
    folder = work.folder(out, facts, opened.hf_config)
    if processes.first:
        work.warn_of_others(out, folder)
    dtype, width = running.compute_dtype(opened.hf_config, device), int(getattr(opened.text_config, "hidden_size", 0))
    return TrainJob(
        source, config, plan, chosen, corpus, length, facts, device, dtype, width, opened.context, folder, processes,
        progress, opened.rotary_tables(corpus.ids.shape[1]),
    )  # fmt: skip


def _corpus(
    sources: Sequence[data.Source], encode: data.Encode, bos: int | None, count: int, length: int, limit: int | None,
    config: TrainConfig,
) -> data.Corpus:  # fmt: skip
    """Sequences of ``length`` tokens, or of the longest that kernels are tuned on where the text has enough of them."""
    longest = max(length, min(int(max(end_to_end.Tuning().lengths) * length), limit or length))
    if config.end_to_end and longest > length:
        try:
            corpus = data.sequences(sources, encode, bos, count, longest, config.seed)
        except UsageError:  # the text is shorter than one
            corpus = None
        if corpus is not None and len(corpus.ids) == count:
            return corpus
    return data.sequences(sources, encode, bos, count, length, config.seed)


def _model_hash(source: ModelSource, progress: Progress) -> str:
    """Hash of the weights: of their files' hashes."""
    source.fetch()
    files = [f for f in ([source.gguf] if source.gguf else checkpoint_files(source.folder)) if f]
    progress.say(f"hashing {sum(f.stat().st_size for f in files) / 1e9:.2f} GB of weights")
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
