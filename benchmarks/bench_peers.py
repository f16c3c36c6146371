"""less-export against optimum-onnx and ONNX Runtime GenAI's model builder, on one checkpoint.

Each exports a random Llama of TinyLlama-1.1B's shape, fp16; the parent measures wall time, peak RSS and bytes
written. Then all models decode on this environment's ONNX Runtime, in rounds: each has its turn at each context, in a
process of its own; and each takes prompts. less-export's run through its backend, with 256 slots full and the position
set to the context; the peers' graphs with a past of that length (random numbers, bound once; GenAI's attention writes
into the buffer it reads, as in its runtime). Prompts are fed in our chunks, and to the peers' graphs whole. Each has
its own int4: ours has blocks of 64, an int8 output embedding and the checkpoint's input embedding; GenAI's has blocks
of 32, an int4 output embedding and an f32 input embedding. ``int4, 32`` is ours in blocks of 32 with an int4 output
embedding. Each peer is installed into its own environment under ``--environments``; if one cannot be installed or
fails, the reason is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import TINYLLAMA, kernels, measure, random_checkpoint, write_results, written
from bench_memory import resident

from less_export.training.options import DEFAULT_RANK

BUDGET, HIDDEN, STEPS = 256, 128, 12
#: Tokens of prompts that are fed after the first one, which counts only where it is the only one.
PREFILLED = 1024
#: Packages of each peer. This version of torch has a CPU wheel wherever the benchmark runs.
PEERS = {
    "optimum-onnx": ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0"],
    "onnxruntime-genai": [
        "torch==2.13.0", "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0", "onnx==1.23.2",
        "onnx-ir==1.1.0",
    ],
}  # fmt: skip


def environment(peer: str, folder: Path) -> Path:
    """The Python interpreter of a peer's environment, which is created if it does not exist."""
    python = folder / peer / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        try:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        except subprocess.CalledProcessError:
            python.unlink()
            raise
    return python


def tokenizer(folder: Path) -> None:
    """Write a tokenizer of single letters: GenAI's builder copies one and fails without it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(97 + i): i for i in range(26)}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="b", eos_token="c").save_pretrained(folder)


def commands(checkpoint: Path, scratch: Path, folder: Path, layers: int) -> dict[tuple[str, str], Any]:
    """Export commands by (who, precision), or the reason why there is none."""
    kernel_file = scratch / "kernels.safetensors"
    kernels(layers, DEFAULT_RANK, HIDDEN).save(kernel_file)
    ours = [sys.executable, "-m", "less_export.cli.main", str(checkpoint), "--no-validate", "--budget", str(BUDGET)]
    ours += ["--kernels", str(kernel_file), "--max-batch", "1"]
    exports: dict[tuple[str, str], Any] = {
        ("less-export", "f32"): ours,
        ("less-export", "int4"): [*ours, "--weights", "int4"],
        ("less-export", "int4, 32"): [*ours, "--weights", "int4", "--block", "32", "--head", "int4"],
    }
    for peer in PEERS:
        try:
            python = str(environment(peer, folder))
        except (OSError, subprocess.CalledProcessError) as error:
            exports[peer, "f32"] = exports[peer, "int4"] = f"cannot be installed: {error}"
            continue
        if peer == "optimum-onnx":
            command = [str(Path(python).with_name("optimum-cli")), "export", "onnx", "-m", str(checkpoint)]
            exports[peer, "f32"] = [*command, "--task", "text-generation-with-past", "--no-post-process"]
            exports[peer, "int4"] = "its exporter has no weight-only int4"
        else:
            builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-e", "cpu"]
            for precision, name in (("f32", "fp32"), ("int4", "int4")):
                exports[peer, precision] = [*builder, "-p", name, "-c", str(scratch / "cache")]
    return exports


class Step:
    """A run of a peer's graph over the last ``tokens`` of a context, inputs bound once; the past does not advance.

    ``shared``: the graph writes the new tokens into the buffer that it reads the past from.
    """

    def __init__(self, model: Path, context: int, shared: bool, tokens: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        heads = TINYLLAMA["num_key_value_heads"]
        width = TINYLLAMA["hidden_size"] // TINYLLAMA["num_attention_heads"]
        rng, buffers = np.random.default_rng(0), {}
        for node in self.session.get_inputs():
            if node.name.startswith("past"):
                length = context if shared else context - tokens
                value = rng.standard_normal((1, heads, length, width), np.float32)
            elif node.name == "attention_mask":
                value = np.ones((1, context), np.int64)
            elif node.name == "position_ids":
                value = np.arange(context - tokens, context)[None]
            else:
                value = rng.integers(3, 1000, (1, tokens))
            buffers[node.name] = ort.OrtValue.ortvalue_from_numpy(value)
            self.binding.bind_ortvalue_input(node.name, buffers[node.name])
        for node in self.session.get_outputs():
            past = node.name.replace("present", "past_key_values")
            if shared and past in buffers:
                self.binding.bind_ortvalue_output(node.name, buffers[past])
            else:
                self.binding.bind_output(node.name, "cpu")

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


def less_step(bundle: Path, context: int) -> Any:
    """One decode step of a bundle whose slots are full, at position ``context - 1``; the state advances by one."""
    import less_export
    from less_export import RowState

    backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count()).backend
    backend.open(1)
    rng = np.random.default_rng(0)
    for _ in range(0, BUDGET + backend.contract.chunk, backend.contract.chunk):
        backend.step(rng.integers(3, 1000, (1, backend.contract.chunk)))
    state = backend.read_row(0)
    shift = context - 1 - state.length  # shift positions too, so that the newest stay the newest
    tensors = {n: np.where(x >= 0, x + shift, x) if n.endswith("position") else x for n, x in state.tensors.items()}
    tensors = {n: x.astype(state.tensors[n].dtype) for n, x in tensors.items()}
    backend.write_row(0, RowState(context - 1, tensors, state.identity))
    return lambda: backend.step([[5]])


def less_prefill(bundle: Path, tokens: int) -> Any:
    """Feeding a prompt to a fresh row of a bundle, in its own chunks."""
    import less_export

    backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count()).backend
    ids, chunk = np.random.default_rng(0).integers(3, 1000, (1, tokens)), backend.contract.chunk

    def prefill() -> None:
        backend.open(1)
        for begin in range(0, tokens, chunk):
            backend.step(ids[:, begin : begin + chunk])

    return prefill


def child(who: str, out: Path, context: int, tokens: int) -> None:
    """Decode at one context, or feed a prompt as long as the context, and print the figures as JSON."""
    if who == "less-export":
        step = less_step(out, context) if tokens == 1 else less_prefill(out, tokens)
    else:
        step = Step(out / "model.onnx", context, who == "onnxruntime-genai", tokens)
    times = []
    for _ in range(STEPS + 1 if tokens == 1 else 1 + PREFILLED // tokens):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    rate = round(tokens / statistics.median(times[1:] or times), 2)  # the first one warms up
    print(json.dumps({"tokens_per_second": rate, **resident()}))


def run(models: list[tuple[dict[str, Any], Path]], contexts: list[int], prompts: list[int], rounds: int) -> None:
    """Give the row of each exported model its ``contexts`` and ``prompts``: rates and memory, measured in turn with the
    others; prompts once."""
    cells = [(c, 1) for c in contexts] * rounds + [(p, p) for p in prompts]
    runs: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for context, tokens in cells:
        for index, (row, out) in enumerate(models):
            command = [sys.executable, __file__, "--child", row["who"], str(out), str(context), str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            figures = {"failed": reason(done.stderr)} if done.returncode else json.loads(done.stdout)
            runs.setdefault((index, context, tokens), []).append(figures)
    for index, (row, _) in enumerate(models):
        row["contexts"] = [{"context": c, **summary(runs[index, c, 1])} for c in contexts]
        row["prompts"] = [{"tokens": p, **summary(runs[index, p, p])} for p in prompts]
        print(row, flush=True)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median rate of a model, or why it failed."""
    failed = next((r for r in runs if "failed" in r), None)
    if failed is not None:
        return failed
    rates = [r["tokens_per_second"] for r in runs]
    return {**runs[0], "tokens_per_second": statistics.median(rates), "rates": rates}


