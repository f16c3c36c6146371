"""Native code of bundles: loaded if this machine built it, if the user names it or says so, and otherwise never."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from less_export import open_bundle
from less_export.bundle.artifact import MANIFEST, Artifact, Bundle, Layout, Manifest
from less_export.bundle.files import sha256
from less_export.contract import Contract
from less_export.errors import EngineError, UsageError
from less_export.native import cache
from less_export.runtime import open as opening
from less_export.runtime import trt
from less_export.tensorrt import engine, plugin, trust
from less_export.tensorrt.trust import PluginFacts

from . import bundles
from .bundles import Run, refused
from .test_plugin_build import Toolkit, toolkit  # noqa: F401  (a fixture)
from .trt_decoder import contract_of
from .trt_support import Fake

pytest_plugins = ["tests.bundles", "tests.trust_support"]


def compiled(path: Path, number: int) -> Path:
    """A shared library whose ``answer()`` is ``number``."""
    code = f'extern "C" int answer() {{ return {number}; }}'
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=code, text=True, check=True)
    return path


@functools.cache
def _libraries(folder: Path) -> tuple[bytes, bytes]:
    return compiled(folder / "one.so", 1).read_bytes(), compiled(folder / "two.so", 2).read_bytes()


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Two libraries as bytes: the answer of the first is 1, that of the second 2."""
    return _libraries(tmp_path_factory.mktemp("libraries"))


# ------------------------------------------------------------------ libraries that manifests name


def facts_of(path: Path, library: str | None = None) -> PluginFacts:
    return dataclasses.replace(PluginFacts.of(path, inside=False), **({"library": library} if library else {}))


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def test_a_foreign_library_is_not_loaded(
    own_cache: Path, tmp_path: Path, libraries: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the manifest says of its hash; the line names the file, and three ways to allow it."""
    path = tmp_path / "foreign.so"
    path.write_bytes(libraries[0])
    facts = facts_of(path)
    with pytest.raises(EngineError) as caught:
        trust.find(facts)
    said = str(caught.value)
    assert said.isprintable()
    for part in (str(path), facts.sha256, "--trust-code", "trust_code=True", "LESS_EXPORT_PLUGIN", "build the engine"):
        assert part in said
    assert answer(trust.find(facts, trust_code=True)) == 1
    monkeypatch.setenv("LESS_EXPORT_PLUGIN", str(path))
    assert answer(trust.find(dataclasses.replace(facts, library="/nowhere.so"))) == 1
    monkeypatch.delenv("LESS_EXPORT_PLUGIN")
    cache.record(facts.sha256)
    assert answer(trust.find(facts)) == 1
    path.write_bytes(libraries[1])
    for trusting in (False, True):
        with pytest.raises(
            EngineError, match=r"is not the plugin that this engine was built with \(its hash differs\)"
        ):
            trust.find(facts, trusting)


def test_a_bare_name_is_not_searched(
    own_cache: Path, tmp_path: Path, libraries: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader looks for ``x.so`` on a path of its own; here it means the file in this folder."""
    path = tmp_path / "libless_test.so"
    path.write_bytes(libraries[0])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / path.name).write_bytes(libraries[1])
    code = (
        "import ctypes, sys; from less_export.tensorrt import trust\n"
        "facts = trust.PluginFacts(sys.argv[1], sys.argv[2], '1', False)\n"
        "print(ctypes.CDLL(str(trust.find(facts, True))).answer(), ctypes.CDLL(sys.argv[1]).answer())"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path / "elsewhere")}
    output = subprocess.check_output(
        [sys.executable, "-c", code, path.name, sha256(path)], text=True, cwd=tmp_path, env=environment
    )
    assert output == "1 2\n"


@pytest.mark.parametrize("how", ["written over", "replaced", "removed"])
def test_what_was_hashed_is_what_is_loaded(
    how: str, own_cache: Path, tmp_path: Path, libraries: tuple[bytes, bytes]
) -> None:
    path, other = tmp_path / "x.so", tmp_path / "other.so"
    path.write_bytes(libraries[0])
    sealed = trust.find(facts_of(path), trust_code=True)
    if how == "written over":
        path.write_bytes(libraries[1])
    elif how == "replaced":
        other.write_bytes(libraries[1])
        os.replace(other, path)
    else:
        path.unlink()
    assert answer(sealed) == 1
    with pytest.raises(OSError, match="not permitted"):
        sealed.write_bytes(libraries[1])
    assert sealed.read_bytes() == libraries[0]


