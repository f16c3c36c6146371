"""Every private or unstable name of transformers and torch that less-export uses; the other modules get them here.

Each entry says what it is for, and the first release of transformers that has it here with this meaning ("4.48": that
release or an earlier one). The other modules import public names from transformers' top level only.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# FakeTensorMode: run a bare model on shapes alone. The exceptions: its code branches on values. (torch 2.13)
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedModel, masking_utils

# How a checkpoint's names become the model's: renamings, and converters that also change the layout. (5.0)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

# The table of attention functions that decoders look their attention up in. (4.48)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# GPT-2's linear layer, whose weight is [in, out]. (4.48)
from transformers.pytorch_utils import Conv1D

# Verbosity and progress bars of transformers. (4.48)
from transformers.utils import logging as hf_logging

__all__ = [
    "MASK_FUNCTIONS",
    "Conv1D",
    "Naming",
    "attention_implementation",
    "experts_implementation",
    "fake_tensors",
    "gguf_keys",
    "gguf_names",
    "gguf_reader",
    "gguf_splits",
    "has_fast_bfloat16",
    "ignored_keys",
    "initialise",
    "mask_namespaces",
    "on_interface",
    "one_gguf_reader",
    "quiet_transformers",
    "register_attention",
    "untraceable",
    "use_attention",
]

# ------------------------------------------------------------------ attention, experts and masks

#: Functions that make attention masks, by name: they are replaced while LESS is in a model. (masking_utils: 4.53)
MASK_FUNCTIONS = {n: f for n, f in vars(masking_utils).items() if n.startswith("create_") and callable(f)}


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Enter ``function`` into the attention interface as ``name``."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)


def on_interface(model: PreTrainedModel) -> bool:
    """Whether the decoder's attention goes through the attention interface (a vision tower's may not).

    ``_can_set_attn_implementation`` reads the source of the model's module. (4.57)
    """
    decoder = model.get_decoder()
    return bool((decoder if isinstance(decoder, PreTrainedModel) else model)._can_set_attn_implementation())


def use_attention(config: Any, name: str) -> None:
    """Set the attention of a configuration, unchecked: the public setter refuses names that it does not know. (4.48)"""
    config._attn_implementation_internal = name


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let all of ``model`` attend through ``name`` of the attention interface while the context is open."""
    with _configured(_configs(model), "_attn_implementation_internal", name):
        yield


@contextlib.contextmanager
def experts_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let mixtures of experts compute as ``name`` while the context is open; no effect on other models. (5.0)"""
    configs = _configs(model) if model._can_set_experts_implementation() else []
    with _configured(configs, "_experts_implementation_internal", name):
        yield


@contextlib.contextmanager
def _configured(configs: Sequence[Any], attribute: str, value: Any) -> Iterator[None]:
    """Set ``attribute`` = ``value`` in every configuration while the context is open."""
    before = [(c, getattr(c, attribute, None)) for c in configs]
    try:
        for config in configs:
            setattr(config, attribute, value)
        yield
    finally:
        for config, previous in before:
            setattr(config, attribute, previous)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct config object of the model, its sub-models and sub-configs (``sub_configs``: 4.48)."""
    configs: dict[int, Any] = {}
    queue = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop()
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            queue += [getattr(config, name, None) for name in config.sub_configs]
    return list(configs.values())


def mask_namespaces(model: nn.Module) -> list[dict[Any, Any]]:
    """Where ``model`` can look up a mask function: masking_utils, its table by layer type (4.53), the model's modules.

    Modelling files import the functions by name, so every module of the model's classes has its own reference.
    """
    modules = {cls.__module__ for m in model.modules() for cls in type(m).__mro__}
    own = [vars(sys.modules[n]) for n in sorted(modules) if n.startswith("transformers.models")]
    return [vars(masking_utils), masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, *own]


# ------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class Naming:
    """How transformers renames a checkpoint's tensors for a model."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str

    @classmethod
    def of(cls, model: PreTrainedModel, key_mapping: Mapping[str, str]) -> Naming:
        """The rules for ``model``, after those of ``key_mapping`` (pattern -> replacement)."""
        transforms = get_model_conversion_mapping(model, key_mapping=dict(key_mapping))
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        return cls(renamings, converters, model.base_model_prefix)

    def rename(self, key: str, wanted: Mapping[str, torch.Tensor]) -> tuple[str, list[str]]:
        """The name in the model of the tensor ``key``, and all names that it is converted to with others (or none).

        Args:
            wanted: the model's tensors by name.
        """
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, wanted)
        if pattern is None:
            return name, []
        first, *others = next(c for c in self.converters if pattern in c.source_patterns).target_patterns
        return name, [name, *(name.replace(first, other) for other in others)]


def ignored_keys(model: PreTrainedModel) -> list[str]:
    """Patterns of tensors that checkpoints of ``model`` may hold although they are not its weights. (4.48)"""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def initialise(model: PreTrainedModel, module: nn.Module) -> None:
    """Give the parameters of ``module`` their first values, by the rules of ``model``. (4.48)"""
    model._init_weights(module)


_readers: dict[tuple[str, int], Any] = {}


@contextlib.contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not again (10 s) for config, weights and tokenizer; no bars.

    ``modeling_gguf_pytorch_utils`` imports gguf.GGUFReader when it is called, and has ``tqdm`` as a global. (4.48)
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    original, bar = gguf.GGUFReader, loader.tqdm

    def cached(path: str | Path) -> Any:
        key = (os.path.realpath(path), Path(path).stat().st_mtime_ns)
        if key not in _readers:
            _readers.clear()
            _readers[key] = original(path)
        return _readers[key]

    try:
        gguf.GGUFReader, loader.tqdm = cached, lambda items, **_: items
        yield
    finally:
        gguf.GGUFReader, loader.tqdm = original, bar


def gguf_reader(path: Path) -> Any:
    """The reader of a GGUF file, within :func:`one_gguf_reader` the one that transformers uses."""
    import gguf

    return gguf.GGUFReader(path)


#: Architectures by other names in transformers' tables.
_GGUF_TYPES = {"gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def gguf_keys(architecture: str) -> set[str] | None:
    """Keys of a GGUF architecture that transformers reads, without its name; None where it has no table. (4.48)"""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    table = GGUF_CONFIG_MAPPING.get(_GGUF_TYPES.get(architecture, architecture))
    return None if table is None else {key for key, name in table.items() if name is not None}


def gguf_names(model: PreTrainedModel, architecture: str) -> set[str] | None:
    """Tensors of a GGUF file that transformers loads into ``model``; None where it does not say. (4.48)"""
    from transformers import modeling_gguf_pytorch_utils as loader

    if gguf_keys(architecture) is None:
        return None
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config={})
    return set(loader.get_gguf_hf_weights_map(model, processor))


def gguf_splits() -> set[str]:
    """Pre-tokenizers of GGUF files that transformers knows. (5.20)"""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return set(GGUF_PRE_TOKENIZER_SPLITS)


# ------------------------------------------------------------------ messages


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' warnings and progress bars."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# ------------------------------------------------------------------ torch


def fake_tensors() -> contextlib.AbstractContextManager[Any]:
    """Run a model on shapes alone; real tensors are allowed as inputs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def untraceable(error: BaseException) -> bool:
    """Whether a model run on shapes alone failed because it branches on values."""
    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))


def has_fast_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 faster than in float32. (torch 2.13)"""
    return bool(torch.cpu._is_avx512_bf16_supported())
