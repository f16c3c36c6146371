"""Running a model on this machine: the device, the dtype, free memory, and its layers over a text."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..dtypes import from_torch
from ..errors import UsageError
from .compat import has_fast_bfloat16


def device(name: str | None) -> str:
    """The device to run on: ``name``, else this process's GPU, else the CPU."""
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.zeros(1, device=name).item()  # fails on meta, which holds no data
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def compute_dtype(config: Any, device: str) -> torch.dtype:
    """Compute dtype of the model while activations are collected: 16 bits if weights and device allow it."""
    stored = from_torch(getattr(config, "dtype", None) or "bfloat16")
    if stored == "float32":
        return torch.float32
    if device == "cpu" and not has_fast_bfloat16():
        return torch.float32
    return torch.bfloat16


def free_memory(device: str) -> int | None:
    """Free bytes of memory on ``device``; None if unknown."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: use the total instead
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def peak_memory(device: str) -> int | None:
    """The most bytes of memory that this process has taken so far: of ``device`` if it is a GPU; None if unknown."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        return None


def position_ids(ids: Tensor, rotates: bool = True) -> Tensor:
    """Positions of whole sequences ``ids`` [B,T]; all 0 for a model that leaves the rotation to attention."""
    steps = torch.arange(ids.shape[1], device=ids.device) * rotates
    return steps[None].expand(len(ids), -1)


def run_decoder(model: PreTrainedModel, ids: Tensor, rotates: bool = True) -> None:
    """Run the layers of a model over ``ids`` [B,T]; its logits are not computed.

    ``rotates``: as in :func:`position_ids`.
    """
    decoder = getattr(model, model.base_model_prefix, model)
    decoder(input_ids=ids, position_ids=position_ids(ids, rotates), use_cache=False)
