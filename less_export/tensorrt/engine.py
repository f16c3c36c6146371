"""TensorRT plans, built from an ONNX graph and its weights; ``runtime.trt`` loads and runs them.

Two flavours share one API. ``tensorrt`` (data-center GPUs) builds for the GPU it runs on;
``tensorrt_rtx`` builds ahead of time for architectures, on a machine that needs neither GPU nor driver.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..bundle.files import replace, scratch_folder
from ..contract import OP_NAME, TENSORRT_TOPK_LIMIT, Contract, TensorSpec
from ..dtypes import from_tensorrt
from ..errors import EngineError, UsageError, install_hint
from ..native import nvcc
from ..progress import Progress
from . import plugin, rows
from .log import implement, log_of, one_line
from .trust import PluginFacts

Shape = tuple[int, ...]

#: Flavours in order of preference: module -> (name in messages, our extra).
_FLAVOURS = {"tensorrt": ("TensorRT", "trt"), "tensorrt_rtx": ("TensorRT-RTX", "trt-rtx")}


@dataclass(frozen=True)
class Flavour:
    """An importable TensorRT: ``name`` is "tensorrt" or "tensorrt_rtx"."""

    name: str
    module: ModuleType
    version: str

    @property
    def label(self) -> str:
        """Name and version for messages."""
        return f"{_FLAVOURS[self.name][0]} {self.version}"


def flavour(name: str | None = None) -> Flavour:
    """The installed TensorRT: full TensorRT if it can be imported, otherwise TensorRT-RTX; or the one called ``name``.

    Raises:
        EngineError: none is installed, or the installed one cannot be loaded.
    """
    broken = ""
    for candidate in _FLAVOURS if name is None else (name,):
        try:
            module = importlib.import_module(candidate)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a half-installed binary package may raise anything
            broken = f" ({candidate} is installed but cannot be loaded: {one_line(str(error))})"
            continue
        if hasattr(module, "Builder"):  # an empty folder of that name imports too
            return Flavour(candidate, module, str(module.__version__))
    hints = {n: install_hint(extra) for n, (_, extra) in _FLAVOURS.items()}
    if name is not None:
        raise EngineError(f"this needs {_FLAVOURS[name][0]}, which is not available{broken}: {hints[name]}")
    raise EngineError(
        f"TensorRT is not available{broken}: {hints['tensorrt']} for the GPU of this machine, "
        f"or {hints['tensorrt_rtx']} to build for RTX GPUs on any machine"
    )


def parse_gpu_arch(chosen: Flavour, gpu_arch: str | None) -> tuple[str, ...]:
    """Architectures to build for, as "sm_89"; none means the default of the flavour.

    Args:
        chosen: the flavour that will build.
        gpu_arch: "sm_89", "89" or "8.9", several of them with commas; ``None`` or "all" for
            TensorRT-RTX's default, a plan for every GPU from sm_80 on.

    Raises:
        UsageError: unknown, unsupported, or given with full TensorRT, which builds for the GPU of the machine.
    """
    if gpu_arch is None:
        return ()
    if chosen.name != "tensorrt_rtx":
        raise UsageError(
            f"{chosen.label} builds for the GPU of this machine: leave --gpu-arch out, "
            "or build with TensorRT-RTX in an environment without tensorrt"
        )
    if gpu_arch.strip().lower() == "all":
        return ()
    names = " ".join(chosen.module.ComputeCapability.__members__)
    # TensorRT-RTX knows Turing (sm_75) but has no f32 matrix product for it, which the low-rank term needs.
    first = nvcc.first_arch()
    supported = [f"sm_{n}" for n in sorted(map(int, re.findall(r"\bSM(\d+)", names))) if n >= first]
    archs = []
    for item in gpu_arch.split(","):
        arch = nvcc.arch_name(item)
        if arch is None or arch not in supported:
            raise UsageError(
                f"{chosen.label} cannot build for '{item.strip()}': choose from {', '.join(supported)}, "
                f"or leave --gpu-arch out for all from sm_{first} on"
            )
        archs.append(arch)
    return tuple(dict.fromkeys(archs))


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: its largest chunk, and (min, opt, max) of every input's shape."""

    name: str
    chunk: int
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def profiles(contract: Contract, by_index: bool = False) -> tuple[Profile, ...]:
    """The profiles of a plan, in order: decode (T = 1), and prefill (T = 1..chunk) where chunk > 1.

    Both accept 1..max_batch rows and are tuned for max_batch, since a user who raises --max-batch means to use it.
    ``by_index``: of a plan that takes rows by index, whose state has 1..max_batch rows whatever the step has.
    """

    def profile(name: str, chunk: int) -> Profile:
        rows, specs = contract.max_batch, contract.inputs(by_index)
        shapes = {s.name: (s.sized(1, 1), s.sized(rows, chunk), s.sized(rows, chunk)) for s in specs}
        return Profile(name, chunk, shapes)

    prefill = (profile("prefill", contract.chunk),) if contract.chunk > 1 else ()
    return (profile("decode", 1), *prefill)


