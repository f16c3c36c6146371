"""The GPU as the TensorRT backend uses it: one stream, its memory, and copies, through ``cuda-bindings``."""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, install_hint
from .backend import Array

#: A copy on the device: the addresses of target and source, and the bytes.
Copy = tuple[int, int, int]
#: The first CUDA whose driver takes a batch of copies in one call.
_BATCHES_FROM = 12080


def _cuda() -> Any:
    """cuda-bindings' runtime API."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            f"the trt backend needs cuda-bindings ({error}): {install_hint('trt')}, or {install_hint('trt-rtx')}"
        ) from error


class Device:
    """The first GPU: one stream, and memory that is freed by :meth:`release` or with this object.

    Copies and engines share the stream, so they run in order; :meth:`wait` waits for them.
    """

    def __init__(self) -> None:
        self._cuda = _cuda()
        error, count = self._cuda.cudaGetDeviceCount()
        if int(error) or not count:
            self._refuse(error)
        self.stream = self.call("cudaStreamCreate")
        self._pending: list[Array] = []
        self._owned: set[int] = set()
        self._pinned: set[int] = set()
        self._graphs: list[Any] = []
        self._batches = self._batch_attributes()
        self._finalizer = weakref.finalize(
            self, self._free, self._cuda, self._owned, self._pinned, self._graphs, self.stream
        )

    def _refuse(self, error: Any) -> None:
        version = self.call("cudaDriverGetVersion")  # 0 without a driver
        if version == 0:
            raise BackendError("no CUDA driver: run this where nvidia-smi lists a GPU, or use the ONNX Runtime backend")
        needed = self.call("cudaRuntimeGetVersion")
        if version // 1000 < needed // 1000:
            driver, bindings = (f"{v // 1000}.{v % 1000 // 10}" for v in (version, needed))
            raise BackendError(
                f"the driver supports CUDA up to {driver}, cuda-bindings needs {bindings}: update the driver"
            )
        raise BackendError(f"no CUDA GPU ({self._text(error)}): run nvidia-smi, and check CUDA_VISIBLE_DEVICES")

    def _text(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return text.decode() if text else str(error)

    def call(self, name: str, *args: Any) -> Any:
        """Call a CUDA runtime function and return its result; raises :class:`BackendError` if it fails."""
        error, *result = getattr(self._cuda, name)(*args)
        if int(error):
            raise BackendError(f"{name} failed on the GPU: {self._text(error)}")
        return result[0] if result else None

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory; its contents are undefined."""
        address = int(self.call("cudaMalloc", nbytes))
        self._owned.add(address)
        return address

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """New page-locked host memory, which copies reach without a detour; its contents are undefined."""
        address = int(self.call("cudaMallocHost", nbytes))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def upload(self, address: int, data: Array) -> None:
        """Copy a contiguous host array to the device, in stream order."""
        self._pending.append(data)  # CUDA may read it until the next wait
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, data.ctypes.data, data.nbytes, kind, self.stream)

    def download(self, address: int, data: Array) -> None:
        """Fill a contiguous host array from the device; complete after :meth:`wait`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", data.ctypes.data, address, data.nbytes, kind, self.stream)

    def copies(self, copies: Sequence[Copy]) -> None:
        """Copy device memory, in stream order; the copies do not overlap. In one call, where CUDA can do that."""
        if not copies:
            return
        if self._batches is not None:
            targets, sources, sizes = map(list, zip(*copies, strict=True))
            count, attributes = len(copies), self._batches
            self.call("cudaMemcpyBatchAsync", targets, sources, sizes, count, [attributes], [0], 1, self.stream)
            return
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for target, source, nbytes in copies:
            self.call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def _batch_attributes(self) -> Any:
        """The attributes of a batch of copies; None where the bindings or the driver know no batches."""
        known = hasattr(self._cuda, "cudaMemcpyBatchAsync")
        if not known or self.call("cudaDriverGetVersion") < _BATCHES_FROM:
            return None
        attributes = self._cuda.cudaMemcpyAttributes()
        attributes.srcAccessOrder = self._cuda.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        return attributes

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what ``work`` queues, which does not run by this; it lives until :meth:`drop_graphs`.

        Raises:
            BackendError: it cannot be captured; the stream goes on as before.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        failed: BackendError | None = None
        try:
            work()
        except BackendError as error:
            failed = error
        finally:
            ended, graph = self._cuda.cudaStreamEndCapture(self.stream)
        try:
            if failed is not None or int(ended):
                raise failed or BackendError(f"cudaStreamEndCapture failed on the GPU: {self._text(ended)}")
            executable = self.call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            if graph is not None and not int(ended):
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()  # what failed must not come up again in a later call
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Queue the work of a graph."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def drop_graph(self, graph: Any) -> None:
        """Destroy a graph, after what still runs of it."""
        self.wait()
        self._graphs.remove(graph)
        self.call("cudaGraphExecDestroy", graph)

    def drop_graphs(self) -> None:
        """Destroy all graphs, after what still runs of them."""
        if self._graphs:
            self.wait()
        while self._graphs:
            self.call("cudaGraphExecDestroy", self._graphs.pop())

    def wait(self) -> None:
        """Wait until everything in the stream has finished."""
        self.call("cudaStreamSynchronize", self.stream)
        self._pending.clear()

    def release(self) -> None:
        """Free all memory, after everything that still uses it."""
        self.wait()
        self.drop_graphs()
        while self._owned:
            self.call("cudaFree", self._owned.pop())
        while self._pinned:
            self.call("cudaFreeHost", self._pinned.pop())

    @staticmethod
    def _free(cuda: Any, owned: set[int], pinned: set[int], graphs: list[Any], stream: Any) -> None:
        for graph in graphs:
            cuda.cudaGraphExecDestroy(graph)
        for address in owned:
            cuda.cudaFree(address)
        for address in pinned:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(stream)
