"""The C++ scheduler against Python's, on the same recorded schedules; see tests/schedules.py for what that proves."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.contract import Contract, LayerSpec, Policy
from less_export.runtime.backend import RowState
from less_export.runtime.scheduler import Scheduler
from less_export.runtime.sequence import SequenceFactory

from .cpp_support import ROOT, TOKENIZER, MixingBackend, Result, bundle, call, lines
from .schedules import FAULTS, play, schedule
from .test_cpp_row_states import state_of
from .trt_support import HEADER

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
            "several rows": r"feed rows=0,1",
            "one row": r"feed rows=[1-9] ",
            **{f"failed {what}": f"event .* error: the test forbids this {what}" for what in FAULTS},
        }.items():
            kinds[kind] += bool(re.match(pattern, line))
    return kinds


@pytest.mark.parametrize("name", CONTRACTS)
def test_schedules(name: str, tools: Path, tmp_path: Path) -> None:
    """Plans with the plugin and without it, and those that take rows by index, where a step may hold any."""
    contract = CONTRACTS[name]
    path = bundle(tmp_path / "x.plan", contract, tokenizer=dataclasses.replace(TOKENIZER, eos_ids=EOS))
    recorded: list[list[str]] = []
    for memory, first in (("in-place", 0), ("two-blocks", 1), ("by-index", 2)):
        seeds = range(first, SCHEDULES, 3)
        commands = {seed: schedule(seed, contract, faults=seed % 4 != 3) for seed in seeds}
        feed = "".join(f"{line}\n" for one in commands.values() for line in one)
        done = call(tools / "less_runtime_probe", "schedules", path, memory, feed=feed)
        assert (done.code, done.err) == (0, "")
        rest = done.out.splitlines()
        for seed, one in commands.items():
            recorded.append(play(one, contract, EOS, memory == "by-index"))
            got, rest = rest[: len(recorded[-1])], rest[len(recorded[-1]) :]
            assert got == recorded[-1], f"schedule {seed}, {memory}"
        assert not rest
    happened = counted([line for one in recorded for line in one])
    never = {"refused"} if name != "full" else set()  # the others take prompts of any length
    assert {kind for kind, count in happened.items() if not count} == never
    assert all(one[-1].endswith("busy=no") for one in recorded)
    steps = [x for x in (re.match(r"feed rows=([\d,]+)", line) for one in recorded for line in one) if x]
    rows = [[int(i) for i in step[1].split(",")] for step in steps]
    assert any((np.diff(chosen) != 1).any() for chosen in rows), "a step over rows that are not adjacent"


def test_schedules_are_random() -> None:
    """The same seed is the same schedule, and another one is another; engines and pieces of all sizes occur."""
    contract = CONTRACTS["full"]
    made = [schedule(seed, contract, faults=True) for seed in range(SCHEDULES)]
    assert made == [schedule(seed, contract, faults=True) for seed in range(SCHEDULES)]
    assert len({tuple(one) for one in made}) == SCHEDULES
    assert {one[0].split()[1] for one in made} == {"rows=1", "rows=2", "rows=3"}
    assert np.ptp([len(one) for one in made]) > 5


# ------------------------------------------------------------------ less_generate --prompts, on mocks of the GPU

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [3, 1, 4, 1, 5, 9, 2], [6, 2, 6]]
#: What the mocked TensorRT reads.
MOCK_PLAN = HEADER(b"ftrt", 99, 10, 16, 0, 1).ljust(99)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    tokenizer = dataclasses.replace(TOKENIZER, eos_ids=EOS)
    return bundle(tmp_path / "x.plan", CONTRACTS["full"], MOCK_PLAN, tokenizer=tokenizer)


def expected(
    prompts: list[list[int]],
    rows: int,
    piece: int,
    prefix: RowState | None = None,
    contract: Contract = CONTRACTS["full"],
    **params: Any,
) -> list[str]:
    """The lines of Python's scheduler, as requests end; a prompt is on every second line, from the first on."""
    backend = MixingBackend(contract)
    factory, scheduler = SequenceFactory(backend, None, EOS), Scheduler(backend, rows=rows, piece=piece)
    checked = factory.params(None, params)
    for index, prompt in enumerate(prompts):
        scheduler.submit(factory.sequence(prompt, checked, index=index, prefix=prefix))
    out = []
    while scheduler.busy:
        for event in scheduler.step():
            if event.token is not None and event.token.finish_reason is not None:
                ids = " ".join(map(str, event.sequence.token_ids))
                out.append(f"{2 * event.sequence.index + 1}\t{event.token.finish_reason}\t{ids}")
    return out