def polygraphy_options(contract: Contract) -> list[str]:
    """Options with which ``polygraphy convert`` builds a plan with the plugin; it does not take rows by index."""
    options = ["--strongly-typed", "--preview-features", "ALIASED_PLUGIN_IO_10_03"]
    for profile in profiles(contract):
        for index, bound in enumerate(("min", "opt", "max")):
            sizes = (f"{n}:[{','.join(map(str, s[index]))}]" for n, s in profile.shapes.items())
            options += [f"--trt-{bound}-shapes", *sizes]
    return options


def check_limits(contract: Contract) -> None:
    """Raise :class:`EngineError` for a contract that TensorRT cannot run without the plugin."""
    for index, layer in enumerate(contract.layers):
        if layer.policy.uses_topk and layer.capacity > TENSORRT_TOPK_LIMIT:
            raise EngineError(
                f"layer {index} keeps {layer.capacity} tokens with {layer.policy.name}, but TensorRT chooses among "
                f"at most {TENSORRT_TOPK_LIMIT}: use a smaller --budget, or --policy sink"
            )


def check_tensors(tensors: Mapping[str, tuple[str, Shape]], expected: Iterable[TensorSpec], what: str) -> None:
    """Compare names, dtypes and shapes with the contract; TensorRT reports unknown and dynamic sizes as -1."""
    specs = {s.name: s for s in expected}
    for name in [*specs, *tensors]:
        if name not in tensors:
            raise EngineError(f"{what} lacks the tensor {name}: export the bundle again")
        if name not in specs:
            raise EngineError(f"{what} has the tensor {name}, which the contract lacks: export the bundle again")
        spec, (dtype, shape) = specs[name], tensors[name]
        fits = len(shape) == len(spec.shape) and all(a == -1 or a == b for a, b in zip(shape, spec.shape, strict=True))
        if dtype != spec.dtype or not fits:
            raise EngineError(
                f"{what} has {name} as {dtype} {list(shape)} where the contract says "
                f"{spec.dtype} {list(spec.shape)}: export the bundle again"
            )


@dataclass(frozen=True)
class PlanInfo:
    """How a plan was built: file size, time, TensorRT's layers; ``gpu_arch`` like "sm_86,sm_89", None for the default.

    ``plugin_layers`` of the layers are plugins; ``plugin`` describes their library.
    """

    flavour: str
    version: str
    gpu_arch: str | None
    bytes: int
    seconds: float
    layers: int
    plugin_layers: int = 0
    plugin: PluginFacts | None = None


def build_plan(
    model: bytes,
    contract: Contract,
    *,
    out: Path,
    weights_dir: Path,
    gpu_arch: str | None = None,
    library: Path | None = None,
    progress: Progress | None = None,
) -> PlanInfo:
    """Build ``out`` from an ONNX graph; the file is whole or as it was before.

    The plan is streamed to disk if TensorRT can do that (RTX can), so it never takes up host memory.

    Args:
        model: serialised ONNX, with the LessAttention bodies inside or, with a ``library``, bare nodes. The plan takes
            rows by index in the latter case (:mod:`less_export.tensorrt.rows`).
        weights_dir: the folder that external data locations are relative to.
        gpu_arch: see :func:`parse_gpu_arch`.
        library: the plugin (see :func:`less_export.tensorrt.plugin.library`); TensorRT-RTX puts it into the plan.
        progress: notified when each profile begins (TensorRT's own steps are no measure of time: nearly all of it is
            one opaque step per profile); an exception that it raises cancels the build and is passed on.

    Raises:
        UsageError: ``gpu_arch``.
        EngineError: no TensorRT, or it rejects the graph (the message is TensorRT's own, in one line).
    """
    chosen = flavour()
    archs = parse_gpu_arch(chosen, gpu_arch)
    if library is None:
        check_limits(contract)
    else:
        plugin.check_layers(library, contract)
        model = rows.by_index(model, contract)
    started = time.monotonic()
    log, names = log_of(chosen.module), [p.name for p in profiles(contract)]

    def watch(message: str) -> None:
        begun = re.search(r"optimization profile number (\d+)", message)
        if begun and progress is not None:
            progress.say(f"compiling {names[int(begun[1])]} ({int(begun[1]) + 1} of {len(names)})")

    try:
        with scratch_folder(out) as folder:
            part = folder / out.name
            with log.listening(watch), log.interruptible():
                layers, plugins = _build(chosen, model, contract, weights_dir, archs, library, part)
            replace(part, out)
    except OSError as error:
        raise EngineError(f"cannot write {out}: {error.strerror or error}") from error
    seconds = time.monotonic() - started
    facts = None if library is None else PluginFacts.of(library, _embeds(chosen), rows_by_index=True)
    size = out.stat().st_size
    return PlanInfo(chosen.name, chosen.version, ",".join(archs) or None, size, seconds, layers, plugins, facts)


