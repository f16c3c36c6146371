"""All kernels together: the model with LESS is brought closer to what it says with its full cache."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..bundle.files import write_atomically
from ..contract import LayerSpec
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate
from ..less.feature_maps import FeatureMap
from ..progress import Progress

STEPS = 96
_POSITIONS = 96
_RATE = 5e-4
_WARM_UP = 8
#: Steps after which what is done is kept.
_KEEP = 8


def tune(
    model: PreTrainedModel,
    train: Tensor,
    validation: Tensor,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    seed: int,
    progress: Progress,
    steps: int = STEPS,
    keep: Path | None = None,
) -> tuple[dict[int, FeatureMap], dict[str, Any]]:
    """Minimise KL(full cache || LESS) of the next-token distributions at positions past the budget.

    ``keep``: a file that holds what is done so far, for a run that was interrupted.

    Returns:
        The tuned maps, or the given ones where validation text does not agree that they are better, and the
        divergences (nats per token) before and after (None: not finite).
    """
    model.requires_grad_(False)
    first = max(plan[i].capacity for i in maps) + 1
    everywhere = torch.arange(first, train.shape[1])
    tuned = {i: copy.deepcopy(m).to(model.device) for i, m in maps.items()}
    spread = everywhere[:: max(1, len(everywhere) // _POSITIONS)]

    def measure(name: str) -> float:
        total = 0.0
        with progress.phase(name, len(validation)) as step, torch.no_grad():
            for row in validation:
                total += float(divergence(full_cache(model, row, plan, spread), model, row, plan, tuned, spread))
                step("")
        return total / len(validation)

    parameters = [p for m in tuned.values() for p in m.requires_grad_().parameters()]
    optimizer = torch.optim.Adam(parameters, lr=_RATE, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    begin = done = 0
    if keep is not None and keep.exists():
        state = torch.load(keep, weights_only=True, map_location=model.device)
        begin, before = state["step"], state["before"]
        done = begin
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data = value
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
    else:
        before = measure("divergence before")
    with progress.phase("end to end", steps) as step:
        step("", begin)
        for number in range(begin, steps):
            cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * number / steps))
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (number + 1) / _WARM_UP) * cosine
            positions = everywhere[torch.randperm(len(everywhere), generator=generator)[:_POSITIONS]]
            row = train[number % len(train)]
            loss = divergence(full_cache(model, row, plan, positions), model, row, plan, tuned, positions)
            if not bool(loss.isfinite()):
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done = number + 1
            step(f"divergence {loss.item():.4f}")
            if keep is not None and done % _KEEP == 0:
                state = {"step": done, "before": before, "parameters": [p.data for p in parameters]}
                state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                buffer = io.BytesIO()
                torch.save(state, buffer)
                write_atomically(keep, buffer.getvalue())
    for made in tuned.values():
        made.requires_grad_(False)
    after = measure("divergence after")
    better = after < before
    shown = after if math.isfinite(after) else None
    facts = {"steps": done, "divergence_before": before, "divergence_after": shown, "used": better}
    return ({i: m.cpu() for i, m in tuned.items()} if better else dict(maps)), facts


@torch.no_grad()
def full_cache(model: PreTrainedModel, ids: Tensor, plan: Sequence[LayerSpec], positions: Tensor) -> Tensor:
    """Log probabilities [P,V] of the next token at ``positions`` of one sequence, nothing evicted."""
    return _log_probabilities(
        model, ids, positions, lambda call: simulate.full(call.q, call.k, call.v, plan[call.layer])
    )


def divergence(
    wanted: Tensor,
    model: PreTrainedModel,
    ids: Tensor,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    positions: Tensor,
) -> Tensor:
    """Mean over ``positions`` of the KL of :func:`full_cache` from the model with the caches of ``plan``, in nats.

    Layers without a map in ``maps`` evict without a low-rank term.
    """

    def student(call: AttentionCall) -> Tensor:
        layer, made = plan[call.layer], maps.get(call.layer)
        if not layer.policy.evicts:
            return simulate.full(call.q, call.k, call.v, layer)
        left = simulate.evictions(simulate.logits(call.q.detach(), call.k.detach(), layer), layer)
        features = (made.log_phi(call.q), made.psi(call.k)) if made is not None else None
        # Recomputed on the way back: masks and weights of T x T per head would not fit for larger models.
        return checkpoint(simulate.attend_as, call.q, call.k, call.v, layer, features, left, use_reentrant=False)

    said = _log_probabilities(model, ids, positions, student)
    return (wanted.exp() * (wanted - said)).sum(-1).mean()


def _log_probabilities(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Callable[[AttentionCall], Tensor]
) -> Tensor:
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, positions.to(args[0].device)], *args[1:]))
    row = ids[None].to(model.device)
    steps = torch.arange(row.shape[1], device=row.device)[None]
    try:
        with less_attention(model, attention):
            logits = model(input_ids=row, position_ids=steps, use_cache=False).logits[0]
    finally:
        hook.remove()
    return torch.log_softmax(logits.float(), -1)
