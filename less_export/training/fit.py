"""One layer's kernels: what is fixed is computed once, then a few hundred steps of Adam.

The loss compares what the layer adds to the model, after its output projection, with what it adds with the
full cache, at positions whose query finds something in the state. Which tokens those are is decided by the
policy as in a streaming run of one token at a time, and does not depend on the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import LayerSpec
from ..errors import LessExportError
from ..less import simulate
from ..less.feature_maps import FeatureMap
from . import initialisation

#: Queries attended at a time while preparing and validating: bounds memory.
_QUERIES = 256
#: Rows prepared at a time, and the most bytes that their logits may take.
_ROWS = 8
_LOGITS = 512 << 20


@dataclass(frozen=True)
class Fit:
    """How a layer is fitted.

    steps of ``batch`` sequences x ``positions`` queries each, Adam with ``betas`` at ``rate``, ``warm_up`` steps
    then a cosine down to 2%, gradients clipped at norm ``clip``. ``floor`` keeps tokens with small targets from
    ruling the loss (a share of the mean square). ``average`` is the decay of the averaged weights that are kept.
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
    """Mean square of what is wrong with a layer's output over the mean square of that output.

    ``sparse``: eviction alone. ``start``: the untrained kernels. ``less``: those that are kept, trained or untrained.
    """

    sparse: float
    start: float
    less: float