def test_two_libraries_do_not_mix(own_cache: Path, tmp_path: Path, libraries: tuple[bytes, bytes]) -> None:
    """The loader knows a library by its file's name, and both have the same one on the disk."""
    path = tmp_path / "x.so"
    answers = []
    for code in (*libraries, libraries[0]):
        path.write_bytes(code)
        answers.append(answer(trust.find(facts_of(path), trust_code=True)))
    assert answers == [1, 2, 1]


def test_what_is_not_a_plugin(tmp_path: Path, libraries: tuple[bytes, bytes]) -> None:
    module: Any = types.ModuleType("tensorrt_test")
    module.get_plugin_registry = None
    (tmp_path / "text.so").write_text("no library")
    (tmp_path / "other.so").write_bytes(libraries[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "_ErrorSink", lambda function: function)
        for name in ("text.so", "other.so"):
            with pytest.raises(EngineError, match=f"cannot load the plugin {tmp_path / name}: "):
                plugin.load(module, tmp_path / name)
    plugin._sinks.pop("tensorrt_test")


# ------------------------------------------------------------------ plans


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A plan, and a TensorRT that notes in ``flags`` whether code in plans was allowed."""
    made = Fake(contract_of("float16"), tmp_path, monkeypatch, lambda feed: [])
    module, flags = sys.modules["tensorrt_rtx"], []
    original = module.Runtime  # type: ignore[attr-defined]

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, log: Any) -> None:
            self.runtime = original(log)

        def deserialize_cuda_engine(self, data: Any) -> Any:
            flags.append(self.engine_host_code_allowed)
            return self.runtime.deserialize_cuda_engine(data)

    module.Runtime = Runtime  # type: ignore[attr-defined]
    made.flags = flags  # type: ignore[attr-defined]
    return made


INSIDE = PluginFacts("/nowhere.so", "0" * 64, "1", inside=True)


def test_plans_with_code_inside(own_cache: Path, fake: Fake) -> None:
    flags: list[bool] = fake.flags  # type: ignore[attr-defined]
    with pytest.raises(EngineError) as caught:
        trt.TrtBackend(fake.contract, fake.plan, INSIDE)
    said = str(caught.value)
    for part in (str(fake.plan), sha256(fake.plan), "carries native code", "--trust-code", "trust_code=True"):
        assert part in said
    assert said.isprintable()
    assert flags == []
    trt.TrtBackend(fake.contract, fake.plan, INSIDE, trust_code=True)
    cache.record(sha256(fake.plan))
    trt.TrtBackend(fake.contract, fake.plan, INSIDE)
    assert flags == [True, True]
    fake.plan.write_bytes(fake.plan.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match="this machine did not build it"):
        trt.TrtBackend(fake.contract, fake.plan, INSIDE)
    trt.TrtBackend(fake.contract, fake.plan)  # no code, as far as anyone says: TensorRT would refuse it
    assert flags == [True, True, False]


def bundle_of(fake: Fake, facts: PluginFacts | None) -> Bundle:
    plan = Artifact("plan", fake.plan.name, sha256(fake.plan), fake.contract, {"plugin": facts and vars(facts)})
    model = {"name": "x", "class": "X", "parameters": 1, "config": {}}
    manifest = Manifest(model, {}, (plan,), (), {})
    (fake.plan.parent / MANIFEST).write_bytes(manifest.dump())
    return Bundle.open(fake.plan.parent)


@pytest.mark.parametrize("library", ["beside.so", "sub/../beside.so", "ABSOLUTE"])
def test_a_bundle_does_not_bring_its_own_code(
    library: str, own_cache: Path, fake: Fake, libraries: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library beside a downloaded bundle, with its hash in the manifest."""
    loaded: list[Path] = []
    monkeypatch.setattr(plugin, "load", lambda module, path: loaded.append(path))
    folder = fake.plan.parent
    (folder / "sub").mkdir()
    (folder / "beside.so").write_bytes(libraries[0])
    facts = facts_of(folder / "beside.so", str(folder / "beside.so") if library == "ABSOLUTE" else library)
    bundle_of(fake, facts)
    with pytest.raises(EngineError, match="which this machine did not build"):
        open_bundle(folder)
    assert loaded == []
    open_bundle(folder, trust_code=True)
    assert [p.read_bytes() for p in loaded] == [libraries[0]]
    cache.record(facts.sha256)
    open_bundle(folder)
    assert len(loaded) == 2


def test_engines_that_are_built_here_are_known(
    own_cache: Path, run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = iter((b"a plan with its plugin inside", b"a plan that refers to it"))

    def build_plan(model: bytes, contract: Contract, out: Path, library: Path, **options: Any) -> engine.PlanInfo:
        out.write_bytes(plan := next(plans))
        facts = PluginFacts.of(library, inside=b"inside" in plan)
        return engine.PlanInfo("tensorrt", "10.3", None, 1, 0.0, 9, 1, facts)

    (tmp_path / "lib.so").write_text("a library")
    monkeypatch.setattr(engine, "flavour", lambda: engine.Flavour("tensorrt", dataclasses, "10.3"))
    monkeypatch.setattr(engine, "build_plan", build_plan)
    monkeypatch.setattr(plugin, "library", lambda archs, progress: tmp_path / "lib.so")
    monkeypatch.setattr(plugin, "check_layers", lambda *_: None)
    for name, known in (("a.plan", True), ("b.plan", False)):
        assert run(source, "--out", tmp_path / name, *bundles.QUICK_OPTIONS).code == 0
        assert cache.is_known(sha256(tmp_path / name)) is known
    own_cache.chmod(0o777)
    plans = iter((b"another with it inside",))
    result = run(source, "--out", tmp_path / "c.plan", *bundles.QUICK_OPTIONS)
    assert result.code == 0
    assert "warning: this engine will need --trust-code to be opened: others may write to the cache" in result.err


# ------------------------------------------------------------------ commands


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each backend that was asked for may load code; none is made."""
    flags: list[bool] = []

    def load(bundle: Bundle, name: str | None, trust_code: bool, **options: Any) -> Any:
        flags.append(trust_code)
        raise EngineError("no backend today")

    monkeypatch.setattr(opening, "_load", load)
    return flags


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "BUNDLE", "--prompt", "x"),
        ("check", "BUNDLE"),
        (
            "eval",
            "BUNDLE",
            "--backend",
            "ort",
            "--compare",
            "sparse",
            "--seqs",
            "1",
            "--seq-len",
            "64",
            "--positions",
            "8",
        ),
        ("eval", "BUNDLE", "--task", "summarize", "--data", "ITEMS"),
    ],
)
def test_commands_ask_for_trust(
    words: tuple[str, ...], asked: list[bool], run: Run, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "items.jsonl").write_text('{"text": "a cat", "summary": "cat"}\n')
    named = [str(plain) if w == "BUNDLE" else str(tmp_path / "items.jsonl") if w == "ITEMS" else w for w in words]
    for flag in ((), ("--trust-code",)):
        result = run(*named, *flag)
        assert result.code == 1
        assert result.err.splitlines()[-1] == "less-export: error: no backend today"
    assert asked == [False, True]


def test_the_harness_asks_for_trust(asked: list[bool], plain: Path) -> None:
    pytest.importorskip("lm_eval")
    from less_export.evaluation.harness import LessLM

    for options in ({}, {"trust_code": True}):
        with pytest.raises(EngineError, match="no backend today"):
            LessLM(str(plain), **options)
    assert asked == [False, True]
    with pytest.raises(UsageError, match="trust_code must be true or false, not 'yes'"):
        LessLM(str(plain), trust_code="yes")  # type: ignore[arg-type]


def test_python_asks_for_trust(asked: list[bool], plain: Path) -> None:
    for options in ({}, {"trust_code": False}, {"trust_code": True}):
        with pytest.raises(EngineError, match="no backend today"):
            open_bundle(plain, **options)
    assert asked == [False, False, True]


def test_info_needs_no_trust(own_cache: Path, fake: Fake, run: Run) -> None:
    bundle_of(fake, INSIDE)
    assert run("info", fake.plan.parent).code == 0
    assert Layout.of(fake.plan.parent).stem is None


# ------------------------------------------------------------------ check


def test_check_hashes_the_weights(run: Run, plain: Path, tmp_path: Path) -> None:
    """One changed bit of a weight: the reference reads the same file, and only the hash can tell."""
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    words = ("check", out, "--tokens", "20")
    for option in ((), ("--full",)):
        refused(run(*words, *option), "model.safetensors is damaged (its hash differs")
    assert run(*words, "--quick").code == 0
    refused(run(*words, "--quick", "--full"), "not allowed with argument")
