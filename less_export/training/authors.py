"""Kernels from the LESS authors' checkpoints, one ``layer_{i}.pth`` a layer, as parametrisation ``paper``.

Their layers hold q matrices [heads, D, hidden] and [heads, hidden, R], the same for k (one shared set of plain
linear layers where a single KV head serves all), an interaction [heads, R, R] and two scales [1, heads, 1, R].
The scale of their psi is arbitrary and starts at 1e-4, too small for 16-bit slots. It is normalised to one per head,
and log phi takes up the constant, so that phi(q) psi(k) does not change.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.files import sha256
from ..contract import Heads
from ..errors import KernelError
from ..hf.model import open_architecture
from ..hf.sources import resolve
from ..less.feature_maps import Kernels, PaperMap

_FILE = re.compile(r"layer_(\d+)\.pth$")


def import_folder(folder: Path, model: str, out: Path) -> tuple[int, ...]:
    """Read every ``layer_{i}.pth`` in ``folder`` and write a kernel file; returns the layers.

    Raises:
        KernelError: there are no such files, or the authors' training did not write them, or they do not fit ``model``.
    """
    files = {int(m[1]): p for p in sorted(folder.glob("layer_*.pth")) if (m := _FILE.search(p.name))}
    if not files:
        raise KernelError(f"{folder} holds no layer_0.pth, layer_1.pth, ...: give the folder of the checkpoints")
    source = resolve(model)
    heads = [x.heads for x in open_architecture(source).layers]
    if max(files) >= len(heads):
        raise KernelError(f"{files[max(files)].name}, but {model} has {len(heads)} layers: wrong model or folder")
    maps = {i: read_layer(p, heads[i]) for i, p in sorted(files.items())}
    kernels = Kernels(maps, {"model": source.name, "imported": {p.name: sha256(p) for p in files.values()}})
    kernels.check(heads)
    try:
        kernels.save(out)
    except OSError as error:
        raise KernelError(f"cannot write {out}: {error.strerror or error}") from error
    return tuple(maps)


def read_layer(path: Path, heads: Heads) -> PaperMap:
    """One checkpoint as a feature map for a layer with ``heads``.

    Raises:
        KernelError: the file is damaged or does not fit the heads; names the tensor.
    """
    try:
        # weights_only: a pickle that holds anything but tensors is refused, not executed.
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise KernelError(f"{path} is not a checkpoint of tensors ({_first_line(error)})") from None
    if not isinstance(saved, dict):
        raise KernelError(f"{path} holds a {type(saved).__name__}, not a state dict")

    def tensor(name: str) -> Tensor:
        value = saved.get(name)
        if value is None and name + ".weight" in saved:  # a linear layer, which stores its matrix transposed
            value = saved[name + ".weight"].T[None]
        if not isinstance(value, Tensor):
            raise KernelError(f"{path} lacks {name}: not written by the authors' training")
        return value.detach().float()

    rank, hidden = tensor("kernel_q_mat2").shape[-1], tensor("kernel_q_mat1").shape[-1]
    scale = tensor("scalingD")[0]  # [Hk,1,R]
    gain = 1 / scale.abs().mean(-1, keepdim=True).clamp(min=1e-30)
    parts = {
        "q_in": tensor("kernel_q_mat1"),
        "q_out": tensor("kernel_q_mat2"),
        "q_offset": -gain.log().repeat_interleave(max(1, heads.query_heads // max(1, len(gain))), 0),
        "k_in": tensor("kernel_k_mat1"),
        "k_out": tensor("kernel_k_mat2"),
        "k_interaction": tensor("interaction_k"),
        "k_scale": scale,
        "k_scale_interaction": tensor("scalingD2")[0],
        "k_gain": gain,
    }
    feature_map = PaperMap(heads, rank, hidden)
    for name, shape in PaperMap.shapes(heads, rank, hidden).items():
        if parts[name].shape != shape:
            raise KernelError(f"{path}: {name} has shape {list(parts[name].shape)}, the model needs {list(shape)}")
        if not bool(parts[name].isfinite().all()):
            raise KernelError(f"{path}: {name} holds NaN or inf")
        feature_map.get_parameter(name).data = parts[name].contiguous()
    return feature_map


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
