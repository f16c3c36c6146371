"""The servers of bench_serving.py: less-export's and llama.cpp's, on the same weights with the same threads and rows.

llama.cpp is built for this machine's instructions, from the sources that a release of llama-cpp-python ships. Its
model is the GGUF file of the recipe's package, which is also what less-export exports; its F32 is that file
dequantised, as ours is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import psutil
from bench_common import kernels
from llama_cpp import build, run

from less_export.bundle.artifact import Bundle
from less_export.config import DEFAULT_BLOCK, DEFAULT_HEAD
from less_export.hf.recipes import all_recipes
from less_export.less.feature_maps import Kernels

MODEL, ROWS, THREADS = "gemma3-270m", 8, os.cpu_count() or 1
RECIPE = next(r for r in all_recipes() if r.name == MODEL)
LESS_EXPORT = (sys.executable, "-m", "less_export")
#: Weights by the name of less-export's option: what llama.cpp calls the format nearest to them.
WEIGHTS = {"int4": "Q4_K_M", "f32": "F32"}
#: Seconds that a server may take to start.
START = 600


@dataclass(frozen=True)
class Server:
    """How to start a server: ``{port}`` in its command stands for its port. ``weights``: a key of ``WEIGHTS``;
    ``stored``: how they are held; ``cache``: what the server keeps of a sequence."""

    name: str
    weights: str
    command: list[str]
    stored: str
    cache: str


@dataclass(frozen=True)
class Running:
    """A server that takes requests at ``url``."""

    url: str
    process: psutil.Process

    def resident_bytes(self) -> int:
        """Proportional set size of the process and its descendants: memory shared by n processes counts 1/n in each."""
        tree = [self.process, *self.process.children(recursive=True)]
        return sum(p.memory_full_info().pss for p in tree)


def bundle(weights: str, work: Path) -> Path:
    """The bundle in ``work``, exported unless it is there; its kernels are ``kernels.safetensors`` in ``work``, or
    random ones: the same work, other answers."""
    folder, maps = work / f"less-export-{weights}", work / "kernels.safetensors"
    if not folder.exists():
        if not maps.exists():
            facts, step = RECIPE.architecture, RECIPE.architecture["sliding_window_pattern"]
            evicting = range(step - 1, facts["num_hidden_layers"], step)
            kernels(facts["num_hidden_layers"], RECIPE.rank, RECIPE.hidden, facts, evicting).save(maps)
        quantised = [] if weights == "f32" else ["--weights", weights]
        run(*LESS_EXPORT, MODEL, "--out", folder, "--kernels", maps, "--max-batch", str(ROWS), *quantised)
    return folder


def ours(weights: str, work: Path) -> Server:
    """less-export's server."""
    folder = bundle(weights, work)
    opened = Bundle.open(folder)
    found, facts = opened.artifact("ort"), opened.manifest.kernels
    assert found is not None
    assert facts is not None
    made = Kernels.load(folder / facts.file).provenance["model"]
    cache = f"LESS, {found.contract.state_bytes() / 1e6:.2f} MB a sequence, kernels: {made}"
    command = [*LESS_EXPORT, "serve", str(folder), "--threads", str(THREADS), "--max-rows", str(ROWS)]
    held = "f32" if weights == "f32" else f"{weights} in blocks of {DEFAULT_BLOCK}, output embedding {DEFAULT_HEAD}"
    return Server(f"less-export {weights}", weights, [*command, "--port", "{port}"], held, cache)


def llama_cpp(weights: str, program: Path, work: Path, tokens: int) -> Server:
    """llama.cpp's server with the full cache in 16 bits, for ``ROWS`` sequences of ``tokens`` tokens."""
    model = Path(importlib.import_module(str(RECIPE.gguf_package)).assemble())
    if weights == "f32":
        source, model = model, work / "f32.gguf"
        if not model.exists():
            run(program.with_name("llama-quantize"), "--allow-requantize", source, model, "F32")
    command = [str(program), "-m", str(model), "--port", "{port}", "-t", str(THREADS), "-tb", str(THREADS)]
    command += ["-np", str(ROWS), "-c", str(ROWS * tokens), "--no-kv-unified", "--cache-ram", "0", "--no-webui"]
    cache = f"full, 16 bits, {ROWS} sequences of {tokens:,} tokens"
    return Server(f"llama.cpp {WEIGHTS[weights]}", weights, command, stored(model), cache)


def stored(model: Path) -> str:
    """In which formats a GGUF file holds how many of its parameters, the largest first."""
    counts: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(model).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = ((name, count / counts.total()) for name, count in counts.most_common())
    return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)


def llama_server(work: Path) -> Path:
    """The program ``llama-server`` in ``work``, built unless it is there, with ``llama-quantize`` beside it."""
    return build(work, ("llama-quantize", "llama-server")) / "llama-server"


def version(program: Path) -> str:
    """The first line that ``llama-server`` prints about its version."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return next(line for line in (done.stdout + done.stderr).splitlines() if "version" in line)


@contextlib.contextmanager
def running(server: Server, work: Path) -> Iterator[Running]:
    """Start a server on a free port of 127.0.0.1, wait until it takes requests, and stop it at the end.

    Raises:
        SystemExit: it ends, or does not answer within ``START`` seconds; with the end of its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", work / f"{server.name}.log"
    with log.open("wb") as file:
        command = [argument.replace("{port}", str(port)) for argument in server.command]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{server.name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        yield Running(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False