@pytest.mark.parametrize(("rows", "piece"), [(3, 5), (2, 3), (1, 1)])
def test_requests_of_a_file(rows: int, piece: int, tools: Path, engine: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(lines(PROMPTS).replace("\n", "\n \n"))
    command = [tools / "less_generate_on_mocks", engine, "--prompts", tokens, "--max-new-tokens", 9]
    options = ["--rows", rows, "--piece", piece, "--stop-ids", "30,31,32,33"]
    want = expected(PROMPTS, rows, piece, max_new_tokens=9, stop_token_ids=(30, 31, 32, 33))
    assert len(want) == len(PROMPTS)
    assert {line.split("\t")[1] for line in want} >= {"length", "stop"}
    assert call(*command, *options) == Result(0, "".join(f"{line}\n" for line in want), "")
    # To a file; as many rows and as large pieces as there are; without new ids that end a text.
    done = call(*command, "--out", tmp_path / "out.txt", "--ignore-eos")
    assert done == Result(0, "", "")
    want = expected(PROMPTS, 3, 5, max_new_tokens=9, ignore_eos=True)
    assert (tmp_path / "out.txt").read_text().splitlines() == want
    # As one after the other.
    groups = call(tools / "less_generate_on_mocks", engine, tokens, "--max-new-tokens", 9, "--ignore-eos").out
    assert groups.splitlines() == [line.split("\t")[2] for line in sorted(want, key=lambda w: int(w.split("\t")[0]))]


def test_requests_go_on_from_a_state(tools: Path, tmp_path: Path) -> None:
    contract = CONTRACTS["policies that evict"]
    path = bundle(tmp_path / "x.plan", contract, MOCK_PLAN, tokenizer=dataclasses.replace(TOKENIZER, eos_ids=EOS))
    made = state_of(contract)
    prefix = RowState(made.length, made.tensors, "")
    prefix.save(tmp_path / "state")
    (tmp_path / "tokens.txt").write_text(lines(PROMPTS).replace("\n", "\n\n"))
    command = [tools / "less_generate_on_mocks", path, "--prompts", tmp_path / "tokens.txt", "--max-new-tokens", 5]
    done = call(*command, "--prefix", tmp_path / "state")
    want = expected(PROMPTS, 4, 5, prefix, contract, max_new_tokens=5)
    assert (done.code, done.err, done.out.splitlines()) == (0, "", want)


def test_requests_that_fail(tools: Path, engine: Path, tmp_path: Path) -> None:
    """They do not end the others."""
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(lines([PROMPTS[0], [60], [1] * 40, PROMPTS[1]]))
    done = call(tools / "less_generate_on_mocks", engine, "--prompts", tokens, "--max-new-tokens", 3)
    assert (done.code, done.err) == (
        1,
        "less_generate: error: 2 of 4 requests failed: see the lines with error\n",
    )
    told = dict(line.split("\t", 1) for line in done.out.splitlines())
    assert sorted(told) == ["1", "2", "3", "4"]
    assert told["2"].startswith("error\ttoken ids must lie in 0..59")
    assert told["3"].startswith("error\ta prompt of 40 tokens and its new tokens do not fit into the 40")
    assert [told[line].split("\t")[0] for line in ("1", "4")] == ["length", "length"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts", "TOKENS", "--rows", "4"], "this artifact takes 1 to 3 rows (--max-batch at export), not 4"),
        (["--prompts", "TOKENS", "--piece", "0"], "in pieces of 1 to 5 tokens (--chunk at export), not 0"),
        (["--prompts", "TOKENS", "--rows", "x"], "--rows is not a number: 'x'"),
        (["--prompts", "TOKENS", "--stop-ids", "1,x"], "--stop-ids is not a number: 'x'"),
        (["--prompts", "TOKENS", "--save-state", "STATE"], "--save-state takes exactly one prompt, not --prompts"),
        (["--prompts", "TOKENS", "TOKENS"], "give a bundle and a file of token ids"),
        (["--prompts", "NOTHING"], "No such file"),
        (["--prompts"], "--prompts needs a value"),
        (["TOKENS", "--rows", "1"], "--rows and --piece need --prompts"),
        (["TOKENS", "--stop-ids", "60"], "stop_token_ids must lie in 0..59"),
        (["--prompts", "TOKENS", "--out", "FOLDER/x"], "cannot write"),
    ],
)
def test_refused_options(arguments: list[str], says: str, tools: Path, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "TOKENS").write_text("1 2\n3\n")
    command = [str(tmp_path / w) if w[0].isupper() else w for w in arguments]
    done = call(tools / "less_generate_on_mocks", engine, *command)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert says in done.err
    assert not (tmp_path / "STATE").exists()


def test_code_of_the_howto_compiles(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "cpp.md").read_text(encoding="utf-8")
    program, part = re.findall(r"```cpp\n(.*?)```", text, re.S)
    inside = f"void part(less::Session& session, less::Bundle const& bundle) {{\n{part}}}\n"
    (tmp_path / "main.cpp").write_text(f'#include "less_scheduler.hpp"\n{program}{inside}')
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "plugins_trt" / "include"]
    done = call("c++", *flags, tmp_path / "main.cpp")
    assert done.code == 0, done.err
