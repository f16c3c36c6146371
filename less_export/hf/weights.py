"""Weights that are never copied: where each parameter's bytes are, and models built without them.

A safetensors file is a header and raw tensors, so a parameter is a byte range. A bare model has one-element
parameters stretched to their shapes (stride 0). Quantised weights are stored in a file of the bundle as codes and
scales.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import dtypes
from ..errors import ModelError, one_line
from .compat import Naming, quiet_transformers
from .sources import TEXT_PART

#: Dtypes of weights that can be used as stored, by their names in safetensors.
FLOATS = tuple(dtypes.DTYPES[n].safetensors for n in dtypes.COMPUTE_DTYPES)
#: Dtypes of a bundle's weights, as torch dtypes; the integers are codes of quantised weights.
DTYPES = {dtypes.DTYPES[n].safetensors: dtypes.torch_dtype(n) for n in (*dtypes.COMPUTE_DTYPES, "int8", "uint8")}
#: Every other dtype that transformers casts to the model's, as torch dtypes.
CAST_DTYPES = {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file: ``offset`` and ``length`` are bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self) -> torch.Tensor:
        """The tensor, mapped from the file: do not write to it."""
        dtype = DTYPES.get(self.dtype) or CAST_DTYPES[self.dtype]
        if self.length == 0:
            return torch.empty(self.shape, dtype=dtype)
        count = self.length // dtype.itemsize
        if self.offset % dtype.itemsize:
            raw = torch.from_file(str(self.file), shared=False, size=self.offset + self.length, dtype=torch.uint8)
            return raw[self.offset :].clone().view(dtype).view(self.shape)
        raw = torch.from_file(str(self.file), shared=False, size=self.offset // dtype.itemsize + count, dtype=dtype)
        return raw[-count:].view(self.shape)


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight matrix as codes [in, out] and float32 scales [in / block, out]: ``weight = code * scale``.

    Codes are int8, or int4 two to a byte (dtype ``U8``), the even column in the low bits, as ONNX packs them.
    ``transposed``: the parameter is [out, in], as that of ``nn.Linear``.
    """

    codes: StoredTensor
    scales: StoredTensor
    transposed: bool

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def packed(self) -> bool:
        """Whether the codes are int4."""
        return self.codes.dtype == "U8"

    @property
    def matrix(self) -> tuple[int, int]:
        """(in, out)"""
        rows, columns = self.codes.shape
        return rows, columns * (2 if self.packed else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.matrix[:: -1 if self.transposed else 1]

    @property
    def block(self) -> int:
        """Input features that share a scale."""
        return self.matrix[0] // self.scales.shape[0]

    def read(self) -> torch.Tensor:
        """The dequantised parameter, float32, a tensor of its own."""
        codes = self.codes.read()
        if self.packed:
            codes = torch.stack([codes << 4, codes & 0xF0], -1).view(torch.int8).flatten(1) >> 4
        blocks = codes.view(-1, self.block, self.matrix[1]).float() * self.scales.read()[:, None]
        weight = blocks.view(self.matrix)
        return weight.T.contiguous() if self.transposed else weight


Stored = StoredTensor | QuantisedTensor
#: Suffixes of a quantised weight's codes, by whether they are transposed, and of its scales.
CODES, SCALES = {False: ".codes", True: ".codes.T"}, ".scales"
#: What safetensors' own messages about a header begin with.
_DESERIALISING = "Error while deserializing header: "


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file by name, the codes and scales of a quantised weight as one."""
    header = read_header(path)
    tensors: dict[str, Stored] = dict(header)
    for key, codes in header.items():
        for transposed, suffix in CODES.items():
            name = key.removesuffix(suffix)
            if key.endswith(suffix) and _belong(codes, header.get(name + SCALES)):
                tensors[name] = QuantisedTensor(tensors.pop(key), tensors.pop(name + SCALES), transposed)  # type: ignore[arg-type]
    return tensors


def _belong(codes: StoredTensor, scales: StoredTensor | None) -> bool:
    """Whether these are the codes and scales of one matrix; other checkpoints may use these names for other tensors."""
    if scales is None or codes.dtype not in ("I8", "U8") or scales.dtype != "F32":
        return False
    if len(codes.shape) != 2 or len(scales.shape) != 2:
        return False
    columns = codes.shape[1] * (2 if codes.dtype == "U8" else 1)
    return scales.shape[1] == columns and scales.shape[0] > 0 and codes.shape[0] % scales.shape[0] == 0


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file by name.

    Raises:
        ModelError: the safetensors library refuses the file, or two of its tensors have the same name.
    """
    try:
        with safe_open(path, "np"):  # checks the header: dtypes, shapes, offsets without holes, the file's size
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (OSError, SafetensorError, ValueError, RecursionError, struct.error) as error:
        reason = str(getattr(error, "strerror", None) or error).removeprefix(_DESERIALISING)
        raise ModelError(f"{path.name} is corrupt or truncated ({one_line(reason)}): download it again") from error
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of ``pairs``; safetensors reads the last of two equal names, and its format forbids them."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries have the name {next(n for n in names if names.count(n) > 1)!r}")
    return values


