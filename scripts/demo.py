"""The demo behind ``scripts/demo``: train, export, check and generate with Gemma 3 270M, then tables of figures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import less_export
from less_export.bundle.artifact import Bundle
from less_export.cli.check import story
from less_export.cli.tables import show, size, table
from less_export.less.feature_maps import Kernels

OUT = Path("demo-out")
BUNDLE = OUT / "gemma3-270m"
KERNELS = OUT / "kernels.safetensors"
#: A few sequences of many kinds of text teach too little, so the demo takes three works: one part to train on, another
#: to evaluate on.
WORKS = ("austen.txt", "newton.txt", "presidents.txt")
TEXTS = Path("less_export") / "data"
#: Less than --quality fast takes: the demo ends within minutes.
QUICK = ("--seqs", "20", "--steps", "150", "--tune-steps", "32")
NEW_TOKENS = 80
#: One architecture: the first run compiles the plugin for it.
GPU_ARCH = "sm_89"
PROGRAM = Path(sysconfig.get_path("scripts")) / "less-export"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compile the plugin and the operator with what is left of the processor, and wait for both at the end.

    Threads of torch wait for one another, so a compiler beside them must not take turns with them: niceness 19, in this
    session, as Linux may share the processor among sessions whatever their niceness. If something cannot be compiled,
    the command that needs it says so.
    """
    print(f"meanwhile, the TensorRT plugin is compiled for {GPU_ARCH} alone", flush=True)
    commands = (["build-plugin", "--gpu-arch", GPU_ARCH], ["build-operator"])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "process_group": 0}
    running = [subprocess.Popen(["nice", "-n", "19", PROGRAM, *c], **quiet) for c in commands]
    try:
        yield
    except BaseException:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # the compilers, too
        raise
    finally:
        for process in running:
            process.wait()


def run(*command: str | Path) -> float:
    """Run a less-export command with its output on the terminal; returns the seconds it took."""
    arguments = [str(c) for c in command]
    print(f"\n$ less-export {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    process = subprocess.run([PROGRAM, *arguments], check=False)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - start


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with compiling():
        train_seconds = run(
            "train",
            "gemma3-270m",
            "--data",
            *(TEXTS / "calibration" / work for work in WORKS),
            "--out",
            KERNELS,
            *QUICK,
        )
    engine = ("--target", "both", "--engine", "--gpu-arch", GPU_ARCH)
    export_seconds = run("export", "gemma3-270m", "--out", BUNDLE, "--kernels", KERNELS, *engine)
    run("info", BUNDLE)
    figures = OUT / "check.json"
    run("check", BUNDLE, "--json", figures)
    report = json.loads(figures.read_text())

    prompt = story()
    generator = less_export.open_bundle(BUNDLE)
    contract = generator.backend.contract
    print(f"\ngenerating from a prompt of {len(prompt)} characters, which ends:\n")
    print(f"...{prompt[-220:].strip()}", end="", flush=True)
    params = less_export.SamplingParams(temperature=0.7, top_p=0.9, seed=2, max_new_tokens=NEW_TOKENS)
    for token in generator.stream([prompt], params):
        print(token.text, end="", flush=True)
    timing = generator.timing
    length = timing.prefill_tokens + timing.decode_tokens
    print("\n")

    results = table("results", "what", "figure")
    for artifact in Bundle.open(BUNDLE).manifest.artifacts:
        results.add_row(artifact.file, size((BUNDLE / artifact.file).stat().st_size))
    weights = sum(w.bytes for w in Bundle.open(BUNDLE).manifest.weights)
    results.add_row("weights (dequantised once, shared by both graphs)", size(weights))
    results.add_row("training of the kernels, while the plugin was compiled", f"{train_seconds:.0f} s")
    results.add_row("export, both graphs and the engine", f"{export_seconds:.0f} s")
    results.add_row("prompt, tokens", f"{timing.prefill_tokens} ({report['evicted']} evicted in the check)")
    slots = ", ".join(str(s.capacity) for s in contract.layers if s.absorb)
    results.add_row("slots per head of the full-attention layers", slots)
    results.add_row("LESS state of one sequence, any length", size(contract.state_bytes()))
    results.add_row(f"full cache at {length} tokens", size(contract.full_cache_bytes(length)))
    results.add_row("full cache at 32,768 tokens", size(contract.full_cache_bytes(32768)))
    worst = max(report["differences"], key=lambda d: d["error"])
    results.add_row("largest parity error (share of the largest value)", f"{worst['error']:.1e} ({worst['tensor']})")
    results.add_row("prefill", f"{timing.prefill_rate:.0f} tokens/s")
    results.add_row("decode", f"{timing.decode_rate:.1f} tokens/s")
    show(results)
    states = bool(Kernels.load(KERNELS).layers)  # training leaves out a state that does not pay
    caches = "full,sparse+bytes,less" if states else "full,sparse"
    options = ("--compare", caches, "--seqs", "2", "--positions", "128")
    print("\nfrom here on, two sequences each of other passages of the works that the kernels were trained on:")
    run("eval", "gemma3-270m", "--kernels", KERNELS, "--data", *(TEXTS / "held_out" / work for work in WORKS), *options)


if __name__ == "__main__":
    main()
