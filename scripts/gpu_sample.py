"""Choosing tokens on the device, for gpu_check: against the sampler of the host, and beside it in time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_bench import current_stream, replayed

from less_export.native import sampler as native
from less_export.runtime.sampling import SamplingParams, sample_all
from tests import sample_emulation, test_cuda_sample

#: What rows of the timings ask for.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k 40, top_p 0.95": {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
}
REPEATS = 20


def kernel(device: str) -> native.Sample:
    """The kernel for the device, which is built if need be; for the CPU the emulated one."""
    return native.load(sample_emulation.library() if device == "cpu" else native.library_for_this_gpu())


class Launch:
    """Rows on the device, and what the kernel picks for them."""

    def __init__(self, sample: native.Sample, logits: np.ndarray, rows: Sequence[np.ndarray], device: str) -> None:
        self.device, self._sample, self._rows = device, sample, len(rows)
        self.logits = torch.from_numpy(logits).to(device)
        self._asked = torch.from_numpy(np.stack(rows).view(np.uint8)).to(device)
        self._picks = torch.full((len(rows),), -7, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        at = (self.logits.data_ptr(), self.logits.shape[1], self._asked.data_ptr(), self._rows)
        error = self._sample(*at, 0, self._picks.data_ptr(), current_stream(self.device))
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def picks(self) -> list[int]:
        self()
        return self._picks.tolist()


def check(device: str, quick: bool) -> dict[str, Any]:
    """Picks of the device are those of the host, for the requests and logits of tests/test_cuda_sample.py."""
    sample, failed, count = kernel(device), [], 0
    for size in (7, 1000) if quick else (1, 7, 1000, 32_000, 128_256, 262_144):
        logits = np.stack([test_cuda_sample.row_of_kind(k, size, 1) for k in test_cuda_sample.KINDS])
        turns = itertools.cycle((0.0, 0.3, 0.71, 0.94))
        requests = [*test_cuda_sample.requests(), SamplingParams()]
        asked = [(p, next(turns), r) for p in requests for r in range(len(logits))]
        got = Launch(sample, logits, [sample_emulation.row_of(p, u, r) for p, u, r in asked], device).picks()
        for token, (params, number, row) in zip(got, asked, strict=True):
            count += 1
            if token != test_cuda_sample.by_host(logits[row], params, number):
                failed.append(f"V {size}, row {row}, number {number}, {params}: {token}")
    return {"cases": count, "failed": failed}


def wall(run: Callable[[], object]) -> float:
    """Median microseconds of a call on the CPU's clock."""
    spans = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        spans.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(spans)


def timing(device: str, dry: bool) -> list[dict[str, Any]]:
    """Rows of several sizes and options."""
    sample = kernel(device)
    sizes = itertools.product((1000,) if dry else (32_000, 128_256), (1,) if dry else (1, 16, 64), OPTIONS)
    return [timed(sample, *each, device) for each in sizes]


def timed(sample: native.Sample, vocab: int, batch: int, name: str, device: str) -> dict[str, Any]:
    """The kernel, the download of all logits, and the sampler of the host."""
    logits = (np.random.default_rng(0).standard_normal((batch, vocab)) * 3).astype(np.float32)
    params = SamplingParams(seed=0, **OPTIONS[name])
    asked = [sample_emulation.row_of(params, (r + 0.5) / batch, r) for r in range(batch)]
    launch = Launch(sample, logits, asked, device)
    rngs = [params.generator(r) for r in range(batch)]
    return {
        "batch": batch,
        "vocab": vocab,
        "options": name,
        "kernel_us": round(replayed([launch], device), 1),
        "download_us": round(wall(launch.logits.cpu), 1),
        "host_us": round(wall(lambda: sample_all(logits, [params] * batch, rngs)), 1),
    }
