"""Calibration of int8 slots: mean and standard deviation of every key channel, measured on text.

Keys of a KV head lie far from zero in a few channels. Centred and scaled by these constants, all channels make equal
use of the integers (``less.int8``). The constants belong to a model, not to a cache: any policy and budget uses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle.files import is_special
from ..config import ExportConfig, MaxDistance
from ..contract import LayerSpec
from ..errors import KernelError, ModelError, UsageError
from ..less import simulate
from ..less.feature_maps import Kernels
from ..less.int8 import Centring
from ..less.rotary import RotaryTable
from ..plan import AttentionLayer
from ..progress import AnyProgress, Progress, as_progress
from . import data, running
from .model import distances, open_architecture
from .rotary import arranged, tables
from .sources import resolve
from .surgery import AttentionCall, less_attention

#: Sequences, and tokens of each, unless told otherwise.
SEQUENCES, LENGTH = 8, 1024
#: Smallest std of a channel, as a share of the root mean square of its head's: a channel that varies less than this in
#: the text may vary more in another, where it would take the range of all others. In SmolLM2-135M shares from 0
#: to 0.5 give the same errors: 1 channel in 5,000 varies less than 0.1 times the root mean square.
SMALLEST_SHARE = 0.1
#: Smallest std of a channel in any case, and as a share of the largest mean, whose float32 rounding it exceeds.
_SMALLEST, _SMALLEST_TO_MEAN = 1e-6, 2.0**-20


class Moments:
    """Running mean and variance of every channel, in float64 [Hk,D]."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self._count = 0
        self._mean = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        self._squares = torch.zeros_like(self._mean)  # of deviations from the mean

    def add(self, keys: Tensor) -> None:
        """Add the tokens of ``keys`` [B,Hk,T,D]."""
        x = keys.detach().double().cpu().transpose(0, 1).flatten(1, 2)
        mean, count = x.mean(1), x.shape[1]
        change, total = mean - self._mean, self._count + count
        self._squares += (x - mean[:, None]).square().sum(1) + change.square() * (self._count * count / total)
        self._mean += change * (count / total)
        self._count = total

    def centring(self) -> Centring:
        """Mean and std, the latter no smaller than :data:`SMALLEST_SHARE` says."""
        std = (self._squares / max(self._count, 1)).sqrt()
        floor = SMALLEST_SHARE * std.square().mean(-1, keepdim=True).sqrt()
        floor = torch.maximum(floor, _SMALLEST_TO_MEAN * self._mean.abs().amax(-1, keepdim=True)).clamp(min=_SMALLEST)
        return Centring(self._mean.float(), torch.maximum(std, floor).float())


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: Tensor,
    layers: Sequence[AttentionLayer | LayerSpec],
    progress: Progress,
    rotary: Sequence[RotaryTable] = (),
) -> dict[int, Centring]:
    """Run the model with its own full attention and measure the keys of every layer.

    Args:
        ids: token ids [N,T].
        rotary: tables of distances below T, for keys as slots hold them where distances are limited.

    Raises:
        ModelError: a layer's keys hold NaN or inf.
    """
    moments = {i: Moments(x.kv_heads, x.head_dim) for i, x in enumerate(layers)}

    def record(call: AttentionCall) -> Tensor:
        call, angles = arranged(call, rotary)
        if not bool(call.k.isfinite().all()):
            raise ModelError(
                f"the keys of layer {call.layer} hold NaN or inf: the weights are damaged, or overflow {call.k.dtype}"
            )
        moments[call.layer].add(call.k)
        return simulate.full(call.q, call.k, call.v, layers[call.layer], angles)

    with progress.phase("calibrating int8 slots", len(ids)) as step, less_attention(model, record):
        for row in ids:
            running.run_decoder(model, row[None].to(model.device), rotates=not rotary)
            step()
    return {i: m.centring() for i, m in moments.items()}


def lacking(kernels: Kernels, plan: Sequence[LayerSpec]) -> list[int]:
    """Layers with int8 slots whose keys ``kernels`` cannot centre."""
    return [i for i, layer in enumerate(plan) if layer.int8 and i not in kernels.centring]


def completed(kernels: Kernels, measured: Mapping[int, Centring], facts: Mapping[str, Any]) -> Kernels:
    """``kernels`` with centring for the layers that lack it, and how that was measured."""
    provenance = {**kernels.provenance, "centring": dict(facts)}
    return replace(kernels, provenance=provenance, centring={**measured, **kernels.centring})


