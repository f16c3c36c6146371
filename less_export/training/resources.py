"""Disk space, reserved before training begins, and the memory of gradients."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

#: Bytes written at a time where a file system cannot reserve space.
_PIECE = 1 << 20


def reserve(path: Path, size: int) -> None:
    """Create ``path`` with ``size`` bytes of disk space allocated.

    A write to a sparse file through its mapping would kill the process when the disk is full.

    Raises:
        OSError: not enough disk space, or ``path`` cannot be written.
    """
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        except AttributeError:  # not POSIX
            pass
        else:
            return
        for begin in range(0, size, _PIECE):
            file.write(bytes(min(_PIECE, size - begin)))


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the gradients of what ``run`` computes, without the parameters of ``model``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # lives until all is counted, so that no two storages have the same address
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())
