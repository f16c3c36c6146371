"""The README says what was measured, and names nothing that is not there."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from less_export.cli.commands import COMMANDS
from less_export.hf import recipes
from less_export.plan import AttentionLayer

ROOT = Path(__file__).parent.parent


def test_tables_of_the_readmes_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file", sorted(p for d in (".", "*", "*/*") for p in ROOT.glob(f"{d}/*.md") if ".venv" not in str(p))
)
def test_links_of_the_documents_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    local = [x for x in re.findall(r"\]\(([^)]+)\)", text) if not x.startswith("http")]
    assert local or file.name != "README.md" or file.parent != ROOT
    assert [x for x in local if not (file.parent / x).exists()] == []


def test_options_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = {x for line in re.findall(r"^less-export .*$", text, re.M) for x in re.findall(r"--[\w-]+", line)}
    known = "".join(command.parser().format_help() for command in COMMANDS.values())
    assert used
    assert [x for x in used if x not in known] == []


@pytest.mark.slow
def test_every_benchmark_program_starts(tmp_path: Path) -> None:
    """As far as what they import of the package, of the tests and of one another."""
    programs = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py"))
    code = f"import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(n) for n in {programs}]"
    words = [sys.executable, "-c", code, ROOT / "benchmarks"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    keys = {f for f in recipes.Recipe.__dataclass_fields__ if f != "name"}
    assert {k for k in keys if f"`{k}`" not in text} == set()


def test_the_quality_results_are_what_their_benchmark_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_quality")
    found = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    asked: dict[str, Any] = {}

    class Replay(bench.Bench):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.rows = {r["key"]: r for r in found}
            self.layers = (AttentionLayer(4, 1, 256, 1 / 16, 0),) * 18

        def row(self, key: str, make: Any) -> Any:
            asked[key] = self.rows[key]
            return self.rows[key]

        def trained(self, setting: Any, recipes: Any) -> None:
            assert not recipes, f"{setting.name}: rows of {recipes} are missing"

    bench.measure(Replay())
    assert set(asked) == {r["key"] for r in found if not r["key"].startswith("train")}
