"""The execution contexts of a TensorRT plan, and which of them runs a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..contract import TensorSpec
from ..errors import BackendError, EngineError
from ..tensorrt.log import log_of
from .trt_plan import LoadedPlan

_LOG = logging.getLogger(__name__)
#: Rows, tokens, and rows of the state.
Sizes = tuple[int, int, int]


class Context:
    """An execution context: the sizes that its shapes are set to, and the CUDA graph of its step."""

    def __init__(self, execution: Any) -> None:
        #: TensorRT's own.
        self.execution = execution
        self.shaped: Sizes | None = None
        self.graph: Any = None

    def set_shapes(self, sizes: Sizes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Set the shapes of the inputs, and check that the outputs fit; raises :class:`BackendError`."""
        self.shaped = None
        for spec in inputs:
            if not self.execution.set_input_shape(spec.name, spec.sized(*sizes)):
                raise BackendError(f"the plan does not accept {spec.name} {spec.sized(*sizes)}: build it again")
        for spec in outputs:
            shape = tuple(self.execution.get_tensor_shape(spec.name))
            if shape != spec.sized(*sizes):
                raise BackendError(f"the plan returns {spec.name} {shape}, not {spec.sized(*sizes)}: build it again")
        self.shaped = sizes


class Contexts:
    """The execution contexts of a plan: one for prompts, and those that decode.

    A CUDA graph of the decode step serves one number of rows, and TensorRT forbids launching it once the context that
    it was captured from has other shapes. So there is a context for each bucket: 1, 2, 4, 8, ... rows, and all that are
    open. A bucket gets its context when a step first needs it, that of all rows at once; contexts are kept when rows
    are opened again. Contexts may share a profile since TensorRT 10.0 (NvInfer.h on ``kPROFILE_SHARING_0806``: on, and
    cannot be changed), and memory for activations, as only one of them runs at a time: NVIDIA's guide to TensorRT-RTX
    recommends a context for each captured graph, with memory that they share. The calls for that are in TensorRT's
    bindings since 10.1, and in those of TensorRT-RTX.

    Args:
        plan: the contexts are of its engine.
        profiles: names of its profiles; the first decodes, the second, if there is one, takes prompts.
        stream: steps run in it, one after the other.

    Raises:
        EngineError: a context cannot be created.
    """

    def __init__(self, plan: LoadedPlan, profiles: Sequence[str], stream: int) -> None:
        self._plan, self._profiles, self._stream = plan, profiles, stream
        self._log = log_of(plan.flavour.module)
        self._first, *self._of_prompts = (self._created(profile) for profile in range(len(profiles)))
        self._more: list[Context] = []
        self._free: list[Context] = []
        #: In ascending order of rows; None: not used yet.
        self._buckets: dict[int, Context | None] = {}
        self._attach: Callable[[Any], None] = lambda execution: None

    @property
    def activation_bytes(self) -> int:
        """Device memory that a step needs for activations, whichever context it runs in."""
        return int(self._plan.engine.device_memory_size_v2)

    def open(self, batch: int, attach: Callable[[Any], None]) -> None:
        """Take new memory for ``batch`` rows: ``attach`` binds it to a context."""
        self.close()
        self._attach = attach
        sizes = [*(1 << n for n in range((batch - 1).bit_length())), batch]
        self._buckets = {**dict.fromkeys(sizes), batch: self._first}
        for context in (self._first, *self._of_prompts):
            attach(context.execution)

    def close(self) -> None:
        """Forget memory and graphs."""
        self.forget_graphs()
        self._free = [*self._more]
        for context in (self._first, *self._of_prompts, *self._more):
            context.shaped = None  # other addresses: a step has to run before one is captured

    def forget_graphs(self) -> None:
        """The CUDA graphs are gone."""
        for context in (self._first, *self._more):
            context.graph = None

    def of_prompts(self) -> Context:
        """The context of steps of several tokens."""
        return self._of_prompts[0]

    def of_any_rows(self) -> Context:
        """The context of decode steps whose number of rows changes."""
        return self._first

    def of_bucket(self, rows: int) -> tuple[int, Context]:
        """The smallest bucket that holds so many rows, and its context; a larger one if there is no memory for it."""
        for size in [size for size in self._buckets if size >= rows]:
            context = self._buckets[size] or self._another()
            if context is not None:
                self._buckets[size] = context
                return size, context
            del self._buckets[size]
        raise AssertionError(f"a step of {rows} rows, which are not open")

    def _another(self) -> Context | None:
        """One more context that decodes; None if there is no memory for it."""
        if not self._free:
            try:
                self._more.append(self._created(0))
            except EngineError as error:
                _LOG.warning("steps of few rows are padded to more: %s", error)
                return None
            self._free.append(self._more[-1])
        context = self._free.pop()
        self._attach(context.execution)
        return context

    def _created(self, profile: int) -> Context:
        strategy = self._plan.flavour.module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._log.listening():
            execution = self._plan.engine.create_execution_context(strategy)
            if execution is None or not execution.set_optimization_profile_async(profile, self._stream):
                name = self._profiles[profile]
                raise EngineError(f"{self._plan.flavour.label} cannot prepare {name}: {self._log.reason()}")
        return Context(execution)
