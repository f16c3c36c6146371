"""The cache of what this machine built: known hashes, and libraries beside their hashes."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from less_export.bundle.files import sha256
from less_export.errors import EngineError
from less_export.native import cache
from less_export.progress import Spoken
from less_export.tensorrt import plugin

from .test_plugin_build import Toolkit, toolkit  # noqa: F401  (a fixture)

pytest_plugins = ["tests.trust_support"]

HASH = "ab" * 32


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------ known hashes


def test_hashes_of_what_was_built_here(own_cache: Path) -> None:
    assert not cache.is_known(HASH)
    assert not own_cache.exists()  # asking leaves nothing
    cache.record(HASH)
    cache.record(HASH)
    assert (own_cache / cache.KNOWN).read_text() == f"{HASH}\n"
    assert (mode(own_cache), mode(own_cache / cache.KNOWN)) == (0o700, 0o600)
    assert cache.is_known(HASH)
    assert not cache.is_known("cd" * 32)
    assert not cache.is_known("")
    assert not cache.is_known(HASH[:8])


def test_a_record_that_was_cut(own_cache: Path) -> None:
    own_cache.mkdir(mode=0o700)
    (own_cache / cache.KNOWN).write_text(f"{'cd' * 32}\n{HASH[:20]}")
    (own_cache / cache.KNOWN).chmod(0o600)
    cache.record("ef" * 32)
    assert cache.is_known("ef" * 32)
    assert cache.is_known("cd" * 32)
    assert not cache.is_known(HASH)


def test_many_record_at_once(own_cache: Path) -> None:
    code = (
        "import sys; from less_export.native import cache\n"
        "for i in range(*map(int, sys.argv[1:])): cache.record(f'{i:064x}')"
    )

    def record(first: int) -> None:
        subprocess.run([sys.executable, "-c", code, str(first), str(first + 30)], check=True)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(record, (0, 20, 40)))
    assert sorted((own_cache / cache.KNOWN).read_text().split()) == [f"{i:064x}" for i in range(70)]


def test_a_cache_that_others_could_have_written(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.record(HASH)
    for path in (own_cache, own_cache / cache.KNOWN):
        before = mode(path)
        for bits in (0o020, 0o002):
            path.chmod(before | bits)
            for use in (lambda: cache.is_known(HASH), lambda: cache.record(HASH)):
                with pytest.raises(EngineError, match=f"others may write to the cache {path}: delete it, or set LESS_"):
                    use()
        path.chmod(before)
    own_cache.chmod(0o755)  # as earlier versions made it
    cache.record("cd" * 32)
    assert mode(own_cache) == 0o700
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(EngineError, match=f"the cache {own_cache} belongs to another user: set LESS_EXPORT_CACHE"):
        cache.is_known(HASH)


def test_the_list_is_no_link(own_cache: Path, tmp_path: Path) -> None:
    own_cache.mkdir(mode=0o700)
    (tmp_path / "list").write_text(f"{HASH}\n")
    (own_cache / cache.KNOWN).symlink_to(tmp_path / "list")
    assert not cache.is_known(HASH)
    with pytest.raises(OSError, match="symbolic link"):
        cache.record("cd" * 32)


# ------------------------------------------------------------------ the cache of libraries


def test_a_library_is_stored_with_its_hash(toolkit: Toolkit) -> None:  # noqa: F811
    toolkit()
    library = plugin.library(("sm_89",))
    assert library.is_absolute()
    beside = library.with_name(f"{library.name}.sha256")
    assert beside.read_text() == f"{sha256(library)}\n"
    assert cache.is_known(sha256(library))
    for folder in (library.parent, cache.cache_folder()):
        assert mode(folder) == 0o700


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda p: os.truncate(p, 3),
    "emptied": lambda p: os.truncate(p, 0),
    "changed": lambda p: p.write_text("another\n"),
    "removed": lambda p: p.unlink(),
    "without its hash": lambda p: p.with_name(f"{p.name}.sha256").unlink(),
    "with an empty hash": lambda p: p.with_name(f"{p.name}.sha256").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_again(damage: str, toolkit: Toolkit) -> None:  # noqa: F811
    log = toolkit()
    library = plugin.library(("sm_89",))
    lines = len(log.read_text().splitlines())
    DAMAGE[damage](library)
    told: list[str] = []
    assert plugin.library(("sm_89",), progress=Spoken(told.append)) == library
    assert library.read_text() == "compiled\n"
    assert len(log.read_text().splitlines()) == 2 * lines
    assert ("building it again" in told[0]) == (damage != "removed")
    assert plugin.library(("sm_89",)) == library
    assert len(log.read_text().splitlines()) == 2 * lines


@pytest.mark.parametrize("place", ["cache", "plugins", "key", "library"])
def test_a_library_that_others_could_have_written(place: str, toolkit: Toolkit) -> None:  # noqa: F811
    toolkit()
    library = plugin.library(("sm_89",))
    path = {"library": library, "key": library.parent, "plugins": library.parents[1], "cache": library.parents[2]}[
        place
    ]
    path.chmod(mode(path) | 0o002)
    with pytest.raises(EngineError, match=f"others may write to the cache {re.escape(str(path))}: delete it, or set"):
        plugin.library(("sm_89",))


def test_a_relative_cache(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    toolkit()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LESS_EXPORT_CACHE", "relative")
    assert plugin.library(("sm_89",)).is_relative_to(tmp_path / "relative")
