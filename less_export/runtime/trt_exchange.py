"""What a step of the TensorRT backend takes from the host and gives back: tokens, lengths, rows, and logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, ROWS, Contract
from ..dtypes import item_bytes, numpy_dtype
from .backend import Array
from .trt_device import Device
from .trt_state import ALIGNMENT


class Exchange:
    """Buffers for steps of up to ``batch`` rows, at addresses that never change.

    The inputs lie one behind the other, on the host in page-locked memory, so that one copy takes them to the device.
    Logits of one token a row come back through page-locked memory too; those of more tokens would take much of it.
    """

    def __init__(self, device: Device, contract: Contract, batch: int, by_index: bool) -> None:
        self._device, self._logits_spec = device, contract.logits_spec()
        small = (PAST_LENGTH, NEW_LENGTH, ROWS)  # first, so that a copy ends with the tokens that there are
        self._specs = sorted(contract.tokens(by_index), key=lambda spec: spec.name not in small)
        self._places: dict[str, int] = {}
        size = 0
        for spec in self._specs:
            self._places[spec.name] = size
            wanted = math.prod(spec.sized(batch, contract.chunk)) * item_bytes(spec.dtype)
            size += -(-wanted // ALIGNMENT) * ALIGNMENT
        self._host = device.pinned(size)
        self._inputs = device.allocate(size)
        #: Address of a step's logits on the device.
        self.logits = device.allocate(math.prod(self._logits_spec.sized(batch, contract.chunk)) * 4)
        self._results = device.pinned(batch * contract.vocab_size * 4).view(np.float32)

    def attach(self, context: Any) -> None:
        """Bind everything to an execution context."""
        for name, place in self._places.items():
            context.set_tensor_address(name, self._inputs + place)
        context.set_tensor_address(LOGITS, self.logits)

    def put(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> None:
        """Take a step's inputs; the previous step's must be with the device.

        ``rows`` may have more elements than the others: those are parked.
        """
        given: dict[str, Array] = {
            INPUT_IDS: input_ids,
            PAST_LENGTH: past_length,
            NEW_LENGTH: new_length,
            ROWS: rows,
        }
        for spec in self._specs:
            shape, dtype, place = (
                spec.sized(len(rows), input_ids.shape[1]),
                numpy_dtype(spec.dtype),
                self._places[spec.name],
            )
            held = self._host[place:][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            count = len(given[spec.name])
            held[:count], held[count:] = given[spec.name], 0

    def upload(self, batch: int, chunk: int) -> None:
        """Queue the copy of a step's inputs to the device."""
        last = self._specs[-1]
        end = self._places[last.name] + math.prod(last.sized(batch, chunk)) * item_bytes(last.dtype)
        self._device.upload(self._inputs, self._host[:end])

    def download(self, batch: int, chunk: int) -> npt.NDArray[np.float32]:
        """Queue the copy of a step's logits to the host; returns where they will be."""
        shape = self._logits_spec.sized(batch, chunk)
        fits = math.prod(shape) <= len(self._results)
        logits = self._reused(shape) if fits else np.empty(shape, np.float32)
        self._device.download(self.logits, logits)
        return logits

    def lasting(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits that the next step does not overwrite."""
        return logits.copy() if np.may_share_memory(logits, self._results) else logits

    def _reused(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return self._results[: math.prod(shape)].reshape(shape)
