"""Model cards of kernel files: what they say, from any provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from less_export.contract import Heads
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.training import card

from .bundles import Run, refused
from .training_support import model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]


def test_training_writes_a_card(text: Path, tmp_path: Path, run: Run) -> None:
    file, reports = trained(model_folder(tmp_path / "model"), text, end_to_end=True, tune_steps=2, steps=5)
    kernels = Kernels.load(file)
    written = card.file_of(file).read_text()
    assert written == card.card(kernels)
    lines = written.splitlines()
    assert "| policy | h2o |" in lines
    slots = ", ".join(map(str, sorted({r.slots for r in reports})))
    assert f"| slots per layer and KV head | {slots} |" in lines
    assert any(line.startswith(f"| {text.name} |") or str(text) in line for line in lines)
    for r in reports:
        (line,) = (x for x in lines if x.startswith(f"| {r.layer} | "))
        assert f"| {r.sparse:.4f} | {r.start:.4f} | {r.less:.4f} |" in line
        assert line.endswith("slots instead |") == (not r.used)
    run_facts = kernels.provenance["run"]
    assert f"at most {run_facts['peak_memory_bytes'] / 1e9:.2f} GB of memory" in written
    assert 0.1e9 < run_facts["peak_memory_bytes"] < 100e9
    tuned = kernels.provenance["end_to_end"]
    assert f"| kernels tuned together | {tuned['divergence_tuned']:.4f} |" in lines
    assert f"| the file's kernels and slots | {tuned['divergence_after']:.4f} |" in lines
    result = run("kernels", "info", file)
    assert (result.code, result.out) == (0, written)


@pytest.mark.parametrize(("totals", "shown"), [((8, 8), "8"), ((4, 8, 12), "4, 8, 12"), ((4, 8, 12, 40), "4 to 40")])
def test_many_numbers_of_slots_are_a_range(totals: tuple[int, ...], shown: str) -> None:
    slots = {str(i): [n // 2, n // 2] for i, n in enumerate(totals)}
    assert f"| slots per layer and KV head | {shown} |" in card.card(Kernels({}, {"slots": slots})).splitlines()


def test_kernels_that_do_not_pay_are_named() -> None:
    (line,) = card.doubts({"end_to_end": {"divergence_after": 0.1, "divergence_sparse_bytes": 0.1}})
    assert "pays in no layer: KL 0.1000 if its bytes are spent on slots" in line
    assert card.doubts({"end_to_end": {"divergence_after": 0.1, "divergence_sparse_bytes": 0.2}}) == []
    (line,) = card.doubts({"layers": {"0": {"used": True}, "3": {"used": False}}})
    assert line.startswith("layers [3]: the low-rank term does not pay")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"model": "m", "layers": [], "end_to_end": False, "data": "x", "slots": 3, "sequences": None},
        {"layers": {"0": 1, "x": {}, "1": {"sparse": "no", "used": None}}, "end_to_end": {"divergence_after": "?"}},
        {"data": [1, {"name": "a|b\n# c"}], "slots": {"0": ["a"]}, "sequences": {"count": 1}, "policy": ["h2o"]},
    ],
)
def test_any_provenance_gives_a_card(facts: dict[str, Any]) -> None:
    written = card.card(Kernels({}, json.loads(json.dumps(facts))))
    assert written.startswith("# Kernels for ")
    assert "No layer has a low-rank state" in written
    assert "\n# c" not in written
    assert card.card(random_kernels([Heads(2, 1, 4)], [0], 2, 4)).startswith("# Kernels for ")


def test_the_command_shows_no_control_characters(run: Run, tmp_path: Path) -> None:
    kernels = random_kernels([Heads(2, 1, 4)], [0], 2, 4)
    file = tmp_path / "k.safetensors"
    Kernels(kernels.layers, {"model": "x\x1b[31m"}).save(file)
    result = run("kernels", "info", file)
    assert result.code == 0
    assert "\x1b" not in result.out
    refused(run("kernels", "info", tmp_path / "absent"), "no kernel file at")
