"""Decode steps on ONNX Runtime's CUDA provider as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import LOGITS, Contract
from ..dtypes import numpy_dtype
from .backend import Array

#: Provider options of a session whose steps may be captured.
CAPTURING = {"enable_cuda_graph": "1"}
#: Name of the run option that holds the number of a graph, and the number that captures nothing.
_NUMBER, _NONE = "gpu_graph_id", "-1"
#: Most graphs of a session, which keeps them until it ends.
MOST = 64


class DecodeGraphs:
    """CUDA graphs of the decode step, one for each range of rows, in a session with :data:`CAPTURING`.

    ONNX Runtime runs a step several times before it has captured it (its issue 32243), and a step changes the state in
    place: the step that is captured has no new tokens, so that it changes nothing. All graphs read tokens and lengths,
    and write logits, in the same memory: they run one at a time.

    Args:
        ort: the module. session: runs LessAttention in the native operator. device: of the graphs' memory.
    """

    def __init__(self, ort: Any, session: Any, contract: Contract, device: str = "cuda") -> None:
        self._ort, self._session, self._contract, self._device = ort, session, contract, device
        self._tokens = {spec.name: spec for spec in contract.tokens()}
        self._rows = 0
        self._inputs: dict[str, Any] = {}
        self._logits: Any = None
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._captured, self._stopped = 0, False
        #: Options of the steps that are not captured.
        self.plain = self._options(_NONE)

    def open(self, rows: int) -> None:
        """Allocate tokens, lengths and logits of ``rows`` rows. Graphs of before are forgotten: the state moves."""
        self.close()
        self._rows = rows
        shaped = {name: np.zeros(s.sized(rows, 1), numpy_dtype(s.dtype)) for name, s in self._tokens.items()}
        self._inputs = {name: self._place(array) for name, array in shaped.items()}
        self._logits = self._place(np.zeros(self._contract.logits_spec().sized(rows, 1), np.float32))

    def close(self) -> None:
        """Forget the graphs, and free what they read and write."""
        release = getattr(self._session, "release_captured_graph", None)  # older ones have none
        if release is not None:
            for graph in self._graphs.values():
                release(graph.number)
        self._graphs, self._inputs, self._logits = {}, {}, None

    def step(
        self, first: int, count: int, tokens: Mapping[str, Array], bind_state: Callable[[Any], None]
    ) -> npt.NDArray[np.float32] | None:
        """Logits of one token in each of ``count`` rows from row ``first``; ``None`` if no graph runs these rows.

        Args:
            tokens: ids and lengths by name. bind_state: binds the state of these rows to a binding.
        """
        graph = self._graphs.get((first, count)) or self._capture(first, count, bind_state)
        return None if graph is None else self._run(graph, tokens)

    def _capture(self, first: int, count: int, bind_state: Callable[[Any], None]) -> _Graph | None:
        if self._stopped:
            return None
        if self._captured >= MOST:
            self._stop(f"a session keeps up to {MOST}")
            return None
        self._captured += 1
        binding = self._session.io_binding()
        bind_state(binding)
        for name, spec in self._tokens.items():
            where = (spec.sized(count, 1), self._inputs[name].data_ptr())
            binding.bind_input(name, self._device, 0, numpy_dtype(spec.dtype), *where)
        shape = self._contract.logits_spec().sized(count, 1)
        binding.bind_output(LOGITS, self._device, 0, np.float32, shape, self._logits.data_ptr())
        logits = binding.get_outputs()[-1]  # the one that was bound last
        graph = _Graph(self._captured, self._options(str(self._captured)), binding, logits)
        nothing = {name: np.zeros(spec.sized(count, 1), np.int64) for name, spec in self._tokens.items()}
        try:
            self._run(graph, nothing)
        except Exception as error:  # the state is as before
            self._stop(str(error).strip().splitlines()[0])
            return None
        self._graphs[first, count] = graph
        return graph

    def _stop(self, reason: str) -> None:
        """Capture nothing from now on; what is captured goes on."""
        self._stopped = True
        warnings.warn(f"other decode steps run without CUDA graphs: {reason}", RuntimeWarning, stacklevel=6)

    def _run(self, graph: _Graph, tokens: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        for name, array in tokens.items():
            self._inputs[name].update_inplace(self._padded(name, array))
        self._session.run_with_iobinding(graph.binding, graph.options)
        return np.array(graph.logits.numpy())

    def _padded(self, name: str, array: Array) -> Array:
        """An input of all rows, of which ``array`` holds the first."""
        spec = self._tokens[name]
        padded = np.zeros(spec.sized(self._rows, 1), numpy_dtype(spec.dtype))
        padded[: len(array)] = array
        return padded

    def _place(self, array: Array) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device)

    def _options(self, number: str) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry(_NUMBER, number)
        return options


@dataclass(frozen=True)
class _Graph:
    """A graph's number, the options that choose it, what it was captured from, and its logits [count,1,vocab]."""

    number: int
    options: Any
    binding: Any
    logits: Any
