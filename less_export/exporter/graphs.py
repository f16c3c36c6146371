"""The graphs of an export: traced without weights, quantised, and pointed at the bundle's files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from transformers import PreTrainedModel

from ..contract import Contract
from ..dtypes import torch_dtype
from ..errors import UnsupportedModelError
from ..hf import weights
from ..hf.decoder import LessDecoder, parameter_of
from . import quantise
from .bind import bind
from .job import ExportJob
from .trace import trace


def traced(job: ExportJob, contract: Contract) -> ir.Model:
    """The graph of a contract, its weights not yet bound.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    kernels = job.model.kernels
    decoder = LessDecoder(_bare(job, contract.dtype), contract, kernels).eval()
    maps = [parameter_of(n) for n in kernels.tensors()]
    return trace(decoder, contract, [*(f"model.{n}" for n in job.tensors), *maps])


def quantise_weights(job: ExportJob, graph: ir.Model, path: Path) -> None:
    """Write all weights to ``path``, quantised as the options say, and point the job's tensors at that file.

    Raises:
        UnsupportedModelError: the file lacks a parameter.
    """
    bare = _bare(job, "float32")
    unquantised = quantise.write(path, bare, graph.graph, job.tensors, job.model.config)
    if unquantised:
        warnings.warn(
            f"not quantised: {unquantised[0]} (and {len(unquantised) - 1} more); experts of mixtures, and linear "
            "layers whose sizes no block divides, stay as they are",
            stacklevel=2,
        )
    job.tensors, lost = weights.locate(bare, [path])
    if lost:
        raise UnsupportedModelError(
            f"{lost[0]} (and {len(lost) - 1} more) cannot be found among the quantised weights: drop --weights"
        )


def bind_weights(job: ExportJob, graph: ir.Model, names: Mapping[Path, str], kernel_file: Path) -> None:
    """Point a graph's initializers at the bundle's files: ``names`` by path, and ``kernel_file`` beside them."""
    tensors, files = {f"model.{n}": t for n, t in job.tensors.items()}, dict(names)
    if job.model.kernels.tensors():
        tensors |= {parameter_of(n): t for n, t in weights.read_header(kernel_file).items()}
        files[kernel_file] = kernel_file.name
    bind(graph, tensors, files, kernel_file.parent)


def _bare(job: ExportJob, dtype: str) -> PreTrainedModel:
    """The decoder without weights, as it is traced."""
    bare = weights.bare_model(job.model.hf_config, torch_dtype(dtype))
    if job.model.config.weights is not None:  # a quantised output embedding is not the input's table
        weights.untie(bare)
    return bare
