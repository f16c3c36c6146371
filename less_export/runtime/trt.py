"""The TensorRT backend: runs a plan on the GPU, where the state stays.

Needs TensorRT (either flavour) and ``cuda-bindings``, imported when a backend is made, but no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
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
from .in_flight import InFlight
from .sampler import KeptLogits
from .trt_contexts import Context, Contexts
from .trt_device import Device
from .trt_exchange import Exchange
from .trt_plan import LoadedPlan, PlanHeader, inspect_plan, load_plan
from .trt_state import DeviceState, IndexedState, RangedState

__all__ = ["LoadedPlan", "PlanHeader", "TrtBackend", "inspect_plan", "load_plan"]


class TrtBackend(Backend):
    """An ``engine.plan`` on the first GPU.

    The state stays on the device. If the plan takes rows by index, a step runs any rows where they are, and leaves out
    those that are parked. Its decode step is captured into CUDA graphs, each of which runs any rows, but not another
    number of them: one for each bucket of 1, 2, 4, 8, ... rows, and all that are open. A step runs in the smallest
    bucket that holds its rows, behind which there are parked ones.
    If a step of a plan with the plugin fails on the GPU, the state of its rows is undefined: write, reset or copy over
    them. A decode step by index whose logits stay on the GPU is not waited for: its failure is said by what is chosen
    from the logits, and by what uses its rows.
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
        self._in_flight = InFlight(self._device)
        self._plan = load_plan(plan_path, contract, plugin, trust_code)
        self._log = log_of(self._plan.flavour.module)
        self._in_place = plugin is not None
        self.rows_by_index = plugin is not None and plugin.rows_by_index
        self._inputs, self._outputs = contract.inputs(self.rows_by_index), contract.outputs(self.rows_by_index)
        self._check_aliases()
        names = [profile.name for profile in profiles(contract, self.rows_by_index)]
        self._contexts = Contexts(self._plan, names, int(self._device.stream))
        self._exchange: Exchange | None = None
        self._state: DeviceState | None = None
        self._captures = cuda_graphs and self.rows_by_index
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

    def _open(self, batch: int) -> None:
        self._close()
        try:
            self._exchange = Exchange(self._device, self.contract, batch, self.rows_by_index)
            if self.rows_by_index:
                self._state = IndexedState(self._device, self.contract, batch)
            else:
                self._state = RangedState(self._device, self.contract, batch, self._in_place)
            if self._sample is not None:
                self._sampler = DeviceSampler(
                    self._device, self._sample, self.contract.vocab_size, batch, self._in_flight.wait
                )
            activations = self._device.allocate(max(self._contexts.activation_bytes, 1))
            self._device.wait()
        except BackendError as error:
            self.close()
            raise BackendError(
                f"not enough GPU memory for {batch} rows of {self.contract.state_bytes() / 1e6:.1f} MB: "
                f"use fewer prompts at a time ({error})"
            ) from error
        self._contexts.open(
            batch, partial(_attach, self._exchange, self._state, activations, self._contexts.activation_bytes)
        )

    def _close(self) -> None:
        if self._sampler is not None:
            self._sampler.begin_step()  # logits that are kept are gone with the memory
        self._in_flight.close()
        self._contexts.close()
        self._device.release()
        self._exchange = self._state = self._sampler = None

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
        self._in_flight.end()  # it reads its inputs where those of this step will be
        active = np.flatnonzero(new_length)
        self._in_flight.check(rows[active].tolist())
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
        exchange, state = self._exchange, self._state
        assert exchange is not None
        assert state is not None
        if chunk > 1:
            size, context = batch, self._contexts.of_prompts()
        elif self._captures:
            size, context = self._contexts.of_bucket(batch)
        else:
            size, context = batch, self._contexts.of_any_rows()

        def work() -> None:
            exchange.upload(size, chunk)
            copies = state.bind(context.execution, rows)
            if not context.execution.execute_async_v3(int(self._device.stream)):
                raise BackendError(f"{self._plan.flavour.label} cannot run this step: {self._log.reason()}")
            self._device.copies(copies)

        with self._log.listening():
            exchange.put(input_ids, past_length, new_length, self._padded(rows, size))
            # After a change of shapes or addresses, TensorRT has to run a step once before it can be captured.
            if self._has_shapes(context, size, chunk) and chunk == 1:
                self._capture(context, work)
            try:
                if context.graph is not None:
                    self._device.launch(context.graph)
                else:
                    work()
                logits = np.empty(0, np.float32) if self._keeps_logits else exchange.download(batch, chunk)
                if self._keeps_logits and self.rows_by_index and chunk == 1:
                    self._in_flight.begin(rows.tolist())  # what is chosen from the logits waits for both
                else:
                    self._device.wait()
            except BackendError:
                context.shaped = None
                raise
        state.stepped(rows)
        return exchange.lasting(logits)

    def _padded(self, rows: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32]:
        """``rows``, and parked ones behind them; which row of the state they name does not matter."""
        return np.pad(rows, (0, size - len(rows)))

    def _capture(self, context: Context, work: Callable[[], None]) -> None:
        """Capture the decode step of a context, unless it is or cannot be."""
        if not self._captures or context.graph is not None:
            return
        try:
            context.graph = self._device.capture(work)
        except BackendError as error:
            self._captures = False
            self._drop_graphs()
            warnings.warn(f"decoding without a CUDA graph, as the step cannot be captured: {error}", stacklevel=5)

    def _has_shapes(self, context: Context, rows: int, chunk: int) -> bool:
        """Whether a context has the input shapes already; if not, set them."""
        sizes = (rows, chunk, self.batch if self.rows_by_index else rows)
        if context.shaped == sizes:
            return True
        if context.graph is not None:  # TensorRT: it may not run once its context has changed
            self._device.drop_graph(context.graph)
            context.graph = None
        context.set_shapes(sizes, self._inputs, self._outputs)
        return False

    def _drop_graphs(self) -> None:
        self._device.drop_graphs()
        self._contexts.forget_graphs()

    def _opened(self) -> DeviceState:
        assert self._state is not None
        return self._state

    def _copy_row(self, source: int, target: int) -> None:
        self._in_flight.finish()
        self._in_flight.check([source])
        self._opened().copy_row(source, target)
        self._device.wait()
        self._in_flight.written([target])

    def _reset_rows(self, rows: Sequence[int]) -> None:
        self._in_flight.finish()
        self._opened().reset_rows(rows)
        self._device.wait()
        self._in_flight.written(rows)

    def _read_row(self, row: int) -> State:
        return self._read_tensors(row, [s.past.name for s in self.contract.state()])

    def _read_tensors(self, row: int, names: Collection[str]) -> State:
        self._in_flight.finish()
        self._in_flight.check([row])
        return self._opened().read(row, names)

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        self._in_flight.finish()
        self._opened().write(row, tensors)
        self._device.wait()
        self._in_flight.written([row])


def _attach(exchange: Exchange, state: DeviceState, activations: int, nbytes: int, execution: Any) -> None:
    """Bind memory to an execution context of TensorRT."""
    exchange.attach(execution)
    state.attach(execution)
    execution.set_device_memory(activations, nbytes)
