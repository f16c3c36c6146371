"""TensorRT plans: what their first bytes say, and loading their engine."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..contract import Contract
from ..dtypes import from_tensorrt
from ..errors import EngineError
from ..tensorrt import plugin as plugins
from ..tensorrt import trust
from ..tensorrt.engine import Flavour, check_tensors, flavour, profiles
from ..tensorrt.log import log_of
from ..tensorrt.trust import PluginFacts

#: First bytes of a plan, and the flavour that writes them.
_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
#: magic, unused, total bytes, major, minor, patch, build. NVIDIA documents the position of the version in TensorRT
#: issue 3073; the size is where TensorRT-RTX 1.7.1 writes it (not used for the other flavour).
_HEADER = struct.Struct("<4s12xQ4B")


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
        _check_engine(module, engine, contract, plugin is not None and plugin.rows_by_index)
    return LoadedPlan(chosen, runtime, engine)


def _check_engine(module: Any, engine: Any, contract: Contract, by_index: bool) -> None:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for mode, specs in (("INPUT", contract.inputs(by_index)), ("OUTPUT", contract.outputs(by_index))):
        io_mode = getattr(module.TensorIOMode, mode)
        tensors = {
            n: (from_tensorrt(engine.get_tensor_dtype(n)), tuple(engine.get_tensor_shape(n)))
            for n in names
            if engine.get_tensor_mode(n) == io_mode
        }
        check_tensors(tensors, specs, "the plan")
    expected = profiles(contract, by_index)
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
