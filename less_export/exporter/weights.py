"""Weights that are never copied: where each parameter's bytes lie, and models made without them.

A safetensors file is a header and raw tensors, so an ONNX initializer can point into it. The model is
built with one-element parameters stretched to their shapes (stride 0), traced, and its initializers are
bound to the checkpoint's byte ranges, behind a Cast where the graph computes in another dtype.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import ModelError
from ..sources import TEXT_PART

_ONNX_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: ``offset`` and ``length`` are bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self) -> torch.Tensor:
        """The tensor itself, mapped from the file and not to be written to."""
        dtype = _TORCH_DTYPES[self.dtype]
        if self.length == 0:
            return torch.empty(self.shape, dtype=dtype)
        count = self.length // dtype.itemsize
        if self.offset % dtype.itemsize:
            raw = torch.from_file(str(self.file), shared=False, size=self.offset + self.length, dtype=torch.uint8)
            return raw[self.offset :].clone().view(dtype).view(self.shape)
        raw = torch.from_file(str(self.file), shared=False, size=self.offset // dtype.itemsize + count, dtype=dtype)
        return raw[-count:].view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name; raises :class:`ModelError` for a damaged file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            if 8 + length + end > size:
                raise ValueError(f"'{name}' reaches past the end of the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path.name} is corrupt or truncated ({error}): download it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype in _TORCH_DTYPES:
            expected = math.prod(tensor.shape) * _TORCH_DTYPES[tensor.dtype].itemsize
            if expected != tensor.length:
                raise ModelError(f"{path.name} is corrupt: '{name}' has {tensor.length} bytes, not {expected}")
    return tensors


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, single or sharded."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index.name} is not a usable index ({error}): download it again") from error
        files = [folder / str(n) for n in names]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].exists():
            files = sorted(folder.glob("*.safetensors"))
    missing = [f.name for f in files if not f.exists()]
    if missing or not files:
        kinds = sorted(p.suffix for p in folder.glob("*.bin")) and " (convert pytorch .bin files to safetensors first)"
        what = f"{missing[0]} is missing" if missing else "no .safetensors file"
        raise ModelError(f"{folder}: {what}{kinds or ''}")
    return files


def locate(model: PreTrainedModel, files: list[Path]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Where the parameters (and saved buffers) of ``model`` lie in a checkpoint.

    Returns the tensors by parameter name, tied names included, and the names that are not stored as they
    are needed (fused experts, other dtypes): those must be converted and copied. The names follow
    transformers' own renaming rules.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model, key_mapping=TEXT_PART)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    wanted: dict[str, torch.Tensor] = dict(model.state_dict())
    found: dict[str, StoredTensor] = {}
    for path in files:
        for key, tensor in read_header(path).items():
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = key, None
            if pattern is None and name in wanted and tensor.dtype in _ONNX_DTYPES:
                if tensor.shape != tuple(wanted[name].shape):
                    raise ModelError(
                        f"{path.name}: '{key}' is {list(tensor.shape)}, config.json makes it "
                        f"{list(wanted[name].shape)}: weights and config belong to different models"
                    )
                found[name] = tensor
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        source = next((found[n] for n in names if n in found), None)
        if source is not None:
            found.update(dict.fromkeys((n for n in names if n not in found), source))
    return found, [n for n in wanted if n not in found]


def layer_kinds(text: Any) -> list[str]:
    """What a config says of each of its layers; equal words, equal layers."""
    count = text.num_hidden_layers
    lists, single = _lists(text), _overrides(text)
    own = count - _shared_layers(text)
    return [repr([*(v[i] for v in lists.values()), single.get(i), i >= own]) for i in range(count)]


def keep_layers(text: Any, indices: list[int]) -> None:
    """Reduce a config to some of its layers, with what it says of each."""
    lists, single = _lists(text), _overrides(text)
    own = text.num_hidden_layers - _shared_layers(text)
    for name, values in lists.items():
        setattr(text, name, [values[i] for i in indices])
    if own < text.num_hidden_layers:
        text.num_kv_shared_layers = sum(i >= own for i in indices)
    text.num_hidden_layers = len(indices)
    if single:
        text.per_layer_config = {new: single[old] for new, old in enumerate(indices) if old in single}


def _lists(text: Any) -> dict[str, list[Any]]:
    """The lists of a config with one value a layer."""
    return {n: v for n, v in vars(text).items() if isinstance(v, list) and len(v) == text.num_hidden_layers}


def _overrides(text: Any) -> dict[int, dict[str, Any]]:
    """What single layers of a config have otherwise than the rest (heads of Gemma 4)."""
    return {int(i): v for i, v in (text.to_dict().get("per_layer_config") or {}).items()}


def _shared_layers(text: Any) -> int:
    """How many of the last layers take the keys and values of earlier ones (Gemma 4)."""
    return int(getattr(text, "num_kv_shared_layers", None) or 0)


def bare_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A decoder whose parameters have shapes but no memory; buffers (rotary tables) are real."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)  # from_config writes dtype and attention into the one it is given
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.tie_weights()
    stretched: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = stretched.setdefault(id(parameter), _stretch(parameter))
    return model.eval()


def _stretch(like: torch.Tensor) -> nn.Parameter:
    """A parameter of the same shape and dtype over a single element."""
    return nn.Parameter(torch.zeros(1, dtype=like.dtype).expand(like.shape), requires_grad=False)


def fill(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Give a bare model its real weights, in each parameter's own dtype (tied parameters stay tied)."""
    filled: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in filled:
                source = tensors[f"{prefix}.{name}" if prefix else name]
                filled[id(parameter)] = nn.Parameter(source.read().to(parameter.dtype), requires_grad=False)
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            stored = tensors.get(f"{prefix}.{name}" if prefix else name)
            if buffer is not None and stored is not None:
                module._buffers[name] = stored.read().to(buffer.dtype)


def bind(model: ir.Model, tensors: Mapping[str, StoredTensor], names: Mapping[Path, str], folder: Path) -> None:
    """Point the initializers named in ``tensors`` at their bytes.

    ``names`` gives each weight file's name inside ``folder``, where the graph will lie. An initializer
    stored in another dtype than the graph's gets a Cast, which ONNX Runtime and TensorRT fold at load.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        stored = tensors.get(name)
        if stored is None:
            continue
        dtype = _ONNX_DTYPES[stored.dtype]
        shape = ir.Shape(stored.shape)
        external = ir.ExternalTensor(
            names[stored.file], stored.offset, stored.length, dtype, name=name, shape=shape, base_dir=folder
        )
        assert value.dtype is not None
        if dtype == value.dtype:
            value.const_value = external
            continue
        raw = ir.Value(name=f"{name}.stored", shape=shape, type=ir.TensorType(dtype), const_value=external)
        cast = ir.node("Cast", [raw], attributes={"to": value.dtype}, name=f"{name}.cast")
        cast.outputs[0].shape, cast.outputs[0].type = shape, ir.TensorType(value.dtype)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        graph.initializers[raw.name or ""] = raw
        graph.insert_before(graph[0], cast)
