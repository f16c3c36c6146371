"""Training under torchrun: two CPU processes share the sequences and write the same file as one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import bundles

pytest_plugins = ["tests.bundles"]
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_two_processes_are_one(tmp_path: Path) -> None:
    folder = bundles.checkpoint(tmp_path / "model", num_hidden_layers=3, initializer_range=0.6)
    text = tmp_path / "text.txt"
    words = bundles.PROMPT.split()
    picks = torch.randint(len(words), (900,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(words[i] for i in picks))
    options = ["--budget", "8", "--rank", "2", "--hidden", "4", "--steps", "3", "--seqs", "5", "--seq-len", "40"]
    options += ["--layer-budgets", "auto"]
    outputs = []
    for launcher in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        out = tmp_path / f"{len(launcher)}" / "k.safetensors"
        out.parent.mkdir()
        command = [*launcher, "-m", "less_export.cli.main", "train", folder, "--data", text, "--out", out, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(str(out)) == 1
        assert sorted(p.name for p in out.parent.iterdir()) == ["k.safetensors", "k.safetensors.md"]
        for layer in range(3):  # including those of the second process
            assert len(re.findall(rf"layer {layer}: \d+ s, error", done.stderr)) == 1
        outputs.append(load_file(out))
    one, two = outputs
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[n]) for n, x in one.items())
    layers = {n.split(".")[1] for n in one}
    assert len(layers) >= 2
