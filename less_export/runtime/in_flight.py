"""The step that the device runs while the host goes on, and the rows that such a step leaves undefined if it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable

from ..errors import BackendError
from .trt_device import Device


class InFlight:
    """A step that was queued and not waited for, and the rows of earlier ones that have failed.

    A step that is waited for at once reports its failure itself. That of one in flight is reported by :meth:`wait`,
    until the next step, and by every use of its rows until they are written. Other rows are not touched by it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rows: tuple[int, ...] = ()
        self._failure: BackendError | None = None
        self._undefined: dict[int, BackendError] = {}

    def begin(self, rows: Iterable[int]) -> None:
        """A step of these rows is in flight; there was none."""
        self._rows = tuple(rows)

    def wait(self) -> None:
        """Wait for the device; raises :class:`BackendError` if it fails, or the step that was in flight has failed."""
        rows, self._rows = self._rows, ()
        try:
            self._device.wait()
        except BackendError as error:
            if rows:
                self._failure = error
                self._undefined.update(dict.fromkeys(rows, error))
            raise
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait for the step in flight, if there is one; does not say whether it has failed."""
        if self._rows:
            with contextlib.suppress(BackendError):
                self.wait()

    def end(self) -> None:
        """Before another step: this one is done, and its logits are gone."""
        self.finish()
        self._failure = None

    def check(self, rows: Iterable[int]) -> None:
        """Raise :class:`BackendError` if the state of one of these rows is undefined."""
        for row in rows:
            error = self._undefined.get(row)
            if error is not None:
                raise BackendError(
                    f"an earlier step failed, and the state of row {row} is undefined: "
                    f"write, reset or copy over it ({error})"
                ) from error

    def written(self, rows: Collection[int]) -> None:
        """The state of these rows was written anew."""
        for row in rows:
            self._undefined.pop(row, None)

    def close(self) -> None:
        """The rows are gone."""
        self.end()
        self._undefined.clear()
