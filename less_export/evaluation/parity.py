"""``less-export check``: compare a bundle's backend with the torch reference, through Polygraphy.

Teacher-forced over many steps: before every step the backend receives the reference's state, so that rounding
errors cannot accumulate. The logits are compared, the set of positions in every head's slots, and H and z of the
heads whose sets agree.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from ..contract import INPUT_IDS, LOGITS, NEW_LENGTH, Contract
from ..errors import UsageError
from ..less import state16
from ..less.int8 import ONE_CODE
from ..runtime.backend import Array, Backend, RowState, State

#: Largest error by compute dtype, relative to the tensor's largest reference value.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}
#: Largest share of slots whose token may differ, because scores are within rounding of each other.
SLOT_TOLERANCE = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.1}
#: Precision whose tolerances hold for ONNX Runtime with quantised weights: it rounds activations to 8 bits.
QUANTISED_PRECISION = "bfloat16"
#: Tokens fed one at a time after the chunks.
DECODE_STEPS = 8


@dataclass(frozen=True)
class Difference:
    """The worst error of one tensor over all steps; ``error`` is relative, or for positions a share of slots."""

    tensor: str
    error: float
    limit: float
    step: int

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass
class Report:
    """Outcome of a check. ``evicted`` counts tokens that lost their slot in the layer that evicted most."""

    tokens: int
    steps: int
    evicted: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.differences) and all(d.passed for d in self.differences.values())

    def worst(self, count: int = 10) -> list[Difference]:
        """The tensors closest to (or furthest beyond) their limits."""
        return sorted(self.differences.values(), key=lambda d: d.error / d.limit, reverse=True)[:count]

    def largest(self, kind: str) -> float:
        """Largest error of a kind of tensor: logits, position, h or z."""
        errors = [d.error for d in self.differences.values() if d.tensor.split(".")[-1] == kind]
        return max(errors, default=0.0)


class _Runner(BaseRunner):
    """A backend as a Polygraphy runner; ``before`` returns the state that each step starts from."""

    def __init__(self, backend: Backend, before: Callable[[], RowState] | None = None) -> None:
        super().__init__(name=backend.name)
        self.backend, self.before = backend, before
        self.started_from: RowState | None = None

    def activate_impl(self) -> None:
        self.backend.open(1)

    def deactivate_impl(self) -> None:
        self.backend.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add(INPUT_IDS, np.int64, (1, -1)).add(NEW_LENGTH, np.int32, (1,))

    def infer_impl(self, feed_dict: dict[str, Array]) -> OrderedDict[str, Array]:
        if self.before is not None:
            self.backend.write_row(0, convert(self.before(), self.backend.contract))
        else:
            self.started_from = self.backend.read_row(0)
        start = time.perf_counter()
        logits = self.backend.step(feed_dict[INPUT_IDS], feed_dict[NEW_LENGTH])
        self.inference_time = time.perf_counter() - start
        return OrderedDict({LOGITS: logits, **_compared(self.backend.read_row(0).tensors, self.backend.contract)})


def _compared(state: State, contract: Contract) -> State:
    """The state tensors that have the same meaning in every implementation; of a state of 16 bits the means."""
    compared: State = {}
    for index, layer in enumerate(contract.layers):
        own = {n: state[f"past.{index}.{n}"] for n in ("position", "h", "z", *["h_scale"] * layer.state16)}
        h = state16.absorbed(own["h"], own["h_scale"], own["z"]) if layer.state16 else own["h"]
        tensors = {"position": np.sort(own["position"], -1), "h": h, "z": own["z"]}
        compared |= {f"past.{index}.{n}": x for n, x in tensors.items()}
    return compared


def convert(state: RowState, contract: Contract) -> RowState:
    """A float32 state in the dtypes of ``contract`` (bfloat16 as its bits, rounded to nearest even)."""
    tensors: State = {}
    for spec in contract.state():
        x = state.tensors[spec.past.name]
        if spec.dtype == "bfloat16":
            bits = x.astype(np.float32).view(np.uint32)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        elif spec.dtype == "float16":
            x = x.astype(np.float16)
        tensors[spec.past.name] = x
    return RowState(state.length, tensors, state.identity)


def check(
    reference: Backend,
    backend: Backend,
    token_ids: Sequence[int],
    chunk: int | None = None,
    precision: str | None = None,
) -> Report:
    """Compare ``backend`` with ``reference`` over ``token_ids`` of one sequence.

    The text runs in chunks of ``chunk`` tokens (default: the contract's), its last 8 tokens one at a time.
    ``precision`` is the dtype whose tolerances apply (default: the contract's).
    """
    if len(token_ids) < DECODE_STEPS + 2:
        raise UsageError(f"checking takes at least {DECODE_STEPS + 2} tokens of text, not {len(token_ids)}")
    contract = backend.contract
    sizes = _steps(len(token_ids), min(chunk or contract.chunk, contract.chunk))
    report = Report(len(token_ids), len(sizes))
    reference_runner = _Runner(reference)

    def started_from() -> RowState:
        assert reference_runner.started_from is not None
        return reference_runner.started_from

    compare = _Compare(contract, report, precision or contract.dtype)
    runners = [reference_runner, _Runner(backend, started_from)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        run = Comparator.run(runners, data_loader=_feeds(token_ids, sizes), streaming=True)
        results = Comparator.compare_accuracy(run, compare_func=compare)
    assert bool(results) == report.passed
    return report


def _steps(tokens: int, chunk: int) -> list[int]:
    prefill = tokens - DECODE_STEPS
    return [min(chunk, prefill - i) for i in range(0, prefill, chunk)] + [1] * DECODE_STEPS


def _feeds(token_ids: Sequence[int], sizes: Sequence[int]) -> Iterator[dict[str, Array]]:
    at = 0
    for size in sizes:
        ids = np.asarray(token_ids[at : at + size], np.int64)[None]
        yield {INPUT_IDS: ids, NEW_LENGTH: np.array([size], np.int32)}
        at += size


class _Compare:
    """Polygraphy comparison function that also records the worst error of every tensor in ``report``."""

    def __init__(self, contract: Contract, report: Report, precision: str) -> None:
        self.contract, self.report, self.precision, self.step = contract, report, precision, 0

    def __call__(self, truth: Any, other: Any) -> OrderedDict[str, bool]:
        limit, slots = TOLERANCE[self.precision], SLOT_TOLERANCE[self.precision]
        verdicts: OrderedDict[str, bool] = OrderedDict()

        def record(name: str, error: float, tolerance: float) -> None:
            error = error if np.isfinite(error) else float("inf")
            before = self.report.differences.get(name)
            if before is None or error > before.error:
                self.report.differences[name] = Difference(name, error, tolerance, self.step)
            verdicts[name] = error <= tolerance

        record(LOGITS, _relative(truth[LOGITS], other[LOGITS]), limit)
        for index, layer in enumerate(self.contract.layers):
            prefix = f"past.{index}."
            expected, actual = truth[prefix + "position"], other[prefix + "position"]
            differ = np.array([len(set(a) ^ set(b)) for a, b in zip(expected, actual, strict=True)])
            record(prefix + "position", float(differ.sum()) / 2 / expected.size, slots)
            if layer.absorb:
                same = differ == 0
                for name, tolerance in (("h", max(limit, ONE_CODE if layer.int8 else 0.0)), ("z", limit)):
                    error = _relative(truth[prefix + name][same], other[prefix + name][same])
                    record(prefix + name, error, tolerance)
            if layer.policy.evicts:
                live = int((expected[0] >= 0).sum())
                self.report.evicted = max(self.report.evicted, int(expected[0].max()) + 1 - live)
        self.step += 1
        return verdicts


def _relative(truth: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Largest difference, relative to the largest reference value."""
    if truth.size == 0:
        return 0.0
    a, b = truth.astype(np.float64), other.astype(np.float64)
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-6))