@dataclass
class Prepared:
    """A layer's sequences [N, ...] with everything that training does not change.

    q [N,Hq,T,D], k and v [N,Hk,T,D] as collected; out [N,Hk,G,T,D] and total [N,Hk,G,T,1] of the sparse part;
    left [N,Hk,T]; target [N,T,W], what the layer truly adds, W wide.
    """

    layer: LayerSpec
    projection: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    total: Tensor
    left: Tensor
    target: Tensor

    @property
    def first(self) -> int:
        """First position whose query may find something in the state."""
        return self.layer.capacity + 1

    def rows(self, index: slice | Tensor) -> Prepared:
        """Some of the sequences."""
        names = ("q", "k", "v", "out", "total", "left", "target")
        return Prepared(self.layer, self.projection, *(getattr(self, n)[index] for n in names))

    def added(self, out: Tensor) -> Tensor:
        """[N,Hk,G,P,D] attention -> [N,P,W] after the output projection."""
        return out.flatten(1, 2).transpose(1, 2).flatten(2) @ self.projection

    def predict(self, made: FeatureMap, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer adds with LESS at positions ``queries``, and the log of its low-rank mass."""
        split = (self.layer.kv_heads, self.layer.group)
        log_phi = made.log_phi(self.q[:, :, queries].float()).unflatten(1, split)
        psi = made.psi(self.k.float())
        out, mass = simulate.combine(
            self.out[:, :, :, queries], self.total[:, :, :, queries], log_phi, psi, self.v,
            simulate.absorbed(self.left, queries),
        )  # fmt: skip
        return self.added(out), mass[..., 0]


@torch.no_grad()
def prepare(activations: Tensor, layer: LayerSpec, projection: Tensor, device: str) -> Prepared:
    """Sort the collected q, k, v [N,Hq+2Hk,T,D] of a layer into what training needs; streaming-exact."""
    sizes = (layer.query_heads, layer.kv_heads, layer.kv_heads)
    parts: list[list[Tensor]] = []
    projection = projection.to(device)
    some = _rows_at_a_time(layer, activations.shape[2])
    for begin in range(0, len(activations), some):
        q, k, v = (x.to(device) for x in activations[begin : begin + some].split(sizes, 1))
        scores = simulate.logits(q, k, layer)
        left = simulate.evictions(scores, layer)
        steps = torch.arange(q.shape[2], device=device)
        out, total = simulate.sparse(scores, simulate.visible(left, steps, layer.window), v)
        true = simulate.full(q.float(), k.float(), v.float(), layer)
        parts.append([q, k, v, out, total, left, true.transpose(1, 2).flatten(2) @ projection])
    return Prepared(layer, projection, *(torch.cat(x) for x in zip(*parts, strict=True)))


def memory(layer: LayerSpec, width: int, shape: torch.Size, itemsize: int) -> int:
    """Most bytes that a layer takes while it is fitted.

    That is its :class:`Prepared` sequences, and beside them what the last rows to be prepared need (a little over two
    times their logits, and casts) or, when all are joined, the parts they come from.

    width: of what the layer adds. shape, itemsize: of its activations [N,Hq+2Hk,T,D].
    """
    count, heads, length, dim = shape
    token = heads * dim * itemsize + 4 * layer.query_heads * (dim + 1) + 4 * layer.kv_heads + 4 * width
    rows = min(count, _rows_at_a_time(layer, length))
    temporary = rows * length * (9 * layer.query_heads * length + 2 * token)
    return count * length * token + max(count * length * token, temporary)


def _rows_at_a_time(layer: LayerSpec, length: int) -> int:
    """Several rows, since the eviction loop is the same for one, but not too many logits at once."""
    return max(1, min(_ROWS, _LOGITS // (4 * layer.query_heads * length * length)))


def _loss(data: Prepared, made: FeatureMap, queries: Tensor, floor: Tensor) -> Tensor:
    added, _ = data.predict(made, queries)
    target = data.target[:, queries]
    return ((added - target).pow(2).mean(-1) / (target.pow(2).mean(-1) + floor)).mean()


@torch.no_grad()
def relative_error(data: Prepared, made: FeatureMap | None) -> float:
    """Squared error over squared target at all positions past the budget; ``None`` is eviction alone."""
    wrong = size = 0.0
    for row in range(len(data.q)):
        one = data.rows(slice(row, row + 1))
        for queries in torch.arange(data.first, data.q.shape[2], device=data.q.device).split(_QUERIES):
            added = one.predict(made, queries)[0] if made is not None else one.added(one.out[:, :, :, queries])
            target = one.target[:, queries]
            wrong += float((added - target).pow(2).sum())
            size += float(target.pow(2).sum())
    return wrong / max(size, 1e-30)


@torch.no_grad()
def begin(data: Prepared, parametrisation: str, rank: int, hidden: int, generator: torch.Generator) -> FeatureMap:
    """Kernels at their start, calibrated on the first few sequences."""
    few = data.rows(slice(0, 8))
    keys = few.k.float().transpose(0, 1).flatten(1, 2)
    made = initialisation.new_map(parametrisation, data.layer, rank, hidden, keys, generator)
    few = data.rows(slice(0, 4))
    queries = torch.arange(data.first, data.q.shape[2], max(1, data.q.shape[2] // 256), device=data.q.device)
    true = initialisation.true_mass(few.q, few.k, data.layer, few.left, queries)
    initialisation.calibrate(made, true, few.predict(made, queries)[1])
    return made


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
    """Train one layer's kernels; ``step`` is called with the current error after each step.

    Raises:
        LessExportError: the loss becomes NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    made = begin(train, parametrisation, rank, hidden, generator)
    before = relative_error(validation, made)
    floor = recipe.floor * train.target.pow(2).mean()
    averaged = [p.data.clone() for p in made.parameters()]
    optimizer = torch.optim.Adam(made.requires_grad_().parameters(), lr=recipe.rate, betas=recipe.betas)
    order: list[int] = []
    length = train.q.shape[2]
    for number in range(recipe.steps):
        if len(order) < recipe.batch:
            order += torch.randperm(len(train.q), generator=generator).tolist()
        rows, order = order[: recipe.batch], order[recipe.batch :]
        queries = train.first + torch.randperm(length - train.first, generator=generator)[: recipe.positions]
        batch = train.rows(torch.tensor(rows, device=train.q.device))
        loss = _loss(batch, made, queries.to(train.q.device), floor)
        if not bool(loss.isfinite()):
            raise LessExportError(f"the loss became {loss.item()} in step {number}: try another --seed, or --steps 0")
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(number)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), recipe.clip)
        optimizer.step()
        decay = min(recipe.average, (number + 1) / (number + 10))
        for kept, parameter in zip(averaged, made.parameters(), strict=True):
            kept.lerp_(parameter.data, 1 - decay)
        step(f"error {loss.item():.4f}")
    made.requires_grad_(False)
    for kept, parameter in zip(averaged, made.parameters(), strict=True):
        parameter.data = kept
    after = relative_error(validation, made)
    if not after <= before:  # the steps did harm: back to where they began
        made = begin(train, parametrisation, rank, hidden, torch.Generator().manual_seed(seed))
        after = before
    return made, Errors(relative_error(validation, None), before, after)