@dataclass(frozen=True)
class Survey:
    """The tensors of a model in a checkpoint's files.

    ``tensors`` by parameter name, tied names included. ``missing`` names are not stored in the form that
    is needed; those that are also ``convertible`` are stored in another layout (fused experts), those in ``castable``
    in a dtype that has to be cast. ``unused``: floats without a place in the model, by their names in the files, and
    the names they would have in the model.
    """

    tensors: dict[str, Stored]
    missing: list[str]
    convertible: set[str]
    castable: dict[str, StoredTensor]
    unused: dict[str, str]


def locate(model: PreTrainedModel, files: list[Path]) -> tuple[dict[str, Stored], list[str]]:
    """Where the parameters (and saved buffers) of ``model`` are stored, and the names of those that are missing."""
    result = survey(model, files)
    return result.tensors, result.missing


def survey(model: PreTrainedModel, files: list[Path]) -> Survey:
    """Compare the names and shapes in ``files`` with ``model``'s, by transformers' own renaming rules.

    Raises:
        ModelError: a damaged file, or another shape.
    """
    naming = Naming.of(model, TEXT_PART)
    wanted: dict[str, torch.Tensor] = dict(model.state_dict())
    tensors: dict[str, Stored] = {}
    convertible: set[str] = set()
    castable: dict[str, StoredTensor] = {}
    unused: dict[str, str] = {}
    for path in files:
        for key, stored in stored_tensors(path).items():
            name, converted = naming.rename(key, wanted)
            if name not in wanted and key in wanted:
                name, converted = key, []
            if name not in wanted:
                if isinstance(stored, StoredTensor) and stored.dtype.startswith(("F", "BF")):
                    unused[key] = name
                continue
            if converted:
                convertible.update(converted)
                continue
            if stored.shape != tuple(wanted[name].shape):
                raise ModelError(
                    f"{path.name}: '{key}' is {list(stored.shape)}, config.json makes it "
                    f"{list(wanted[name].shape)}: weights and config belong to different models"
                )
            if not isinstance(stored, QuantisedTensor) and stored.dtype not in FLOATS:
                if stored.dtype not in DTYPES and stored.dtype not in CAST_DTYPES:
                    raise ModelError(f"{path.name}: '{key}' has dtype {stored.dtype}, which no weight can have")
                castable[name] = stored
                continue
            tensors[name] = stored
    for names in tied_names(model):
        source = next((tensors[n] for n in names if n in tensors), None)
        if source is not None:
            tensors.update(dict.fromkeys((n for n in names if n not in tensors), source))
        if not convertible.isdisjoint(names):
            convertible.update(names)
        cast = next((castable[n] for n in names if n in castable), None)
        if cast is not None:
            castable.update(dict.fromkeys((n for n in names if n not in castable), cast))
    return Survey(tensors, [n for n in wanted if n not in tensors], convertible, castable, unused)


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """The names of every parameter."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(tensor), []).append(name)
    return list(owners.values())


def bare_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A decoder whose parameters have shapes but no memory; buffers (rotary tables) are real."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)  # from_config writes dtype and attention into its argument
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.tie_weights()
    stretched: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, stretched.setdefault(id(parameter), _stretch(parameter)))
    return model.eval()


def _stretch(like: torch.Tensor) -> nn.Parameter:
    """A parameter of the same shape and dtype backed by a single element."""
    return nn.Parameter(torch.zeros(1, dtype=like.dtype).expand(like.shape), requires_grad=False)


def untie(model: PreTrainedModel) -> None:
    """Give the output embedding of a bare model a parameter of its own."""
    head = model.get_output_embeddings()
    head.weight = _stretch(head.weight)


def fill(model: nn.Module, tensors: Mapping[str, Stored]) -> None:
    """Give a bare model its real weights, in each parameter's own dtype.

    Tied parameters stay tied, unless they are stored apart (a quantised output embedding).
    """
    filled: dict[tuple[int, Stored], nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            source = tensors[f"{prefix}.{name}" if prefix else name]
            key = (id(parameter), source)
            if key not in filled:
                filled[key] = nn.Parameter(source.read().to(parameter.dtype), requires_grad=False)
            setattr(module, name, filled[key])
        for name, buffer in list(module.named_buffers(recurse=False)):
            stored = tensors.get(f"{prefix}.{name}" if prefix else name)
            if stored is not None:
                setattr(module, name, stored.read().to(buffer.dtype))
