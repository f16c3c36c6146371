"""Fuzzing of the C++ runtime's readers for some seconds, and of a reader with a fault to see that it is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from less_export.bundle.artifact import Manifest
from less_export.runtime.backend import RowState
from less_export.runtime.trt import inspect_plan

from .cpp_support import RUNTIME, Result, call

pytest_plugins = ["tests.cpp_support"]
pytestmark = pytest.mark.slow

CORPUS = RUNTIME / "fuzz" / "corpus"
#: Seconds of each target.
TARGETS = {"manifest": 3, "plan_header": 1, "row_state": 3}


def test_every_seed_is_valid() -> None:
    """Mutations of what is refused at once would not get far."""
    seeds = {target: sorted((CORPUS / target).iterdir()) for target in TARGETS}
    assert min(map(len, seeds.values())) > 1
    for file in seeds["manifest"]:
        assert Manifest.parse(file.read_bytes(), file.name).artifacts
    for file in seeds["plan_header"]:
        assert inspect_plan(file).version
    for file in seeds["row_state"]:
        assert RowState.load(file).length == 9


def fuzz(tools: Path, target: str, artifact: Path, *arguments: object) -> Result:
    return call(tools / f"fuzz_{target}", *arguments, f"-artifact={artifact}")


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_is_a_fault(target: str, tools: Path, tmp_path: Path) -> None:
    done = fuzz(tools, target, tmp_path / "fault", CORPUS / target, f"-seconds={TARGETS[target]}")
    assert done.code == 0, done.err[-4000:]  # with the path of the input, and how to run it again
    assert int(done.out.split()[0]) > 100


@pytest.mark.parametrize("target", TARGETS)
def test_a_planted_fault_is_found(target: str, tools: Path, tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    planted = f"{target}_planted"
    assert fuzz(tools, planted, fault, CORPUS / target).code == 0  # no seed triggers it
    done = fuzz(tools, planted, fault, CORPUS / target, "-seconds=300")  # found within a few
    assert done.code == 1
    assert "heap-buffer-overflow" in done.err
    again = f"run it again: {tools / f'fuzz_{planted}'} {fault}"
    assert again in done.err
    repeated = fuzz(tools, planted, tmp_path / "second", fault)
    assert "heap-buffer-overflow" in repeated.err
    assert (tmp_path / "second").read_bytes() == fault.read_bytes()
    assert fuzz(tools, target, tmp_path / "none", fault).code == 0
    assert not (tmp_path / "none").exists()


def test_what_the_driver_refuses(tools: Path, tmp_path: Path) -> None:
    done = call(tools / "fuzz_manifest")
    assert done.code == 2
    assert done.err.startswith("usage: ")
    done = call(tools / "fuzz_manifest", tmp_path / "missing")
    assert done.code == 2
    assert "cannot read" in done.err
