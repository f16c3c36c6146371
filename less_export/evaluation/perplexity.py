"""Negative log likelihood per token, by the streaming code or by a simulation of it over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contract import Contract
from ..errors import UsageError
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate
from ..runtime.backend import Backend
from .variants import Variant

Nll = npt.NDArray[np.float64]
#: Rows of logits that are brought to f32 at a time.
_ROWS = 4
#: Most sequences simulated at a time (the eviction loop costs the same for one), and most bytes of their logits.
_BATCH, _LOGITS = 4, 512 << 20


def attention(variant: Variant, chunk: int) -> Callable[[AttentionCall], Tensor]:
    """The attention of every layer over whole sequences, as ``variant`` would compute it in steps of ``chunk``."""

    def attend(call: AttentionCall) -> Tensor:
        features = None
        if call.layer in variant.kernels:
            made = variant.kernels[call.layer]
            features = made.log_phi(call.q), made.psi(call.k)
        return simulate.attend(call.q, call.k, call.v, variant.plan[call.layer], features, chunk)

    return attend


@torch.inference_mode()
def simulated(
    model: PreTrainedModel,
    ids: Tensor,
    variant: Variant,
    chunk: int,
    positions: Tensor,
    step: Callable[[int], Any] = lambda rows: None,
) -> Nll:
    """What a streaming run with steps of ``chunk`` tokens would find, several times faster.

    Args:
        ids: [N,L]. positions: [P], ascending; entry p scores the token at p + 1 given those up to p.

    Returns:
        [N,P] in nats.
    """
    head = model.get_output_embeddings()
    places = positions.to(model.device)
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, places], *args[1:]))
    widest = max(s.query_heads for s in variant.plan)
    batch = max(1, min(_BATCH, _LOGITS // (4 * widest * ids.shape[1] ** 2)))
    found = []
    try:
        with less_attention(model, attention(variant, chunk)):
            for rows in ids.split(batch):
                rows = rows.to(model.device)
                steps = torch.arange(rows.shape[1], device=rows.device)[None].expand(len(rows), -1)
                logits = model(input_ids=rows, position_ids=steps, use_cache=False).logits
                nll = _nll(logits.flatten(0, 1), rows[:, places + 1].flatten())
                found.append(nll.view(len(rows), -1).cpu().double().numpy())
                step(len(rows))
    finally:
        hook.remove()
    return np.concatenate(found)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[P,V] and [P] -> [P], in f32 without a copy of all the logits."""
    return torch.cat(
        [
            torch.logsumexp(x.float(), -1) - x.gather(1, t[:, None])[:, 0].float()
            for x, t in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
    )


def refuse_chunk(contract: Contract, chunk: int) -> None:
    """Raise :class:`UsageError` unless an artifact takes ``chunk`` tokens a step and gives the logits of each."""
    if chunk > contract.chunk:
        raise UsageError(f"--chunk {chunk} is more than the {contract.chunk} that the bundle takes: lower it")
    if chunk > 1 and contract.logits != "all":
        raise UsageError(
            f"--chunk {chunk} needs the logits of every token: export with --logits all, or take --chunk 1"
        )


def streamed(
    backend: Backend,
    ids: npt.NDArray[np.int64],
    chunk: int,
    positions: Sequence[int],
    step: Callable[[], Any] = lambda: None,
) -> Nll:
    """The same through a backend's steps, as generation runs them.

    Raises:
        UsageError: chunks that the artifact does not take.
    """
    contract = backend.contract
    refuse_chunk(contract, chunk)
    found = np.empty((len(ids), len(positions)))
    column = {p: c for c, p in enumerate(positions)}
    for begin in range(0, len(ids), contract.max_batch):
        rows = ids[begin : begin + contract.max_batch]
        backend.open(len(rows))
        for at in range(0, max(positions) + 1, chunk):
            piece = rows[:, at : at + chunk]
            logits = backend.step(piece, np.full(len(rows), piece.shape[1]))
            for offset in range(piece.shape[1]):
                place = column.get(at + offset)
                if place is not None:
                    scores = torch.from_numpy(np.ascontiguousarray(logits[:, offset]))
                    nll = _nll(scores, torch.from_numpy(rows[:, at + offset + 1]))
                    found[begin : begin + len(rows), place] = nll.double().numpy()
            step()
    return found
