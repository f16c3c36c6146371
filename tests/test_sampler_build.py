"""Building the library that chooses tokens on a GPU; the compiler is a script that records its command line."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path

import pytest

from less_export.errors import EngineError
from less_export.native import nvcc, sampler
from less_export.runtime import device_sampler

from .test_plugin_build import Toolkit

pytest_plugins = ["tests.test_plugin_build"]


def test_built_once(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = toolkit()
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: "sm_89")
    built = sampler.library_for_this_gpu()
    assert built.is_relative_to(tmp_path / "cache" / "samplers")
    compiled, link = log.read_text().splitlines()
    assert "sampler/sample.cu -o" in compiled
    assert "code=sm_89" in compiled
    assert "tensorrt" not in compiled.lower()
    assert "-cudart=static" in link
    toolkit("13.1.20")  # another toolchain: what is there is taken
    assert sampler.library_for_this_gpu() == built
    assert sampler.cached(("sm_90",)) is None
    every = sampler.library()
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: "sm_90")
    assert sampler.library_for_this_gpu() == every
    every.write_text("changed")
    assert sampler.library_for_this_gpu() != every


def test_the_host_chooses_where_there_is_no_library(
    toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, device_sampler.__name__)
    for arch, said in (
        (None, "no CUDA driver, or no GPU"),
        ("sm_75", "the sampler is for GPUs from sm_80 on, this one is sm_75"),
        ("sm_89", "cannot load the sampler"),  # the recorded compiler makes no library
    ):
        toolkit()
        monkeypatch.setattr(nvcc, "gpu_arch", lambda arch=arch: arch)
        assert device_sampler.open_sampler() is None
        assert f"tokens are chosen on the host: {said}" in caplog.messages[-1]
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(nvcc, "places", lambda: iter([]))
    assert device_sampler.open_sampler() is None
    assert "the sampler needs nvcc" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("int lessSampleInterface() { return 7; }", "has interface 7, not 1: build it again"),
        ("int lessSampleInterface() { return 1; }", "cannot use the sampler .*: the driver is old"),
    ],
)
def test_a_library_that_does_not_fit(body: str, said: str, tmp_path: Path) -> None:
    source, library = tmp_path / "x.c", tmp_path / "x.so"
    rest = 'int lessSample() { return 0; } char const* lessSampleWhyUnusable() { return "the driver is old"; }'
    source.write_text(f"{body} {rest}")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(EngineError, match=said):
        sampler.load(library)


def test_the_library_exports_its_interface_only(tmp_path: Path) -> None:
    """nvcc of this machine, where there is one, for one architecture."""
    try:
        tools = nvcc.find("sampler")
    except EngineError:
        return
    out = tmp_path / sampler.LIBRARY
    nvcc.compile_library(out, sampler.product(), ("sm_90",), tools)
    listed = subprocess.check_output(["nm", "-D", "--defined-only", out], text=True).split()
    names = [n for n in listed if n.startswith("less") or "less" in n]
    assert sorted(names) == ["lessSample", "lessSampleInterface", "lessSampleWhyUnusable"]
    opened = ctypes.CDLL(str(out))
    assert opened.lessSampleInterface() == 1
    assert callable(sampler.load(out))
