"""The C++ scheduler against Python's, on the same recorded schedules; see tests/schedules.py for what that proves."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from less_export.contract import Contract, LayerSpec, Policy

from .cpp_support import ROOT, TOKENIZER, bundle, call
from .schedules import FAULTS, play, schedule

pytest_plugins = ["tests.cpp_support"]
pytestmark = pytest.mark.slow

#: A row of the first tensor has a multiple of 256 bytes: it is bound where it lies, which tells the row.
H2O = LayerSpec(4, 2, 8, 0.35, Policy.H2O, 4, 4, 0, True, 8, 3)
TOVA = LayerSpec(4, 2, 8, 0.35, Policy.TOVA, 6, 1, 0, True, 7, 3)
SINK = LayerSpec(4, 1, 8, 0.35, Policy.SINK, 2, 5, 0, True, 7, 2)
WINDOW = LayerSpec(4, 2, 8, 0.35, Policy.WINDOW, 0, 6, 6, False, 6, 1)
FULL = LayerSpec(4, 2, 8, 0.35, Policy.FULL, 0, 40, 0, False, 40, 1)
INT8 = dataclasses.replace(TOVA, slot_dtype="int8")
STATE16 = dataclasses.replace(SINK, slot_dtype="int8", state_bits=16)
CONTRACTS = {
    "policies that evict": Contract((H2O, TOVA, SINK, WINDOW), 60, "float16", 5, 4),
    "full": Contract((FULL,), 60, "bfloat16", 5, 3),
    "int8, all logits": Contract((H2O, INT8, STATE16), 60, "bfloat16", 4, 3, logits="all"),
}
SCHEDULES = 40
EOS = (7, 23)


def counted(out: list[str]) -> Counter[str]:
    """How often the things that a schedule is to bring about have happened."""
    kinds = Counter[str]()
    for line in out:
        for kind, pattern in {
            "eos": r"event \d+ token \d+ eos",
            "stop": r"event \d+ token \d+ stop",
            "length": r"event \d+ token \d+ length",
            "state": r"event .* state \d+ ",
            "full": "submit .* full",
            "refused": "submit .* refused: a prompt of",
            "cancelled": "cancel .* yes",
            "ended before": "cancel .* no",
            "several rows": r"feed from=0 past=\d+,\d+",
            "prompts behind them": r"feed from=[1-9]",
            **{f"failed {what}": f"event .* error: the test forbids this {what}" for what in FAULTS},
        }.items():
            kinds[kind] += bool(re.match(pattern, line))
    return kinds


@pytest.mark.parametrize("name", CONTRACTS)
def test_schedules(name: str, tools: Path, tmp_path: Path) -> None:
    contract = CONTRACTS[name]
    path = bundle(tmp_path / "x.plan", contract, tokenizer=dataclasses.replace(TOKENIZER, eos_ids=EOS))
    recorded: list[list[str]] = []
    for memory, first in (("in-place", 0), ("two-blocks", 1)):
        seeds = range(first, SCHEDULES, 2)
        commands = {seed: schedule(seed, contract, faults=seed % 4 < 2) for seed in seeds}
        feed = "".join(f"{line}\n" for one in commands.values() for line in one)
        done = call(tools / "less_runtime_probe", "schedules", path, memory, feed=feed)
        assert (done.code, done.err) == (0, "")
        rest = done.out.splitlines()
        for seed, one in commands.items():
            recorded.append(play(one, contract, EOS))
            got, rest = rest[: len(recorded[-1])], rest[len(recorded[-1]) :]
            assert got == recorded[-1], f"schedule {seed}, {memory}"
        assert not rest
    happened = counted([line for one in recorded for line in one])
    never = {"refused"} if name != "full" else set()  # the others take prompts of any length
    assert {kind for kind, count in happened.items() if not count} == never
    assert all(one[-1].endswith("busy=no") for one in recorded)


def test_schedules_are_random() -> None:
    """The same seed is the same schedule, and another one is another; engines and pieces of all sizes occur."""
    contract = CONTRACTS["full"]
    made = [schedule(seed, contract, faults=True) for seed in range(SCHEDULES)]
    assert made == [schedule(seed, contract, faults=True) for seed in range(SCHEDULES)]
    assert len({tuple(one) for one in made}) == SCHEDULES
    assert {one[0].split()[1] for one in made} == {"rows=1", "rows=2", "rows=3"}
    assert np.ptp([len(one) for one in made]) > 5


def test_code_of_the_howto_compiles(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "cpp.md").read_text(encoding="utf-8")
    program, part = re.findall(r"```cpp\n(.*?)```", text, re.S)
    inside = f"void part(less::Session& session, less::Bundle const& bundle) {{\n{part}}}\n"
    (tmp_path / "main.cpp").write_text(f'#include "less_scheduler.hpp"\n{program}{inside}')
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "plugins_trt" / "include"]
    done = call("c++", *flags, tmp_path / "main.cpp")
    assert done.code == 0, done.err
