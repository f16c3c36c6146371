"""Checkpoints with a model's true shapes and random weights: sharded safetensors beside a config.

Names are those in transformers' model: a layer's experts are one tensor, even if the hub's files store them apart. At
most one shard is in memory. Drawing normal numbers would take longer than writing them to disk, so one block is drawn
and every matrix reads it cyclically from its own offset. The block's length is prime, so no two rows are equal.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..bundle.files import apply_umask, publish, scratch_folder
from ..config import ExportConfig
from ..errors import LessExportError, ModelError, UsageError
from ..progress import Progress, Silent
from . import recipes, tokenizer_files, weights
from .compat import initialise
from .config_layers import keep_first
from .sources import ModelSource, described, resolve

_BLOCK = 16_777_213  # prime
_SHARD = 10**9
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class RandomSource(ModelSource):
    """A random checkpoint, reused or written by :meth:`fetch`."""

    hf_config: Any = None
    own_tokenizer: Any = None
    lacks_tokenizer: str = tokenizer_files.NONE
    seed: int = 0
    progress: Progress | None = None

    def fetch(self) -> None:
        """Write the checkpoint; raises :class:`LessExportError` if it does not fit or another one is there."""
        size, written = write(self.hf_config, self.folder, self.seed, self.progress, self.own_tokenizer)
        where = "written to" if written else "taken from"
        warnings.warn(f"the weights are random, {size / 1e9:.2f} GB {where} {self.folder}", stacklevel=2)

    def config(self) -> Any:
        return copy.deepcopy(self.hf_config)

    def tokenizer_or_reason(self) -> tuple[Any | None, str]:
        return self.own_tokenizer, self.lacks_tokenizer


def random_source(model: str, config: ExportConfig, beside: Path, progress: Progress | None = None) -> RandomSource:
    """MODEL with random weights: a recipe, or anything with a config.json.

    The checkpoint is a folder next to ``beside``, named after the model, and is kept: a second run with
    the same model, layers and seed reuses it.

    Raises:
        LessExportError: no such model, or too many layers.
    """
    recipe = recipes.load(model)
    if recipe is not None:
        hf_config, name, tokenizer, reason = described(recipe), model, None, tokenizer_files.NONE
    else:
        origin = resolve(model)
        if origin.gguf is not None:
            raise UsageError(
                f"--random-weights writes safetensors: give a recipe or a folder with config.json, not {model}"
            )
        hf_config, name = origin.config(), origin.name.split("/")[-1]
        tokenizer, reason = origin.tokenizer_or_reason()
    vars(hf_config).pop("quantization_config", None)
    dtype = getattr(hf_config, "dtype", None) or torch.bfloat16
    hf_config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    parts = [name, "random"]
    if config.num_hidden_layers is not None:
        keep_first(hf_config.get_text_config(), config.num_hidden_layers)
        parts.append(f"{config.num_hidden_layers}-layers")
    if config.seed:
        parts.append(f"seed-{config.seed}")
    folder = beside.parent / "-".join(parts)
    if folder == beside:
        raise UsageError(f"--out {beside} is where the random checkpoint goes: choose another name")
    return RandomSource(
        name,
        folder,
        recipe=recipe,
        hf_config=hf_config,
        own_tokenizer=tokenizer,
        lacks_tokenizer=reason,
        seed=config.seed or 0,
        progress=progress,
    )


def write(
    hf_config: Any, folder: Path, seed: int = 0, progress: Progress | None = None, tokenizer: Any = None
) -> tuple[int, bool]:
    """Write a random checkpoint of ``hf_config`` in its dtype, unless it is there.

    Args:
        folder: where it goes, under a temporary name until it is whole.
        tokenizer: the Hugging Face tokenizer to save beside the weights.

    Returns:
        The size of the weights in bytes, and whether they were written.
    """
    bare = weights.bare_model(hf_config, hf_config.dtype)
    saved = bare.state_dict()
    tensors = dict(bare.named_parameters()) | {n: b for n, b in bare.named_buffers() if n in saved}  # tied ones once
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=_nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD,
    )
    total = sum(map(_nbytes, tensors.values()))
    index = {"metadata": {"total_size": total, "seed": seed}, "weight_map": plan.tensor_to_filename}
    with _no_room(folder), scratch_folder(folder) as scratch:
        hf_config.architectures = [type(bare).__name__]
        hf_config.save_pretrained(scratch)
        GenerationConfig.from_model_config(hf_config).save_pretrained(scratch)
        (scratch / _INDEX).write_text(json.dumps(index, indent=1))
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        if folder.exists():
            if _same(scratch, folder, [*plan.filename_to_tensors]):
                _refuse_damaged(folder, [*plan.filename_to_tensors])
                return total, False
            raise UsageError(f"{folder} is not the random checkpoint that this command makes: remove it")
        free = shutil.disk_usage(scratch).free
        if free < total:
            raise LessExportError(
                f"the random checkpoint takes {total / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free: "
                "make room, choose another --out, or try fewer layers with --num-hidden-layers"
            )
        values, progress = _Values(bare, seed), progress or Silent()
        for number, (file_name, names) in enumerate(plan.filename_to_tensors.items(), 1):
            shard = f"shard {number} of {len(plan.filename_to_tensors)}"
            progress.say(f"writing random weights, {total / 1e9:.1f} GB: {shard}")
            path = scratch / file_name
            save_file({n: values.of(n, tensors[n]) for n in names}, path, {"format": "pt"})
            apply_umask(path)  # safetensors makes files that only their owner may read
        apply_umask(scratch)
        publish([(scratch, folder)])
    return total, True


@contextlib.contextmanager
def _no_room(folder: Path) -> Iterator[None]:
    """Why ``folder`` cannot be written, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LessExportError(f"cannot write {folder}: {reason}; nothing was left behind") from error


