"""The data that the steps of an export share, prepared after everything that can go wrong has been checked."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import strict_json
from ..config import DEFAULT_POLICY, ExportConfig
from ..contract import Contract
from ..errors import ModelError
from ..hf import checkpoint, tokenizer_files
from ..hf.model import OpenModel, open_model
from ..hf.sources import ModelSource
from ..hf.weights import Stored
from ..less.policies import by_name
from ..plan import unused_kernels
from ..progress import Progress
from ..tensorrt import engine, plugin
from . import quantise
from .calibrate import calibrated
from .targets import Targets, compute_dtype, contract


@dataclass
class ExportJob:
    """One export.

    contracts: of every graph and engine, by kind. library: the plugin that an engine is built with, if any.
    tensors: where every parameter's bytes are. facts: what the manifest states about the model.
    """

    model: OpenModel
    targets: Targets
    contracts: dict[str, Contract]
    library: Path | None
    tokenizer: Any | None
    tensors: dict[str, Stored]
    facts: dict[str, Any]


def prepare(
    source: ModelSource, config: ExportConfig, targets: Targets, scratch: Path, progress: Progress
) -> ExportJob:
    """Open the model and check everything that can go wrong before any output is made; weights are fetched last.

    Raises:
        LessExportError: anything that the user can fix.
    """
    model = open_model(source, config)
    contracts = {kind: contract(model, compute_dtype(kind, model)) for kind in (*targets.traced, *targets.kinds)}
    library = _plugin(model, contracts["plan"], targets, progress) if "plan" in contracts else None
    if config.weights is not None:
        quantise.load_quantiser()  # refuses where it is not installed
    tokenizer, without = usable_tokenizer(source)
    bare, tensors = checkpoint.take(model, scratch, progress)
    model = replace(model, kernels=calibrated(model, source.tokenizer(), progress))
    facts = {
        "name": source.name,
        "class": type(bare).__name__,
        "parameters": sum(p.numel() for p in bare.parameters()),
        "config": _as_json(model.hf_config, source),
        "max_position_embeddings": model.trained_length,
    }
    if without:
        warnings.warn(f"{without}: generate will take token ids only", stacklevel=2)
    _warn(model)
    return ExportJob(model, targets, contracts, library, tokenizer, tensors, facts)


def usable_tokenizer(source: ModelSource) -> tuple[Any | None, str]:
    """The tokenizer, where a file can hold it; otherwise None, and what a message says of it."""
    tokenizer, reason = source.tokenizer_or_reason()
    if tokenizer is not None:
        reason = tokenizer_files.python_only(tokenizer) or ""
    return (None, reason) if reason else (tokenizer, "")


def _as_json(hf_config: Any, source: ModelSource) -> Any:
    """The configuration as the manifest states it.

    Raises:
        ModelError: no manifest may hold it.
    """
    try:
        config = json.loads(json.dumps(hf_config.to_dict(), default=str))
        strict_json.read_json(json.dumps({"model": {"config": strict_json.tag_floats(config)}}).encode())
    except (RecursionError, strict_json.SchemaError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"the configuration of {source.name} does not fit into a manifest: {reason}") from None
    return config


def _plugin(model: OpenModel, planned: Contract, targets: Targets, progress: Progress) -> Path | None:
    """The plugin library of an engine, None for one of standard operators.

    Raises:
        EngineError: neither can run a layer, or the library cannot be built.
    """
    if not model.config.plugin:
        engine.check_limits(planned)
        return None
    assert targets.flavour is not None
    library = plugin.library(engine.parse_gpu_arch(targets.flavour, model.config.gpu_arch), progress=progress)
    plugin.check_layers(library, planned)
    return library


def _warn(model: OpenModel) -> None:
    """Warn of kernels that do not fit or are missing, and of a plan that evicts nothing."""
    for doubt in model.kernels.doubts(model.source.names, model.plan):
        warnings.warn(doubt, stacklevel=2)
    unused = unused_kernels(model.plan, model.kernels.layers)
    if unused:
        warnings.warn(f"kernels of layers {unused} are not used: these layers evict nothing", stacklevel=2)
    evicts = any(layer.policy.evicts for layer in model.plan)
    if evicts and not model.kernels.layers:
        given = "no --kernels given" if model.config.kernels is None else f"{model.config.kernels} is calibrated only"
        warnings.warn(f"{given}: evicted tokens are forgotten (plain sparse eviction, low-rank term off)", stacklevel=2)
    if not evicts and not by_name(model.config.policy or DEFAULT_POLICY).keeps_all:
        warnings.warn("every layer slides and keeps its window: see --compress-sliding", stacklevel=2)
