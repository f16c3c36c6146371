"""Which of two sets of buffers holds each row, for backends whose steps read one set and write the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class RowSides:
    """The set, 0 or 1, that holds the current state of each row.

    A step over a range of rows flips that range only. Rows that are stepped together must be in the same set, so
    those in the minority move by a copy of their state: once, when a row joins others.
    """

    def __init__(self, rows: int) -> None:
        self._sides: npt.NDArray[np.int8] = np.zeros(rows, np.int8)

    def __getitem__(self, row: int) -> int:
        return int(self._sides[row])

    def __setitem__(self, row: int, side: int) -> None:
        self._sides[row] = side

    def meeting(self, first: int, count: int) -> tuple[int, list[int]]:
        """The set in which rows ``first`` to ``first + count - 1`` should meet, and those that have to move there."""
        sides = self._sides[first : first + count]
        side = int(2 * np.count_nonzero(sides) > count)
        return side, [first + int(i) for i in np.flatnonzero(sides != side)]

    def flip(self, first: int, count: int) -> None:
        """Rows ``first`` to ``first + count - 1`` are now in the other set."""
        self._sides[first : first + count] ^= 1
