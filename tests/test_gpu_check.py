"""``scripts/gpu_check`` works before there is a GPU: everything but the GPU itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [ROOT / "scripts/gpu_check", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_goes_through_the_motions_on_emulated_kernels(tmp_path: Path) -> None:
    done = gpu_check("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in ("primitives", "parity", "bandwidth", "decode", "eager", "full_cache", "prefill"):
        assert f"\n{part}: " in f"\n{done.stdout}"
    assert done.stdout.endswith("nothing failed\n")
    assert list(tmp_path.iterdir()) == []  # times of an emulation are no results


def test_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        return
    done = gpu_check()
    assert done.returncode == 1
    assert done.stderr == "gpu_check: no GPU here; --dry-run goes through the motions without one\n"
