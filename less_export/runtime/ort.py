"""The ONNX Runtime backend, on a CPU or with CUDA.

A kernel of our own runs LessAttention where it can (:mod:`less_export.native.ort_operator` and
:mod:`less_export.native.ort_cuda`). It changes the state in place, and a range of rows is bound by its address, once.
Else the operator's body runs as ordinary nodes. The state then has two sets of tensors: a step of some rows reads one
set and writes the other, and the next step of these rows the reverse. No state is copied or allocated between steps,
except that a row which joins others moves into their set.

Session options are ONNX Runtime's defaults except for scratch memory (``benchmarks/bench_memory.py``).
Measured on two cores:
- Memory that is freed while a model loads is returned to the system at once (glibc would keep it): an int4
  model of 1.1B parameters (746 MB on disk, of which 131 MB of embeddings are only mapped) takes 841 MB after
  loading instead of 1,136 MB.
- 10 layers of 1024 x 4096 (320 MB, external data): weights are held once (375 MB including the interpreter,
  f32, or bf16 behind a folded Cast). Disabling prepacking saves nothing and decodes two to three times slower.
- 8 LESS layers (16 heads of 64, C 256), 4 rows, chunks of 128: the process took 835 MB after prefill. Without
  memory patterns, which keep one block per chunk shape, it takes 660 MB at the same speed; returning the
  unused part of the arena when decode begins leaves 500 MB (doing so after every chunk would slow prefill
  by a quarter). The kernel's own scratch memory, of a chunk and thread, stays with the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, Contract, TensorSpec
from ..dtypes import numpy_dtype, onnx_type
from ..errors import BackendError, EngineError, UsageError, install_hint
from ..native import ort_cuda, ort_operator
from ..versions import warn_if_untested
from .backend import Array, Backend, State, empty
from .ort_graphs import CAPTURING, DecodeGraphs
from .row_sides import RowSides

_LOG = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
#: Options that a session gets on each device. By default, CUDA multiplies float32 in TF32, whose mantissa has 10 bits.
_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
#: Most ranges of rows whose bindings are kept.
_MAX_RANGES = 64
#: Log only what ends the process; every other error is raised as an exception and reported once.
_LOG_FATAL = 4


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be imported ({_reason(error)}): {install_hint('cpu')}") from error
    return onnxruntime


def _reason(error: BaseException) -> str:
    """First line of an exception, without ONNX Runtime's prefix."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]).rstrip(" .")


def _trim_heap() -> None:
    """Return freed memory to the system; glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _choose_provider(ort: Any, provider: str | None) -> str:
    """Full name of a provider; raises if it is unknown or not available."""
    name = _PROVIDERS.get((provider or "cpu").lower(), provider)
    if name not in _PROVIDERS.values():
        raise UsageError(f"unknown ONNX Runtime provider '{provider}': choose {' or '.join(_PROVIDERS)}")
    cuda = name == _PROVIDERS["cuda"]
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        message = (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"uninstall both, then {install_hint('cpu')} or {install_hint('gpu')}"
        )
        if cuda:
            raise BackendError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    if name not in ort.get_available_providers():
        raise BackendError(f"this ONNX Runtime was built without CUDA: {install_hint('gpu')}")
    return str(name)


def _cpu_kernel(contract: Contract) -> Path | str:
    return ort_operator.why_unsupported(contract) or ort_operator.library()


def _cuda_kernel(contract: Contract) -> Path | str:
    if reason := ort_cuda.why_unsupported(contract):
        return reason
    library = ort_cuda.library_for_this_gpu()
    return ort_cuda.why_layers_unsupported(library, contract) or library


#: By device: the library whose kernel runs a graph, or the reason why none can. Raises EngineError if there is none.
_KERNELS = {"cpu": _cpu_kernel, "cuda": _cuda_kernel}


def _kernel(contract: Contract, device: str, operator: str | None) -> Path | None:
    """The library whose kernel runs LessAttention; None if the graph's own nodes do."""
    if operator not in (None, "native", "onnx"):
        raise UsageError(f"unknown operator '{operator}': choose native or onnx")
    if operator == "onnx":
        return None
    try:
        kernel = _KERNELS[device](contract)
    except EngineError as error:
        if operator == "native":
            raise
        warnings.warn(f"LessAttention runs as ONNX nodes, which is slower: {error}", RuntimeWarning, stacklevel=5)
        return None
    if isinstance(kernel, Path):
        return kernel
    if operator == "native":
        raise UsageError(f"the native operator cannot run this graph ({kernel}): leave the choice out, or choose onnx")
    _LOG.info("LessAttention runs as ONNX nodes: %s", kernel)
    return None


