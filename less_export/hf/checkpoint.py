"""A checkpoint's tensors for a model: fetched, located, converted where necessary, checked against the config."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..bundle import artifact
from ..bundle.files import apply_umask
from ..dtypes import COMPUTE_DTYPES, from_torch, torch_dtype
from ..errors import LessExportError, ModelError
from ..progress import Progress
from . import weights
from .compat import ignored_keys
from .model import OpenModel
from .sources import ModelSource
from .weight_files import checkpoint_files
from .weights import Stored, StoredTensor

#: Floats in older checkpoints that are not weights: rotary tables, masks. Model classes of transformers name more.
_NO_WEIGHTS = ("rotary_emb.", "inv_freq", "masked_bias", "position_ids")
_PIECE = 1 << 24


def take(model: OpenModel, scratch: Path, progress: Progress) -> tuple[PreTrainedModel, dict[str, Stored]]:
    """Where every parameter of a model is: in the checkpoint's files, or in one that is written to ``scratch``.

    Parameters that the configuration ties but the checkpoint stores with different values are untied, as in
    transformers: then ``model.hf_config`` is changed, and the bare model is not ``model.bare``.

    Returns:
        The bare model, and its tensors by parameter name.

    Raises:
        LessExportError: the weights cannot be downloaded, are damaged, or belong to another model.
    """
    source, config, hf_config, bare = model.source, model.config, model.hf_config, model.bare
    if source.gguf is not None:
        progress.say("dequantising the GGUF weights")
        # In TensorRT's compute dtype: 16 bits unless the options say otherwise.
        files = [_write(_loaded(source, bare.state_dict(), config.dtype or "bfloat16"), scratch)]
        whole = bare if config.num_hidden_layers is None else weights.bare_model(source.config(), torch.float32)
        _warn_of_unread(source.gguf.name, source.unread(whole))
    else:
        if source.hub is not None:
            progress.say(f"fetching the weights of {source.hub}")
        source.fetch()
        files = checkpoint_files(source.folder)
    survey = weights.survey(bare, files)
    _refuse_lost([n for n in survey.missing if n not in survey.convertible and n not in survey.castable])
    tensors = survey.tensors
    if survey.missing:
        progress.say(f"converting {len(survey.missing)} tensors that are stored in another layout or dtype")
        copied = _write(_converted(source, hf_config, survey), scratch)
        tensors |= weights.locate(bare, [copied])[0]
        _refuse_lost([n for n in survey.missing if n not in tensors])
    if survey.unused and config.num_hidden_layers is not None:  # later layers are left out on purpose
        survey = weights.survey(weights.bare_model(source.config(), torch.float32), files)
    unused = unused_weights(bare, survey.unused, source.is_part()) if survey.unused else []
    if unused:
        warnings.warn(
            f"config.json has no place for {unused[0]} (and {len(unused) - 1} more tensors of the checkpoint): they "
            "are left out, as in transformers; if the model was trained with them, config.json is wrong",
            stacklevel=2,
        )
    apart = stored_apart(bare, tensors)
    if apart:
        for part in (hf_config, hf_config.get_text_config()):
            part.tie_word_embeddings = False
        bare = weights.bare_model(hf_config, torch.float32)
        if stored_apart(bare, tensors):
            raise ModelError(
                f"{apart[0]} and {apart[1]} are one tensor in {type(bare).__name__}, but the checkpoint stores "
                "different values: weights and config belong to different models"
            )
        warnings.warn(
            f"config.json ties {apart[0]} and {apart[1]}, but the checkpoint stores different values: both are used, "
            "as in transformers",
            stacklevel=2,
        )
    return bare, tensors


def _warn_of_unread(file: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{file} states {shown}, which transformers does not read: the export does without, and if the model "
            "needs them it is wrong",
            stacklevel=3,
        )


def _refuse_lost(names: list[str]) -> None:
    if names:
        raise LessExportError(f"the checkpoint lacks {names[0]} (and {len(names) - 1} more): weights and config differ")


def _converted(source: ModelSource, hf_config: Any, survey: weights.Survey) -> dict[str, torch.Tensor]:
    """The missing weights by name: cast, or loaded by transformers where their layout differs (fused experts)."""
    once = {stored: name for name, stored in reversed(survey.castable.items())}  # tied names share a tensor
    tensors = {name: _cast(name, stored) for stored, name in once.items()}
    fused = set(survey.missing) - set(survey.castable)
    if fused:
        loaded = _loaded(source, fused, "auto", hf_config)
        tensors |= {n: t if from_torch(t.dtype) in COMPUTE_DTYPES else t.float() for n, t in loaded.items()}
    return tensors


def _cast(name: str, stored: StoredTensor) -> torch.Tensor:
    """A weight of another dtype as bfloat16, which holds every value of 8 bits, or else float32."""
    if not stored.dtype.startswith("F"):
        warnings.warn(
            f"{name} is stored as {stored.dtype} and read as numbers, as in transformers: if these are codes of a "
            "quantised weight, the model is wrong",
            stacklevel=2,
        )
    return stored.read().to(torch.bfloat16 if stored.dtype.startswith("F8") else torch.float32)


def _loaded(source: ModelSource, names: Collection[str], dtype: str, hf_config: Any = None) -> dict[str, torch.Tensor]:
    """The weights ``names`` as transformers loads them, tied ones once. ``dtype`` may be "auto", the checkpoint's."""
    model = source.load(dtype if dtype == "auto" else torch_dtype(dtype), hf_config)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in names and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def _write(tensors: Mapping[str, torch.Tensor], scratch: Path) -> Path:
    """Write weights that cannot be pointed at (GGUF, fused experts, other dtypes) to a file of the bundle."""
    path = scratch / artifact.CONVERTED_WEIGHTS
    save_file(dict(tensors), path, {"format": "pt"})
    apply_umask(path)  # safetensors makes files that only their owner may read
    return path


def unused_weights(model: PreTrainedModel, unused: Mapping[str, str], is_part: bool) -> list[str]:
    """Which of the floats without a place in ``model`` are weights of a decoder, by their names in the checkpoint.

    Args:
        unused: names in the checkpoint, and the names they would have in ``model``.
        is_part: the checkpoint also has vision or audio parts, whose tensors do not count.
    """
    known = [*map(re.escape, _NO_WEIGHTS), *ignored_keys(model)]
    ignored = re.compile("|".join(f"({p})" for p in known))
    modules = {n for n, _ in model.named_modules()} - {"", model.base_model_prefix}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))

    own = {k: n for k, n in unused.items() if not (ignored.search(k) or ignored.search(n))}
    return [k for k, n in own.items() if not is_part or inside(n)]


def stored_apart(model: PreTrainedModel, tensors: Mapping[str, Stored]) -> list[str]:
    """Names of a parameter of ``model`` that is stored twice, with different values; empty where there is none."""
    for names in weights.tied_names(model):
        first, *others = dict.fromkeys(tensors[n] for n in names)
        if not all(_equal(first, other) for other in others):
            return names
    return []


def _equal(a: Stored, b: Stored) -> bool:
    """Whether the same bytes are stored, in the same dtype."""
    if not (isinstance(a, StoredTensor) and isinstance(b, StoredTensor)) or (a.dtype, a.length) != (b.dtype, b.length):
        return False
    with open(a.file, "rb") as one, open(b.file, "rb") as other:
        one.seek(a.offset)
        other.seek(b.offset)
        for at in range(0, a.length, _PIECE):
            size = min(_PIECE, a.length - at)
            if one.read(size) != other.read(size):
                return False
    return True
