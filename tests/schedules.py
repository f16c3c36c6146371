"""Random schedules of requests, and what Python's scheduler does with them: what the C++ scheduler is compared with.

A schedule is text: one command a line, with fields ``name=value``.

==================================  ====================================================================================
``begin rows= piece= queue=``       a scheduler of so many rows; ``queue`` requests may wait
``submit name= prompt= ...``        a request, with fields of SamplingParams; ``keep``: with its state at the end;
                                    ``prefix=NAME``: it continues the state of another, if there is one by now
``cancel name=``                    whatever has become of it
``fail what= nth=``                 the nth run, copy, read, write or reset of a row from here fails
``step``, ``end``
==================================  ====================================================================================

:func:`play` prints what each of them did: every run of the engine with its rows, the tokens they had seen and those
they were fed; every event; the hash of every state that is kept; how many run and wait.

Both sides run a fake engine, the arithmetic of ``MixingBackend`` and ``host_machine.hpp``: the next token depends on
all bytes of a row's state and on all that the row was fed. So equal output proves that the schedulers do the same at
the same calls, and that neither loses, swaps or reuses a row's state, also after faults. It does not prove that an
engine computes attention or evicts rightly (the arithmetic knows no policy: that of a layer only shapes its tensors),
nor that random choices agree, which come from different generators: what is sampled here has one possible outcome.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from less_export.contract import Contract
from less_export.errors import BackendError, LessExportError
from less_export.runtime.backend import Array, RowState, State
from less_export.runtime.scheduler import Event, Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory

from .cpp_support import MixingBackend

FAULTS = ("run", "copy", "read", "write", "reset")
#: Fields of SamplingParams that are numbers.
NUMBERS: Mapping[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}


def schedule(seed: int, contract: Contract, faults: bool) -> list[str]:
    """The commands of a random schedule: 10 requests, some of them alike, too long or cancelled."""
    rng = random.Random(seed)
    rows, piece = rng.randint(1, contract.max_batch), rng.randint(1, contract.chunk)
    lines = [f"begin rows={rows} piece={piece} queue={rng.randint(1, 4)}"]
    names = [str(i) for i in range(10)]
    burst = rng.random() < 0.3  # most ask for answers to one prompt, at once
    prompts = [_prompt(rng, contract) for _ in range(1 if burst else 3)]
    arrivals = sorted((rng.randint(0, 1 if burst else 14), name) for name in names)
    last = arrivals[-1][0]
    cancels = [(rng.randint(0, 22), rng.choice(names)) for _ in range(4)]
    for now in range(last + 120):
        for arrives, name in arrivals:
            if arrives == now:
                prompt = rng.choice(prompts) if rng.random() < (0.9 if burst else 0.5) else _prompt(rng, contract)
                lines.append(_submit(rng, contract, name, prompt))
        lines += [f"cancel name={name}" for leaves, name in cancels if leaves == now]
        if faults and now < last + 4 and rng.random() < (0.8 if burst else 0.3):
            what = "run" if burst and rng.random() < 0.5 else rng.choice(FAULTS)
            lines.append(f"fail what={what} nth={rng.randint(1, 3)}")
        lines.append("step")
    return [*lines, "end"]


def _prompt(rng: random.Random, contract: Contract) -> list[int]:
    length = 45 if rng.random() < 0.05 else rng.randint(1, 13)
    return [rng.randrange(contract.vocab_size) for _ in range(length)]


def _submit(rng: random.Random, contract: Contract, name: str, prompt: list[int]) -> str:
    def maybe(share: float, text: str) -> str:
        return f" {text}" if rng.random() < share else ""

    def some(count: int) -> list[int]:
        return [rng.randrange(contract.vocab_size) for _ in range(count)]

    line = f"submit name={name} prompt={_joined(prompt)} max_new_tokens={rng.randint(1, 9)}"
    line += maybe(0.2, "temperature=1.5 top_k=1") + maybe(0.2, "ignore_eos") + maybe(0.3, "keep")
    line += maybe(0.3, f"stop_token_ids={_joined(some(4))}") + maybe(0.1, "repetition_penalty=1.3")
    line += maybe(0.1, "presence_penalty=0.75 frequency_penalty=0.3")
    line += maybe(0.1, "logit_bias=" + ",".join(f"{i}:{rng.choice((-2.5, 4))}" for i in some(3)))
    return line + maybe(0.3, f"prefix={rng.randrange(10)}")


def _joined(values: Any) -> str:
    return ",".join(str(int(v)) for v in values)


class RecordingBackend(MixingBackend):
    """Notes every run, and fails when it is told to: before it changes anything."""

    def __init__(self, contract: Contract, by_index: bool) -> None:
        super().__init__(contract)
        self.rows_by_index = by_index
        self.faults: dict[str, int] = {}
        self.runs: list[str] = []

    def _about(self, what: str) -> None:
        if what in self.faults:
            self.faults[what] -= 1
            if not self.faults[what]:
                del self.faults[what]
                raise BackendError(f"the test forbids this {what}")

    def _step(self, input_ids: Any, past_length: Any, new_length: Any, rows: Any) -> Any:
        self._about("run")
        ids = ";".join(_joined(row[:new]) for row, new in zip(input_ids, new_length, strict=True))
        self.runs.append(f"feed rows={_joined(rows)} past={_joined(past_length)} ids={ids}")
        return super()._step(input_ids, past_length, new_length, rows)

    def _copy_row(self, source: int, target: int) -> None:
        self._about("copy")
        super()._write_row(target, super()._read_row(source))

    def _reset_rows(self, rows: Any) -> None:
        self._about("reset")
        with_faults, self.faults = self.faults, {}
        super()._reset_rows(rows)  # by a write, which is none of the scheduler's
        self.faults = with_faults

    def _read_row(self, row: int) -> State:
        self._about("read")
        return super()._read_row(row)

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        self._about("write")
        super()._write_row(row, tensors)


def play(lines: list[str], contract: Contract, eos_ids: tuple[int, ...], by_index: bool) -> list[str]:
    """What each command of a schedule does with Python's scheduler, over adjacent rows or rows by index."""
    stage: _Stage | None = None
    out: list[str] = []
    for line in lines:
        command, *words = line.split()
        fields = {name: value for name, _, value in (word.partition("=") for word in words)}
        if command == "begin":
            stage = _Stage(RecordingBackend(contract, by_index), eos_ids, fields)
        else:
            assert stage is not None
            out += getattr(stage, command)(fields)
    return out


