"""The base class of all backends: lifecycle, checks against the contract, and the state of each row.

A backend owns the state of ``batch`` rows. :meth:`Backend.step` is a template method: it checks its
arguments, lets the subclass run the graph, and advances the lengths. Subclasses implement the five
abstract methods; ``_copy_row``, ``_reset_rows`` and ``_read_tensors`` may be replaced by faster ones.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..contract import Contract, StateTensor
from ..dtypes import numpy_dtype
from ..errors import BackendError, UsageError
from .row_state import MAX_LENGTH, Array, RowState
from .sampler import KeptLogits

State = dict[str, Array]


class Backend(abc.ABC):
    """Runs one artifact and owns its state.

    Rows are independent sequences. A row with ``new_length = 0`` is parked: its state does not change.
    ``past_length`` [batch] i32 is the number of tokens each row has seen.

    A backend belongs to one thread at a time: while a thread is inside one of its methods, the methods raise
    :class:`UsageError` in every other thread. Open a backend per thread, or take turns. ``with
    backend.exclusive():`` holds it for several calls.
    """

    name: ClassVar[str]
    #: True where a step takes exactly one token or exactly ``chunk`` (padding included).
    fixed_chunk: ClassVar[bool] = False
    #: True where a step takes any rows, in any order; elsewhere they are adjacent. Subclasses may decide by object.
    rows_by_index: bool = False

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        #: Identifies the bundle; saved states carry it, so that no other model continues them.
        self.identity = ""
        #: Counts the changes of the state, so that a stream notices when something else used its rows.
        self.revision = 0
        self.past_length: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._warned = False
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the backend for this thread, which may do so more than once.

        Raises:
            UsageError: another thread holds it.
        """
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                f"another thread is using this {self.name} backend: open a generator per thread, or take turns"
            )
        try:
            yield
        finally:
            self._lock.release()

    # ------------------------------------------------------------ lifecycle

    @property
    def batch(self) -> int:
        """Number of open rows; 0 before :meth:`open` and after :meth:`close`."""
        return len(self.past_length)

    def open(self, batch: int = 1) -> None:
        """Allocate the state of ``batch`` empty rows; opening again discards the previous state.

        Raises:
            BackendError: ``batch`` is outside 1..max_batch.
        """
        if not 1 <= batch <= self.contract.max_batch:
            raise BackendError(
                f"batch {batch} is outside 1..{self.contract.max_batch}: "
                "use fewer prompts at a time or export with a larger --max-batch"
            )
        with self.exclusive():
            self.revision += 1
            self.past_length = np.zeros(0, np.int32)
            self._open(batch)
            self.past_length = np.zeros(batch, np.int32)

    def close(self) -> None:
        """Release the state; the backend can be opened again."""
        with self.exclusive():
            self.revision += 1
            self.past_length = np.zeros(0, np.int32)
            self._close()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------ running

    def step(
        self,
        input_ids: npt.ArrayLike,
        new_length: npt.ArrayLike | None = None,
        rows: slice | Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Feed one chunk and advance the state.

        Args:
            input_ids: [B, T] token ids, padded on the right, 1 <= T <= chunk.
            new_length: [B] valid tokens of each row, 0..T; default T for every row.
            rows: the B rows that run, default all: adjacent ones, as ``slice(2, 4)`` or ``[2, 3]``, and with
                :attr:`rows_by_index` any distinct ones, in any order. The other rows neither change nor cost anything.

        Returns:
            logits [B, 1, V] f32 after each row's last valid token ([B, T, V] for ``--logits all``);
            those of a parked row are finite but meaningless.

        Raises:
            BackendError: a wrong shape, token id, length or choice of rows, or a sequence longer than the artifact
                supports.
        """
        with self.exclusive():
            chosen = self._chosen(rows)
            past = self.past_length[chosen]
            ids, new = self._checked(input_ids, new_length, past)
            self.revision += 1
            logits = self._step(ids, past, new, chosen)
            lengths = self.past_length.copy()
            lengths[chosen] += new
            self.past_length = lengths
            return logits

    def step_last(
        self,
        input_ids: npt.NDArray[np.int64],
        new_length: npt.NDArray[np.int64],
        rows: slice | Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32] | KeptLogits:
        """As :meth:`step`, for the logits [B, V] f32 after each row's last valid token.

        A backend may keep them on its device; they are gone with the next step then. It need not wait for the step
        either: what fails later is said by the choice from the logits, and by every use of the rows until they are
        written.
        """
        logits = self.step(input_ids, new_length, rows)
        return logits[np.arange(len(logits)), self._last(new_length)]

    def _last(self, new_length: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the logits after each row's last valid token are along T."""
        return np.zeros_like(new_length) if self.contract.logits == "last" else np.maximum(new_length, 1) - 1

    def _chosen(self, rows: slice | Sequence[int] | None) -> npt.NDArray[np.int32]:
        """The rows of a step."""
        if self.batch == 0:
            raise BackendError(f"the {self.name} backend is not open: call open(batch) first")
        if rows is None:
            return np.arange(self.batch, dtype=np.int32)
        if isinstance(rows, slice):
            first = 0 if rows.start is None else rows.start
            end = self.batch if rows.stop is None else rows.stop
            if rows.step not in (None, 1) or not 0 <= first < end <= self.batch:
                raise BackendError(f"rows must be a range of adjacent rows within 0..{self.batch - 1}, not {rows}")
            return np.arange(first, end, dtype=np.int32)
        chosen = _integers("rows", rows)
        distinct = chosen.ndim == 1 and 0 < len(chosen) == len(np.unique(chosen))
        if not distinct or chosen.min() < 0 or chosen.max() >= self.batch:
            raise BackendError(f"rows must be distinct rows within 0..{self.batch - 1}, not {chosen.tolist()}")
        if not self.rows_by_index and (np.diff(chosen) != 1).any():
            raise BackendError(f"the {self.name} backend runs adjacent rows in order, not {chosen.tolist()}")
        return chosen.astype(np.int32)

    def _checked(
        self, input_ids: npt.ArrayLike, new_length: npt.ArrayLike | None, past: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        def require(ok: bool, why: str) -> None:
            if not ok:
                raise BackendError(why)

        ids = _integers("input_ids", input_ids)
        rows = len(past)
        require(
            ids.ndim == 2 and ids.shape[0] == rows and ids.shape[1] > 0,
            f"input_ids must be [{rows}, T], not {list(ids.shape)}",
        )
        chunk = self.contract.chunk
        require(ids.shape[1] <= chunk, f"a step takes at most {chunk} tokens (--chunk), not {ids.shape[1]}")
        new = _integers("new_length", ids.shape[1] if new_length is None else new_length)
        if new.ndim == 0:
            new = np.full(rows, new)
        require(new.shape == (rows,), f"new_length must be [{rows}], not {list(new.shape)}")
        require(bool(((new >= 0) & (new <= ids.shape[1])).all()), f"new_length must lie in 0..{ids.shape[1]}")
        is_valid = np.arange(ids.shape[1]) < new[:, None]
        valid_ids, highest_id = ids[is_valid], self.contract.vocab_size - 1
        require(bool(((valid_ids >= 0) & (valid_ids <= highest_id)).all()), f"token ids must lie in 0..{highest_id}")
        limit = self.contract.token_limit()
        limit = MAX_LENGTH if limit is None else limit
        longest = int((past + new).max())  # in int64
        require(
            longest <= limit,
            f"this artifact takes sequences of at most {limit} tokens, not {longest}: "
            "shorten the text, or export with a larger --context or an evicting --policy",
        )
        trained = self.contract.known_length()
        if trained is not None and longest > trained and not self._warned:
            self._warned = True
            warnings.warn(f"past the {trained} positions the model was trained for: quality may suffer", stacklevel=3)
        # Padding may hold any value, but the embedding still looks it up: make it a valid id.
        ids = np.where(is_valid, ids, 0)
        return ids, new.astype(np.int32)

    # ------------------------------------------------------------ rows of state

    def reset_rows(self, rows: Sequence[int]) -> None:
        """Empty these rows: each starts a new sequence."""
        with self.exclusive():
            for row in rows:
                self._check_row(row)
            self.revision += 1
            self._reset_rows(rows)
            self.past_length[list(rows)] = 0

    def copy_row(self, source: int, target: int) -> None:
        """Copy the state of row ``source`` to row ``target``."""
        with self.exclusive():
            self._check_row(source)
            self._check_row(target)
            self.revision += 1
            if source != target:
                self._copy_row(source, target)
                self.past_length[target] = self.past_length[source]

    def read_row(self, row: int) -> RowState:
        """A copy of one row's state."""
        with self.exclusive():
            self._check_row(row)
            return RowState(int(self.past_length[row]), self._read_row(row), self.identity)

    def read_fields(self, row: int, fields: Collection[str]) -> list[State]:
        """Copies of some fields of one row's state, such as ``position``: one dictionary by field for each layer."""
        with self.exclusive():
            self._check_row(row)
            wanted = [s for s in self.contract.state() if s.field.name in fields]
            tensors = self._read_tensors(row, [s.past.name for s in wanted])
            layers: list[State] = [{} for _ in self.contract.layers]
            for s in wanted:
                layers[s.layer][s.field.name] = tensors[s.past.name]
            return layers

    def write_row(self, row: int, state: RowState) -> None:
        """Replace one row's state.

        Raises:
            BackendError: the state belongs to another bundle or contract, or no such row.
        """
        with self.exclusive():
            self._check_row(row)
            state.check(self.contract, self.identity)
            self.revision += 1
            self._write_row(row, state.tensors)
            self.past_length[row] = state.length

    def _check_row(self, row: int) -> None:
        if self.batch == 0:
            raise BackendError(f"the {self.name} backend is not open: call open(batch) first")
        if not isinstance(row, int | np.integer) or not 0 <= row < self.batch:
            raise BackendError(f"row {row} is outside 0..{self.batch - 1}")

    # ------------------------------------------------------------ for subclasses

    @abc.abstractmethod
    def _open(self, batch: int) -> None:
        """Allocate ``batch`` empty rows."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Release what :meth:`_open` allocated."""

    @abc.abstractmethod
    def _step(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """Run the graph on checked inputs and keep its state; ``rows`` are adjacent unless :attr:`rows_by_index`."""

    @abc.abstractmethod
    def _read_row(self, row: int) -> State:
        """Copies of one row's state tensors by past name, without the batch axis."""

    @abc.abstractmethod
    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        """Overwrite one row's state tensors."""

    def _read_tensors(self, row: int, names: Collection[str]) -> State:
        """Some of these tensors; may be replaced by one that copies no others."""
        state = self._read_row(row)
        return {n: state[n] for n in names}

    def _copy_row(self, source: int, target: int) -> None:
        """Copy the state tensors of one row to another."""
        self._write_row(target, self._read_row(source))

    def _reset_rows(self, rows: Sequence[int]) -> None:
        """Overwrite the state tensors of rows with those of an empty row."""
        for row in rows:
            self._write_row(row, {s.past.name: empty(s, 1)[0] for s in self.contract.state()})


def empty(tensor: StateTensor, batch: int) -> Array:
    """The state tensor of ``batch`` empty rows."""
    return np.full((batch, *tensor.row_shape), tensor.field.empty, numpy_dtype(tensor.dtype))


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """An argument of :meth:`Backend.step` as int64."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise BackendError(f"{name} must be an array of integers: {' '.join(str(error).split())}") from error
    if array.dtype.kind not in "iu":
        raise BackendError(f"{name} must be integers, not {array.dtype}")
    return array.astype(np.int64)
