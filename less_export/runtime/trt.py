"""The TensorRT backend: reads plans, loads their engine, and keeps the state on the GPU.

Needs TensorRT (either flavour) and ``cuda-bindings``, imported when a backend is made, but no torch.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, Contract, StateTensor
from ..dtypes import from_tensorrt, item_bytes, numpy_dtype
from ..errors import BackendError, EngineError
from ..tensorrt import plugin as plugins
from ..tensorrt import trust
from ..tensorrt.engine import Flavour, check_tensors, flavour, profiles
from ..tensorrt.log import log_of
from ..tensorrt.trust import PluginFacts
from .backend import Array, Backend, State, empty
from .row_sides import RowSides
from .trt_device import Device

#: First bytes of a plan, and the flavour that writes them.
_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
#: magic, unused, total bytes, major, minor, patch, build. NVIDIA documents the position of the version in TensorRT
#: issue 3073; the size is where TensorRT-RTX 1.7.1 writes it (not used for the other flavour).
_HEADER = struct.Struct("<4s12xQ4B")
#: Bytes that addresses of tensors must be a multiple of (NvInferRuntime.h, ``setTensorAddress``).
_ALIGNMENT = 256


@dataclass(frozen=True)
class PlanHeader:
    """The facts in a plan's first bytes: ``version`` like "1.7.1.116", ``bytes`` the size of the file."""

    flavour: str
    version: str
    bytes: int


