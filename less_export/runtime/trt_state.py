"""The state of the TensorRT backend on the GPU: bound once where steps take rows by index, or a range at a time."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import Contract, StateTensor
from ..dtypes import numpy_dtype
from .backend import Array, State, empty
from .row_sides import RowSides
from .trt_device import Copy, Device

#: Bytes that addresses of tensors must be a multiple of (NvInferRuntime.h, ``setTensorAddress``).
ALIGNMENT = 256


class DeviceState(abc.ABC):
    """The state tensors of ``batch`` rows, all empty at first, and one empty row more, for resets."""

    def __init__(self, device: Device, contract: Contract, batch: int) -> None:
        self.device, self.batch = device, batch
        self.tensors = list(contract.state())
        self._empty: dict[str, int] = {}
        row = b"".join(empty(t, 1).tobytes() for t in self.tensors)
        address = device.allocate(len(row))
        device.upload(address, np.frombuffer(row, np.uint8))
        for tensor in self.tensors:
            self._empty[tensor.past.name] = address
            address += tensor.row_bytes

    @abc.abstractmethod
    def attach(self, context: Any) -> None:
        """Bind what no step changes to an execution context."""

    @abc.abstractmethod
    def bind(self, context: Any, rows: npt.NDArray[np.int32]) -> list[Copy]:
        """Bind what a step of these rows needs; returns the copies that must follow it."""

    @abc.abstractmethod
    def stepped(self, rows: npt.NDArray[np.int32]) -> None:
        """Note that a step of these rows is done."""

    @abc.abstractmethod
    def _address(self, tensor: StateTensor, row: int) -> int:
        """Where the state of a row is."""

    def copy_row(self, source: int, target: int) -> None:
        self.device.copies([(self._address(t, target), self._address(t, source), t.row_bytes) for t in self.tensors])

    def reset_rows(self, rows: Collection[int]) -> None:
        self.device.copies([c for row in dict.fromkeys(rows) for c in self._resets(row)])

    def _resets(self, row: int) -> Iterator[Copy]:
        for t in self.tensors:
            yield self._address(t, row), self._empty[t.past.name], t.row_bytes

    def read(self, row: int, names: Collection[str]) -> State:
        """Copies of these tensors of a row."""
        state: State = {}
        for tensor in (t for t in self.tensors if t.past.name in names):
            data = np.empty(tensor.row_shape, numpy_dtype(tensor.dtype))
            self.device.download(self._address(tensor, row), data)
            state[tensor.past.name] = data
        self.device.wait()
        return state

    def write(self, row: int, tensors: Mapping[str, Array]) -> None:
        for tensor in self.tensors:
            self.device.upload(self._address(tensor, row), np.ascontiguousarray(tensors[tensor.past.name]))


class IndexedState(DeviceState):
    """The state of a plan that takes rows by index: one buffer a tensor, at an address that never changes."""

    def __init__(self, device: Device, contract: Contract, batch: int) -> None:
        super().__init__(device, contract, batch)
        self._buffers = {t.past.name: device.allocate(batch * t.row_bytes) for t in self.tensors}
        self.reset_rows(range(batch))

    def attach(self, context: Any) -> None:
        for tensor in self.tensors:
            for name in (tensor.past.name, tensor.present.name):  # updated in place
                context.set_tensor_address(name, self._buffers[tensor.past.name])

    def bind(self, context: Any, rows: npt.NDArray[np.int32]) -> list[Copy]:
        return []

    def stepped(self, rows: npt.NDArray[np.int32]) -> None:
        pass

    def _address(self, tensor: StateTensor, row: int) -> int:
        return self._buffers[tensor.past.name] + row * tensor.row_bytes


class RangedState(DeviceState):
    """The state of a plan that runs adjacent rows, whose addresses each step binds.

    In one buffer a tensor if the plan has the plugin, which updates it ``in_place``, otherwise in two, and a row is in
    one or the other. Rows whose address TensorRT cannot take are staged in aligned memory.
    """

    def __init__(self, device: Device, contract: Contract, batch: int, in_place: bool) -> None:
        super().__init__(device, contract, batch)
        self._in_place = in_place
        #: Addresses of two sets, which share what is updated in place, and of aligned copies of rows (past, present).
        self._sets: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._staged: dict[str, tuple[int, int]] = {}
        self._sides = RowSides(batch)
        for tensor in self.tensors:
            name, size = tensor.past.name, batch * tensor.row_bytes
            past = self._sets[0][name] = device.allocate(size)
            self._sets[1][name] = past if in_place else device.allocate(size)
        self.reset_rows(range(batch))

    def attach(self, context: Any) -> None:
        pass

    def bind(self, context: Any, rows: npt.NDArray[np.int32]) -> list[Copy]:
        first, count = int(rows[0]), len(rows)
        side, strays = self._sides.meeting(first, count)
        for row in strays:
            self._move(row, row, side)
        before, after = [], []
        for tensor in self.tensors:
            name, offset, size = tensor.past.name, first * tensor.row_bytes, count * tensor.row_bytes
            past, present = self._sets[side][name] + offset, self._sets[1 - side][name] + offset
            if offset % ALIGNMENT:
                aligned_past, aligned_present = self._stage(tensor)
                before.append((aligned_past, past, size))
                after.append((present, aligned_present, size))
                past, present = aligned_past, aligned_present
            context.set_tensor_address(name, past)
            context.set_tensor_address(tensor.present.name, present)
        self.device.copies(before)
        return after

    def stepped(self, rows: npt.NDArray[np.int32]) -> None:
        self._sides.flip(int(rows[0]), len(rows))

    def copy_row(self, source: int, target: int) -> None:
        self._move(source, target, self._sides[source])

    def _move(self, source: int, target: int, side: int) -> None:
        """Copy the state of row ``source`` to row ``target`` in set ``side``."""
        copies = []
        for tensor in self.tensors:
            begin, end = self._address(tensor, source), self._sets[side][tensor.past.name] + target * tensor.row_bytes
            if begin != end:
                copies.append((end, begin, tensor.row_bytes))
        self.device.copies(copies)
        self._sides[target] = side

    def _stage(self, tensor: StateTensor) -> tuple[int, int]:
        """Addresses of aligned memory for any rows of ``tensor``: for past and for present."""
        name, size = tensor.past.name, self.batch * tensor.row_bytes
        if name not in self._staged:
            past = self.device.allocate(size)
            self._staged[name] = (past, past if self._in_place else self.device.allocate(size))
        return self._staged[name]

    def _address(self, tensor: StateTensor, row: int) -> int:
        return self._sets[self._sides[row]][tensor.past.name] + row * tensor.row_bytes
