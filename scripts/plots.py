"""The plots of the README, made from the committed figures in ``benchmarks/results``."""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_common import RESULTS


def decode_cost() -> None:
    """Time of a decode step and bytes of cache against the context, LESS and full cache."""
    data = json.loads((RESULTS / "decode_cost.json").read_text())
    rows = data["rows"]
    contexts = [r["context"] for r in rows]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 3.8))
    time.plot(contexts, [r["full_ms"] for r in rows], "o-", label="full cache (ordinary export)")
    time.plot(contexts, [r["less_ms"] for r in rows], "s-", label=f"LESS, {data['slots']} slots")
    time.plot(contexts, [r["sparse_ms"] for r in rows], "^:", label="the same without kernels")
    time.set_ylabel("decode step, ms")
    memory.plot(contexts, [r["full_cache_bytes"] / 1e6 for r in rows], "o-", label="full cache")
    memory.plot(contexts, [r["less_state_bytes"] / 1e6 for r in rows], "s-", label=f"LESS, {data['slots']} slots")
    memory.set_ylabel("cache of one sequence, MB")
    memory.set_yscale("log")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{data['layers']} layers of TinyLlama-1.1B's shape, {data['dtype']}, batch {data['batch']}, "
        f"ONNX Runtime {data['machine']['versions']['onnxruntime']}, {data['machine']['cores']} cores",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "decode_cost.png", dpi=120)
    print(f"wrote {RESULTS / 'decode_cost.png'}")


if __name__ == "__main__":
    decode_cost()
