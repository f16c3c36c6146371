"""A prompt on its way into a row, and the sequences that begin with it."""

from __future__ import annotations

from dataclasses import dataclass

from .sequence import Sequence


@dataclass(eq=False)
class Prefill:
    """A prompt that is fed in ``row``, for the first of ``sequences``, which has that row, and for its twins."""

    row: int
    sequences: list[Sequence]

    @property
    def leader(self) -> Sequence:
        return self.sequences[0]

    def is_for(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` begins with the same tokens."""
        return sequence.prefix is self.leader.prefix and sequence.prompt == self.leader.prompt

    def drop(self, sequence: Sequence) -> bool:
        """Go on without one of the sequences, the next one in the place of the first; False if none is left."""
        fed = self.leader.fed
        self.sequences.remove(sequence)
        sequence.row = None
        if self.sequences:
            self.leader.row, self.leader.fed = self.row, fed
        return bool(self.sequences)
