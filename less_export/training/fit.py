"""Fit the kernels of one layer: everything that does not depend on them is computed once, then Adam runs.

The loss compares what the layer's attention adds to the residual stream, after its output projection and the norm that
follows in some families, with what it adds in the model with full caches, at positions past the budget, where the
low-rank state holds tokens. The policy decides which tokens are evicted as in a streaming
run of one token at a time; that does not depend on the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contract import LayerSpec
from ..errors import LessExportError
from ..less import simulate, stream
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from . import initialisation
from .additions import Addition

#: Queries attended at a time while validating, and about as many of each sequence that calibrate the start.
_QUERIES = 256
#: Sequences that calibrate the start.
_CALIBRATION = 4
#: Rows prepared at a time, and the most bytes that their logits may take.
_ROWS = 8
_LOGITS = 512 << 20


@dataclass(frozen=True)
class Fit:
    """How a layer is fitted.

    ``steps`` of ``batch`` sequences x ``positions`` queries each. Adam with ``betas``; the learning rate rises to
    ``rate`` in ``warm_up`` steps, then falls to 2% of it along a cosine. Gradients are clipped at norm ``clip``.
    ``floor``, a share of the mean square target, keeps tokens with small targets from dominating the loss.
    ``average`` is the decay of the moving average of the weights, which is the result.
    """

    steps: int = 500
    batch: int = 2
    positions: int = 128
    rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 50
    clip: float = 1.0
    floor: float = 0.01
    average: float = 0.98

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.02 + 0.98 * cosine)


@dataclass(frozen=True)
class Errors:
    """Mean squared error of what a layer adds, relative to the mean square of its target.

    ``sparse``: eviction alone. ``start``: the untrained kernels. ``less``: the resulting kernels, which are the
    untrained ones where training made them worse.
    """

    sparse: float
    start: float
    less: float


@dataclass
class Prepared:
    """A layer's sequences [N, ...] with everything that training does not change.

    q [N,Hq,T,D] and k [N,Hk,T,D] as collected, which is how kernels read them; v [N,Hk,T,D] as slots give it back, in
    f32 if they are int8; out [N,Hk,G,T,D] and total [N,Hk,G,T,1] of the sparse part; evicted_at [N,Hk,T]; target
    [N,T,W], what the layer adds in the model with full caches. rotary [at least T,D_rot]: the table
    of a layer with a largest distance, whose q and k are not rotated.
    """

    layer: LayerSpec
    addition: Addition
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    total: Tensor
    evicted_at: Tensor
    target: Tensor
    rotary: Tensor | None = None

    @property
    def first(self) -> int:
        """First position at which the low-rank state may hold a token."""
        return self.layer.capacity + 1

    def rows(self, index: slice | Tensor) -> Prepared:
        """Some of the sequences."""
        names = ("q", "k", "v", "out", "total", "evicted_at", "target")
        return replace(self, **{n: getattr(self, n)[index] for n in names})

    def predict(self, feature_map: FeatureMap, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output with LESS at positions ``queries``, and the log of its low-rank mass."""
        split = (self.layer.kv_heads, self.layer.group)
        log_phi = feature_map.log_phi(self.q[:, :, queries].float()).unflatten(1, split)
        psi = feature_map.psi(self.k.float())
        out, mass = simulate.combine(
            self.out[:, :, :, queries], self.total[:, :, :, queries], log_phi, psi, self.v,
            simulate.absorbed(self.evicted_at, queries),
        )  # fmt: skip
        return self.addition(out), mass[..., 0]


