"""Benchmarks that run for long wait for a choice."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_families_are_measured_by_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench_families")
    measured: list[str] = []
    written: list[int] = []

    def measure(name: str, _: Path) -> dict[str, object]:
        measured.append(name)
        figures = dict.fromkeys(("onnx_against_f64", "hf_f32_against_f64", "onnx_against_torch_evicting"), 0.0)
        return {"family": name, "class": "", **figures}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "write_results", lambda _, results: written.append(len(results["rows"])))

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_families.py", *arguments])
        bench.main()

    for arguments, code in (((), 2), (("--only", "nothing"), 2), (("--all", "--only", "llama"), 2), (("--help",), 0)):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == code
    assert "--only FAMILY" in capsys.readouterr().out
    assert measured == []
    run("--only", "llama", "qwen3")
    assert (measured, written) == (["llama", "qwen3"], [])
    run("--all")
    assert measured[2:] == list(bench.families.FAMILIES)
    assert written == [len(bench.families.FAMILIES)]
