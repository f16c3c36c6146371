"""Releases of other packages: tested ranges, the warning for others, and extras that resolve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from less_export import versions

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
#: On PyPI these are installers that fetch the real package from NVIDIA's registry when pip asks for their dependencies.
INSTALLERS = ("tensorrt",)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions that appear to be installed instead of the real ones."""
    pretended: dict[str, str] = {}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: pretended.get(package) or real(package))
    versions.warn_if_untested.cache_clear()
    yield pretended
    versions.warn_if_untested.cache_clear()


def test_an_untested_release_is_reported_once_in_one_line(installed: dict[str, str]) -> None:
    installed |= {"torch": "3.1.0", "transformers": "5.19.4", "onnx": "1.23.9"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_if_untested("torch", "transformers", "onnx")
        versions.warn_if_untested("torch", "transformers", "onnx")
    assert [str(w.message) for w in caught] == [
        "not tested with torch 3.1.0 (tested: 2.13 to 2.15), transformers 5.19.4 (tested: 5.20 to 5.24): "
        "if something fails, install one of these"
    ]


@pytest.mark.parametrize("end", [0, 1])
def test_tested_releases_are_silent(installed: dict[str, str], end: int) -> None:
    installed |= {package: ends[end] for package, ends in versions.TESTED.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested(*versions.TESTED)


def test_the_table_is_what_nox_tested() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "versions.json").read_text())
    assert all(row["failed"] == 0 and row["passed"] > 0 for row in rows.values())

    def number(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]

    for package, ends in versions.TESTED.items():
        tested = sorted((row["packages"][package].partition("+")[0] for row in rows.values()), key=number)
        assert (tested[0], tested[-1]) == ends, package


def test_lower_bounds_are_the_oldest_tested_releases() -> None:
    for name in ("export", "cpu", "gpu"):
        for requirement in EXTRAS[name]:
            package, bound = re.fullmatch(r"([\w-]+)>=([\w.]+).*", requirement).groups()  # type: ignore[union-attr]
            oldest, _ = versions.TESTED.get(package.removesuffix("-gpu"), (bound, bound))
            assert oldest == bound or oldest.startswith(f"{bound}."), requirement


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(extra: str) -> None:
    """The registry has what is not installed here; what is installed here was just resolved from it."""
    requirements = [r for r in EXTRAS[extra] if not r.startswith("less-export[")]
    installers = [r for r in requirements if r.startswith(INSTALLERS) and re.split("[<>=]", r)[0] in INSTALLERS]
    for requirement in installers:
        package, bound = requirement.split(">=")
        listed = pip("index", "versions", package)
        newest = re.search(r"\(([\d.]+)", listed)
        assert newest, listed
        assert [int(n) for n in newest[1].split(".")] >= [int(n) for n in bound.split(".")], listed
    others = [r for r in requirements if r not in installers]
    pip("install", "--dry-run", "-c", str(ROOT / "scripts" / "constraints.txt"), *others)


def pip(*arguments: str) -> str:
    """What pip prints; fails with its message if it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
