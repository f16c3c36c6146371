"""Constants of int8 slots for an export whose kernels bring none, measured on the text in the package if possible."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from typing import Any

import torch

from ..errors import LessExportError
from ..hf import calibration, data, running
from ..hf.model import OpenModel
from ..less.feature_maps import Kernels
from ..progress import Progress

#: Most parameters of a model that an export runs: larger ones take minutes.
_MOST_PARAMETERS = 10e9


def calibrated(model: OpenModel, tokenizer: Any | None, progress: Progress) -> Kernels:
    """The kernels of an export, with constants for every layer with int8 slots, or a warning that some have none."""
    missing = calibration.lacking(model.kernels, model.plan)
    if not missing or model.config.random_weights:
        return model.kernels
    reason = _why_not(model, tokenizer)
    if reason is None:
        try:
            return _measured(model, tokenizer, progress)
        except LessExportError as error:
            reason = str(error)
    warnings.warn(
        f"int8 slots are not calibrated, which costs quality: {reason}; calibrate with less-export calibrate, and give "
        "its file with --kernels",
        stacklevel=2,
    )
    return model.kernels


def _dtype(model: OpenModel) -> torch.dtype:
    return running.compute_dtype(model.hf_config, "cpu")


def _why_not(model: OpenModel, tokenizer: Any | None) -> str | None:
    """Why the model is not run here, None if it is."""
    if tokenizer is None:
        return "the model has no tokenizer"
    parameters = sum(p.numel() for p in model.bare.parameters())
    # Weights as they are computed with, a quarter for activations, and GGUF dequantised to f32 on the way.
    needed = int(parameters * (1.25 * _dtype(model).itemsize + 4 * (model.source.gguf is not None)))
    free = running.free_memory("cpu")
    if free is not None and needed > free:
        return f"running the model takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if parameters > _MOST_PARAMETERS:
        return f"the model has {parameters / 1e9:.0f} billion parameters, and running it takes long"
    return None


def _measured(model: OpenModel, tokenizer: Any, progress: Progress) -> Kernels:
    progress.say("calibrating int8 slots on the text that ships with less-export (less-export calibrate takes others)")
    rotated = not model.rotations
    corpus, facts = calibration.shipped_corpus(*data.encoder(tokenizer), model.trained_length, rotated)
    loaded = model.source.load(_dtype(model), model.hf_config)
    tables = model.rotary_tables(corpus.ids.shape[1])
    measured = calibration.measure(loaded, corpus.ids, model.plan, progress, tables)
    del loaded
    gc.collect()  # its modules refer to one another
    kernels = replace(model.kernels, provenance={"model": model.source.name, **model.kernels.provenance})
    return calibration.completed(kernels, measured, facts)
