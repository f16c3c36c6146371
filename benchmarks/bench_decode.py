"""Cost of a decode step on ONNX Runtime's CPU: LESS against an ordinary export with a growing cache.

LESS runs with random kernels of the same size as trained ones, and without kernels: plain sparse eviction.
All sides are the same random Llama of TinyLlama-1.1B's shape (fewer layers), float32, batch 1, in one
process, with the same session options, their steps timed in turn. The ordinary side is the result of
``torch.onnx.export`` for the Hugging Face model with ``past_key_values``: it reads and returns the
whole cache at every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from bench_common import TINYLLAMA, kernels, random_checkpoint, write_results
from transformers import AutoModelForCausalLM, DynamicCache

import less_export
from less_export import RowState

HEADS, DIM = TINYLLAMA["num_key_value_heads"], TINYLLAMA["hidden_size"] // TINYLLAMA["num_attention_heads"]


class FullCache(torch.nn.Module):
    """The ordinary decoder: takes a token and the cache, returns logits and the longer cache."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]) -> Any:
        cache = DynamicCache()
        for i in range(self.layers):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return (out.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values)))


def export_full_cache(checkpoint: Path, out: Path, layers: int) -> ort.InferenceSession:
    """Export with a dynamic cache length and one new token; opens the graph and checks it against the model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    past = [torch.zeros(1, HEADS, 9, DIM) for _ in range(2 * layers)]
    length = torch.export.Dim("past", min=2, max=1 << 17)
    names = [f"{kind}.{i}" for i in range(layers) for kind in ("key", "value")]
    out.mkdir()
    with torch.no_grad():
        torch.onnx.export(
            FullCache(model, layers),
            (torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 9), past),
            str(out / "model.onnx"),
            dynamo=True,
            external_data=True,
            dynamic_shapes=(None, None, [{2: length} for _ in past]),
            input_names=["input_ids", "position_ids", *(f"past.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            opset_version=23,
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = ort.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        expected = model(input_ids=ids, use_cache=False).logits[:, -1:].numpy()
    values = [x.numpy() for layer in cache.layers for x in (layer.keys, layer.values)]
    feed = {"input_ids": ids[:, -1:].numpy(), "position_ids": np.array([[19]])}
    feed |= {f"past.{n}": v for n, v in zip(names, values, strict=True)}
    error = float(np.abs(session.run(["logits"], feed)[0] - expected).max() / np.abs(expected).max())
    assert error < 1e-4, f"the ordinary export is wrong by {error:.1e}"
    return session


class FullCacheStep:
    """One decode step at a fixed context, inputs bound once; the cache is not advanced."""

    def __init__(self, session: ort.InferenceSession, context: int) -> None:
        self.session, self.binding = session, session.io_binding()
        rng = np.random.default_rng(0)
        for node in session.get_inputs():
            if node.name.startswith("past."):
                value = rng.standard_normal((1, HEADS, context - 1, DIM), np.float32)
            else:
                value = np.full((1, 1), context - 1 if node.name == "position_ids" else 5, np.int64)
            self.binding.bind_ortvalue_input(node.name, ort.OrtValue.ortvalue_from_numpy(value))
        for node in session.get_outputs():
            self.binding.bind_output(node.name, "cpu")

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 4096, 16384, 32768])
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        random_checkpoint(folder / "checkpoint", "float32", args.layers, context=1 << 16)
        kernel_file = folder / "kernels.safetensors"
        kernels(args.layers, args.rank, args.hidden).save(kernel_file)
        options: dict[str, Any] = {"policy": "h2o", "budget": str(args.slots), "slots": "model", "max_distance": "none"}
        options |= {"validate": False, "max_batch": 1}
        less_export.export(str(folder / "checkpoint"), folder / "less", kernels=kernel_file, **options)
        less_export.export(str(folder / "checkpoint"), folder / "sparse", **options)
        full = export_full_cache(folder / "checkpoint", folder / "full", args.layers)
        threads = os.cpu_count() or 1
        less = less_export.open_bundle(folder / "less", "ort", threads=threads).backend
        sparse = less_export.open_bundle(folder / "sparse", "ort", threads=threads).backend
        # All contexts in turn, in several rounds, so that other load on the machine affects all alike.
        cases = {c: (filled(less, c), filled(sparse, c), FullCacheStep(full, c)) for c in args.contexts}
        times: dict[int, list[list[float]]] = {c: [[], [], []] for c in cases}
        for count in range(args.steps + 1):
            for context, (less_state, sparse_state, plain) in cases.items():
                less.write_row(0, less_state)
                sparse.write_row(0, sparse_state)
                steps = (lambda: less.step([[5]]), lambda: sparse.step([[5]]), plain)
                for samples, step in zip(times[context], steps, strict=True):
                    milliseconds = timed(step)
                    if count:  # the first round warms up
                        samples.append(milliseconds)
        rows = []
        for context, samples in times.items():
            less_ms, sparse_ms, full_ms = (round(statistics.median(x), 2) for x in samples)
            row = {
                "context": context,
                "less_ms": less_ms,
                "sparse_ms": sparse_ms,
                "full_ms": full_ms,
                "less_state_bytes": less.contract.state_bytes(),
                "full_cache_bytes": less.contract.full_cache_bytes(context),
                "speedup": round(full_ms / less_ms, 3),
            }
            rows.append(row)
            print(row, flush=True)
    facts = {"model": "random Llama, TinyLlama-1.1B shape", "dtype": "float32", "batch": 1, "threads": threads}
    write_results(
        "decode_cost",
        {
            **facts,
            "layers": args.layers,
            "slots": args.slots,
            "policy": "h2o",
            "rank": args.rank,
            "hidden": args.hidden,
            "kernel_bytes": kernels(args.layers, args.rank, args.hidden).nbytes(),
            "steps": args.steps,
            "rows": rows,
        },
    )


def filled(backend: Any, context: int) -> RowState:
    """The state of a row at ``context - 1`` tokens (slots are full after two budgets; further ones change nothing)."""
    backend.open(1)
    rng, warm = np.random.default_rng(0), min(context - 1, 2 * backend.contract.layers[0].capacity)
    for at in range(0, warm, backend.contract.chunk):
        count = min(backend.contract.chunk, warm - at)
        backend.step(rng.integers(3, 1000, (1, count)))
    state: RowState = backend.read_row(0)
    return state


def timed(step: Any) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
