"""The TensorRT backend: runs a plan on the GPU, where the state stays.

Needs TensorRT (either flavour) and ``cuda-bindings``, imported when a backend is made, but no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import Contract
from ..errors import BackendError, EngineError
from ..native.sampler import MAX_VOCAB
from ..tensorrt.engine import profiles
from ..tensorrt.log import log_of
from ..tensorrt.trust import PluginFacts
from . import device_sampler
from .backend import Array, Backend, State
from .device_sampler import DeviceSampler
from .sampler import KeptLogits
from .trt_device import Device
from .trt_exchange import Exchange
from .trt_plan import LoadedPlan, PlanHeader, inspect_plan, load_plan
from .trt_state import DeviceState, IndexedState, RangedState

__all__ = ["LoadedPlan", "PlanHeader", "TrtBackend", "inspect_plan", "load_plan"]


class TrtBackend(Backend):
    """An ``engine.plan`` on the first GPU.

    One execution context per profile (decode, prefill). The state stays on the device. If the plan takes rows by index,
    a step runs any rows where they are, and leaves out those that are parked. Its decode step is captured into a CUDA
    graph, which runs any rows, but not another number of them: for that it is captured again.
    If a step of a plan with the plugin fails on the GPU, the state of its rows is undefined: write, reset or copy over
    them.
    """

    name = "trt"

    def __init__(
        self,
        contract: Contract,
        plan_path: Path,
        plugin: PluginFacts | None = None,
        trust_code: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        """Load the plan; ``plugin`` describes its plugin, as in the manifest, ``trust_code`` allows foreign code.

        Without ``cuda_graphs``, every step is queued kernel by kernel.

        Raises:
            BackendError: no cuda-bindings, no driver or no GPU.
            EngineError: see :func:`load_plan`, or the engine contradicts the manifest about the plugin.
        """
        super().__init__(contract)
        self._device = Device()  # first: its message about a missing driver is the clearest
        self._plan = load_plan(plan_path, contract, plugin, trust_code)
        self._log = log_of(self._plan.flavour.module)
        self._in_place = plugin is not None
        self.rows_by_index = plugin is not None and plugin.rows_by_index
        self._inputs, self._outputs = contract.inputs(self.rows_by_index), contract.outputs(self.rows_by_index)
        self._profiles = profiles(contract, self.rows_by_index)
        self._check_aliases()
        self._contexts = [self._context(index) for index in range(len(self._profiles))]
        #: Of each context, the rows, tokens and rows of state that it has the shapes for.
        self._shaped: list[tuple[int, int, int] | None] = [None] * len(self._profiles)
        self._exchange: Exchange | None = None
        self._state: DeviceState | None = None
        self._captures = cuda_graphs and self.rows_by_index
        self._graph: Any = None  # of the decode step, for the number of rows that its context has the shapes for
        #: What chooses tokens on the device, while rows are open, and whether the logits of a step stay there for it.
        self._sample = device_sampler.open_sampler() if contract.vocab_size <= MAX_VOCAB else None
        self._sampler: DeviceSampler | None = None
        self._keeps_logits = False

    def _check_aliases(self) -> None:
        """Refuse a plan that says otherwise about memory that outputs share with inputs.

        The manifest decides: engines need not report what a plugin does, and cannot before TensorRT 10.15.
        """
        ask = getattr(self._plan.engine, "get_aliased_input_tensor", None)
        if ask is None:
            return
        for tensor in self.contract.state():
            alias = ask(tensor.present.name)
            what = f"the plan writes {tensor.present.name} into {alias}"
            if alias and not self._in_place:
                raise EngineError(f"{what}, but its manifest names no plugin: build it again")
            if alias and alias != tensor.past.name:
                raise EngineError(f"{what}: build it again")

    def _context(self, profile: int) -> Any:
        strategy = self._plan.flavour.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        with self._log.listening():
            context = self._plan.engine.create_execution_context(strategy)
            if context is None or not context.set_optimization_profile_async(profile, int(self._device.stream)):
                name = self._profiles[profile].name
                raise EngineError(f"{self._plan.flavour.label} cannot prepare {name}: {self._log.reason()}")
        return context

    def _open(self, batch: int) -> None:
        self._close()
        try:
            self._exchange = Exchange(self._device, self.contract, batch, self.rows_by_index)
            if self.rows_by_index:
                self._state = IndexedState(self._device, self.contract, batch)
            else:
                self._state = RangedState(self._device, self.contract, batch, self._in_place)
            if self._sample is not None:
                self._sampler = DeviceSampler(self._device, self._sample, self.contract.vocab_size, batch)
            self._device.wait()
        except BackendError as error:
            self.close()
            raise BackendError(
                f"not enough GPU memory for {batch} rows of {self.contract.state_bytes() / 1e6:.1f} MB: "
                f"use fewer prompts at a time ({error})"
            ) from error
        for context in self._contexts:
            self._exchange.attach(context)
            self._state.attach(context)

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.begin_step()  # logits that are kept are gone with the memory
        self._shaped = [None] * len(self._profiles)  # new addresses: a step has to run before one is captured
        self._device.release()
        self._exchange = self._state = self._graph = self._sampler = None

    def step_last(
        self,
        input_ids: npt.NDArray[np.int64],
        new_length: npt.NDArray[np.int64],
        rows: slice | Sequence[int] | None = None,
    ) -> npt.NDArray[np.float32] | KeptLogits:
        """See :meth:`Backend.step_last`; they stay on the GPU where tokens can be chosen there."""
        with self.exclusive():
            if self._sampler is None or self._exchange is None:
                return super().step_last(input_ids, new_length, rows)
            self._keeps_logits = True
            try:
                self.step(input_ids, new_length, rows)
            finally:
                self._keeps_logits = False
            width = self.contract.logits_spec().sized(*input_ids.shape)[1]
            ran = np.ones_like(new_length) if not self.rows_by_index else new_length > 0
            order = np.maximum(np.cumsum(ran) - 1, 0)  # parked rows are left out: theirs are those of another row
            return self._sampler.after_step(self._exchange.logits, order * width + self._last(new_length))

    def _step(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        if self._sampler is not None:
            self._sampler.begin_step()
        active = np.flatnonzero(new_length)
        if not self.rows_by_index or len(active) == len(rows):
            return self._run(input_ids, past_length, new_length, rows)
        ran = np.empty(0, np.float32)
        if len(active):
            ran = self._run(input_ids[active], past_length[active], new_length[active], rows[active])
        if self._keeps_logits:
            return ran
        logits = np.zeros(self.contract.logits_spec().sized(*input_ids.shape), np.float32)
        if len(active):
            logits[active] = ran
        return logits

    def _run(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        batch, chunk = input_ids.shape
        profile = 0 if chunk == 1 else 1
        context, exchange, state = self._contexts[profile], self._exchange, self._state
        assert exchange is not None
        assert state is not None

        def work() -> None:
            exchange.upload(batch, chunk)
            copies = state.bind(context, rows)
            if not context.execute_async_v3(int(self._device.stream)):
                raise BackendError(f"{self._plan.flavour.label} cannot run this step: {self._log.reason()}")
            self._device.copies(copies)

        with self._log.listening():
            exchange.put(input_ids, past_length, new_length, rows)
            # After a change of shapes, TensorRT has to run a step once before it can be captured.
            if self._shape(profile, batch, chunk) and profile == 0:
                self._capture(work)
            try:
                if profile == 0 and self._graph is not None:
                    self._device.launch(self._graph)
                else:
                    work()
                logits = np.empty(0, np.float32) if self._keeps_logits else exchange.download(batch, chunk)
                self._device.wait()
            except BackendError:
                self._shaped[profile] = None
                raise
        state.stepped(rows)
        return exchange.lasting(logits)

    def _capture(self, work: Callable[[], None]) -> None:
        """Capture the decode step, unless it is or cannot be."""
        if not self._captures or self._graph is not None:
            return
        try:
            self._graph = self._device.capture(work)
        except BackendError as error:
            self._captures = False
            warnings.warn(f"decoding without a CUDA graph, as the step cannot be captured: {error}", stacklevel=5)

    def _shape(self, profile: int, batch: int, chunk: int) -> bool:
        """Whether a context has the input shapes already; if not, set them and check that the outputs fit."""
        context, wanted = self._contexts[profile], (batch, chunk, self.batch if self.rows_by_index else batch)
        if self._shaped[profile] == wanted:
            return True
        self._shaped[profile] = None
        if profile == 0:  # TensorRT: a graph may not run once the context that it was captured from has changed
            self._device.drop_graphs()
            self._graph = None
        for spec in self._inputs:
            if not context.set_input_shape(spec.name, spec.sized(*wanted)):
                raise BackendError(f"the plan does not accept {spec.name} {spec.sized(*wanted)}: build it again")
        for spec in self._outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if shape != spec.sized(*wanted):
                raise BackendError(f"the plan returns {spec.name} {shape}, not {spec.sized(*wanted)}: build it again")
        self._shaped[profile] = wanted
        return False

    def _opened(self) -> DeviceState:
        assert self._state is not None
        return self._state

    def _copy_row(self, source: int, target: int) -> None:
        self._opened().copy_row(source, target)
        self._device.wait()

    def _reset_rows(self, rows: Sequence[int]) -> None:
        self._opened().reset_rows(rows)
        self._device.wait()

    def _read_row(self, row: int) -> State:
        return self._read_tensors(row, [s.past.name for s in self.contract.state()])

    def _read_tensors(self, row: int, names: Collection[str]) -> State:
        return self._opened().read(row, names)

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        self._opened().write(row, tensors)
        self._device.wait()
