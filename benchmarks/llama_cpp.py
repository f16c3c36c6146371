"""llama.cpp's programs, built for this machine's instructions from the sources that llama-cpp-python ships; one of them
measures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_memory import resident

#: The release of the package whose sources are built.
PACKAGE = "llama-cpp-python==0.3.36"
#: Virtual machines may announce AMX's tiles and forbid their use: llama.cpp ends by an illegal instruction there.
NO_TILES = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
#: Seconds between two looks at the memory of a running program.
SAMPLED = 0.1


def programs(work: Path) -> Path:
    """The folder of the programs that :func:`build` makes in ``work``."""
    return work / "llama.cpp" / "bin"


def build(work: Path, targets: Sequence[str]) -> Path:
    """The folder of the programs ``targets``, which are built in ``work`` unless they are there.

    Raises:
        OSError, subprocess.CalledProcessError: no cmake, no sources, or they do not compile.
    """
    made, folder = work / "llama.cpp", programs(work)
    if not all((folder / name).exists() for name in targets):
        options = ["BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_OPENSSL=OFF"]
        options += ["CMAKE_BUILD_TYPE=Release", "LLAMA_BUILD_APP=OFF", "LLAMA_USE_PREBUILT_UI=OFF"]
        if platform.machine() == "x86_64":
            options += [f"CMAKE_{language}_FLAGS={NO_TILES}" for language in ("C", "CXX")]
        run("cmake", "-S", _sources(work), "-B", made, *(f"-D{o}" for o in options))
        run("cmake", "--build", made, "--parallel", str(os.cpu_count() or 1), "--target", *targets)
    return folder


def _sources(work: Path) -> Path:
    """The folder of llama.cpp's sources, unpacked in ``work`` and downloaded before unless they are there."""
    name = PACKAGE.replace("-", "_").replace("==", "-")
    archive = work / f"{name}.tar.gz"
    work.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        download = ["download", "--no-deps", "--no-binary", ":all:", "--dest", work, PACKAGE]
        run(sys.executable, "-m", "pip", *download)
    with tarfile.open(archive) as file:
        file.extractall(work, filter="data")
    return work / name / "vendor" / "llama.cpp"


def run(*command: str | Path) -> None:
    """Run a command that is shown first; raises ``subprocess.CalledProcessError`` if it fails."""
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def bench(program: Path, model: Path, depth: int, prompt: int, steps: int, repetitions: int, warm_up: bool) -> Any:
    """What ``llama-bench`` measured: its rates in tokens/s, one a repetition, and the memory of its process in MB.

    Args:
        depth: tokens that are in the cache before; they are fed first, which is not timed.
        prompt: tokens to feed; 0: none.
        steps: tokens to decode, one after another; 0: none. A rate is the mean of one repetition.
        warm_up: whether it does the same once before it measures (of decoding, one step at an empty cache).

    Memory is that of the last moments of the measurement. Where there is a depth, the program holds a second copy of
    the cache, which it would restore in a further repetition.

    Raises:
        SystemExit: it fails, with the end of what it printed.
    """
    command = [str(program), "-m", str(model), "-o", "jsonl", "-t", str(os.cpu_count() or 1)]
    command += ["-d", str(depth), "-p", str(prompt), "-n", str(steps), "-r", str(repetitions)]
    if not warm_up:
        command.append("--no-warmup")
    memory: dict[str, float] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        # The results are printed, or the output is closed, once it has measured and before it frees anything.
        while not select.select([process.stdout], [], [], SAMPLED)[0]:
            with contextlib.suppress(KeyError):  # it has ended, and its memory is gone
                memory = resident(process.pid)
        output, _ = process.communicate()
        errors.seek(0)
        if process.returncode or not output.strip():
            raise SystemExit(errors.read()[-2000:] or f"llama-bench ended with {process.returncode}")
    return {"rates": json.loads(output)["samples_ts"], **memory}
