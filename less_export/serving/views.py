"""What the states of running requests hold, for whoever asked for a live view with the request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from ..contract import Contract
from ..errors import UsageError
from ..runtime.backend import Backend
from ..runtime.sequence import Sequence
from ..runtime.tokenizer import Tokenizer
from ..view.occupancy import Occupancy, Pieces, view

#: Views that are kept: the texts of these requests stay in memory after their end.
MOST_VIEWS = 32


class NoSuchViewError(UsageError):
    """The request asked for no view, or later ones took its place."""


class LiveView:
    """What one sequence's state holds.

    The row is read where the engine's thread shows it, between two steps: once for each look at the view, and at the
    sequence's end.
    """

    def __init__(self, sequence: Sequence, contract: Contract, tokenizer: Tokenizer | None) -> None:
        self._sequence: Sequence | None = sequence
        self._prompt, self._said, self._contract = sequence.prompt, sequence.token_ids, contract
        self._first = 0 if sequence.prefix is None else sequence.prefix.length
        self._pieces = Pieces(tokenizer)
        self._latest: Occupancy | None = None
        self._wanted = True
        self._lock = threading.Lock()  # of the pieces: two may look at a time
        sequence.observer = self._observe

    def _observe(self, backend: Backend, row: int) -> None:
        sequence = self._sequence
        if sequence is not None and (self._wanted or not sequence.active):
            self._wanted = False
            self._latest = Occupancy.read(backend, row)

    def close(self) -> None:
        """Nothing more will come. The view outlives its sequence, whose state may take a hundred megabytes."""
        self._sequence = None

    def content(self, layer: int | None) -> dict[str, Any]:
        """The latest look, with the positions of ``layer``; ``final`` if there will be no later one.

        Raises:
            UsageError: no such layer.
        """
        if layer is not None and not 0 <= layer < len(self._contract.layers):
            raise UsageError(f"layer must lie in 0..{len(self._contract.layers) - 1}")
        sequence = self._sequence
        final = sequence is None or not sequence.active
        latest, self._wanted = self._latest, True
        if latest is None:
            return {"final": final}
        with self._lock:
            known = len(self._pieces.texts)
            ids = [*self._prompt, *self._said][known : latest.length - self._first]
            self._pieces.extend(ids)
            texts = self._pieces.texts[: latest.length - self._first]
        layers = () if layer is None else (layer,)
        return {**view(latest, self._contract, texts, first=self._first, layers=layers), "final": final}


class Views:
    """The latest views, by the ids of their replies. Of the event loop."""

    def __init__(self) -> None:
        self._views: OrderedDict[str, LiveView] = OrderedDict()

    def add(self, name: str, live: LiveView) -> None:
        """Keep a view, in the place of the oldest one if there are too many."""
        self._views[name] = live
        while len(self._views) > MOST_VIEWS:
            self._views.popitem(last=False)

    def get(self, name: str) -> LiveView:
        """The view of a reply.

        Raises:
            NoSuchViewError: there is none.
        """
        try:
            return self._views[name]
        except KeyError:
            raise NoSuchViewError("no such view: ask for one with live_view, and look soon") from None
