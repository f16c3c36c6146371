"""The subject of an evaluation: a bundle as it was exported, or a model with options and a kernel file."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..bundle.artifact import Bundle, is_bundle
from ..config import CACHE_OPTIONS, DEFAULT_CHUNK, ExportConfig
from ..contract import Contract, LayerSpec, limits_distances
from ..errors import UsageError
from ..hf import calibration, data
from ..hf.model import open_model
from ..hf.rotary import Rotation, probe, tables
from ..hf.running import compute_dtype
from ..hf.sources import resolve
from ..hf.special_tokens import adds_bos, eos_ids
from ..hf.surgery import learned_positions
from ..hf.weights import bare_model
from ..less.feature_maps import Kernels
from ..less.rotary import RotaryTable, table_length
from ..progress import Progress, Silent
from ..runtime.backend import Backend
from ..runtime.open import load_backend, load_tokenizer
from ..runtime.tokenizer import Tokenizer
from ..runtime.torch import ModelBackend, bundle_kernels, bundle_model
from .variants import Variant


@dataclass
class Subject:
    """A loaded model, the plan of its LESS cache, and its tokenizer.

    own: opens the bundle's artifact on the named backend (None: the one for what the bundle holds), once each; None
    for a model. cache_dtype: dtype that state bytes are counted in. tokenizer, chunk: for generation.
    special_tokens: of the tokenizer, as they are written.
    """

    name: str
    model: PreTrainedModel
    plan: tuple[LayerSpec, ...]
    kernels: Kernels
    encode: data.Encode
    bos: int | None
    cache_dtype: str
    tokenizer: Tokenizer | None
    chunk: int
    plan_for: Callable[[str], tuple[LayerSpec, ...]] | None = None
    own: Callable[[str | None], Backend] | None = None
    rotations: tuple[Rotation | None, ...] = ()
    special_tokens: Collection[str] = ()

    def rotary_tables(self, plan: Sequence[LayerSpec], length: int) -> tuple[RotaryTable, ...]:
        """Tables of distances below ``length`` for ``plan``; none where it does not limit distances."""
        return tables(self.rotations, length) if limits_distances(plan) else ()

    def backend(self, variant: Variant, name: str | None, batch: int, chunk: int) -> Backend:
        """A backend that runs ``variant`` step by step: any variant on torch, the exported one on other backends."""
        if name == "torch":
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            vocabulary = int(self.model.config.get_text_config().vocab_size)
            limit = None if limits_distances(variant.plan) else learned_positions(self.model)
            contract = Contract(variant.plan, vocabulary, dtype, chunk, batch, "all", limit)
            farthest = max((s.max_distance or 0 for s in variant.plan), default=0)
            rotary = self.rotary_tables(variant.plan, table_length(farthest, chunk))
            return ModelBackend(self.model, contract, replace(variant.kernels, rotary=rotary))
        assert self.own is not None, "a model runs on torch only"
        return self.own(name)

    def refuse_backend(self, name: str | None) -> None:
        """Raise :class:`UsageError` for a model on a backend that runs only bundles."""
        if name not in (None, "torch") and self.own is None:
            raise UsageError(f"--backend {name} runs bundles: export the model first, or use --backend torch")

    def exported(self, variant: Variant) -> bool:
        """Whether ``variant`` is the cache in the bundle."""
        return self.own is not None and variant.plan == self.plan


def open_subject(
    target: str,
    cache: ExportConfig,
    kernel_file: Path | None,
    whole_precision: bool,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Subject:
    """A bundle (folder with a manifest, x.onnx, x.plan) or a MODEL.

    ``whole_precision`` loads a model in f32 even where 16 bits are faster (for streaming in f32). int8 slots that the
    kernels do not calibrate are calibrated on the text in the package.

    Raises:
        LessExportError: ``target`` is neither, or the options do not fit it.
    """
    if is_bundle(target):
        refuse_options(target, cache, kernel_file)
        return _bundle(Path(target), trust_code)
    source = resolve(target)
    opened = open_model(source, replace(cache, kernels=kernel_file))
    tokenizer, reason = source.tokenizer_or_reason()
    if tokenizer is None:
        raise UsageError(f"{reason}; evaluation on text of {target} needs one")
    encode, bos = data.encoder(tokenizer)
    fast_tokenizer = getattr(tokenizer, "backend_tokenizer", None)
    runtime_tokenizer = fast_tokenizer and Tokenizer(
        fast_tokenizer,
        bos_id=tokenizer.bos_token_id,
        eos_ids=eos_ids(source, opened.hf_config, tokenizer),
        add_bos=adds_bos(tokenizer),
    )
    cache = opened.config

    def plan_for(budget: str) -> tuple[LayerSpec, ...]:
        return opened.plan_for(replace(cache, budget=budget, layer_budgets=None, heavy=None, recent=None))

    model = source.load(torch.float32 if whole_precision else compute_dtype(opened.hf_config, "cpu"))
    for doubt in opened.kernels.doubts(source.names, opened.plan):
        warnings.warn(doubt, stacklevel=2)
    kernels = opened.kernels
    if calibration.lacking(kernels, opened.plan):
        corpus, facts = calibration.shipped_corpus(encode, bos, opened.trained_length, not opened.rotations)
        length = corpus.ids.shape[1]
        measured = calibration.measure(
            model, corpus.ids, opened.plan, progress or Silent(), opened.rotary_tables(length)
        )
        kernels = calibration.completed(kernels, measured, facts)
    chunk = cache.chunk or DEFAULT_CHUNK
    return Subject(
        target, model, opened.plan, kernels, encode, bos, "bfloat16", runtime_tokenizer, chunk, plan_for,
        rotations=opened.rotations, special_tokens=data.special_tokens(tokenizer),
    )  # fmt: skip


def refuse_options(target: str, cache: ExportConfig, kernel_file: Path | None) -> None:
    """Raise :class:`UsageError` for cache options, as the cache of a bundle is fixed."""
    options = [n for n in (*CACHE_OPTIONS, "chunk") if getattr(cache, n) is not None] + ["kernels"] * (
        kernel_file is not None
    )
    if options:
        option = "--" + options[0].replace("_", "-")
        raise UsageError(f"{target} is a bundle, whose cache is fixed: drop {option}, or give its MODEL")


def _bundle(path: Path, trust_code: bool) -> Subject:
    bundle = Bundle.open(path)
    artifact = next(iter(bundle.manifest.artifacts))
    tokenizer = load_tokenizer(bundle)
    if tokenizer is None:
        raise UsageError(f"{path} has no tokenizer, which evaluation on text needs")
    bos = tokenizer.bos_id if tokenizer.encode("a")[:1] == [tokenizer.bos_id] else None

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, special=False)

    contract, model = artifact.contract, bundle_model(bundle)
    rotations = probe(bare_model(model.config, torch.float32)) if limits_distances(contract.layers) else ()
    return Subject(
        str(path), model, contract.layers, bundle_kernels(bundle), encode, bos, contract.dtype, tokenizer,
        contract.chunk, own=functools.cache(lambda name: load_backend(bundle, name, trust_code=trust_code)),
        rotations=rotations, special_tokens=tuple(tokenizer.special_tokens.values()),
    )  # fmt: skip
