"""Memory and disk that a training takes, asked for before it begins."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

#: Bytes written at a time where a file system cannot reserve space.
_PIECE = 1 << 20


def free_memory(device: str) -> int | None:
    """Bytes of memory that can still be taken on ``device``; None where nothing tells."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all memory there is
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def reserve(path: Path, size: int) -> None:
    """Make ``path`` a file of ``size`` bytes that the disk truly has: a full one kills whoever writes to a sparse
    file through its mapping.

    Raises:
        OSError: it has not.
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
