"""Negative log likelihood per token, by streaming or by simulating that over whole sequences, and in the simulation the
divergence from the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contract import Contract, limits_distances
from ..errors import UsageError
from ..hf.rotary import arranged
from ..hf.running import position_ids
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate
from ..less.rotary import RotaryTable
from ..runtime.backend import Backend
from .variants import Variant

Nll = npt.NDArray[np.float64]
#: Rows of logits cast to f32 at a time.
_ROWS = 4
#: Most sequences simulated together (the eviction loop takes the same time for several), and most bytes of their
#: attention logits, and of their logits at the scored positions.
_BATCH, _LOGITS = 4, 512 << 20


def attention(variant: Variant, chunk: int, rotary: Sequence[RotaryTable] = ()) -> Callable[[AttentionCall], Tensor]:
    """The attention of every layer over whole sequences, as ``variant`` would compute it in steps of ``chunk``.

    ``rotary``: tables as long as the sequences, for a variant that limits distances.
    """
    assert limits_distances(variant.plan) == bool(rotary), "tables belong to limited distances"

    def attend(call: AttentionCall) -> Tensor:
        features, (call, angles) = None, arranged(call, rotary)
        if call.layer in variant.kernels.layers:
            features = variant.kernels.layers[call.layer].features(call.q, call.k)
        centring = variant.kernels.centring.get(call.layer)
        return simulate.attend(call.q, call.k, call.v, variant.plan[call.layer], features, chunk, centring, angles)

    return attend


@dataclass(frozen=True)
class Scores:
    """What a cache does on N sequences at P positions, in nats a token: negative log likelihoods [N,P], and
    KL(full cache || it) of the next token [N,P], where the full cache was run too."""

    nll: Nll
    divergence: Nll | None = None


@torch.inference_mode()
def simulated(
    model: PreTrainedModel,
    ids: Tensor,
    variant: Variant,
    chunk: int,
    positions: Tensor,
    step: Callable[[int], Any] = lambda rows: None,
    rotary: Sequence[RotaryTable] = (),
) -> Nll:
    """The result of a streaming run with steps of ``chunk`` tokens, computed several times faster.

    Args:
        ids: [N,L]. positions: [P], ascending; entry p scores the token at p + 1 given those up to p.
        rotary: see :func:`attention`.

    Returns:
        [N,P] negative log likelihoods in nats.
    """
    return compared(model, ids, [variant], chunk, positions, step, lambda _: rotary)[0].nll


@torch.inference_mode()
def compared(
    model: PreTrainedModel,
    ids: Tensor,
    variants: Sequence[Variant],
    chunk: int,
    positions: Tensor,
    step: Callable[[int], Any],
    rotary: Callable[[Variant], Sequence[RotaryTable]],
) -> list[Scores]:
    """:func:`simulated` for several variants, with divergences from the first if that is the full cache.

    ``step`` is called with the number of rows after each run; ``rotary`` gives the tables of a variant.
    """
    columns = positions.to(model.device)
    widest = max(s.query_heads for v in variants for s in v.plan)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    row = 4 * max(widest * ids.shape[1] ** 2, vocabulary * len(positions))
    nlls: list[list[Tensor]] = [[] for _ in variants]
    divergences: list[list[Tensor]] = [[] for _ in variants]
    for rows in ids.split(max(1, min(_BATCH, _LOGITS // row))):
        rows, reference = rows.to(model.device), None
        for number, variant in enumerate(variants):
            logits = _logits(model, rows, variant, chunk, columns, rotary(variant)).flatten(0, 1)
            nlls[number].append(_nll(logits, rows[:, columns + 1].flatten()).view(len(rows), -1).cpu().double())
            if reference is not None:
                divergences[number].append(_divergence(reference, logits).view(len(rows), -1).cpu().double())
            elif variant.kind == "full" and len(variants) > 1:
                reference = logits
            step(len(rows))
    return [
        Scores(torch.cat(a).numpy(), torch.cat(b).numpy() if b else None)
        for a, b in zip(nlls, divergences, strict=True)
    ]


def _logits(
    model: PreTrainedModel, rows: Tensor, variant: Variant, chunk: int, columns: Tensor, rotary: Sequence[RotaryTable]
) -> Tensor:
    """Logits [B,P,V] at positions ``columns`` of ``rows`` [B,L]."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, columns], *args[1:]))
    try:
        with less_attention(model, attention(variant, chunk, rotary)):
            steps = position_ids(rows, rotates=not rotary)
            logits: Tensor = model(input_ids=rows, position_ids=steps, use_cache=False).logits
            return logits
    finally:
        hook.remove()


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL of the next token from logits [N,V] to others, [N], in f32 without a copy of all of them."""
    parts = []
    for a, b in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True):
        a, b = torch.log_softmax(a.float(), -1), torch.log_softmax(b.float(), -1)
        parts.append((a.exp() * (a - b)).sum(-1))
    return torch.cat(parts)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[P,V] and [P] -> [P], in f32 without a copy of all the logits."""
    return torch.cat(
        [
            torch.logsumexp(x.float(), -1) - x.gather(1, t[:, None])[:, 0].float()
            for x, t in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
    )


def refuse_chunk(contract: Contract, chunk: int) -> None:
    """Raise :class:`UsageError` unless the artifact accepts ``chunk`` tokens a step and returns the logits of each."""
    if chunk > contract.chunk:
        raise UsageError(f"--chunk {chunk} is more than the {contract.chunk} that the bundle accepts: reduce it")
    if chunk > 1 and contract.logits != "all":
        raise UsageError(f"--chunk {chunk} needs the logits of every token: export with --logits all, or use --chunk 1")


def streamed(
    backend: Backend,
    ids: npt.NDArray[np.int64],
    chunk: int,
    positions: Sequence[int],
    step: Callable[[], Any] = lambda: None,
) -> Nll:
    """The same as :func:`simulated`, through a backend's steps as in generation.

    Raises:
        UsageError: the artifact does not support ``chunk``.
    """
    contract = backend.contract
    refuse_chunk(contract, chunk)
    nlls = np.empty((len(ids), len(positions)))
    column = {p: c for c, p in enumerate(positions)}
    for begin in range(0, len(ids), contract.max_batch):
        rows = ids[begin : begin + contract.max_batch]
        backend.open(len(rows))
        for at in range(0, max(positions) + 1, chunk):
            piece = rows[:, at : at + chunk]
            logits = backend.step(piece, np.full(len(rows), piece.shape[1]))
            for offset in range(piece.shape[1]):
                index = column.get(at + offset)
                if index is not None:
                    scores = torch.from_numpy(np.ascontiguousarray(logits[:, offset]))
                    nll = _nll(scores, torch.from_numpy(rows[:, at + offset + 1]))
                    nlls[begin : begin + len(rows), index] = nll.double().numpy()
            step()
    return nlls