def facts_of(sources: Sequence[data.Source], corpus: data.Corpus, rotated: bool = True) -> dict[str, Any]:
    """Provenance of centring: texts and sequences, and whether the keys were ``rotated``."""
    count, length = corpus.ids.shape
    return {
        "rotated": rotated,
        "data": [s.facts() for s in sources],
        "sequences": {"count": count, "length": length, "sha256": corpus.hash()},
    }


def shipped_corpus(
    encode: data.Encode, bos: int | None, limit: int | None, rotated: bool = True
) -> tuple[data.Corpus, dict[str, Any]]:
    """Sequences of the text in the package for a model of ``limit`` positions, and the provenance of centring.

    Raises:
        UsageError: the tokenizer fails.
    """
    sources = [data.shipped("calibration")]
    corpus = data.sequences(sources, encode, bos, SEQUENCES, min(LENGTH, limit or LENGTH), None)
    return corpus, facts_of(sources, corpus, rotated)


def calibrate(
    model: str,
    out: str | Path,
    texts: Sequence[str] = (),
    *,
    kernels: str | Path | None = None,
    max_distance: MaxDistance | None = None,
    seqs: int = SEQUENCES,
    seq_len: int | None = None,
    device: str | None = None,
    progress: AnyProgress | None = None,
) -> Path:
    """Measure with which constants int8 slots centre the keys of a model, and write them to a kernel file.

    Args:
        model: recipe name, hub id, checkpoint folder or GGUF file.
        out: the kernel file (.safetensors) to write.
        texts: see :func:`less_export.hf.data.read`; default: the text in the package.
        kernels: a kernel file whose kernels are written to ``out`` too; its own constants are replaced.
        max_distance: as in an export: with one, slots hold keys that are not rotated.
        seqs, seq_len: sequences, and tokens of each (default 1024, or fewer if the model has fewer positions).
        device: like ``"cpu"`` or ``"cuda:1"``; default a GPU if there is one.
        progress: as in :func:`less_export.export`.

    Returns:
        ``out``.

    Raises:
        LessExportError: a problem that the user can fix.
    """
    out, report = Path(out), as_progress(progress)
    if out.is_dir() or not out.name or is_special(out):
        raise UsageError(f"--out {out} is no file: give the name of a .safetensors file")
    for name, value in (("seqs", seqs), ("seq-len", seq_len)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    sources, duplicates = data.distinct(data.read(texts or ["calibration"]))
    if duplicates:
        warnings.warn(f"--data {', '.join(duplicates)}: ignored, same text as another source", stacklevel=2)
    chosen = running.device(device)
    source = resolve(model)
    opened = open_architecture(source)
    given = Kernels({}, {}) if kernels is None else Kernels.load(kernels)
    given.check([x.heads for x in opened.layers])
    config = ExportConfig(kernels=None if kernels is None else Path(kernels), max_distance=max_distance)
    _, rotations = distances(opened, config.with_defaults(source.recipe.options() if source.recipe else {}), given)
    if given.rotated is not None and given.rotated == bool(rotations):
        raise UsageError(f"{kernels} was trained on unrotated queries and keys: drop --max-distance none")
    length = seq_len or min(LENGTH, opened.trained_length or LENGTH)
    if length > (opened.position_limit or length):
        raise UsageError(
            f"--seq-len {length} is more than the {opened.position_limit} positions that the model has: reduce it"
        )
    tokenizer, reason = source.tokenizer_or_reason()
    if tokenizer is None:
        raise UsageError(f"{reason}; calibration of {source.name} needs one: add one to its folder")
    data.warn_of_special_tokens(sources, data.special_tokens(tokenizer))
    corpus = data.sequences(sources, *data.encoder(tokenizer), seqs, length, None)
    if len(corpus.ids) < seqs:
        warnings.warn(f"the text has {len(corpus.ids)} sequences of {length} tokens, not {seqs}", stacklevel=2)
    report.say(f"loading {source.name}")
    loaded = source.load(running.compute_dtype(opened.hf_config, chosen)).to(torch.device(chosen))
    measured = measure(loaded, corpus.ids, opened.layers, report, tables(rotations, length))
    provenance = {"model": source.name, **given.provenance}
    try:
        facts = facts_of(sources, corpus, rotated=not rotations)
        completed(Kernels(given.layers, provenance), measured, facts).save(out)
    except OSError as error:
        raise KernelError(f"cannot write {out}: {error.strerror or error}") from error
    return out
