"""The CUDA kernels, on the host, under the address and undefined behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from less_export.contract import SlotDtype, StateBits

from . import emulation
from .emulation import PLUGIN, emulated, kernel_layer, normal
from .scenarios import play, scenario
from .test_cuda_row_indices import scattered
from .test_ops import empty

pytestmark = pytest.mark.slow

FLAGS = ("-O1", "-DLESS_TRIAL=__half", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHUNKS = [(60, 9), (1, 1), (1, 0), (20, 66), (25, 7), (1, 1)]
#: Policy, head_dim, group, rank, what the slots hold, the largest distance, and the bits of the state.
KINDS: list[tuple[str, int, int, int, SlotDtype, int | None, StateBits]] = [
    ("h2o", 64, 2, 8, "model", None, 32),
    ("tova", 24, 3, 5, "model", None, 32),
    ("sink", 40, 1, 16, "model", None, 32),
    ("window", 64, 4, 1, "model", None, 32),
    ("h2o", 8, 9, 32, "model", None, 32),
    ("h2o", 56, 2, 8, "int8", None, 32),
    ("h2o", 64, 1, 8, "int8", 30, 32),
    ("tova", 40, 2, 8, "model", 30, 32),
    ("h2o", 40, 2, 9, "int8", None, 16),
    ("sink", 8, 1, 33, "int8", 30, 16),
]
#: Every so many kinds also run with rows by index.
BY_INDEX = 3


@pytest.fixture(scope="module")
def replay() -> Path:
    return emulation.cached_build("replay", *FLAGS, interface="replay.cpp")


def sanitized(program: Path, launches: Path, *orders: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, launches, *map(str, orders)], capture_output=True, text=True)


def record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of launches of every policy, decode and prefill."""
    with open(path, "wb") as file, monkeypatch.context() as patch:
        patch.setattr(emulation, "recording", file)
        for index, (policy, head_dim, group, rank, slots, far, bits) in enumerate(KINDS):
            layer = kernel_layer(policy, 77, head_dim, group, rank, kv_heads=1)
            layer = replace(layer, slot_dtype=slots, max_distance=far, state_bits=bits)
            steps = scenario(layer, CHUNKS, 6, normal("float16"))
            runs = [emulated(layer, "float16")]
            if index % BY_INDEX == 0:
                runs.append(scattered(emulated(layer, "float16", by_index=True), layer))
            for run in runs:
                for _ in play(run, steps, empty(layer, torch.float16, 2)):
                    pass


def test_nothing_out_of_bounds_and_nothing_undefined(
    replay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two thread orders, decode split over blocks and not."""
    record(tmp_path / "launches", monkeypatch)
    done = sanitized(replay, tmp_path / "launches", 0, 3)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"{(len(KINDS) + len(KINDS[::BY_INDEX])) * len(CHUNKS)} launches\n"


def test_the_sanitizers_would_say(replay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sanitizers report a decode kernel that reads one row of slots too many."""
    source = "less_attention_decode.cu"
    shutil.copytree(PLUGIN / "src", tmp_path / "src", ignore=lambda _, names: {n for n in names if n.endswith(".cu")})
    shutil.copy(PLUGIN / "src" / source, tmp_path / "src")
    kernel = tmp_path / "src/decode_slots.cuh"
    text = kernel.read_text()
    assert text.count("u * kRowStep < left") == 1
    kernel.write_text(text.replace("u * kRowStep < left", "u * kRowStep <= left"))
    program = tmp_path / "replay"
    emulation.build(program, *FLAGS, sources=tmp_path / "src", reuse=replay, interface="replay.cpp")
    record(tmp_path / "launches", monkeypatch)
    done = sanitized(program, tmp_path / "launches", 0)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
