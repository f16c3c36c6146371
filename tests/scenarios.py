"""Random inputs for ``LessAttention`` with what the oracle expects of them, and comparisons with an implementation.

:func:`scenario` records inputs and expectations, :func:`play` drives an implementation through them, :func:`compare`
asserts what is exact and measures the rest, :func:`follow` does so along all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from less_export.contract import LayerSpec

from .oracle import (
    CENTRING,
    SCALES,
    STATE,
    STATE_SCALES,
    TOKENS,
    TURNING,
    Arrays,
    Oracle,
    centring_of,
    table_of,
)

#: An implementation: its arrays in the op's order, in and out.
Run = Callable[[list[np.ndarray]], list[np.ndarray]]
#: Makes q, k, v, log_phi_q, psi_k of a chunk: (rng, layer, positions [B,T]) -> arrays.
Draw = Callable[[np.random.Generator, LayerSpec, np.ndarray], Arrays]

#: State whose contents are unspecified in empty slots; there, integers are poisoned with a large code.
IN_SLOTS = ("key", "value", "psi", "score", *SCALES)
POISON = 77
#: Largest share of codes of means that float32 may change, which moves some of them past a whole number.
DIFFERENT = 0.1


@dataclass(frozen=True)
class Step:
    """One call of the operator: rows to reset first, inputs without the state, expected outputs."""

    reset: tuple[int, ...]
    inputs: Arrays
    expected: Arrays


@dataclass(frozen=True)
class Normal:
    """Gaussian tokens: logits with standard deviation ``logit``, log phi in a range and sometimes -inf."""

    logit: float = 1.5
    log_phi: tuple[float, float] = (-4.0, 3.0)
    rounded: Callable[[np.ndarray], np.ndarray] = lambda x: x

    def __call__(self, rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        batch, chunk = positions.shape
        queries, tokens = (batch, layer.query_heads, chunk), (batch, layer.kv_heads, chunk)
        gain = self.logit / (layer.scale * math.sqrt(layer.head_dim))
        log_phi = rng.uniform(*self.log_phi, (*queries, layer.rank)).astype(np.float32)
        log_phi[rng.random(log_phi.shape) < 0.1] = -np.inf
        mixed = np.exp(rng.normal(0, 1.5, (*tokens, layer.rank)))
        mixed[:, 0, :, 1:2] = 0  # a feature that one KV head never fills, whatever phi is
        psi = mixed / mixed.sum(-1, keepdims=True) if layer.absorb else np.zeros(mixed.shape)
        drawn = {
            "q": gain * rng.normal(size=(*queries, layer.head_dim)),
            "k": rng.normal(size=(*tokens, layer.head_dim)),
            "v": rng.normal(size=(*tokens, layer.head_dim)),
            "psi_k": psi,
        }
        return {"log_phi_q": log_phi, **{n: self.rounded(x.astype(np.float32)) for n, x in drawn.items()}}


@dataclass(frozen=True)
class OneHot:
    """Each query puts all its attention on one of the ``reach`` tokens before it or on itself (its logit is
    +200, every other is -200), so that scores are small integers and tie everywhere, also in float32.

    Positions stay below head_dim. ``blind`` is the share of queries that look at everything alike.
    """

    reach: int
    blind: float = 0.0

    def __call__(self, rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
        drawn = Normal(log_phi=(-60.0, 60.0))(rng, layer, positions)
        at = positions[:, None, :]
        for b, t in np.ndindex(positions.shape):
            drawn["k"][b, :, t] = -1
            drawn["k"][b, :, t, positions[b, t] % layer.head_dim] = 1
        target = np.maximum(at - rng.integers(0, self.reach + 1, drawn["q"].shape[:3]), 0)
        q = np.zeros(drawn["q"].shape, np.float32)
        np.put_along_axis(q, target[..., None] % layer.head_dim, 200 / layer.scale, -1)
        q[rng.random(target.shape) < self.blind] = 0
        return {**drawn, "q": q}


def chunk_of(
    draw: Draw, rng: np.random.Generator, layer: LayerSpec, past: np.ndarray, new: np.ndarray, pad: int
) -> Arrays:
    """Inputs of one call without the state: ``new`` [B] valid tokens, ``pad`` more, all padding NaN."""
    width = max(1, int(new.max()) + pad)
    chunk = draw(rng, layer, past[:, None] + np.arange(width))
    for b, n in enumerate(new):
        for name in TOKENS:
            chunk[name][b, :, n:] = np.nan
    centring = dict(zip(CENTRING, centring_of(layer), strict=True)) if layer.int8 else {}
    rotary = {"rotary": table_of(layer)} if layer.max_distance else {}
    return {**chunk, "past_length": past.astype(np.int32), "new_length": new.astype(np.int32), **centring, **rotary}


def scenario(
    layer: LayerSpec,
    lengths: Sequence[Sequence[int]],
    seed: int,
    draw: Draw | None = None,
    reset: dict[int, tuple[int, ...]] | None = None,
) -> list[Step]:
    """Steps with ``lengths[step][row]`` new tokens and what the oracle expects of them.

    Data with evictions that depend on less than :data:`FRAGILE` is discarded for the next seed's.
    """
    draw, reset, batch = draw or Normal(), reset or {}, len(lengths[0])
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        oracle, past, steps, fragile = Oracle(layer, batch), np.zeros(batch, int), [], False
        for i, new in enumerate(np.array(lengths)):
            for row in reset.get(i, ()):
                fragile |= oracle.fragile
                oracle.reset(row)
                past[row] = 0
            chunk = chunk_of(draw, rng, layer, past, new, pad=int(rng.integers(0, 2)))
            steps.append(Step(reset.get(i, ()), chunk, oracle.step(chunk)))
            past = past + new
        if not (fragile or oracle.fragile):
            return steps
    raise AssertionError("no data without near ties: take smaller chunks or fewer steps")


def play(run: Run, steps: list[Step], empty: list[np.ndarray]) -> Iterator[tuple[Step, Arrays, Arrays]]:
    """Run the steps from the state ``empty``: (step, state before, outputs). Empty slots stay poisoned."""
    state, names = [x.copy() for x in empty], (*STATE, *SCALES, *STATE_SCALES)[: len(empty)]
    for step in steps:
        for x, fresh in zip(state, empty, strict=True):
            x[list(step.reset)] = fresh[list(step.reset)]
        before = dict(zip(names, [x.copy() for x in state], strict=True))
        constants = [step.inputs[n] for n in (*CENTRING, *TURNING) if n in step.inputs]
        lengths = [step.inputs["past_length"], step.inputs["new_length"]]
        outputs = run([*(step.inputs[n] for n in TOKENS), *state, *lengths, *constants])
        yield step, before, dict(zip(("out", *names), outputs, strict=True))
        state = [x.copy() for x in outputs[1:]]
        vacant = state[STATE.index("position")] < 0
        for name, x in zip(names, state, strict=True):
            if name in IN_SLOTS:
                x[vacant] = np.nan if x.dtype.kind == "f" else POISON


def compare(step: Step, before: Arrays, got: Arrays) -> dict[str, float]:
    """Assert positions, slot contents, zeros, parked rows and means that stay exactly; relative errors of the rest."""
    want, new = step.expected, step.inputs["new_length"]
    np.testing.assert_array_equal(got["position"], want["position"])
    live = want["position"] >= 0
    for name in {"key", "value", "psi", *SCALES} & got.keys():
        np.testing.assert_array_equal(got[name][live], want[name][live], err_msg=name)
    assert np.isfinite(got["out"]).all()
    for b, n in enumerate(new):
        assert not got["out"][b, :, n:].any(), "an output beyond new_length is not 0"
        if n == 0:
            for name in before:
                mask = live[b] if name in IN_SLOTS else ...
                assert got[name][b][mask].tobytes() == before[name][b][mask].tobytes(), f"parked row: {name}"
    errors = {}
    if "h_scale" in got:
        still = got["z"] == before["z"]
        for name in ("h", "h_scale"):
            assert got[name][still].tobytes() == before[name][still].tobytes(), f"feature without mass: {name}"
        got, want = with_means(got), with_means(want)
    for name in ("out", "score", "h", "z"):
        mask = live if name == "score" else ...
        a, b = got[name][mask].astype(np.float64), want[name][mask]
        assert np.isfinite(a).all(), name
        errors[name] = float(np.max(np.abs(a - b), initial=0.0) / (np.max(np.abs(b), initial=0.0) or 1.0))
    return errors


def codes_of(planes: np.ndarray) -> np.ndarray:
    """Codes of 16 bits [...,D] from their two planes [...,2D]."""
    high, low = np.split(planes.astype(np.int64), 2, -1)
    return 256 * high + low


def with_means(state: Arrays) -> Arrays:
    """The state with the means that its codes of 16 bits stand for, 0 for features without mass."""
    means = codes_of(state["h"]) * state["h_scale"].astype(np.float64)[..., None]
    return {**state, "h": np.where(state["z"][..., None] > 0, means, 0.0)}


def follow(run: Run, steps: list[Step], empty: list[np.ndarray]) -> dict[str, float]:
    """:func:`compare` along all steps: the largest relative error of out, score, h and z.

    Asserts that codes of means are equal but for a share of :data:`DIFFERENT`.
    """
    worst, codes, different = dict.fromkeys(("out", "score", "h", "z"), 0.0), 0, 0
    for step, before, got in play(run, steps, empty):
        for name, error in compare(step, before, got).items():
            worst[name] = max(worst[name], error)
        if "h_scale" in got:
            equal = codes_of(got["h"]) == codes_of(step.expected["h"])
            codes, different = codes + equal.size, different + int(np.count_nonzero(~equal))
    assert different <= DIFFERENT * codes, f"{different} of {codes} codes of means differ"
    return worst
