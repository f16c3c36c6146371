"""Tune all kernels together: bring the predictions of the model with LESS closer to those with its full cache."""

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

from ..contract import LayerSpec
from ..hf.rotary import arranged
from ..hf.running import position_ids
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from ..less.rotary import RotaryTable
from ..progress import Progress
from . import work

STEPS = 96
_POSITIONS = 96
_RATE = 5e-4
_WARM_UP = 8
#: Steps between saves of the state.
_SAVE_EVERY = 8


def tune(
    model: PreTrainedModel,
    train: Tensor,
    validation: Tensor,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    seed: int,
    progress: Progress,
    steps: int = STEPS,
    state_file: Path | None = None,
    centring: Mapping[int, Centring] | None = None,
    rotary: Sequence[RotaryTable] = (),
) -> tuple[dict[int, FeatureMap], dict[str, Any]]:
    """Minimise KL(full cache || LESS) of the next-token distributions at positions past the budget.

    Args:
        state_file: saves the progress, so that an interrupted run can resume.
        centring: of keys in int8 slots, by layer. rotary: tables of distances below T, for plans that limit distances.

    Returns:
        The tuned maps, or ``maps`` unless tuning lowers the divergence on validation text, and provenance: the
        divergences (nats per token) before and after (None: not finite).
    """
    model.requires_grad_(False)
    first = max(plan[i].capacity for i in maps) + 1
    all_positions = torch.arange(first, train.shape[1])
    tuned = {i: copy.deepcopy(m).to(model.device) for i, m in maps.items()}
    spread = all_positions[:: max(1, len(all_positions) // _POSITIONS)]

    def measure(name: str) -> float:
        total = 0.0
        with progress.phase(name, len(validation)) as step, torch.no_grad():
            for row in validation:
                reference = full_cache(model, row, plan, spread, rotary)
                total += float(divergence(reference, model, row, plan, tuned, spread, centring, rotary))
                step("")
        return total / len(validation)

    parameters = [p for m in tuned.values() for p in m.requires_grad_().parameters()]
    optimizer = torch.optim.Adam(parameters, lr=_RATE, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    begin = done = 0
    saved = work.load(state_file, progress) if state_file is not None else None
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True, map_location=model.device)
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
            positions = all_positions[torch.randperm(len(all_positions), generator=generator)[:_POSITIONS]]
            row = train[number % len(train)]
            reference = full_cache(model, row, plan, positions, rotary)
            loss = divergence(reference, model, row, plan, tuned, positions, centring, rotary)
            if not bool(loss.isfinite()):
                break
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done = number + 1
            step(f"divergence {loss.item():.4f}")
            if state_file is not None and done % _SAVE_EVERY == 0:
                state = {"step": done, "before": before, "parameters": [p.data for p in parameters]}
                state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                buffer = io.BytesIO()
                torch.save(state, buffer)
                work.save(state_file, buffer.getvalue())
    for feature_map in tuned.values():
        feature_map.requires_grad_(False)
    after = measure("divergence after")
    better = after < before
    shown = after if math.isfinite(after) else None
    facts = {"steps": done, "divergence_before": before, "divergence_after": shown, "used": better}
    return ({i: m.cpu() for i, m in tuned.items()} if better else dict(maps)), facts


@torch.no_grad()
def full_cache(
    model: PreTrainedModel, ids: Tensor, plan: Sequence[LayerSpec], positions: Tensor,
    rotary: Sequence[RotaryTable] = (),
) -> Tensor:  # fmt: skip
    """Log probabilities [P,V] of the next token at ``positions`` of one sequence with full caches."""

    def attend(call: AttentionCall, angles: Tensor | None) -> Tensor:
        return simulate.full(call.q, call.k, call.v, plan[call.layer], angles)

    return _log_probabilities(model, ids, positions, attend, rotary)


def divergence(
    reference: Tensor,
    model: PreTrainedModel,
    ids: Tensor,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    positions: Tensor,
    centring: Mapping[int, Centring] | None = None,
    rotary: Sequence[RotaryTable] = (),
) -> Tensor:
    """KL(``reference`` || the model with the caches of ``plan``), mean over ``positions``, in nats.

    ``reference`` comes from :func:`full_cache`, ``rotary`` is that of :func:`tune`. Layers without a map in ``maps``
    evict without a low-rank term, and keys of layers without ``centring`` are rounded as they are.
    """
    constants = centring or {}

    def student(call: AttentionCall, angles: Tensor | None) -> Tensor:
        layer, feature_map = plan[call.layer], maps.get(call.layer)
        if simulate.exact(layer, call.q.shape[2]):
            return simulate.full(call.q, call.k, call.v, layer, angles)
        own = constants.get(call.layer)
        left = simulate.departures(call.q.detach(), call.k.detach(), layer, own, 1, angles)
        features = (feature_map.log_phi(call.q), feature_map.psi(call.k)) if feature_map is not None else None
        # Recomputed in the backward pass: T x T masks and weights per head do not fit in memory for larger models.
        return checkpoint(
            simulate.attend_as, call.q, call.k, call.v, layer, features, left, own, 1, angles, use_reentrant=False
        )

    predicted = _log_probabilities(model, ids, positions, student, rotary)
    return (reference.exp() * (reference - predicted)).sum(-1).mean()


def _log_probabilities(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Callable[[AttentionCall, Tensor | None], Tensor],
    rotary: Sequence[RotaryTable],
) -> Tensor:  # fmt: skip
    def attend(call: AttentionCall) -> Tensor:
        return attention(*arranged(call, rotary))

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, positions.to(args[0].device)], *args[1:]))
    row = ids[None].to(model.device)
    try:
        with less_attention(model, attend):
            logits = model(input_ids=row, position_ids=position_ids(row, not rotary), use_cache=False).logits[0]
    finally:
        hook.remove()
    return torch.log_softmax(logits.float(), -1)