class _Stage:
    """A scheduler with a backend of its own, and what the schedule knows of it; a method for each command."""

    def __init__(self, backend: RecordingBackend, eos_ids: tuple[int, ...], fields: Mapping[str, str]) -> None:
        self.backend = backend
        self.scheduler = Scheduler(self.backend, rows=int(fields["rows"]), piece=int(fields["piece"]))
        self.scheduler.open()
        self.queue = int(fields["queue"])
        self.factory = SequenceFactory(self.backend, None, eos_ids)
        self.sequences: dict[str, Sequence] = {}

    def submit(self, fields: Mapping[str, str]) -> list[str]:
        name = fields["name"]
        params: dict[str, Any] = {n: kind(fields[n]) for n, kind in NUMBERS.items() if n in fields}
        params["ignore_eos"] = "ignore_eos" in fields
        if "stop_token_ids" in fields:
            params["stop_token_ids"] = [int(i) for i in fields["stop_token_ids"].split(",")]
        if "logit_bias" in fields:
            pairs = [pair.split(":") for pair in fields["logit_bias"].split(",")]
            params["logit_bias"] = {int(i): float(b) for i, b in pairs}
        before = self.sequences.get(fields.get("prefix", ""))
        prefix = before.state if before else None
        try:
            checked = self.factory.params(None, params)
            self.factory.check_prefix(prefix)
            prompt = [int(i) for i in fields["prompt"].split(",")]
            sequence = self.factory.sequence(prompt, checked, prefix=prefix, keep_state="keep" in fields)
        except LessExportError as error:
            return [f"submit {name} refused: {error}"]
        # As Engine.submit counts.
        if self.scheduler.waiting + self.scheduler.running >= self.scheduler.rows + self.queue:
            return [f"submit {name} full"]
        self.sequences[name] = sequence
        self.scheduler.submit(sequence)
        return [f"submit {name} queued"]

    def cancel(self, fields: Mapping[str, str]) -> list[str]:
        sequence = self.sequences.get(fields["name"])
        here = sequence is not None and self.scheduler.cancel(sequence)
        return [f"cancel {fields['name']} {'yes' if here else 'no'}"]

    def fail(self, fields: Mapping[str, str]) -> list[str]:
        self.backend.faults[fields["what"]] = int(fields["nth"])
        return []

    def step(self, fields: Mapping[str, str]) -> list[str]:
        self.backend.runs.clear()
        events = self.scheduler.step()
        out = ["step", *self.backend.runs, *map(self._told, events)]
        return [*out, f"now running={self.scheduler.running} waiting={self.scheduler.waiting}"]

    def _told(self, event: Event) -> str:
        (name,) = (n for n, s in self.sequences.items() if s is event.sequence)
        if event.token is None:
            return f"event {name} error: {event.error}"
        reason, state = event.token.finish_reason, event.sequence.state
        text = f"event {name} token {event.token.token_id}" + (f" {reason}" if reason else "")
        return text if reason is None or state is None else f"{text} state {state.length} {_hash(state)}"

    def end(self, fields: Mapping[str, str]) -> list[str]:
        timing, busy = self.scheduler.timing, "yes" if self.scheduler.busy else "no"
        return [f"end prefilled={timing.prefill_tokens} decoded={timing.decode_tokens} busy={busy}"]


def _hash(state: RowState) -> str:
    """Of the tensors one after another, in the contract's order."""
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in state.tensors.values())
    return hashlib.sha256(data).hexdigest()[:16]
