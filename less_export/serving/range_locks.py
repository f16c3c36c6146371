"""Locks of names between the processes that share a folder."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

#: ``struct flock`` of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


class RangeLocks:
    """A lock for each name, as one byte of a file that is empty.

    Locks are those of an open file: they end with the process that has them, however it ends, and leave nothing behind.
    On file systems without such locks every name is free.

    Raises:
        OSError: the file cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, name: str) -> bool:
        """Lock a name of hexadecimal digits; False if another process, or another object here, has it."""
        try:
            self._set(fcntl.F_WRLCK, name)
        except (BlockingIOError, PermissionError):  # the two that POSIX allows
            return False
        except OSError:  # this file system has no locks
            return True
        return True

    def leave(self, name: str) -> None:
        """Unlock a name."""
        try:
            self._set(fcntl.F_UNLCK, name)
        except OSError:
            return

    def _set(self, kind: int, name: str) -> None:
        byte = int(name[:15], 16)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))

    def __del__(self) -> None:
        os.close(self._file)
