"""Finding the plugin's toolchain, and its cache; the compiler is a script that records its command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from less_export.cli import main as cli
from less_export.contract import PLUGIN_VERSION
from less_export.errors import EngineError, UsageError
from less_export.native import nvcc
from less_export.progress import Spoken
from less_export.tensorrt import plugin

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V{version}"; exit 0; fi
echo "$@" >>"{log}"
{extra}
while [ "$1" != -o ]; do shift; done
echo compiled >"$2"
"""
Toolkit = Callable[..., Path]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    """``toolkit(version, extra)`` creates a fake CUDA toolkit that records its command lines in ``log``."""
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "cache"))

    def make(version: str = "13.0.88", extra: str = "") -> Path:
        nvcc, log = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "log"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(NVCC.format(version=version, log=log, extra=extra))
        nvcc.chmod(0o755)
        log.write_text("")
        monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
        return log

    return make


def test_one_list_of_sources() -> None:
    """The compiled sources are those in the folder and those in the package."""
    root = nvcc.kernels()
    listed = nvcc.listed("sources.txt")
    assert sorted(listed) == sorted(f"src/{p.name}" for p in (root / "src").iterdir() if p.suffix in (".cu", ".cpp"))
    assert nvcc.default_archs() == ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    header = (root / "src/less_attention_plugin.h").read_text()
    assert re.findall(r'kPluginVersion = "(\d+)"', header) == [PLUGIN_VERSION]


def test_built_once(toolkit: Toolkit, tmp_path: Path) -> None:
    log, told = toolkit(), list[str]()
    built = plugin.library(("sm_89", "sm_120"), progress=Spoken(told.append))
    assert built.read_text() == "compiled\n"
    assert built.is_relative_to(tmp_path / "cache" / "plugins")
    lines = log.read_text().splitlines()
    assert len(lines) == len(nvcc.listed("sources.txt")) + 1
    (kernels,) = [x for x in lines if "less_attention_decode.cu -o" in x]
    for flag in (
        "code=sm_89",
        "code=sm_120",
        "arch=compute_89,code=compute_89",
        "arch=compute_120,code=compute_120",
        "-compress-all",
        "-fvisibility=hidden",
    ):
        assert flag in kernels
    assert kernels.count("code=compute_") == 2  # PTX of the oldest and of the newest
    link = lines[-1]
    assert all(x in link for x in ("-shared", "-cudart=static", "--exclude-libs=ALL", "exports.map"))
    assert told[-1] == "linking the plugin"
    assert any("8 of 8 files done" in x for x in told)
    assert plugin.library(("sm_89", "sm_120")) == built
    assert len(log.read_text().splitlines()) == len(lines)  # from the cache
    assert sorted(p.name for p in built.parent.iterdir()) == [plugin.LIBRARY, f"{plugin.LIBRARY}.sha256"]
    assert [p for p in built.parents[1].iterdir() if p.name.startswith(".")] == []


def test_what_makes_another_library(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit()
    libraries = {plugin.library(("sm_89",)), plugin.library(("sm_80",)), plugin.library(("sm_80", "sm_89"))}
    toolkit("13.1.20")
    libraries.add(plugin.library(("sm_89",)))
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "NvInfer.h").touch()
    (headers / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 11\n")
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(headers))
    libraries.add(plugin.library(("sm_89",)))
    assert len(libraries) == 5
    monkeypatch.delenv("LESS_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plugin.library(("sm_89",)).is_relative_to(tmp_path / "xdg" / "less-export")


def test_several_processes_at_once(toolkit: Toolkit, tmp_path: Path) -> None:
    log = toolkit(extra="sleep 0.2")
    code = "from less_export.tensorrt import plugin; print(plugin.library(('sm_86',)))"

    def build(_: int) -> str:
        return subprocess.check_output([sys.executable, "-c", code], text=True)

    with ThreadPoolExecutor(3) as pool:
        said = {*pool.map(build, range(3))}
    (path,) = said
    assert Path(path.strip()).read_text() == "compiled\n"
    assert len(log.read_text().splitlines()) > 8  # more than one was compiled
    assert [p.name for p in Path(path.strip()).parents[1].iterdir()] == [Path(path.strip()).parent.name]


def test_compile_errors_are_one_line_and_leave_nothing(toolkit: Toolkit, tmp_path: Path) -> None:
    toolkit(extra="echo 'src/x.cu(3): error: no such thing' >&2; exit 2")
    with pytest.raises(EngineError, match=r"cannot be compiled \(src/\w+\.\w+\): src/x.cu\(3\): error: no such thing$"):
        plugin.library(("sm_89",))
    assert [*(tmp_path / "cache").rglob("*.so")] == []
    assert not (tmp_path / "cache").exists()
    blocked = tmp_path / "cache"
    blocked.write_text("a file")
    toolkit()
    with pytest.raises(EngineError, match=r"cannot write the plugin to .*set LESS_EXPORT_CACHE to another folder"):
        plugin.library(("sm_89",))


def test_what_is_missing_is_said(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit("12.4.1")
    with pytest.raises(EngineError, match=r"nvcc is from CUDA 12.4, the plugin needs 12.8 or newer: pip"):
        plugin.toolchain()
    toolkit("nonsense")
    with pytest.raises(EngineError, match=r"nvcc reports no version"):
        plugin.toolchain()
    toolkit()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(empty))
    with pytest.raises(EngineError, match=r"needs TensorRT's headers: set TENSORRT_INCLUDE_DIR .* pip install"):
        plugin.toolchain()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(EngineError, match=r"needs a C\+\+ compiler: install g\+\+"):
        plugin.toolchain()
    monkeypatch.setattr(nvcc, "places", lambda: iter([empty / "nvcc"]))
    with pytest.raises(EngineError, match=r"needs nvcc, .* pip install 'less-export\[plugin\]'"):
        plugin.toolchain()


def test_places_of_nvcc_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_HOME first, then the PATH, then PyPI's packages."""
    (tmp_path / "nvidia" / "cu13").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("CUDA_HOME", "/given")
    places = [*nvcc.places()]
    assert places[0] == Path("/given/bin/nvcc")
    assert tmp_path / "nvidia/cu13/bin/nvcc" in places
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    assert any("kernel_lens" in str(p) for p in plugin._header_places())


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("sm_89", ("sm_89",)), ("8.9,90, 120", ("sm_89", "sm_90", "sm_120")), ("SM_100,100", ("sm_100",))],
)
def test_architectures(text: str, parsed: tuple[str, ...]) -> None:
    assert nvcc.parse_archs(text) == parsed
    assert nvcc.parse_archs(None) == nvcc.parse_archs("all") == nvcc.default_archs()


@pytest.mark.parametrize("text", ["", "sm_75", "ada", "8", "89,", "8.9.1"])
def test_architectures_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give architectures from sm_80 on"):
        nvcc.parse_archs(text)


def test_the_command(toolkit: Toolkit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toolkit()
    out = tmp_path / "mine.so"
    assert cli.main(["build-plugin", "--gpu-arch", "sm_89", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == "compiled\n"
    assert cli.main(["build-plugin", "--gpu-arch", "sm_89"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_relative_to(tmp_path / "cache")
    for arguments in (["--gpu-arch", "x"], ["--out", str(tmp_path / "no" / "x.so"), "--gpu-arch", "sm_89"]):
        assert cli.main(["build-plugin", *arguments]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("less-export: error: ")
    assert os.environ["LESS_EXPORT_CACHE"]
