"""``scripts/gpu_check`` without a GPU: everything except the GPU itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from less_export.runtime.ort import OrtBackend

from .trt_decoder import contract_of, decoder, serialised

ROOT = Path(__file__).parents[1]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [ROOT / "scripts/gpu_check", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_goes_through_the_motions_on_emulated_kernels(tmp_path: Path) -> None:
    done = gpu_check("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for part in (
        "primitives",
        "parity",
        "rows",
        "picks",
        "stress",
        "bandwidth",
        "decode",
        "eager",
        "full_cache",
        "prefill",
        "sampling",
        "engine",
        "onnxruntime",
    ):
        assert f"\n{part}: " in f"\n{done.stdout}"
    assert done.stdout.endswith("nothing failed\n")
    assert list(tmp_path.iterdir()) == []  # times of an emulation are not results


def test_tables_of_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the tables from results in the format of gpu_check."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_tables

    place = {"batch": 16, "slots": 256, "kv_heads": 8}
    data = {
        "machine": {"gpu": "a GPU", "driver": "1", "nvcc": "2", "torch": "3"},
        "bandwidth": {"gb_per_s": 200.0},
        "decode": [{**place, "query_heads": 32, "us": 10.0, "bytes": 1_800_000, "gb_per_s": 180.0}],
        "eager": [{**place, "plugin_us": 10.0, "eager_us": 200.0, "eager_graph_us": 50.0, "ratio": 20.0}],
        "full_cache": [{**place, "context": 4096, "sdpa": "flash", "plugin_us": 10.0, "sdpa_us": 70.0, "ratio": 7.0}],
        "prefill": [
            {
                **place,
                **{"slot_dtype": "int8", "state_bits": bits, "policy": "h2o", "chunk": 256},
                **{"us": 100.0, "tflop_per_s": 50.0},
            }
            for bits in (32, 16)
        ],
        "sampling": [
            {
                **{"batch": 16, "vocab": 32000, "options": "greedy"},
                **{"kernel_us": 10.0, "download_us": 100.0, "host_us": 1000.0},
            }
        ],
        "primitives": {"cases": 16, "failed": []},
        "parity": {"cases": 90, "failed": ["one"], "largest_error_of_allowed": 1.2},
        "sanitizers": {"memcheck": "0 errors", "failed": []},
    }
    for part in gpu_tables.PARTS.values():
        for measured in ({}, data):
            header, rows = part(measured)
            assert rows
            assert {len(row) for row in rows} == {len(header)}
    assert gpu_tables.decode(data)[1][0][-1] == "90%"
    assert [row[3] for row in gpu_tables.prefill(data)[1]] == ["256 int8", "256 int8 state 16"]
    assert gpu_tables.sampling(data)[1] == [["16", "32,000", "greedy", "10.0", "100.0", "1,000.0"]]
    assert gpu_tables.peers(data)[1][1][-1] == "5.0x"
    assert ["parity through the plugin's interface", "89 of 90"] in gpu_tables.checks(data)[1]
    assert "a GPU" in gpu_tables.note(data)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("fault", ["", "copied", "swapped"])
def test_engine_that_loses_the_state_is_caught(
    fault: str, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison fails if the engine updates a copy, or reads the state of the step before the last."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_engine

    contract, path = contract_of("float32"), tmp_path / "model.onnx"
    path.write_bytes(serialised(decoder(contract, tmp_path)))
    backend = gpu_engine.on_double(contract, tmp_path, monkeypatch, in_place, fault)
    reference = OrtBackend(contract, path, threads=1)
    assert bool(gpu_engine.difference(backend, reference)) is bool(fault)


@pytest.mark.slow
def test_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        return
    done = gpu_check()
    assert done.returncode == 1
    assert done.stderr == "gpu_check: no GPU found; --dry-run runs without one\n"