def _nbytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _same(wanted: Path, folder: Path, shards: list[str]) -> bool:
    """Whether ``folder`` holds this config and index, and the shards (which were renamed into place whole)."""
    try:
        alike = all(_content(wanted / n) == _content(folder / n) for n in ("config.json", _INDEX))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return alike and all((folder / n).is_file() for n in shards)


def _refuse_damaged(folder: Path, shards: list[str]) -> None:
    for name in shards:
        try:
            weights.read_header(folder / name)
        except ModelError as error:
            raise ModelError(
                f"{folder / name} is corrupt or truncated: remove {folder} to have it written again"
            ) from error


def _content(path: Path) -> dict[str, Any]:
    """The contents of a JSON file, without the version of transformers that wrote it."""
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "transformers_version"}


class _Values:
    """Values of a model's tensors: normal with its ``initializer_range``; norms, biases and buffers as initialised."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        std = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
        self._block = (torch.randn(_BLOCK, generator=self._generator) * std).to(model.dtype)
        self._given = dict(_vectors(model)) | dict(model.named_buffers())

    def of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The tensor called ``name``, of the shape of ``like``; call it once for each name, in order."""
        if name in self._given:
            return self._given[name]
        out = torch.empty(like.shape, dtype=like.dtype)
        flat, done = out.view(-1), 0
        start = int(torch.randint(_BLOCK, (), generator=self._generator))
        while done < flat.numel():
            piece = self._block[start : start + flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done, start = done + piece.numel(), 0
        return out


def _vectors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Norm weights as the model initialises them (ones, or zeros for 1 + w), other vectors zero."""
    for prefix, module in model.named_modules():
        owned = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        small = {n: torch.full(p.shape, float(n == "weight"), dtype=p.dtype) for n, p in owned.items() if p.ndim <= 1}
        for name, values in small.items():
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        if small and len(small) == len(owned):
            initialise(model, module)
        for name, values in small.items():
            yield f"{prefix}.{name}" if prefix else name, values
