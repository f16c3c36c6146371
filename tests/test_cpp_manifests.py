"""The C++ runtime accepts and refuses the same manifests as the Python package, and stops at the same tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from less_export.bundle.artifact import (
    MANIFEST,
    Bundle,
)
from less_export.errors import LessExportError

from .cpp_support import PLAN, call, describe
from .manifest_cases import CASES, FINE, MODEL, Case, write_bundle

pytest_plugins = ["tests.cpp_support"]
pytestmark = pytest.mark.slow


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A bundle with a plan whose files are what its manifest says."""
    path = tmp_path / "whole"
    write_bundle(path, "plan", PLAN)
    return path


def render(case: Case, whole: Path, folder: Path) -> Path:
    """A copy of the bundle with the manifest of a case."""
    folder.mkdir()
    for file in whole.iterdir():
        if file.name != MANIFEST:
            os.link(file, folder / file.name)
    (folder / MANIFEST).write_bytes(case.render(json.loads((whole / MANIFEST).read_bytes())))
    return folder


def python_verdict(path: Path) -> str:
    try:
        Bundle.open(path)
    except LessExportError as error:
        return str(error)
    return "accepted"


def test_both_runtimes_agree_on_every_manifest(tools: Path, whole: Path, tmp_path: Path) -> None:
    cases = (*CASES, *FINE)
    folders = [render(case, whole, tmp_path / str(i)) for i, case in enumerate(cases)]
    done = call(tools / "less_runtime_probe", "verdicts", feed="".join(f"{f}\n" for f in folders))
    assert done.code == 0, done.err
    verdicts = done.out.splitlines()
    assert len(verdicts) == len(cases)
    disagreements = [
        f"{case.name}: Python: {python}; C++: {cpp}"
        for case, folder, cpp in zip(cases, folders, verdicts, strict=True)
        if ((python := python_verdict(folder)) == "accepted") != (cpp == "accepted")
    ]
    assert not disagreements, "\n".join(disagreements)
    assert verdicts.count("accepted") == len(FINE)
    reasons = zip(cases, verdicts, strict=True)
    assert not [f"{c.name}: {verdict}" for c, verdict in reasons if c.reason not in verdict]
    for folder, verdict in zip(folders, verdicts, strict=True):
        assert verdict.isprintable()
        assert len(verdict) < len(str(folder)) + 300


def test_what_is_printable(tools: Path) -> None:
    """The same as in Python, but for code points that no version of Unicode has assigned so far."""
    out = call(tools / "less_runtime_probe", "printable-codes").out
    ranges = [range(*map(int, line.split())) for line in out.splitlines()]
    printable = {code for r in ranges for code in r}
    assigned = {c for c in range(0x110000) if unicodedata.category(chr(c)) != "Cn"}
    assert printable & assigned == {c for c in assigned if chr(c).isprintable()}


def test_a_plan_behind_a_link(tools: Path, whole: Path, tmp_path: Path) -> None:
    plan = whole / "engine.plan"
    outside = plan.rename(tmp_path / "engine.plan")
    plan.symlink_to(outside)
    for verdict in (python_verdict(whole), describe(tools, whole)):
        assert "engine.plan is a link to a file outside the bundle" in verdict
    plan.unlink()
    outside.rename(whole / "inside")
    plan.symlink_to("inside")
    assert python_verdict(whole) == "accepted"
    assert describe(tools, whole)["chunk"] == 4
    (tmp_path / "link").symlink_to(whole)  # to the whole folder: the user's own
    assert describe(tools, tmp_path / "link")["chunk"] == 4
    assert "other" not in describe(tools, tmp_path / "link" / "engine.plan")


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, {}),
        ({"eos_ids": [3, 5]}, {"eos_token_id": 7}),
        ({"eos_ids": 3}, {}),
        ({"eos_ids": None}, {"eos_token_id": 7}),
        ({"eos_ids": []}, {"eos_token_id": 7}),
        ({"eos_ids": [True, "1", 1.0, None, 4, -1, 2**70]}, {}),
        ({}, {"eos_token_id": 7}),
        ({}, {"eos_token_id": [7, 8]}),
        ({}, {"eos_token_id": "7"}),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": 9}}),
        ({}, {"eos_token_id": 7, "text_config": {"a": 1}}),
        ({}, {"eos_token_id": 7, "text_config": {}}),
        ({}, {"eos_token_id": 7, "text_config": None}),
    ],
)
def test_tokens_that_end_a_text_without_a_tokenizer(
    settings: dict[str, Any], config: dict[str, Any], tools: Path, whole: Path
) -> None:
    manifest = dataclasses.replace(
        Bundle.open(whole).manifest, settings=settings, model={**MODEL, "config": config}, tokenizer=None
    )
    (whole / MANIFEST).write_bytes(manifest.dump())
    expected = [i for i in Bundle.open(whole).manifest.eos_ids() if i < 2**63]
    assert describe(tools, whole)["eos_ids"] == expected