def reason(error: BaseException | str) -> str:
    """Last line of an error."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 4096], help="tokens (default: 512 4096)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of a context; the median counts (default: 3)"
    )
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "less-export-peers")
    parser.add_argument("--child", nargs=4, metavar=("WHO", "OUT", "CONTEXT", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), int(args.child[2]), int(args.child[3]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[dict[str, Any]] = []
    models: list[tuple[dict[str, Any], Path]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        scratch = Path(folder)
        checkpoint = scratch / "checkpoint"
        nbytes = random_checkpoint(checkpoint, "float16", args.layers, context=1 << 15)
        tokenizer(checkpoint)
        for (who, precision), command in commands(checkpoint, scratch, args.environments, args.layers).items():
            row: dict[str, Any] = {"who": who, "precision": precision}
            rows.append(row)
            if isinstance(command, str):
                row["failed"] = command
                continue
            out = scratch / f"out-{len(rows)}"
            target = {"less-export": ["--out", str(out)], "onnxruntime-genai": ["-o", str(out)]}.get(who, [str(out)])
            exported = measure([*command, *target])
            if exported.why:
                row["failed"] = exported.why
                shutil.rmtree(out, ignore_errors=True)
                continue
            figures = {
                "seconds": exported.seconds,
                "peak_rss_mb": exported.peak_rss_mb,
                "written_mb": written(out) / 1e6,
            }
            row |= {n: round(x, 1) for n, x in figures.items()}
            models.append((row, out))
        run(models, args.contexts, args.prompts, args.rounds)
    facts = {
        "model": "random Llama, TinyLlama-1.1B shape",
        "layers": args.layers,
        "checkpoint_mb": round(nbytes / 1e6, 1),
    }
    write_results(
        "peers",
        {**facts, "slots": BUDGET, "rounds": args.rounds, "peers": PEERS, "threads": os.cpu_count(), "rows": rows},
    )


if __name__ == "__main__":
    main()
