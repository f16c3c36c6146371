"""Decode steps on ONNX Runtime's CUDA provider as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, Contract
from .backend import Array

#: Provider options of a session whose steps may be captured.
CAPTURING = {"enable_cuda_graph": "1"}
#: Name of the run option that holds the number of a graph, and the number that captures nothing.
_NUMBER, _NONE = "gpu_graph_id", "-1"
#: Most graphs of a session, which keeps them until it ends.
MOST = 64


class DecodeGraphs:
    """CUDA graphs of the decode step, one for each range of rows, in a session with :data:`CAPTURING`.

    A graph reads tokens and lengths, and writes logits, where they were when it was captured, so each has memory of its
    own. ONNX Runtime runs a step several times before it has captured it (its issue 32243), and a step changes the
    state in place: the step that is captured has no new tokens, so that it changes nothing.

    Args:
        ort: the module. session: runs LessAttention in the native operator. device: of the graphs' memory.
    """

    def __init__(self, ort: Any, session: Any, contract: Contract, device: str = "cuda") -> None:
        self._ort, self._session, self._contract, self._device = ort, session, contract, device
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._captured = 0
        #: Options of the steps that are not captured.
        self.plain = self._options(_NONE)

    def clear(self) -> None:
        """Forget the graphs: the state is elsewhere from now on."""
        release = getattr(self._session, "release_captured_graph", None)  # older ones have none
        if release is not None:
            for graph in self._graphs.values():
                release(graph.number)
        self._graphs = {}

    def step(
        self, first: int, count: int, tokens: Mapping[str, Array], bind_state: Callable[[Any], None]
    ) -> npt.NDArray[np.float32] | None:
        """Logits of one token in each of ``count`` rows from row ``first``; ``None`` if no more graphs are kept.

        Args:
            tokens: ids and lengths by name. bind_state: binds the state of these rows to a binding.
        """
        graph = self._graphs.get((first, count))
        if graph is None:
            if self._captured >= MOST:
                return None
            graph = self._capture(count, bind_state)
            self._graphs[first, count] = graph
        return graph.run(self._session, tokens)

    def _capture(self, count: int, bind_state: Callable[[Any], None]) -> _Graph:
        self._captured += 1  # a session keeps the graph of a step that fails, too
        place = self._ort.OrtValue.ortvalue_from_numpy
        no_tokens: dict[str, Array] = {
            INPUT_IDS: np.zeros((count, 1), np.int64),
            PAST_LENGTH: np.zeros(count, np.int32),
            NEW_LENGTH: np.zeros(count, np.int32),
        }
        inputs = {name: place(array, self._device) for name, array in no_tokens.items()}
        logits = place(np.zeros(self._contract.logits_spec().sized(count, 1), np.float32), self._device)
        binding = self._session.io_binding()
        bind_state(binding)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(LOGITS, logits)
        graph = _Graph(binding, inputs, logits, self._captured, self._options(str(self._captured)))
        graph.run(self._session, no_tokens)
        return graph

    def _options(self, number: str) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry(_NUMBER, number)
        return options


class _Graph:
    """A binding with memory of its own, and the number of its graph with the options that choose it."""

    def __init__(self, binding: Any, inputs: dict[str, Any], logits: Any, number: int, options: Any) -> None:
        self.number = number
        self._binding, self._inputs, self._logits, self._options = binding, inputs, logits, options

    def run(self, session: Any, tokens: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        for name, array in tokens.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))
        session.run_with_iobinding(self._binding, self._options)
        return np.array(self._logits.numpy())
