"""What is evaluated: a bundle as it was exported, or a model with options and a kernel file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .. import api
from ..artifact import Bundle
from ..config import ExportConfig, default_context, plan_layers
from ..contract import Contract, LayerSpec
from ..errors import UsageError
from ..feature_maps import Heads, Kernels
from ..runtime.backend import Backend
from ..runtime.torch_backend import ModelBackend, bundle_kernels, bundle_model
from ..sources import resolve
from ..surgery import discover
from ..training import data
from ..training.options import compute_dtype
from .variants import Variant


@dataclass
class Subject:
    """A loaded model, the plan of its LESS cache, and how text becomes tokens.

    own: opens the bundle's artifact on a backend by name, None for a model. cache_dtype: what bytes count in.
    """

    name: str
    model: PreTrainedModel
    plan: tuple[LayerSpec, ...]
    kernels: Kernels
    encode: data.Encode
    bos: int | None
    cache_dtype: str
    plan_for: Callable[[str], tuple[LayerSpec, ...]] | None = None
    own: Callable[[str], Backend] | None = None

    def backend(self, variant: Variant, name: str, batch: int, length: int) -> Backend:
        """A backend that runs ``variant`` step by step: any on torch, what was exported on another."""
        if name == "torch":
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            vocabulary = int(self.model.config.get_text_config().vocab_size)
            contract = Contract(variant.plan, vocabulary, dtype, length, batch, "all")
            return ModelBackend(self.model, contract, Kernels(variant.kernels, {}))
        assert self.own is not None, "a model runs on torch alone"
        return self.own(name)

    def exported(self, variant: Variant) -> bool:
        """Whether ``variant`` is what the bundle holds."""
        return self.own is not None and variant.plan == self.plan


def open_subject(target: str, cache: ExportConfig, kernel_file: Path | None, whole_precision: bool) -> Subject:
    """A bundle (folder with a manifest, x.onnx, x.plan) or a MODEL.

    ``whole_precision`` keeps a model in f32 even where 16 bits are faster (for streaming in f32).

    Raises:
        LessExportError: neither of them, or options that do not fit.
    """
    path = Path(target)
    if (path / "manifest.json").is_file() or (path.is_file() and path.suffix in (".onnx", ".plan")):
        return _bundle(path, cache, kernel_file)
    source = resolve(target)
    config = source.config()
    model = source.load(torch.float32 if whole_precision else compute_dtype(config, "cpu"))
    layers = discover(model)
    kernels = Kernels.load(kernel_file) if kernel_file else Kernels({}, {})
    kernels.check([Heads(x.query_heads, x.kv_heads, x.head_dim) for x in layers])
    cache = cache.with_defaults(source.recipe.options() if source.recipe else {})
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = cache.context or default_context(limit)
    ranks = {i: m.rank for i, m in kernels.layers.items()}
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UsageError(f"{target} ships no tokenizer, which evaluation on text needs")
    encode, bos = data.encoder(tokenizer)

    def plan_for(budget: str) -> tuple[LayerSpec, ...]:
        changed = ExportConfig(
            policy=cache.policy, budget=budget, context=context, compress_sliding=cache.compress_sliding
        )
        return plan_layers(layers, changed, context, ranks)

    plan = plan_layers(layers, cache, context, ranks)
    return Subject(target, model, plan, kernels, encode, bos, "bfloat16", plan_for)


def _bundle(path: Path, cache: ExportConfig, kernel_file: Path | None) -> Subject:
    asked = [n for n in ("policy", "budget", "context") if getattr(cache, n) is not None]
    if asked or kernel_file or cache.compress_sliding:
        option = f"--{asked[0]}" if asked else "--kernels" if kernel_file else "--compress-sliding"
        raise UsageError(f"{path} is a bundle, whose cache is fixed: drop {option}, or give the MODEL it was made of")
    bundle = Bundle.open(path)
    artifact = next(iter(bundle.manifest.artifacts))
    tokenizer = api.tokenizer(bundle)
    if tokenizer is None:
        raise UsageError(f"{path} has no tokenizer, which evaluation on text needs")
    bos = tokenizer.bos_id if tokenizer.encode("a")[:1] == [tokenizer.bos_id] else None

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, special=False)

    contract = artifact.contract
    return Subject(
        str(path), bundle_model(bundle), contract.layers, bundle_kernels(bundle), encode, bos, contract.dtype,
        own=lambda name: api.load_backend(bundle, name),
    )  # fmt: skip
