"""Disk space, reserved before training begins."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
