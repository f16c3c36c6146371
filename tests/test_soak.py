"""Constant memory over twenty thousand tokens, on a tiny model with rotary embeddings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import families

PROMPT, TOKENS, WARM_UP, EVERY = 40, 20_000, 2_000, 500
#: Allowance for allocators; a growing cache of this model would take 256 bytes a token.
ROOM = 2 << 20
assert ROOM < (TOKENS - WARM_UP) * 256 / 2


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_tokens(tmp_path: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    kernels = families.kernels(families.load(checkpoint), tmp_path / "kernels.safetensors")
    tiny = families.export(checkpoint, tmp_path / "bundle", budget="16", kernels=kernels)
    # In its own process, so that only the memory of generation is measured.
    command = [sys.executable, "-m", "tests.soak_worker", tiny.bundle, *map(str, (PROMPT, TOKENS, WARM_UP, EVERY))]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)

    assert not report["torch"]
    assert report["tokens"] == TOKENS
    assert report["length"] == PROMPT + TOKENS - 1
    assert report["different"] > 20  # still text, not a single token repeated
    assert report["finite"]
    assert len(set(report["state"])) == 1
    first, most = report["resident"][0], max(report["resident"])
    assert most - first <= ROOM, f"{first} bytes after {WARM_UP} tokens, up to {most} later"
    # Every token is still in one place, and the newest eight are in their slots.
    newest = set(range(report["length"] - 8, report["length"]))
    for position, absorbed in zip(report["positions"], report["absorbed"], strict=True):
        assert newest <= set(position)
        assert len(position) + absorbed == pytest.approx(report["length"], rel=1e-3)