def _embeds(chosen: Flavour) -> bool:
    """Whether plans carry the plugin library (TensorRT does so for version-compatible plans only)."""
    return chosen.name == "tensorrt_rtx"


def _build(
    chosen: Flavour,
    model: bytes,
    contract: Contract,
    weights_dir: Path,
    archs: tuple[str, ...],
    library: Path | None,
    part: Path,
) -> tuple[int, int]:
    """Write the plan to ``part``; returns the number of layers and of plugins among them."""
    module: Any = chosen.module
    log = log_of(chosen.module)
    try:
        builder = module.Builder(log.interface)
    except (TypeError, RuntimeError):  # the bindings raise these if the factory returns nothing
        raise EngineError(f"{chosen.label} cannot start: {log.reason()}") from None
    if library is not None:
        plugin.load(module, library)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, log.interface)  # maps the weights: it must outlive the build
    if not parser.parse(model, path=os.fspath(weights_dir / "model.onnx")):  # only the folder is used
        raise EngineError(f"{chosen.label} cannot read the graph{_culprit(parser, library)}: {log.reason()}")
    by_index = library is not None
    for get, count, specs in (
        (network.get_input, network.num_inputs, contract.inputs(by_index)),
        (network.get_output, network.num_outputs, contract.outputs(by_index)),
    ):
        tensors = {t.name: (from_tensorrt(t.dtype), tuple(t.shape)) for t in map(get, range(count))}
        check_tensors(tensors, specs, "the graph")
    config = _configure(module, builder, profiles(contract, by_index), archs)
    if library is not None:
        config.set_preview_feature(module.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        # TensorRT-RTX 1.2: without it, a step may allocate memory, and cannot be captured into a CUDA graph.
        if flag := getattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
            config.set_flag(flag)
        if _embeds(chosen):
            config.plugins_to_serialize = [os.fspath(library)]
    monitor = implement(  # bound to a name: TensorRT does not keep it alive
        module.IProgressMonitor,
        phase_start=lambda *_: None,
        step_complete=log.guarded(lambda *_: True, failed=False),  # False cancels the build
        phase_finish=lambda *_: None,
    )
    config.progress_monitor = monitor
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    with open(part, "wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = implement(module.IStreamWriter, write=log.guarded(file.write, failed=0))
            built = builder.build_serialized_network_to_stream(network, config, writer)
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None and file.write(memoryview(plan))
    if not built:
        raise EngineError(f"{chosen.label} cannot build the engine: {log.reason()}")
    return len(layers), layers.count(module.LayerType.PLUGIN_V3)


def _culprit(parser: Any, library: Path | None) -> str:
    """The node that the parser failed at, for a message."""
    if parser.num_errors == 0 or not parser.get_error(0).node_operator():
        return ""
    error = parser.get_error(0)
    hint = ", which has no body inside" if error.node_operator() == OP_NAME and library is None else ""
    return f" at node '{error.node_name()}' ({error.node_operator()}{hint})"


def _configure(module: Any, builder: Any, planned: Iterable[Profile], archs: tuple[str, ...]) -> Any:
    """Builder configuration: profiles, architectures, and f32 without TF32."""
    config = builder.create_builder_config()
    # TF32 has 10 bits of mantissa: too few for log phi and for the state, which need f32.
    config.clear_flag(module.BuilderFlag.TF32)
    for profile in planned:
        entry = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            entry.set_shape(name, *shapes)
        config.add_optimization_profile(entry)
    if archs:
        config.num_compute_capabilities = len(archs)
        for index, arch in enumerate(archs):
            config.set_compute_capability(getattr(module.ComputeCapability, arch.upper().replace("_", "")), index)
    return config
