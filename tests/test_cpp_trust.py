"""Native code of bundles in the C++ runtime: it knows what Python recorded, and loads nothing else unasked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from less_export.bundle.files import sha256
from less_export.native import cache

from .cpp_support import PLAN, bundle, describe
from .manifest_cases import PLUGIN
from .trt_decoder import contract_of

pytest_plugins = ["tests.cpp_support"]
pytestmark = pytest.mark.slow

Answer = Callable[..., Any]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that does not exist yet."""
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "own"))
    monkeypatch.delenv("LESS_EXPORT_PLUGIN", raising=False)
    return tmp_path / "own"


@pytest.fixture
def answer(own_cache: Path, tools: Path, tmp_path: Path) -> Answer:
    """The plugin of a bundle with a plugin of these facts, or the line that refuses it."""

    def describe_it(path: str, option: str = "verified", **facts: Any) -> Any:
        plugin = {"library": "x.so", "sha256": "0" * 64, "version": "1", "inside": False, **facts}
        made = describe(tools, bundle(tmp_path / path, contract_of("float16"), PLAN, {"plugin": plugin}), option)
        return made["plugin"] if isinstance(made, dict) else made

    return describe_it


def test_libraries(answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libless_plugins.so"
    library.write_bytes(b"library")
    digest = sha256(library)
    beside = {"library": library.name, "sha256": digest}
    absolute = {"library": str(library), "sha256": digest}
    (tmp_path / "c").mkdir()
    for path, facts in (
        ("a.plan", beside),
        ("c/c.plan", absolute),
        ("c/d.plan", {**beside, "library": f"../{library.name}"}),
    ):
        refusal = answer(path, **facts)
        assert refusal.count("\n") == 1
        for part in (str(library.name), digest, "which this machine did not build", "LESS_EXPORT_PLUGIN", "trustCode"):
            assert part in refusal
        assert answer(path, "trust", **facts).endswith(library.name)
    cache.record(digest)
    assert answer("a.plan", **beside) == str(library)
    assert answer("c/c.plan", **absolute) == str(library)
    for option in ("verified", "trust"):
        assert "is missing (" in answer("c/e.plan", option, **beside)
        assert "is not the plugin that this engine was built with" in answer("f.plan", option, library=str(library))
    (tmp_path / "own" / cache.KNOWN).unlink()
    monkeypatch.setenv("LESS_EXPORT_PLUGIN", str(library))
    assert answer("a.plan", **{**beside, "library": "/nowhere.so"}) == "/nowhere.so"
    assert "is not the plugin" in answer("g.plan", library="/nowhere.so")


def test_plans_with_code_inside(answer: Answer, own_cache: Path) -> None:
    refusal = answer("a.plan", inside=True)
    for part in ("a.plan (sha256 ", "carries native code, and this machine did not build it", "trustCode"):
        assert part in refusal
    assert answer("a.plan", "trust", inside=True) == "inside"
    cache.record("0" * 64)  # the library's hash is not the plan's
    assert "carries native code" in answer("a.plan", inside=True)
    cache.record(hashlib.sha256(PLAN).hexdigest())
    assert answer("a.plan", inside=True) == "inside"
    for path in (own_cache, own_cache / cache.KNOWN):
        before = path.stat().st_mode
        path.chmod(before | 0o002)
        refusal = answer("a.plan", inside=True)
        assert f"others may write to the cache {path}: delete it, or set LESS_EXPORT_CACHE" in refusal
        path.chmod(before)
    assert answer("a.plan", inside=True) == "inside"


@pytest.mark.parametrize("said", [None, False, True])
def test_rows_by_index(said: bool | None, own_cache: Path, tools: Path, tmp_path: Path) -> None:
    """What the manifest says of the plan's tensors; older ones say nothing, and have rows in order."""
    plugin = PLUGIN | {"inside": True} | ({} if said is None else {"rows_by_index": said})
    contract = contract_of("float16")
    made = describe(tools, bundle(tmp_path / "x.plan", contract, PLAN, {"plugin": plugin}), "trust")
    assert made["rows_by_index"] is bool(said)
    axes = {"batch": -1, "chunk": -2, "state_rows": -3}
    for name, specs in (("inputs", contract.inputs(bool(said))), ("outputs", contract.outputs(bool(said)))):
        assert made[name] == [[s.name, s.dtype, [axes.get(d, d) for d in s.shape]] for s in specs]  # type: ignore[call-overload]


def test_control_characters_are_not_printed(answer: Answer) -> None:
    for library in ("x\x1b[2J.so", "x\n.so", "x\u202e.so"):
        refusal = answer("a.plan", library=library)
        assert refusal.rstrip("\n").isprintable()
        assert "library must be printable text" in refusal