@torch.no_grad()
def prepare(
    activations: Tensor, targets: Tensor, layer: LayerSpec, addition: Addition, device: str,
    centring: Centring | None = None, rotary: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """Compute what training needs from a layer's activations [N,Hq+2Hk,T,D] and targets [N,T,W].

    Evictions are those of a streaming run. ``centring`` is that of the layer's keys in int8 slots, ``rotary`` its
    table: see :class:`Prepared`.
    """
    sizes = (layer.query_heads, layer.kv_heads, layer.kv_heads)
    parts: list[list[Tensor]] = []
    addition, rotary = addition.to(device), None if rotary is None else rotary.to(device)
    rows = _rows_at_a_time(layer, activations.shape[2])
    for begin in range(0, len(activations), rows):
        q, k, v = (x.to(device) for x in activations[begin : begin + rows].split(sizes, 1))
        slot_v = simulate.slot_values(v, layer)
        out, total, evicted_at = simulate.one_by_one(q, k, v, layer, centring, rotary)
        parts.append([q, k, slot_v, out, total, evicted_at, targets[begin : begin + rows].to(device).float()])
    prepared = Prepared(layer, addition, *(torch.cat(x) for x in zip(*parts, strict=True)))
    return replace(prepared, rotary=rotary)


def memory(layer: LayerSpec, width: int, hidden: int, shape: torch.Size, itemsize: int, device: str) -> int:
    """Peak bytes of memory while a layer is fitted.

    These are its :class:`Prepared` sequences plus the largest of three temporaries: what the last rows take while they
    are prepared (casts, and a little over twice their logits unless they are streamed), the parts while they are
    concatenated, and what the sequences take that calibrate the start.

    width: hidden size of the model. hidden: of the kernels. shape, itemsize: of the layer's activations [N,Hq+2Hk,T,D].
    """
    count, heads, length, dim = shape
    token = heads * dim * itemsize + (4 - itemsize) * layer.kv_heads * dim * layer.int8
    token += 4 * layer.query_heads * (dim + 1) + 4 * layer.kv_heads + 4 * width
    rows = min(count, _rows_at_a_time(layer, length))
    # Beside them, with int8 slots: keys and values exact, rounded and on the way there, in f32.
    rounding = 28 * layer.kv_heads * dim * layer.int8
    turning = 8 * heads * dim * (layer.max_distance is not None)  # queries and keys in f32, and what makes them
    if stream.takes(layer, torch.device(device)):
        scores = 4 * dim * (1 + simulate.clamps(layer, length)) * (2 * layer.query_heads + 2 * layer.kv_heads)
    else:
        scores = (9 + 8 * simulate.clamps(layer, length)) * layer.query_heads * length
    temporary = rows * length * (scores + 2 * token + rounding + turning)
    queries = min(length, _QUERIES) * layer.query_heads
    # Weights of some queries on all keys, and the hidden values of both.
    start = 4 * min(count, _CALIBRATION) * (5 * queries * length // 2 + hidden * (queries + layer.kv_heads * length))
    # What is a view of the activations is there once.
    part = 4 * layer.query_heads * (dim + 1) + 4 * layer.kv_heads * (1 + dim * layer.int8) + 4 * width * (itemsize < 4)
    parts = length * (count * (part if torch.device(device).type == "cpu" else token) + token)
    return count * length * token + max(parts, temporary, start)


def _rows_at_a_time(layer: LayerSpec, length: int) -> int:
    """Rows to prepare together: the eviction loop takes the same time for several, but their logits must fit."""
    return max(1, min(_ROWS, _LOGITS // (4 * layer.query_heads * length * length)))


def _loss(data: Prepared, feature_map: FeatureMap, queries: Tensor, floor: Tensor) -> Tensor:
    added, _ = data.predict(feature_map, queries)
    target = data.target[:, queries]
    return ((added - target).pow(2).mean(-1) / (target.pow(2).mean(-1) + floor)).mean()


@torch.no_grad()
def relative_error(data: Prepared, feature_map: FeatureMap | None) -> float:
    """Squared error over squared target at all positions past the budget; None for eviction alone."""
    error = total = 0.0
    for row in range(len(data.q)):
        one = data.rows(slice(row, row + 1))
        for queries in torch.arange(data.first, data.q.shape[2], device=data.q.device).split(_QUERIES):
            if feature_map is None:
                added = one.addition(one.out[:, :, :, queries])
            else:
                added, _ = one.predict(feature_map, queries)
            target = one.target[:, queries]
            error += float((added - target).pow(2).sum())
            total += float(target.pow(2).sum())
    return error / max(total, 1e-30)


@torch.no_grad()
def begin(data: Prepared, parametrisation: str, rank: int, hidden: int, generator: torch.Generator) -> FeatureMap:
    """Untrained kernels, calibrated on the first few sequences."""
    sample = data.rows(slice(0, 8))
    keys = sample.k.float().transpose(0, 1).flatten(1, 2)
    feature_map = initialisation.new_map(parametrisation, data.layer, rank, hidden, keys, generator, data.rotary)
    sample = data.rows(slice(0, _CALIBRATION))
    queries = torch.arange(data.first, data.q.shape[2], max(1, data.q.shape[2] // _QUERIES), device=data.q.device)
    mass = initialisation.true_mass(sample.q, sample.k, data.layer, sample.evicted_at, queries, data.rotary)
    initialisation.calibrate(feature_map, mass, sample.predict(feature_map, queries)[1])
    return feature_map


def fit(
    train: Prepared,
    validation: Prepared,
    parametrisation: str,
    rank: int,
    hidden: int,
    recipe: Fit,
    seed: int,
    step: Callable[[str], None],
) -> tuple[FeatureMap, Errors]:
    """Train one layer's kernels; ``step`` is called with the loss after each step.

    Raises:
        LessExportError: the loss becomes NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    feature_map = begin(train, parametrisation, rank, hidden, generator)
    before = relative_error(validation, feature_map)
    floor = recipe.floor * train.target.pow(2).mean()
    averaged = [p.data.clone() for p in feature_map.parameters()]
    optimizer = torch.optim.Adam(feature_map.requires_grad_().parameters(), lr=recipe.rate, betas=recipe.betas)
    order: list[int] = []
    length = train.q.shape[2]
    for number in range(recipe.steps):
        if len(order) < recipe.batch:
            order += torch.randperm(len(train.q), generator=generator).tolist()
        rows, order = order[: recipe.batch], order[recipe.batch :]
        queries = train.first + torch.randperm(length - train.first, generator=generator)[: recipe.positions]
        batch = train.rows(torch.tensor(rows, device=train.q.device))
        loss = _loss(batch, feature_map, queries.to(train.q.device), floor)
        if not bool(loss.isfinite()):
            raise LessExportError(f"the loss became {loss.item()} in step {number}: try another --seed, or --steps 0")
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(feature_map.parameters(), recipe.clip)
        optimizer.step()
        decay = min(recipe.average, (number + 1) / (number + 10))
        for average, parameter in zip(averaged, feature_map.parameters(), strict=True):
            average.lerp_(parameter.data, 1 - decay)
        step(f"error {loss.item():.4f}")
    feature_map.requires_grad_(False)
    for average, parameter in zip(averaged, feature_map.parameters(), strict=True):
        parameter.data = average
    after = relative_error(validation, feature_map)
    if not after <= before:  # training made it worse: return the untrained kernels
        feature_map = begin(train, parametrisation, rank, hidden, torch.Generator().manual_seed(seed))
        after = before
    return feature_map, Errors(relative_error(validation, None), before, after)
