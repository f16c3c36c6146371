"""A stand-in for the CUDA runtime, in host memory."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from typing import Any

import numpy as np


class FakeCuda:
    """The cuda-bindings calls that the backend uses. Queued work runs when the stream is synchronised.

    Copies read the host's memory then, which is as late as CUDA's API reference allows (cudaMemcpyAsync: the call may
    return before the copy is complete), and a wait may return errors of what was queued before (the note "error codes
    from previous, asynchronous launches").

    Batches of copies are as CUDA 13's API reference says of cudaMemcpyBatchAsync: in any order among themselves, one
    set of attributes from the first copy on, not on the default stream. CUDA 12 returns the index of a failed copy too.
    """

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="across"
    )

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.stream: list[Callable[[], None]] = []
        self.room, self.next, self.version, self.devices = 1 << 30, 1 << 44, 13050, (0, 1)
        self.host: dict[int, Any] = {}
        self.calls: list[str] = []
        #: Work that is being captured, graphs and what can be launched of them, whether capturing succeeds.
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.captures = True
        #: How often the stream was waited for, and the error that the next wait returns.
        self.waits, self.fault = 0, 0

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self.devices

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13050

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error}".encode()

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 77

    # Captures are as the CUDA runtime's API reference says: what is queued meanwhile is recorded and does not run, a
    # wait for the stream is an error that spoils the capture, and a graph that was instantiated lives on its own.

    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def queue(self, work: Callable[[], None]) -> None:
        (self.stream if self.capturing is None else self.capturing).append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert self.capturing is None
        assert (stream, mode) == (77, 1)
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        assert self.capturing is not None
        work, self.capturing = self.capturing, None
        if not self.captures:
            return 901, None
        self.calls.append("captured")
        return 0, self._graph(work)

    def _graph(self, work: list[Callable[[], None]]) -> int:
        self.next += 1 << 20
        self.graphs[self.next] = work
        return self.next

    def cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> tuple[int, int]:
        assert flags == 0
        return 0, self._graph(self.graphs[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        assert self.capturing is None
        self.calls.append("launched")
        self.stream += self.graphs[graph]
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        if size > self.room:
            return 2, 0
        self.room -= size
        self.next += 1 << 20
        self.memory[self.next] = np.full(size, 0xA5, np.uint8)
        return 0, self.next

    def cudaFree(self, address: int) -> tuple[int]:
        self.room += len(self.memory.pop(address))
        return (0,)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        memory = (ctypes.c_uint8 * size)(*b"\xa5" * size)
        self.host[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self.host[address]
        return (0,)

    cudaMemcpyAttributes = types.SimpleNamespace
    cudaMemcpySrcAccessOrder = types.SimpleNamespace(cudaMemcpySrcAccessOrderStream=1)

    def cudaMemcpyBatchAsync(
        self, targets: list[int], sources: list[int], sizes: list[int], count: int, attributes: list[Any],
        attribute_places: list[int], attribute_count: int, stream: int,
    ) -> tuple[int, ...]:  # fmt: skip
        assert (len(targets), len(sources), len(sizes)) == (count, count, count)
        assert (attribute_places, attribute_count) == ([0], 1)
        assert [a.srcAccessOrder for a in attributes] == [1]
        self.calls.append("batch")
        for target, source, size in reversed([*zip(targets, sources, sizes, strict=True)]):
            self._copy(target, source, size, "across", stream)
        return (0,) if self.version >= 13000 else (0, 0)

    def at(self, address: int, size: int) -> np.ndarray:
        """Device memory at an address; an address that is not allocated is an error."""
        base = max(a for a in self.memory if a <= address)
        view = self.memory[base][address - base :][:size]
        assert len(view) == size, "outside the allocation"
        return view

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        self.calls.append(kind)
        return self._copy(target, source, size, kind, stream)

    def _copy(self, target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        assert stream == 77
        if kind == "across":
            views = self.at(target, size), self.at(source, size)
            self.queue(lambda: np.copyto(*views))
            return (0,)
        host, device = (source, target) if kind == "up" else (target, source)
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        view = self.at(device, size)
        self.queue(lambda: np.copyto(*((view, data) if kind == "up" else (data, view))))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.capturing is None, "a wait for a stream that is being captured"
        self.waits += 1
        while self.stream:
            self.stream.pop(0)()
        fault, self.fault = self.fault, 0
        return (fault,)
