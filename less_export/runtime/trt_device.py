"""The GPU as the TensorRT backend uses it: one stream, its memory, and copies, through ``cuda-bindings``."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from ..errors import BackendError, install_hint
from .backend import Array


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
        self._finalizer = weakref.finalize(self, self._free, self._cuda, self._owned, self.stream)

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

    def upload(self, address: int, data: Array) -> None:
        """Copy a contiguous host array to the device, in stream order."""
        self._pending.append(data)  # CUDA may read it until the next wait
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, data.ctypes.data, data.nbytes, kind, self.stream)

    def download(self, address: int, data: Array) -> None:
        """Fill a contiguous host array from the device; complete after :meth:`wait`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", data.ctypes.data, address, data.nbytes, kind, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy device memory, in stream order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def wait(self) -> None:
        """Wait until everything in the stream has finished."""
        self.call("cudaStreamSynchronize", self.stream)
        self._pending.clear()

    def release(self) -> None:
        """Free all memory, after everything that still uses it."""
        self.wait()
        while self._owned:
            self.call("cudaFree", self._owned.pop())

    @staticmethod
    def _free(cuda: Any, owned: set[int], stream: Any) -> None:
        for address in owned:
            cuda.cudaFree(address)
        cuda.cudaStreamDestroy(stream)
