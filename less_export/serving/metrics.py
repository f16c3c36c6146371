"""Figures of a server in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.engine import Engine
from ..runtime.scheduler import Event
from ..runtime.sequence import Sequence

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server; those of ``engine`` are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "less_requests", "HTTP requests, by path and status", ("path", "status"), registry=self._registry
        )
        self._generated = Counter("less_generated_tokens", "New tokens", registry=self._registry)
        self._first = Histogram(
            "less_time_to_first_token_seconds",
            "From the queuing of a sequence, once its prompt is encoded, to its first token",
            buckets=_FIRST,
            registry=self._registry,
        )
        self._between = Histogram(
            "less_time_between_tokens_seconds",
            "Between two tokens of a sequence",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self._registry.register(_EngineFigures(engine))

    def request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        self._requests.labels(path, str(status)).inc()

    def observe(self, event: Event, arrived: float, latest: dict[Sequence, float]) -> None:
        """Take the time of a token; ``latest`` holds that of each sequence's previous one."""
        if event.token is None:
            return
        self._generated.inc()
        now, before = time.perf_counter(), latest.get(event.sequence)
        latest[event.sequence] = now
        if before is None:
            self._first.observe(now - arrived)
        else:
            self._between.observe(now - before)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, timing = self._engine, self._engine.timing
        row_bytes = engine.backend.contract.state_bytes()
        yield GaugeMetricFamily("less_rows", "Rows: sequences that can run at a time", engine.rows)
        yield GaugeMetricFamily("less_rows_running", "Sequences that have a row", engine.running)
        yield GaugeMetricFamily("less_queue_waiting", "Sequences that wait for a row", engine.waiting)
        yield GaugeMetricFamily("less_queue_limit", "Sequences that may wait for a row", engine.max_queue)
        yield GaugeMetricFamily("less_state_bytes", "Bytes of state of all rows", row_bytes * engine.rows)
        yield CounterMetricFamily("less_prompt_tokens", "Tokens of prompts that were fed", timing.prefill_tokens)
        sequences = CounterMetricFamily("less_sequences", "Sequences, by what became of them", labels=["outcome"])
        for outcome, count in sorted(dict(engine.counts).items()):
            sequences.add_metric([outcome], count)
        yield sequences
