"""less-export against optimum-onnx, ONNX Runtime GenAI's model builder and llama.cpp, on one checkpoint.

Each exports a random Llama of TinyLlama-1.1B's shape, fp16; the parent measures wall time, peak RSS and bytes
written. Then all models decode, in rounds: each has its turn at each context, in a process of its own; and each takes
prompts. less-export's run through its backend, with 256 slots full and the position set to the context; the graphs of
the other exporters with a past of that length (random numbers, bound once; GenAI's attention writes into the buffer it
reads, as in its runtime), all on this environment's ONNX Runtime. Prompts are fed in our chunks, and to the graphs
whole. Each has its own int4: ours has blocks of 64, an int8 output embedding and the checkpoint's input embedding;
GenAI's has blocks of 32, an int4 output embedding and an f32 input embedding. ``int4, 32`` is ours in blocks of 32 with
an int4 output embedding. Our kernel runs LessAttention; in ``int4, nodes``, the graph's own nodes do.

llama.cpp's export is a GGUF file, written as f16 and quantised by ``llama-quantize``; ``llama-bench`` measures it, with
its defaults: a cache in 16 bits, which it fills by feeding as many tokens. That takes long, so ``--llama-contexts``
limits how many. Its rate of decoding is the mean of the steps, the others' their median.

Each peer is installed or built under ``--environments``; if one cannot be, or fails, the reason is recorded.
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
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import llama_gguf
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
    "llama.cpp": [llama_cpp.PACKAGE],
}  # fmt: skip
#: Types of llama.cpp's files.
TYPES = ("Q8_0", "Q4_K_M")
#: Rows that run what another one exported, with the graph's own nodes.
NODES = {("less-export", "int4, nodes"): ("less-export", "int4")}


@dataclass(frozen=True)
class Model:
    """An exported model: its row of the results, its files, where it decodes, and what runs LessAttention."""

    row: dict[str, Any]
    out: Path
    contexts: list[int]
    operator: str


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


def commands(
    only: Container[str], checkpoint: Path, scratch: Path, folder: Path, layers: int
) -> dict[tuple[str, str], Any]:
    """Export commands by (who, precision), or the reason why there is none."""
    exports: dict[tuple[str, str], Any] = {}
    if "less-export" in only:
        kernel_file = scratch / "kernels.safetensors"
        kernels(layers, DEFAULT_RANK, HIDDEN).save(kernel_file)
        ours = [sys.executable, "-m", "less_export.cli.main", str(checkpoint), "--no-validate", "--budget", str(BUDGET)]
        ours += ["--kernels", str(kernel_file), "--max-batch", "1"]
        exports |= {
            ("less-export", "f32"): ours,
            ("less-export", "int4"): [*ours, "--weights", "int4"],
            ("less-export", "int4, 32"): [*ours, "--weights", "int4", "--block", "32", "--head", "int4"],
        }
    for peer in PEERS:
        if peer not in only:
            continue
        precisions = TYPES if peer == "llama.cpp" else ("f32", "int4")
        try:
            if peer == "llama.cpp":
                programs = llama_cpp.build(folder, ("llama-bench", "llama-quantize"))
            else:
                python = str(environment(peer, folder))
        except (OSError, subprocess.CalledProcessError) as error:
            exports |= {(peer, precision): f"cannot be installed: {error}" for precision in precisions}
            continue
        if peer == "llama.cpp":
            writer = [sys.executable, llama_gguf.__file__, str(checkpoint), str(programs / "llama-quantize")]
            exports |= {(peer, kind): [*writer, kind] for kind in TYPES}
        elif peer == "optimum-onnx":
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


def less_step(bundle: Path, context: int, operator: str) -> Any:
    """One decode step of a bundle whose slots are full, at position ``context - 1``; the state advances by one."""
    import less_export
    from less_export import RowState

    backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count(), operator=operator).backend
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


def less_prefill(bundle: Path, tokens: int, operator: str) -> Any:
    """Feeding a prompt to a fresh row of a bundle, in its own chunks."""
    import less_export

    backend = less_export.open_bundle(bundle, "ort", threads=os.cpu_count(), operator=operator).backend
    ids, chunk = np.random.default_rng(0).integers(3, 1000, (1, tokens)), backend.contract.chunk

    def prefill() -> None:
        backend.open(1)
        for begin in range(0, tokens, chunk):
            backend.step(ids[:, begin : begin + chunk])

    return prefill


def llama_work(context: int, tokens: int) -> dict[str, Any]:
    """What ``llama_cpp.bench`` is to do: decode at a context, or feed a prompt as often as the others do."""
    if tokens == 1:
        return {"depth": context - 1, "prompt": 0, "steps": STEPS, "repetitions": 1, "warm_up": True}
    times = max(1, PREFILLED // tokens)
    return {"depth": 0, "prompt": tokens, "steps": 0, "repetitions": times, "warm_up": tokens <= PREFILLED}


def child(who: str, out: Path, context: int, tokens: int, operator: str, programs: Path) -> None:
    """Decode at one context, or feed a prompt as long as the context, and print the figures as JSON."""
    if who == "llama.cpp":
        program, model = programs / "llama-bench", out / llama_gguf.FILE
        figures = llama_cpp.bench(program, model, **llama_work(context, tokens))
        rates = figures.pop("rates")
        print(json.dumps({"tokens_per_second": round(statistics.median(rates), 2), **figures}))
        return
    if who == "less-export":
        step = less_step(out, context, operator) if tokens == 1 else less_prefill(out, tokens, operator)
    else:
        step = Step(out / "model.onnx", context, who == "onnxruntime-genai", tokens)
    times = []
    for _ in range(STEPS + 1 if tokens == 1 else 1 + PREFILLED // tokens):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    rate = round(tokens / statistics.median(times[1:] or times), 2)  # the first one warms up
    print(json.dumps({"tokens_per_second": rate, **resident()}))


def run(models: Sequence[Model], contexts: list[int], prompts: list[int], rounds: int, folder: Path) -> None:
    """Give the row of each exported model its ``contexts`` and ``prompts``: rates and memory, measured in turn with the
    others; prompts once."""
    cells = [(c, 1) for c in contexts] * rounds + [(p, p) for p in prompts]
    runs: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for context, tokens in cells:
        for index, model in enumerate(models):
            if tokens == 1 and context not in model.contexts:
                continue
            command = [sys.executable, __file__, "--environments", str(folder), "--operator", model.operator]
            command += ["--child", model.row["who"], str(model.out), str(context), str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            figures = {"failed": reason(done.stderr)} if done.returncode else json.loads(done.stdout)
            runs.setdefault((index, context, tokens), []).append(figures)
    for index, model in enumerate(models):
        places = [c for c in contexts if c in model.contexts]
        model.row["contexts"] = [{"context": c, **summary(runs[index, c, 1])} for c in places]
        model.row["prompts"] = [{"tokens": p, **summary(runs[index, p, p])} for p in prompts]
        print(model.row, flush=True)


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


def export(command: Any, who: str, out: Path) -> dict[str, Any]:
    """The figures of an export into ``out``, or why there is none."""
    if isinstance(command, str):
        return {"failed": command}
    target = {"less-export": ["--out", str(out)], "onnxruntime-genai": ["-o", str(out)]}.get(who, [str(out)])
    exported = measure([*command, *target])
    if exported.why:
        shutil.rmtree(out, ignore_errors=True)
        return {"failed": exported.why}
    figures = {"seconds": exported.seconds, "peak_rss_mb": exported.peak_rss_mb, "written_mb": written(out) / 1e6}
    return {n: round(x, 1) for n, x in figures.items()}


def main() -> None:
    everyone = ["less-export", *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=everyone, default=everyone, metavar="WHO", help=", ".join(everyone)
    )
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    llama_contexts = [512, 4096]
    note = "those of --contexts at which llama.cpp decodes too (default: 512 4096)"
    parser.add_argument("--llama-contexts", type=int, nargs="*", default=llama_contexts, metavar="CONTEXT", help=note)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 4096], help="tokens (default: 512 4096)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of a context; the median counts (default: 3)"
    )
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "less-export-peers")
    parser.add_argument("--results", default="peers", help="name of the results file (default: peers)")
    parser.add_argument("--child", nargs=4, metavar=("WHO", "OUT", "CONTEXT", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--operator", default="native", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.environments.absolute()
    if args.child:
        who, out, context, tokens = args.child
        return child(who, Path(out), int(context), int(tokens), args.operator, llama_cpp.programs(folder))
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    models: dict[tuple[str, str], Model] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        scratch = Path(temporary)
        checkpoint = scratch / "checkpoint"
        nbytes = random_checkpoint(checkpoint, "float16", args.layers, context=1 << 15)
        tokenizer(checkpoint)
        for key, command in commands(args.only, checkpoint, scratch, folder, args.layers).items():
            who, precision = key
            out = scratch / f"out-{len(rows)}"
            rows[key] = {"who": who, "precision": precision, **export(command, who, out)}
            if "failed" not in rows[key]:
                contexts = args.llama_contexts if who == "llama.cpp" else args.contexts
                models[key] = Model(rows[key], out, contexts, "native")
        for key, exported in NODES.items():
            if exported not in rows:
                continue
            rows[key] = {"who": key[0], "precision": key[1]}
            if exported in models:
                models[key] = replace(models[exported], row=rows[key], operator="onnx")
            else:
                rows[key]["failed"] = rows[exported]["failed"]
        run([*models.values()], args.contexts, args.prompts, args.rounds, folder)
    facts = {
        "model": "random Llama, TinyLlama-1.1B shape",
        "layers": args.layers,
        "checkpoint_mb": round(nbytes / 1e6, 1),
        "slots": BUDGET,
        "rounds": args.rounds,
        "peers": {peer: packages for peer, packages in PEERS.items() if peer in args.only},
        "threads": os.cpu_count(),
    }
    # The rows of one exporter stand together.
    ordered = sorted(rows.values(), key=lambda row: everyone.index(row["who"]))
    write_results(args.results, {**facts, "rows": ordered})


if __name__ == "__main__":
    main()
