"""Shared by the benchmarks: the machine, random checkpoints of real shapes, options, results as data."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from less_export.bundle.files import write_atomically
from less_export.hf.recipes import all_recipes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from less_export.hf.model import OpenModel
    from less_export.hf.sources import Source
    from less_export.less.feature_maps import Kernels

RESULTS = Path(__file__).parent / "results"

#: Facts of TinyLlama-1.1B, the shape that most benchmarks here use.
TINYLLAMA = next(r for r in all_recipes() if r.name == "tinyllama-1.1b").architecture


def random_checkpoint(
    folder: Path, dtype: str, layers: int, context: int | None = None, architecture: dict[str, Any] = TINYLLAMA
) -> int:
    """Write a model of a recipe's shape (TinyLlama's) with random weights, shard by shard; returns its bytes."""
    import torch
    from transformers import AutoConfig

    from less_export.hf import random_checkpoint

    facts = {**architecture, "num_hidden_layers": layers}
    if context is not None:
        facts["max_position_embeddings"] = context
    return random_checkpoint.write(AutoConfig.for_model(**facts, dtype=getattr(torch, dtype)), folder)[0]


def kernels(
    layers: int,
    rank: int,
    hidden: int,
    architecture: dict[str, Any] = TINYLLAMA,
    only: Sequence[int] | None = None,
) -> Kernels:
    """Random kernels of the same size as trained ones, with constants of int8 slots: the same work, without the
    quality. ``only``: the layers that get some, of all ``layers`` of a recipe's shape (TinyLlama's)."""
    from less_export.contract import Heads
    from less_export.less.feature_maps import random_kernels
    from less_export.less.int8 import Centring

    chosen = range(layers) if only is None else only
    heads, kv_heads = architecture["num_attention_heads"], architecture["num_key_value_heads"]
    shape = Heads(heads, kv_heads, architecture.get("head_dim", architecture["hidden_size"] // heads))
    maps = random_kernels([shape] * layers, chosen, rank, hidden)
    provenance = {**maps.provenance, "centring": {"rotated": False}}
    return replace(
        maps, provenance=provenance, centring={i: Centring.none(kv_heads, shape.head_dim) for i in range(layers)}
    )


@dataclass(frozen=True)
class Run:
    """Time and memory of a command. ``reached``: the last line of its progress. ``why``: the reason of a failure."""

    seconds: float
    peak_rss_mb: float
    reached: str = ""
    why: str = ""


def measure(command: list[str], limit_gb: float | None = None) -> Run:
    """Run a command in its own process, and kill it when it takes more than ``limit_gb`` of memory."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        over = _watch(process, limit_gb) if limit_gb is not None else False
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
    why = ""
    if process.returncode:
        why = f"took more than {limit_gb:g} GB" if over else (lines or [f"exit code {process.returncode}"])[-1]
    progress = [x.removeprefix("less-export: ") for x in lines if "warning:" not in x and "error:" not in x]
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6, (progress or [""])[-1], why)


def _watch(process: subprocess.Popen[bytes], limit_gb: float) -> bool:
    """Wait until a process exits, or kill it when it takes too much memory (returns True)."""
    import psutil

    watched = psutil.Process(process.pid)
    try:
        while watched.status() != psutil.STATUS_ZOMBIE:
            if watched.memory_info().rss > limit_gb * 1e9:
                process.kill()
                return True
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        pass
    return False


def written(folder: Path) -> int:
    """Bytes of the files in a folder that are not hard links to others."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def machine() -> dict[str, Any]:
    """The machine that results were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("less-export", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }


def write_results(name: str, data: dict[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json``: the machine and the results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    print(f"wrote {path}")


# ------------------------------------------------------------------ predictions on texts


def parsed(parser: argparse.ArgumentParser, file: Path, sequences: int) -> argparse.Namespace:
    """The arguments of a benchmark of predictions, with what all of them take; torch has its threads."""
    parser.add_argument("--budget", default="5%", metavar="N|P%%", help="of the 16-bit slots (default: 5%%)")
    parser.add_argument(
        "--sequences", type=int, default=sequences, metavar="N", help="of each text (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own)")
    parser.add_argument("--out", type=Path, default=file, metavar="FILE", help=f"(default: results/{file.name})")
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    return args


def encoder_and_model(
    source: Source, opened: OpenModel
) -> tuple[Callable[[str], list[int]], int | None, PreTrainedModel]:
    """What encodes a text, the token that it begins with, and the model with its weights, for inference."""
    from less_export.hf import data
    from less_export.hf.running import compute_dtype

    encode, bos = data.encoder(source.tokenizer())
    return encode, bos, source.load(compute_dtype(opened.hf_config, "cpu")).requires_grad_(False)


#: Rows of results by the values of some of their fields.
Rows = dict[tuple[Any, ...], dict[str, Any]]


def read_rows(file: Path, *fields: str) -> Rows:
    """The rows of a file of results, none without one, by ``fields``."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {tuple(row[name] for name in fields): row for row in rows}


def write_rows(file: Path, rows: Rows, facts: Mapping[str, Any], indent: int | None = None) -> None:
    """Write the machine, ``facts`` and all rows; without ``indent`` in one line."""
    data = {"machine": machine(), **facts, "rows": list(rows.values())}
    text = json.dumps(data, indent=indent, separators=(",", ": " if indent else ":"))
    write_atomically(file, f"{text}\n".encode())
