"""README and docs say what was measured, and name nothing that does not exist."""

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


def test_tables_of_the_documents_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


#: README, docs and the files beside the code.
DOCUMENTS = sorted(
    p
    for folder in (".", "*", "*/*", "docs/**")
    for p in ROOT.glob(f"{folder}/*.md")
    if not {".venv", "_build"} & {x[:5] if x.startswith(".") else x for x in p.relative_to(ROOT).parts}
)


def headings(text: str) -> set[str]:
    """The anchors of a document's headings, as code hosts and MyST make them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    local = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith("http")]
    assert local or file.name != "README.md" or file.parent != ROOT
    for link in local:
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link


def test_options_of_the_documents_exist() -> None:
    lines = [
        line
        for file in DOCUMENTS
        for line in re.findall(r"^(?:\$ |build/)?less-export .*$", file.read_text(encoding="utf-8"), re.M)
    ]
    used = {x for line in lines for x in re.findall(r"(?<![\w-])--[\w-]+", line)}
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
