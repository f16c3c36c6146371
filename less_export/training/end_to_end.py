"""Tune all kernels together: bring the predictions of the model with LESS closer to those with its full cache.

The layers below the first trained one give the same whatever the kernels are, and so does the whole model with full
caches: both are computed once for every sequence and kept. Steps use prefixes of several lengths, so that kernels know
states that have absorbed little and much. Of the states that are measured on held-back text the best is the result.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import LayerSpec
from ..hf.layerwise import LayerwiseDecoder
from ..hf.rotary import arranged
from ..hf.surgery import AttentionCall
from ..less import simulate
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from ..less.memory import extra_tokens
from ..less.rotary import RotaryTable
from ..plan import sparse_layer
from ..progress import Progress
from . import resources, work
from .attention import attend

#: Vocabularies up to this size are compared whole; of larger ones the corpus's own tokens and as many again.
_VOCABULARY = 65_536
_OTHERS = 4_096
#: Sequences times layers on which the gain of every layer is measured, but at least 2 sequences.
_GAIN_ROWS = 24


@dataclass(frozen=True)
class Tuning:
    """How kernels are tuned.

    ``steps`` of ``positions`` queries of one sequence each, whose length is one of ``lengths``, in turn by sequence:
    multiples of the length that layers are fitted on. Adam with ``betas``; the learning rate rises to ``rate`` in
    ``warm_up`` steps, then falls to 3% of it along a cosine. Gradients are clipped at norm ``clip``. ``average`` is the
    decay of the moving average of the weights, which is measured ``measurements`` times, at ``spread`` positions of
    every held-back sequence. The state is saved every ``save`` steps.
    """

    steps: int = 120
    positions: int = 160
    lengths: tuple[float, ...] = (0.5, 0.5, 1.0, 0.5, 0.5, 2.0)
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 8
    clip: float = 1.0
    average: float = 0.97
    measurements: int = 4
    spread: int = 240
    save: int = 10

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.03 + 0.97 * cosine)


class Comparison:
    """Compares a model's predictions with those of its full cache, on sequences whose fixed part is computed once.

    ids [N,T]; layers below ``first`` compute what they do whatever the kernels are. Layers that evict nothing attend
    as without LESS: what int8 slots round there is a hundredth of what eviction changes.
    """

    def __init__(
        self, decoder: LayerwiseDecoder, ids: Tensor, plan: Sequence[LayerSpec], first: int,
        centring: Mapping[int, Centring], rotary: Sequence[RotaryTable],
    ) -> None:  # fmt: skip
        self.ids, self.plan = ids, plan
        self._decoder, self._first, self._centring, self._rotary = decoder, first, centring, rotary
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def divergence(
        self, row: int, length: int, positions: Tensor, maps: Mapping[int, FeatureMap],
        plan: Sequence[LayerSpec] | None = None, vocabulary: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """KL(full cache || caches with ``maps``) of the next token at ``positions`` [P] of the first ``length`` tokens
        of a sequence, in nats, [P]; differentiable. ``plan``: other caches than the usual ones."""
        below, last = self._fixed(row, length)
        device, ids = self._decoder.model.device, self.ids[row : row + 1, :length]
        with torch.no_grad():
            reference = self._decoder.log_probabilities(last[positions].to(device), vocabulary)
        hidden = below[None, :length].to(device) if self._first else None
        handler = self._served(maps, plan or self.plan)
        passed = self._decoder.run(ids, handler, not self._rotary, self._first, hidden)
        assert passed.last is not None
        predicted = self._decoder.log_probabilities(passed.last[0, positions.to(device)], vocabulary)
        return (reference.exp() * (reference - predicted)).sum(-1)

    def _served(self, maps: Mapping[int, FeatureMap], plan: Sequence[LayerSpec]) -> Callable[[AttentionCall], Tensor]:
        def handler(call: AttentionCall) -> Tensor:
            call, angles = arranged(call, self._rotary)
            layer = plan[call.layer]
            if not layer.policy.evicts:
                return simulate.full(call.q, call.k, call.v, layer, angles)
            return attend(call, angles, plan, maps, self._centring)

        return handler

    @torch.no_grad()
    def _fixed(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """The input of the first trained layer and what the head gets with full caches, each at least [length,W]."""
        if row not in self._kept or len(self._kept[row][0]) < length:
            ids = self.ids[row : row + 1, :length]

            def full(call: AttentionCall) -> Tensor:
                call, angles = arranged(call, self._rotary)
                return simulate.full(call.q, call.k, call.v, self.plan[call.layer], angles)

            clean = self._decoder.run(ids, full, not self._rotary, keep=self._first)
            below = clean.kept
            if any(s.policy.evicts for s in self.plan[: self._first]):  # layers that have no kernels
                handler = self._served({}, self.plan)
                below = self._decoder.run(ids, handler, not self._rotary, keep=self._first, until=self._first).kept
            assert below is not None
            assert clean.last is not None
            self._kept[row] = below[0].cpu(), clean.last[0].cpu()
        return self._kept[row]


@dataclass
class Measured:
    """Mean divergences in nats on held-back text: with kernels; without, in as many slots; with all their bytes in
    slots instead; and by how much it would be larger with one layer's bytes in slots.

    plan: the caches, where layers whose bytes are worth more in slots have those slots.
    """

    less: float
    sparse: float
    sparse_bytes: float
    gains: dict[int, float]
    plan: tuple[LayerSpec, ...]


def tune(
    decoder: LayerwiseDecoder,
    train: Tensor,
    validation: Tensor,
    length: int,
    plan: Sequence[LayerSpec],
    maps: Mapping[int, FeatureMap],
    recipe: Tuning,
    seed: int,
    progress: Progress,
    state_file: Path | None = None,
    centring: Mapping[int, Centring] | None = None,
    rotary: Sequence[RotaryTable] = (),
) -> tuple[dict[int, FeatureMap], tuple[LayerSpec, ...], dict[str, Any]]:
    """Minimise KL(full cache || LESS) of the next-token distributions at positions past the largest budget.

    Args:
        train, validation: sequences [N,T] whose prefixes are used. length: tokens that layers were fitted on.
        state_file: saves the progress, so that an interrupted run can resume.
        centring: of keys in int8 slots, by layer. rotary: tables of distances below T, for plans that limit distances.

    Returns:
        The best maps, without those of layers in which the bytes of the low-rank term are worth more in slots; the
        plan, with these slots; and provenance: divergences on ``validation`` (nats per token) before tuning, after it,
        and of the result, and the gain of every layer.
    """
    decoder.model.requires_grad_(False)
    first, lengths = _prefixes(plan, maps, train.shape[1], length, recipe)
    constants, device = centring or {}, decoder.model.device
    training = Comparison(decoder, train, plan, min(maps), constants, rotary)
    held = Comparison(decoder, validation, plan, min(maps), constants, rotary)
    tuned = {i: copy.deepcopy(m).to(device) for i, m in maps.items()}
    vocabulary = _vocabulary(train, decoder.model.get_input_embeddings().weight.shape[0], seed)

    @torch.no_grad()
    def measure(
        used: Mapping[int, FeatureMap], caches: Sequence[LayerSpec] = plan, rows: int = len(validation)
    ) -> float:
        total = 0.0
        for row in range(rows):
            size = min(length, validation.shape[1])
            at = torch.linspace(first, size - 2, recipe.spread).long().unique()
            total += float(held.divergence(row, size, at, used, caches).mean())
        return _finite(total / rows)

    parameters = [p for m in tuned.values() for p in m.requires_grad_().parameters()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=recipe.betas)
    generator = torch.Generator().manual_seed(seed)
    state = _State(parameters, optimizer, generator, state_file)
    if not state.load(progress):
        state.before = state.best_divergence = measure(tuned)
    spacing = max(1, recipe.steps // recipe.measurements)
    with progress.phase("end to end", recipe.steps) as step:
        step(f"held-back divergence {state.before:.4f}", state.step)
        for number in range(state.step, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(number)
            row = number % len(train)
            size = lengths[row % len(lengths)]
            positions = first + torch.randperm(size - 1 - first, generator=generator)[: recipe.positions]
            loss = training.divergence(row, size, positions, tuned, None, vocabulary).mean()
            if not bool(loss.isfinite()):
                warnings.warn(
                    f"the loss is not finite at step {number + 1}: tuning ends with the best state so far", stacklevel=2
                )
                break
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            state.advance(min(recipe.average, (number + 1) / (number + 10)))
            step(f"divergence {loss.item():.4f}, held back {state.best_divergence:.4f}")
            if (number + 1) % spacing == 0 or number + 1 == recipe.steps:
                with state.averaged():
                    state.keep_better(measure(tuned))
            if (number + 1) % recipe.save == 0:
                state.save()
    state.restore_best()
    for feature_map in tuned.values():
        feature_map.requires_grad_(False)
    measured = choose(tuned, plan, measure, len(validation), progress)
    facts = {
        **asdict(recipe), "steps": state.step, "lengths": lengths, "divergence_before": state.before,
        "divergence_tuned": state.best_divergence, "divergence_after": measured.less,
        "divergence_sparse": measured.sparse, "divergence_sparse_bytes": measured.sparse_bytes,
        "gains": {str(i): x for i, x in measured.gains.items()},
    }  # fmt: skip
    return {i: m.cpu() for i, m in tuned.items()}, measured.plan, facts


def _prefixes(
    plan: Sequence[LayerSpec], layers: Collection[int], most: int, length: int, recipe: Tuning
) -> tuple[int, list[int]]:
    """The first position past the largest budget, and the lengths of prefixes of up to ``most`` tokens."""
    first = max(plan[i].capacity for i in layers) + 1
    lengths = [min(int(x * length), most) for x in recipe.lengths]
    # A prefix is of use if as many of its tokens follow that position as a step takes, or as precede it.
    return first, [x for x in lengths if x - first > min(first, recipe.positions)] or [most]


def memory(
    decoder: LayerwiseDecoder, train: Tensor, length: int, plan: Sequence[LayerSpec], maps: Mapping[int, FeatureMap],
    recipe: Tuning, centring: Mapping[int, Centring], rotary: Sequence[RotaryTable],
) -> int:  # fmt: skip
    """About how many bytes of memory :func:`tune` takes beside the model, for maps of any weights.

    A step takes about twice what autograd keeps, which is measured on the shortest prefix and grows with its length.
    """
    decoder.model.requires_grad_(False)
    first, lengths = _prefixes(plan, maps, train.shape[1], length, recipe)
    size, vocabulary = min(lengths), _vocabulary(train, decoder.model.get_input_embeddings().weight.shape[0], 0)
    compared = Comparison(decoder, train[:1], plan, min(maps), centring, rotary)
    tuned = {i: m.to(decoder.model.device).requires_grad_() for i, m in maps.items()}
    at = torch.arange(first, size - 1)[: recipe.positions]
    kept = resources.saved_bytes(lambda: compared.divergence(0, size, at, tuned, None, vocabulary), decoder.model)
    states = 2 * train.numel() * decoder.model.get_input_embeddings().weight.shape[1] * decoder.model.dtype.itemsize
    return 2 * kept * max(lengths) // size + states


def slots_instead(layer: LayerSpec) -> LayerSpec:
    """The layer without a low-rank term, whose bytes are slots, but fewer than its window has tokens."""
    slots = layer.capacity + extra_tokens(layer, "bfloat16")
    return sparse_layer(layer, min(slots, layer.window - 1) if layer.window else slots)


def choose(
    tuned: dict[int, FeatureMap], plan: Sequence[LayerSpec], measure: Callable[..., float], rows: int,
    progress: Progress,
) -> Measured:  # fmt: skip
    """Choose between state and slots: remove from ``tuned`` the layers whose low-rank term is worth less than its bytes
    in slots, the worst first.

    ``measure(maps, plan, rows)`` is the divergence on the first ``rows`` of the held-back sequences.
    """
    layers = list(tuned)
    few = min(rows, max(2, _GAIN_ROWS // len(layers)))

    def caches(kept: Collection[int]) -> tuple[LayerSpec, ...]:
        return tuple(slots_instead(s) if i in layers and i not in kept else s for i, s in enumerate(plan))

    def without(layer: int, rows: int) -> float:
        kept = {i: m for i, m in tuned.items() if i != layer}
        return measure(kept, caches(kept), rows)

    with progress.phase("what each layer's low-rank term gains", len(layers) + 2) as step:
        less, some, gains = measure(tuned, plan, rows), measure(tuned, plan, few), {}
        for layer in layers:
            gains[layer] = without(layer, few) - some
            step(f"layer {layer}: {gains[layer]:+.4f}")
        for layer in sorted((i for i in gains if gains[i] <= 0), key=gains.__getitem__):
            other = without(layer, rows)
            if other <= less:
                del tuned[layer]
                less = other
        sparse = measure({}, plan, rows)
        step(f"without any: {sparse:.4f}")
        same_bytes = measure({}, caches(()), rows)
        step(f"their bytes in slots instead: {same_bytes:.4f}")
    if same_bytes <= less:
        tuned.clear()
        less = same_bytes
    return Measured(less, sparse, same_bytes, gains, caches(tuned))


def _finite(x: float) -> float:
    """``x``, or a number larger than any divergence: JSON knows no infinity."""
    return x if math.isfinite(x) else 1e30


def _vocabulary(ids: Tensor, size: int, seed: int) -> Tensor | None:
    if size <= _VOCABULARY:
        return None
    others = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:_OTHERS]
    return torch.cat([ids.flatten(), others]).unique()


class _State:
    """Progress of tuning: parameters, their moving average, and the best average so far."""

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, generator: torch.Generator,
        file: Path | None,
    ) -> None:  # fmt: skip
        self._parameters, self._optimizer, self._generator, self._file = parameters, optimizer, generator, file
        self.step, self.before, self.best_divergence = 0, math.inf, math.inf
        self._average = [p.data.clone() for p in parameters]
        self._best = [p.data.clone() for p in parameters]

    def advance(self, decay: float) -> None:
        self.step += 1
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter.data, 1 - decay)

    def keep_better(self, divergence: float) -> None:
        """Remember the average if its divergence is the least so far."""
        if divergence < self.best_divergence:
            self.best_divergence, self._best = divergence, [x.clone() for x in self._average]

    def averaged(self) -> _Averaged:
        """A context in which the parameters are their average."""
        return _Averaged(self._parameters, self._average)

    def restore_best(self) -> None:
        for parameter, value in zip(self._parameters, self._best, strict=True):
            parameter.data = value

    def save(self) -> None:
        if self._file is None:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "step": self.step, "before": self.before, "best_divergence": self.best_divergence,
                "parameters": [p.data for p in self._parameters], "average": self._average, "best": self._best,
                "optimizer": self._optimizer.state_dict(), "generator": self._generator.get_state(),
            },
            buffer,
        )  # fmt: skip
        work.save(self._file, buffer.getvalue())

    def load(self, progress: Progress) -> bool:
        """Continue where an interrupted run was saved; whether there is one."""
        saved = None if self._file is None else work.load(self._file, progress)
        if saved is None:
            return False
        state = torch.load(io.BytesIO(saved), weights_only=True, map_location=self._parameters[0].device)
        self.step, self.before, self.best_divergence = state["step"], state["before"], state["best_divergence"]
        self._average, self._best = state["average"], state["best"]
        for parameter, value in zip(self._parameters, state["parameters"], strict=True):
            parameter.data = value
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        return True


class _Averaged:
    """While it is entered, parameters have other values."""

    def __init__(self, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        self._parameters, self._values = parameters, values

    def __enter__(self) -> None:
        self._own = [p.data for p in self._parameters]
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.data = value

    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self._parameters, self._own, strict=True):
            parameter.data = value
