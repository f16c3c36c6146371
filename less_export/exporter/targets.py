"""What an export writes: the layout of the output, the artifacts, and the compute dtype of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import artifact
from ..bundle.artifact import Layout
from ..config import DEFAULT_CHUNK, ExportConfig
from ..contract import Contract, limits_distances
from ..dtypes import COMPUTE_DTYPES, from_torch
from ..errors import UsageError
from ..hf.model import OpenModel
from ..tensorrt import engine


@dataclass(frozen=True)
class Targets:
    """Where an export goes, and the kinds of artifacts it makes: "ort", "trt" (graphs), "plan" (an engine).

    flavour: the TensorRT that builds the engine.
    """

    layout: Layout
    kinds: tuple[str, ...]
    flavour: engine.Flavour | None = None

    @property
    def destination(self) -> Path:
        """The folder or file that the user asked for."""
        return self.layout.folder if self.layout.stem is None else self.layout.folder / str(self.layout.artifact)

    @property
    def traced(self) -> tuple[str, ...]:
        """Kinds of graphs to trace: an engine is built from the one for TensorRT."""
        needed = {"trt" if kind == "plan" else kind for kind in self.kinds}
        return tuple(kind for kind in ("ort", "trt") if kind in needed)

    @property
    def with_weights(self) -> bool:
        """Whether weight files belong to the output; an engine carries its own."""
        return self.kinds != ("plan",)

    def file(self, kind: str) -> str:
        """Name of an artifact."""
        return self.layout.artifact or artifact.ARTIFACT_FILES[kind]


def plan_targets(out: str | Path, config: ExportConfig, engine_plan: bool) -> Targets:
    """The targets of ``--out``, ``--target`` and ``--engine``.

    Raises:
        UsageError: they contradict each other, or other files are in the way. EngineError: no TensorRT for an engine.
    """
    layout = Layout.of(out)
    manifest = layout.folder / layout.manifest
    if manifest.exists() and not artifact.is_manifest(manifest):
        raise UsageError(
            f"--out {out} would replace {manifest}, which does not belong to a bundle: choose another name"
        )
    choose = _folder_kinds if layout.stem is None else _file_kinds
    kinds = choose(out, layout, config, engine_plan)
    _refuse_foreign(out, layout, {artifact.TOKENIZER, *([artifact.KERNELS] if config.kernels else [])}, kinds)
    if "plan" not in kinds:
        if config.gpu_arch is not None:
            raise UsageError("--gpu-arch is for engines: add --engine, or --out x.plan")
        return Targets(layout, kinds)
    flavour = engine.flavour()
    engine.parse_gpu_arch(flavour, config.gpu_arch)
    return Targets(layout, kinds, flavour)


def _refuse_foreign(out: str | Path, layout: Layout, companions: set[str], kinds: tuple[str, ...]) -> None:
    """Refuse to replace files that the manifest there, if any, does not list; a single artifact is named on purpose."""
    names = {layout.companion(name) for name in companions}
    names |= {artifact.ARTIFACT_FILES[kind] for kind in kinds} if layout.stem is None else set()
    for name in artifact.foreign_files(layout):
        if name in names:
            raise UsageError(
                f"--out {out} would replace {layout.folder / name}, which no manifest there lists: rename it, or "
                "choose another --out"
            )


def _folder_kinds(out: str | Path, layout: Layout, config: ExportConfig, engine_plan: bool) -> tuple[str, ...]:
    """Artifacts of a bundle folder."""
    if Path(out).suffix in artifact.SINGLE_SUFFIXES and not Path(out).is_dir():
        raise UsageError(f"--out {out} is inside a bundle: give the bundle's folder, or a name outside it")
    target = config.target or "ort"
    if engine_plan and target == "ort":
        raise UsageError("--engine needs --target trt or both")
    folder = layout.folder
    if not folder.name:
        raise UsageError(f"--out '{out}' names no folder of its own: give it a name")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder, x.onnx or x.plan")
    foreign = [] if artifact.is_manifest(folder / layout.manifest) else artifact.foreign_files(layout)
    if foreign:
        raise UsageError(
            f"--out {folder} holds {foreign[0]}, which does not belong to a bundle: give an empty or new folder"
        )
    graphs = ("ort", "trt") if target == "both" else (target,)
    return (*graphs, "plan") if engine_plan else graphs


def _file_kinds(out: str | Path, layout: Layout, config: ExportConfig, engine_plan: bool) -> tuple[str, ...]:
    """The artifact of ``x.onnx`` or ``x.plan``."""
    if (layout.folder / str(layout.artifact)).is_dir():
        raise UsageError(f"--out {out} is a folder: give a name without .onnx or .plan for a bundle")
    if str(layout.artifact).endswith(".onnx"):
        if config.target == "both" or engine_plan:
            raise UsageError("--out x.onnx is one graph: give a folder for both targets or for an engine")
        return (config.target or "ort",)
    if config.target in ("ort", "both"):
        raise UsageError("--out x.plan is a TensorRT engine: drop --target or give a folder")
    return ("plan",)


def compute_dtype(kind: str, model: OpenModel) -> str:
    """Compute dtype of an artifact: f32 on a CPU, the checkpoint's own for TensorRT, unless the options name one.

    Raises:
        UsageError: the model or the runtime cannot compute in the dtype of the options.
    """
    chosen = model.config.dtype
    gemma = str(model.text_config.model_type).startswith("gemma")
    if chosen == "float16" and gemma:
        raise UsageError("Gemma overflows float16: use --dtype bfloat16 or float32")
    if kind == "ort":
        if chosen == "bfloat16":
            raise UsageError(
                "ONNX Runtime's CPU kernels have no bfloat16: drop --dtype (weights stay bfloat16 on disk)"
            )
        return chosen or "float32"
    if chosen is None and model.source.recipe is not None:
        chosen = model.source.recipe.dtype
    if chosen is not None:
        return chosen
    stored = from_torch(getattr(model.hf_config, "dtype", None) or "bfloat16")
    if stored not in COMPUTE_DTYPES or (gemma and stored == "float16"):
        return "bfloat16"
    return stored


def contract(model: OpenModel, dtype: str) -> Contract:
    """The contract of an artifact that computes in ``dtype``."""
    config = model.config
    return Contract(
        model.plan,
        int(model.text_config.vocab_size),
        dtype,
        config.chunk or DEFAULT_CHUNK,
        config.max_batch,
        config.logits,
        None if limits_distances(model.plan) else model.position_limit,
        model.trained_length,
    )