def inspect_plan(path: Path) -> PlanHeader:
    """Read a plan's header; needs neither TensorRT nor a driver.

    Raises:
        EngineError: the file is missing, not a plan, or truncated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise EngineError(f"cannot read the plan {path}: {error.strerror or error}") from error
    if head[:4] not in _MAGIC or len(head) < _HEADER.size:
        raise EngineError(f"{path} is not a TensorRT plan: build it again")
    magic, total, *version = _HEADER.unpack(head)
    name = _MAGIC[magic]
    if name == "tensorrt_rtx" and total != size:
        raise EngineError(f"the plan {path} has {size} bytes instead of {total}: build it again")
    return PlanHeader(name, ".".join(map(str, version)), size)


@dataclass(frozen=True)
class LoadedPlan:
    """A deserialised plan; ``runtime`` is held because the engine must not outlive it."""

    flavour: Flavour
    runtime: Any
    engine: Any


def load_plan(
    path: Path, contract: Contract, plugin: PluginFacts | None = None, trust_code: bool = False
) -> LoadedPlan:
    """Deserialise a plan on the GPU and check its tensors and profiles against the contract.

    ``plugin`` describes the plan's plugin, as in the manifest. Without ``trust_code``, native code is loaded only if
    this machine built it (see :mod:`less_export.tensorrt.trust`).

    Raises:
        EngineError: not a plan, its flavour or a driver is not installed, it was built by another version
            or for another GPU, it does not match the contract, or its plugin is missing or a different one.
    """
    header = inspect_plan(path)
    chosen = flavour(header.flavour)
    module: Any = chosen.module
    log = log_of(chosen.module)
    with log.listening(), open(path, "rb") as file:
        try:
            runtime = module.Runtime(log.interface)
        except (TypeError, RuntimeError):  # what the bindings raise when the factory returns nothing
            raise EngineError(f"{chosen.label} cannot start: {log.reason()}") from None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if plugin is not None and plugin.inside:
                if not trust_code:
                    trust.refuse_unknown_plan(path, data)
                runtime.engine_host_code_allowed = True
            elif plugin is not None:
                plugins.load(module, trust.find(plugin, trust_code))
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            other = header.version != chosen.version
            built = f" (built by version {header.version})" if other else ""
            advice = ": build it again with this version" if other else ""
            raise EngineError(f"{chosen.label} cannot load {path}{built}: {log.reason()}{advice}")
        _check_engine(module, engine, contract)
    return LoadedPlan(chosen, runtime, engine)


def _check_engine(module: Any, engine: Any, contract: Contract) -> None:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, specs in (("INPUT", contract.inputs()), ("OUTPUT", contract.outputs())):
        io_mode = getattr(module.TensorIOMode, mode)
        tensors = {
            n: (from_tensorrt(engine.get_tensor_dtype(n)), tuple(engine.get_tensor_shape(n)))
            for n in names
            if engine.get_tensor_mode(n) == io_mode
        }
        check_tensors(tensors, specs, "the plan")
    expected = profiles(contract)
    if engine.num_optimization_profiles != len(expected):
        raise EngineError(
            f"the plan has {engine.num_optimization_profiles} profiles instead of {len(expected)}: build it again"
        )
    for index, profile in enumerate(expected):
        for name, (low, _, high) in profile.shapes.items():
            plan_low, _, plan_high = (tuple(s) for s in engine.get_tensor_profile_shape(name, index))
            bounds = zip(plan_low, low, high, plan_high, strict=True)
            if not all(a <= b and c <= d for a, b, c, d in bounds):
                raise EngineError(
                    f"the plan's {profile.name} profile takes {name} from {list(plan_low)} to {list(plan_high)}, "
                    f"the contract needs {list(low)} to {list(high)}: build it again"
                )


class TrtBackend(Backend):
    """An ``engine.plan`` on the first GPU.

    One execution context per profile (decode, prefill). The state stays on the device: in one buffer if the plan has
    the plugin, which updates it in place, otherwise in two, and a row is in one or the other.
    A range of rows is bound by its address, or staged in aligned memory where TensorRT cannot take that address.
    If a step of a plan with the plugin fails on the GPU, the state of its rows is undefined: write, reset or copy over
    them.
    """

    name = "trt"

    def __init__(
        self, contract: Contract, plan_path: Path, plugin: PluginFacts | None = None, trust_code: bool = False
    ) -> None:
        """Load the plan; ``plugin`` describes its plugin, as in the manifest, ``trust_code`` allows foreign code.

        Raises:
            BackendError: no cuda-bindings, no driver or no GPU.
            EngineError: see :func:`load_plan`, or the engine contradicts the manifest about the plugin.
        """
        super().__init__(contract)
        self._device = Device()  # first: its message about a missing driver is the clearest
        self._plan = load_plan(plan_path, contract, plugin, trust_code)
        self._log = log_of(self._plan.flavour.module)
        self._profiles = profiles(contract)
        self._in_place = plugin is not None
        self._check_aliases()
        self._contexts = [self._context(index) for index in range(len(self._profiles))]
        self._shaped: list[tuple[int, int] | None] = [None] * len(self._profiles)
        #: Addresses of the token inputs and logits, of the state (two sets, which share what is updated in place),
        #: and of aligned copies of rows (one for past, one for present).
        self._fixed: dict[str, int] = {}
        self._sets: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._staged: dict[str, tuple[int, int]] = {}
        self._sides = RowSides(0)

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
            self._allocate(batch)
        except BackendError as error:
            self.close()
            raise BackendError(
                f"not enough GPU memory for {batch} rows of {self.contract.state_bytes() / 1e6:.1f} MB: "
                f"use fewer prompts at a time ({error})"
            ) from error

    def _allocate(self, batch: int) -> None:
        for spec in (*self.contract.tokens(), self.contract.logits_spec()):
            size = math.prod(spec.sized(batch, self.contract.chunk)) * item_bytes(spec.dtype)
            self._fixed[spec.name] = self._device.allocate(size)
        for tensor in self.contract.state():
            name, size = tensor.past.name, batch * tensor.row_bytes
            past = self._device.allocate(size)
            self._sets[0][name] = past
            self._sets[1][name] = past if self._in_place else self._device.allocate(size)
            self._device.upload(past, empty(tensor, batch))
            self._device.wait()
        self._sides = RowSides(batch)

    def _close(self) -> None:
        self._device.release()
        self._fixed, self._sets, self._staged = {}, ({}, {}), {}

    def _step(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        first: int,
    ) -> npt.NDArray[np.float32]:
        batch, chunk = input_ids.shape
        profile = 0 if chunk == 1 else 1
        context = self._contexts[profile]
        side, strays = self._sides.meeting(first, batch)
        for row in strays:
            self._move(row, row, side)
        with self._log.listening():
            for name, data in ((INPUT_IDS, input_ids), (PAST_LENGTH, past_length), (NEW_LENGTH, new_length)):
                self._device.upload(self._fixed[name], np.ascontiguousarray(data))
            if self._shaped[profile] != (batch, chunk):
                self._shape(context, batch, chunk)
                self._shaped[profile] = (batch, chunk)
            copies = self._bind(context, side, first, batch)
            if not context.execute_async_v3(int(self._device.stream)):
                raise BackendError(f"{self._plan.flavour.label} cannot run this step: {self._log.reason()}")
            for target, source, size in copies:
                self._device.copy(target, source, size)
            logits = np.empty(self.contract.logits_spec().sized(batch, chunk), np.float32)
            self._device.download(self._fixed[LOGITS], logits)
            self._device.wait()
        self._sides.flip(first, batch)
        return logits

    def _shape(self, context: Any, batch: int, chunk: int) -> None:
        """Set the input shapes, and check that the outputs fit their buffers."""
        for spec in self.contract.inputs():
            if not context.set_input_shape(spec.name, spec.sized(batch, chunk)):
                raise BackendError(f"the plan does not accept {spec.name} {spec.sized(batch, chunk)}: build it again")
        for spec in self.contract.outputs():
            shape = tuple(context.get_tensor_shape(spec.name))
            if shape != spec.sized(batch, chunk):
                raise BackendError(
                    f"the plan returns {spec.name} {shape}, not {spec.sized(batch, chunk)}: build it again"
                )

    def _bind(self, context: Any, side: int, first: int, count: int) -> list[tuple[int, int, int]]:
        """Bind ``count`` rows of set ``side`` from row ``first``; return the copies that must follow the step."""
        for name, address in self._fixed.items():
            context.set_tensor_address(name, address)
        copies = []
        for tensor in self.contract.state():
            name, offset, size = tensor.past.name, first * tensor.row_bytes, count * tensor.row_bytes
            past, present = self._sets[side][name] + offset, self._sets[1 - side][name] + offset
            if offset % _ALIGNMENT:
                aligned_past, aligned_present = self._stage(tensor)
                self._device.copy(aligned_past, past, size)
                copies.append((present, aligned_present, size))
                past, present = aligned_past, aligned_present
            context.set_tensor_address(name, past)
            context.set_tensor_address(tensor.present.name, present)
        return copies

    def _stage(self, tensor: StateTensor) -> tuple[int, int]:
        """Addresses of aligned memory for any rows of ``tensor``: for past and for present."""
        name, size = tensor.past.name, self.batch * tensor.row_bytes
        if name not in self._staged:
            past = self._device.allocate(size)
            self._staged[name] = (past, past if self._in_place else self._device.allocate(size))
        return self._staged[name]

    def _address(self, tensor: StateTensor, row: int, side: int) -> int:
        return self._sets[side][tensor.past.name] + row * tensor.row_bytes

    def _move(self, source: int, target: int, side: int) -> None:
        """Copy the state of row ``source`` to row ``target`` in set ``side``."""
        for tensor in self.contract.state():
            begin = self._address(tensor, source, self._sides[source])
            end = self._address(tensor, target, side)
            if begin != end:
                self._device.copy(end, begin, tensor.row_bytes)
        self._sides[target] = side

    def _copy_row(self, source: int, target: int) -> None:
        self._move(source, target, self._sides[source])
        self._device.wait()

    def _read_row(self, row: int) -> State:
        return self._read_tensors(row, [s.past.name for s in self.contract.state()])

    def _read_tensors(self, row: int, names: Collection[str]) -> State:
        state: State = {}
        for tensor in (s for s in self.contract.state() if s.past.name in names):
            data = np.empty(tensor.row_shape, numpy_dtype(tensor.dtype))
            self._device.download(self._address(tensor, row, self._sides[row]), data)
            state[tensor.past.name] = data
        self._device.wait()
        return state

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        for tensor in self.contract.state():
            data = np.ascontiguousarray(tensors[tensor.past.name])
            self._device.upload(self._address(tensor, row, self._sides[row]), data)
        self._device.wait()