class OrtBackend(Backend):
    """Runs a bundle's ``model.onnx``.

    Args:
        contract: inputs and outputs of the graph; float32 or float16.
        model_path: the .onnx file; its weights are mapped from the same folder.
        threads: threads of one operator; default ONNX Runtime's, one per physical core.
        provider: "cpu" (default) or "cuda", or the full name of either.
        accuracy_level: ONNX Runtime's accuracy level of products with quantised weights. 4, its default,
            rounds activations to 8 bits; 1 computes in float32, several times slower (int8: a hundred times).
        operator: what runs LessAttention: "native", the kernel for the device (for CPUs compiled when it is needed for
            the first time, for CUDA by ``less-export build-operator --cuda``); "onnx", the graph's own nodes; default
            the kernel where it can run, else the nodes.
        cuda_graphs: with the kernel for CUDA, run decode steps as CUDA graphs.

    If a step fails while the kernel runs it, the state of its rows is undefined: write, reset or copy over them.

    Raises:
        BackendError: ONNX Runtime is not installed, the provider does not start, the file does not load,
            or the graph does not match the contract.
        EngineError: the kernel is asked for and cannot be compiled.
        UsageError: an unknown provider or operator, a graph or provider that the kernel is not for, or fewer than
            one thread.
    """

    name = "ort"

    def __init__(
        self,
        contract: Contract,
        model_path: Path,
        *,
        threads: int | None = None,
        provider: str | None = None,
        accuracy_level: int = 4,
        operator: str | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__(contract)
        self._values: list[dict[str, Any]] = []
        self._bindings: dict[tuple[int, int], list[Any]] = {}
        self._sides, self._allocated = RowSides(0), 0
        self._scratch = False  # whether the arena still holds the scratch memory of a chunk
        if contract.dtype == "bfloat16":
            raise BackendError(
                "ONNX Runtime has no bfloat16 kernels for this graph: export for it with --dtype float32"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        self._ort = _onnxruntime()
        warn_if_untested("onnxruntime")
        provider = _choose_provider(self._ort, provider)
        self._device = "cuda" if provider == _PROVIDERS["cuda"] else "cpu"
        kernel = _kernel(contract, self._device, operator)
        #: What runs LessAttention: "native" or "onnx".
        self.operator = "native" if kernel else "onnx"
        load = functools.partial(self._load, Path(model_path), threads, accuracy_level, kernel)
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs and kernel is not None and self._device == "cuda":
            self._session, self._graphs = self._capturing(load, provider)
        else:
            self._session = load(provider, {})
        self._shrink_arena = self._ort.RunOptions()
        arena = "gpu:0" if self._device == "cuda" else "cpu:0"
        self._shrink_arena.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        self._check_graph(Path(model_path))

    def _capturing(self, load: Callable[[str, dict[str, str]], Any], provider: str) -> tuple[Any, DecodeGraphs | None]:
        """The session, and what captures its decode steps unless ONNX Runtime refuses to capture them."""
        try:
            session = load(provider, CAPTURING)
        except BackendError as error:
            session = load(provider, {})  # raises if the reason is another one
            reason = _reason(error.__cause__ or error)
            warnings.warn(f"decode steps run without CUDA graphs: {reason}", RuntimeWarning, stacklevel=4)
            return session, None
        return session, DecodeGraphs(self._ort, session, self.contract, self._device)

    def _load(
        self,
        path: Path,
        threads: int | None,
        accuracy_level: int,
        kernel: Path | None,
        provider: str,
        provider_options: dict[str, str],
    ) -> Any:
        if not path.is_file():
            raise BackendError(f"cannot load {path}: no such file")
        options = self._ort.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = list(dict.fromkeys([provider, _PROVIDERS["cpu"]]))
        if chosen := _OPTIONS[self._device] | provider_options:
            providers[0] = (provider, chosen)
        try:
            if kernel is not None:
                options.register_custom_ops_library(str(kernel))
            session = self._ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"cannot load {path}: {_reason(error)}; export the bundle again") from error
        if provider not in session.get_providers():
            raise BackendError("ONNX Runtime could not start CUDA: check the driver, CUDA and cuDNN, or use the CPU")
        _trim_heap()
        return session

    def _check_graph(self, path: Path) -> None:
        """Raise unless the graph's inputs and outputs are the contract's, by name, dtype and static dimensions."""

        def fits(want: tuple[int | str, ...], have: list[int | str | None], present: bool) -> bool:
            # Dynamic axes of the contract must be dynamic in the graph; a present state may have more of them.
            return len(want) == len(have) and all(
                not isinstance(h, int) if isinstance(w, str) else h == w or (present and not isinstance(h, int))
                for w, h in zip(want, have, strict=True)
            )

        def check(kind: str, specs: tuple[TensorSpec, ...], nodes: list[Any]) -> None:
            expected, actual = {s.name: s for s in specs}, {n.name: n for n in nodes}
            states = {s.present.name for s in self.contract.state()}
            for name in sorted(expected.keys() ^ actual.keys()):
                fault = "lacks" if name in expected else "has an unexpected"
                raise BackendError(f"{path} {fault} {kind} {name}: it does not belong to this manifest, export again")
            for name, spec in expected.items():
                node = actual[name]
                if node.type != onnx_type(spec.dtype) or not fits(spec.shape, node.shape, name in states):
                    raise BackendError(
                        f"{path}: {kind} {name} is {node.type} {node.shape}, the manifest says {spec.dtype} "
                        f"{list(spec.shape)}: export again"
                    )

        check("input", self.contract.inputs(), self._session.get_inputs())
        check("output", self.contract.outputs(), self._session.get_outputs())

    # ------------------------------------------------------------ Backend

    def _open(self, batch: int) -> None:
        if self._graphs is not None and self._values and batch <= self._allocated:  # graphs stay where the state stays
            for s in self.contract.state():
                self._values[0][s.past.name].update_inplace(empty(s, self._allocated))
            return
        self._close()
        from_numpy = self._ort.OrtValue.ortvalue_from_numpy  # on a CPU the value shares the array's memory
        state = list(self.contract.state())
        sets = 1 if self.operator == "native" else 2
        self._values = [{s.past.name: from_numpy(empty(s, batch), self._device) for s in state} for _ in range(sets)]
        self._sides, self._allocated = RowSides(batch), batch
        if self._graphs is not None:
            self._graphs.open(batch)
        self._range_bindings(0, batch)

    def _close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._bindings = {}
        self._values = []

    def _range_bindings(self, first: int, count: int) -> list[Any]:
        """The state of ``count`` rows from row ``first``, read from each set and written to the other, or to itself."""
        key = (first, count)
        if key not in self._bindings:
            if len(self._bindings) >= _MAX_RANGES:
                del self._bindings[next(iter(self._bindings))]
            self._bindings[key] = [self._session.io_binding() for _ in self._values]
            for side, binding in enumerate(self._bindings[key]):
                self._bind_state(binding, first, count, side)
        return self._bindings[key]

    def _bind_state(self, binding: Any, first: int, count: int, side: int = 0) -> None:
        for s in self.contract.state():
            addresses = [x[s.past.name].data_ptr() + first * s.row_bytes for x in self._values]
            place = (self._device, 0, numpy_dtype(s.dtype), (count, *s.row_shape))
            binding.bind_input(s.past.name, *place, addresses[side])
            binding.bind_output(s.present.name, *place, addresses[side - 1])

    def _step(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        first, count = int(rows[0]), len(rows)
        side, strays = self._sides.meeting(first, count)
        for row in strays:
            self._put(row, self._views(row), side)
            self._sides[row] = side
        tokens: dict[str, Array] = {INPUT_IDS: input_ids, PAST_LENGTH: past_length, NEW_LENGTH: new_length}
        decode = input_ids.shape[1] == 1
        if decode and self._graphs is not None:
            with self._reporting():
                replayed = self._graphs.step(first, count, tokens, lambda b: self._bind_state(b, first, count))
            if replayed is not None:
                return replayed
        binding = self._range_bindings(first, count)[side]
        for name, array in tokens.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits = np.empty(self.contract.logits_spec().sized(*input_ids.shape), np.float32)
        binding.bind_ortvalue_output(LOGITS, self._ort.OrtValue.ortvalue_from_numpy(logits))
        options = self._shrink_arena if decode and self._scratch else None
        if self._graphs is not None:
            options = self._graphs.plain  # graphs use memory of the arena, which must not shrink
        with self._reporting():
            self._session.run_with_iobinding(binding, options)
            self._scratch = not decode
        if len(self._values) == 2:
            self._sides.flip(first, count)
        return logits

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn ONNX Runtime's errors in a step into ours; without the kernel, the state from before is in its set."""
        try:
            yield
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {_reason(error)}") from error

    def _read_row(self, row: int) -> State:
        return {n: np.array(x) for n, x in self._views(row).items()}

    def _read_tensors(self, row: int, names: Collection[str]) -> State:
        side = self._sides[row]
        return {n: np.array(self._host(n, side)[row]) for n in names}

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        self._put(row, tensors, self._sides[row])

    def _copy_row(self, source: int, target: int) -> None:
        self._put(target, self._views(source), self._sides[source])
        self._sides[target] = self._sides[source]

    def _reset_rows(self, rows: Sequence[int]) -> None:
        fresh = {s.past.name: np.asarray(s.field.empty) for s in self.contract.state()}
        for row in rows:
            self._put(row, fresh, self._sides[row])

    def _views(self, row: int) -> State:
        """The tensors of ``row``, on a CPU without copying them."""
        side = self._sides[row]
        return {n: self._host(n, side)[row] for n in self._values[side]}

    def _put(self, row: int, tensors: Mapping[str, Array], side: int) -> None:
        """Overwrite the tensors of ``row`` in set ``side``."""
        for name, value in self._values[side].items():
            array = self._host(name, side)
            array[row] = tensors[name]
            if self._device != "cpu":
                value.update_inplace(array)

    def _host(self, name: str, side: int) -> Array:
        """A tensor of set ``side``: the tensor itself on a CPU, a copy elsewhere."""
        array: Array = self._values[side][name].numpy()
        return array
