"""Sequences that come, go and are cancelled at any step: each gets the tokens that it gets alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import BackendError, UsageError
from less_export.runtime.backend import Array, Backend, RowState, State
from less_export.runtime.generate import Generator
from less_export.runtime.ort import OrtBackend
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Event, Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory

from .test_generate import HashBackend, contract, expected, ids, letter_tokenizer
from .tiny_decoder import CONTRACT, onnx_decoder

POLICIES = {
    "h2o": LayerSpec(4, 2, 8, 0.35, Policy.H2O, 3, 4, 0, True, 7, 3),
    "tova": LayerSpec(4, 2, 8, 0.35, Policy.TOVA, 6, 1, 0, True, 7, 3),
    "sink": LayerSpec(4, 1, 8, 0.35, Policy.SINK, 2, 5, 0, True, 7, 2),
    "window": LayerSpec(4, 2, 8, 0.35, Policy.WINDOW, 0, 6, 6, False, 6, 1),
    "full": LayerSpec(4, 2, 8, 0.35, Policy.FULL, 0, 40, 0, False, 40, 1),
}
POLICIES["h2o, int8 slots"] = dataclasses.replace(POLICIES["h2o"], slot_dtype="int8")


@dataclasses.dataclass(frozen=True)
class Request:
    """``arrives`` and ``leaves`` are steps; it leaves only if it has not finished before."""

    prompt: tuple[int, ...]
    tokens: int
    arrives: int
    leaves: int | None = None


REQUESTS = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(0, 39), min_size=1, max_size=14).map(tuple),
        tokens=st.integers(1, 9),
        arrives=st.integers(0, 14),
        leaves=st.one_of(st.none(), st.none(), st.integers(0, 25)),
    ),
    min_size=8,
    max_size=8,
)


def play(scheduler: Scheduler, requests: list[Request], **params: Any) -> dict[int, list[Event]]:
    """Submit, cancel and step as the requests say; their events by index."""
    factory = SequenceFactory(scheduler.backend, None, ())
    sequences: dict[int, Sequence] = {}
    events: dict[int, list[Event]] = defaultdict(list)
    for step in range(400):
        for index, request in enumerate(requests):
            if request.arrives == step:
                options = factory.params(None, {"max_new_tokens": request.tokens, **params})
                sequences[index] = factory.sequence(request.prompt, options, index=index)
                scheduler.submit(sequences[index])
            if request.leaves == step and index in sequences:
                ended = bool(events[index]) and (events[index][-1].token is None or not sequences[index].active)
                assert scheduler.cancel(sequences[index]) == (not ended)
                assert not scheduler.cancel(sequences[index])
        for event in scheduler.step() if scheduler.busy else ():
            events[event.sequence.index].append(event)
        assert scheduler.running <= scheduler.rows
        if not scheduler.busy and step > max(r.arrives for r in requests):
            break
    assert not scheduler.busy
    return events


def tokens(events: list[Event]) -> tuple[int, ...]:
    return tuple(e.token.token_id for e in events if e.token is not None)


def assert_as_alone(requests: list[Request], events: dict[int, list[Event]], alone: list[tuple[int, ...]]) -> None:
    """A request that was cancelled has the first of the tokens that it gets alone, the others have all."""
    for index, (request, want) in enumerate(zip(requests, alone, strict=True)):
        got = tokens(events[index])
        assert got == want[: len(got)], f"request {index}"
        if request.leaves is None or request.leaves < request.arrives:
            assert len(got) == request.tokens
            last = events[index][-1].token
            assert last is not None
            assert last.finish_reason == "length"


@given(REQUESTS, st.integers(1, 3), st.integers(1, 4))
def test_tokens_do_not_depend_on_the_others(requests: list[Request], rows: int, piece: int) -> None:
    backend = HashBackend(contract())
    events = play(Scheduler(backend, rows=rows, piece=piece), requests)
    assert_as_alone(requests, events, [expected(r.prompt, r.tokens) for r in requests])
    assert all(0 not in new for _, new in backend.calls)  # no row runs that has nothing to do
    assert all(width <= piece for width, _ in backend.calls)
    assert backend.opened == [rows]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OrtBackend]:
    folder = tmp_path_factory.mktemp("scheduler")
    backends = {}
    for name, layer in POLICIES.items():
        model = Contract((layer,), vocab_size=40, dtype="float32", chunk=5, max_batch=3)
        backends[name] = OrtBackend(model, onnx_decoder(model, folder / f"{name}.onnx", seed=3), threads=1)
    return backends


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str, models: dict[str, OrtBackend]) -> None:
    """On a real graph: what is evicted depends on how a prompt is cut, so every prompt must be cut as alone."""
    backend = models[policy]
    alone: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    @settings(max_examples=8)
    @given(REQUESTS, st.sampled_from([5, 3]))
    def run(requests: list[Request], piece: int) -> None:
        events = play(Scheduler(backend, piece=piece), requests)
        for request in requests:
            if (request.prompt, piece) not in alone:
                single = dataclasses.replace(request, arrives=0, leaves=None, tokens=9)
                alone[request.prompt, piece] = tokens(play(Scheduler(backend, rows=1, piece=piece), [single])[0])
        assert_as_alone(requests, events, [alone[r.prompt, piece][: r.tokens] for r in requests])

    run()


def test_alone_is_what_generate_gives(models: dict[str, OrtBackend]) -> None:
    backend, prompt = models["h2o"], tuple(range(1, 14))
    (want,) = Generator(backend).generate([prompt], max_new_tokens=8)
    assert tokens(play(Scheduler(backend), [Request(prompt, 8, 0)])[0]) == want.token_ids


def test_seeded_sampling_does_not_depend_on_the_others() -> None:
    requests = [Request((3, 1, 4), 6, 0), Request((1, 5), 6, 1), Request((9,), 6, 1), Request((2, 6, 5), 6, 3)]
    params = {"temperature": 1.5, "seed": 5}
    events = play(Scheduler(HashBackend(contract())), requests, **params)
    together = Generator(HashBackend(contract())).generate([r.prompt for r in requests], max_new_tokens=6, **params)
    assert [tokens(events[i]) for i in range(4)] == [g.token_ids for g in together]


# ------------------------------------------------------------------ order of work


def test_a_long_prompt_stops_nobody_for_longer_than_a_piece() -> None:
    backend = HashBackend(contract())
    requests = [Request((1,), 12, 0), Request((2,), 12, 0), Request((7,) * 20, 2, 3)]
    play(Scheduler(backend, piece=4), requests)
    kinds = "".join("p" if width > 1 else "d" for width, _ in backend.calls)
    assert kinds.count("p") == 5
    assert "pp" not in kinds  # a decode step of the others between two pieces


def test_rows_are_packed() -> None:
    backend = HashBackend(contract())
    play(Scheduler(backend), [Request((1, 1), 6, 0), Request((2, 2), 12, 0), Request((3, 3), 12, 0)])
    sizes = [len(new) for width, new in backend.calls if width == 1]
    assert [size for size, _ in itertools.groupby(sizes)] == [1, 2, 3, 2, 1]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_several_answers_to_one_prompt_are_prefilled_once(rows: int) -> None:
    """As far as rows are free; each is another sample, and the same as without the others."""
    backend, prompt, params = HashBackend(contract()), (3, 1, 4, 1, 5, 9, 2, 6), {"temperature": 1.5, "seed": 5}
    requests = [Request(prompt, 4, 0)] * 3 + [Request(prompt[1:], 4, 0)]
    scheduler = Scheduler(backend, rows=rows, piece=4)
    events = play(scheduler, requests, **params)
    together = Generator(HashBackend(contract())).generate([r.prompt for r in requests], max_new_tokens=4, **params)
    assert [tokens(events[i]) for i in range(4)] == [g.token_ids for g in together]
    assert scheduler.timing.prefill_tokens == {1: 3, 2: 2, 3: 1}[rows] * 8 + 7


def test_prompts_take_turns() -> None:
    """Long ones get as many pieces each; a short one that comes later is not kept waiting by them."""
    scheduler = Scheduler(HashBackend(contract()), rows=3, piece=2)
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=2)
    one, other, short = (factory.sequence(p, params, index=i) for i, p in enumerate(([1] * 20, [2] * 20, [3] * 3)))
    scheduler.submit(one)
    scheduler.submit(other)
    for step in range(4):
        scheduler.step()
        assert (one.fed, other.fed) == (2 * (step // 2 + 1), 2 * ((step + 1) // 2))
    scheduler.submit(short)
    for _ in range(6):
        scheduler.step()
    assert short.token_ids
    assert one.fed == other.fed == 8
    run_all(scheduler, [])
    assert [tuple(s.token_ids) for s in (one, other, short)] == [expected(s.prompt, 2) for s in (one, other, short)]


def test_a_prompt_that_is_left_goes_on_for_its_twins() -> None:
    scheduler = Scheduler(HashBackend(contract()), rows=3, piece=2)
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=3)
    first, second, third = (factory.sequence([4] * 9, params, index=i) for i in range(3))
    for sequence in (first, second, third):
        scheduler.submit(sequence)
    scheduler.step()
    assert (first.row, second.row, scheduler.running, scheduler.waiting) == (0, None, 3, 0)
    assert scheduler.cancel(third)
    assert scheduler.cancel(first)
    assert (first.row, second.row, second.fed, scheduler.running) == (None, 0, 2, 1)
    run_all(scheduler, [])
    assert tuple(second.token_ids) == expected([4] * 9, 3)
    assert scheduler.timing.prefill_tokens == 9


def test_twins_of_a_prompt_that_fails_try_it_themselves() -> None:
    scheduler = Scheduler(FaultyBackend(contract()), rows=3)
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=3)
    events = run_all(scheduler, [factory.sequence([1, RAISES], params, index=i) for i in range(3)])
    assert all("out of something" in str(e.error) for i in range(3) for e in events[i])
    assert [len(events[i]) for i in range(3)] == [1, 1, 1]


def test_a_row_is_free_within_the_step() -> None:
    scheduler = Scheduler(HashBackend(contract()), rows=1)
    factory = SequenceFactory(scheduler.backend, None, ())
    first, second = (factory.sequence([token] * 9, SamplingParams(max_new_tokens=3)) for token in (1, 2))
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    assert (first.row, scheduler.running, scheduler.waiting) == (0, 1, 1)  # in the middle of its prompt
    assert scheduler.cancel(first)
    assert (first.row, scheduler.running) == (None, 0)
    scheduler.step()
    assert (second.row, scheduler.running, scheduler.waiting) == (0, 1, 0)


# ------------------------------------------------------------------ what fails


#: Prompts of the tests below, which go on for at most nine tokens, and two tokens that none of them comes to.
PROMPTS = [(1, 2), (4,), (6, 7), (3, 1), (5,) * 12]
RAISES, SPOILS = sorted({*range(40)} - {t for p in PROMPTS for t in (*p, *expected(p, 9))})[:2]


class FaultyBackend(HashBackend):
    """A step that feeds token ``RAISES`` raises; after token ``SPOILS`` the logits of that row are NaN."""

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, first: int) -> np.ndarray:
        valid = np.arange(input_ids.shape[1]) < new_length[:, None]
        if ((input_ids == RAISES) & valid).any():
            raise BackendError("out of something")
        logits = super()._step(input_ids, past_length, new_length, first)
        logits[((input_ids == SPOILS) & valid).any(1)] = np.nan
        return logits


@pytest.mark.parametrize(("bad", "message"), [(RAISES, "out of something"), (SPOILS, "nan logits")])
def test_a_bad_prompt_ends_only_its_request(bad: int, message: str) -> None:
    requests = [Request((1, 2), 9, 0), Request((1, bad, 3), 9, 1), Request((4,), 9, 2), Request((6, 7), 5, 4)]
    alone = [expected(r.prompt, r.tokens) for r in requests]
    events = play(Scheduler(FaultyBackend(contract())), requests)
    (end,) = events[1]
    assert message in str(end.error)
    for index in (0, 2, 3):
        assert tokens(events[index]) == alone[index]


def test_logits_that_fail_in_decode_end_only_their_request() -> None:
    """The processor makes request 1 take a bad token as its third; the others, which run in the same step, go on."""
    requests = [Request((1, 2), 9, 0), Request((3, 1), 9, 0), Request((4,), 9, 0)]
    scheduler = Scheduler(FaultyBackend(contract()))
    factory = SequenceFactory(scheduler.backend, None, ())

    def third(token_ids: list[int], logits: np.ndarray) -> None:
        if len(token_ids) == 2:
            logits[SPOILS] = 1e9

    for index, request in enumerate(requests):
        options = SamplingParams(max_new_tokens=9, processors=(third,) if index == 1 else ())
        scheduler.submit(factory.sequence(request.prompt, options, index=index))
    events = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
    assert tokens(events[1]) == (*expected((3, 1), 2), SPOILS)
    assert "nan logits" in str(events[1][-1].error)
    for index in (0, 2):
        assert tokens(events[index]) == expected(requests[index].prompt, 9)


def test_a_step_that_raises_ends_those_that_run_and_nobody_else() -> None:
    def take_a_bad_one(token_ids: list[int], logits: np.ndarray) -> None:
        if len(token_ids) == 1:
            logits[RAISES] = 1e9

    scheduler = Scheduler(FaultyBackend(contract()), rows=3, piece=4)
    factory = SequenceFactory(scheduler.backend, None, ())
    plain = SamplingParams(max_new_tokens=6)
    options = [plain, plain.with_overrides(processors=(take_a_bad_one,)), plain, plain]
    prompts = [(1, 2), (3, 1), (5,) * 12, (4,)]
    for index, (prompt, params) in enumerate(zip(prompts, options, strict=True)):
        scheduler.submit(factory.sequence(prompt, params, index=index))
    events = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
    for index in (0, 1):  # decoded in the step that raised
        assert "out of something" in str(events[index][-1].error)
    for index in (2, 3):  # in prefill, and waiting
        assert tokens(events[index]) == expected(prompts[index], 6)


def test_a_state_that_does_not_fit_ends_its_request() -> None:
    scheduler = Scheduler(HashBackend(contract()))
    factory = SequenceFactory(scheduler.backend, None, ())
    params = SamplingParams(max_new_tokens=2)
    scheduler.submit(factory.sequence([1], params, index=0, prefix=RowState(1, {})))
    scheduler.submit(factory.sequence([2], params, index=1))
    events = [e for _ in range(5) if scheduler.busy for e in scheduler.step()]
    assert "belongs to another export" in str(events[0].error)
    assert tokens(events[1:]) == expected([2], 2)


class BrokenRows(HashBackend):
    """Copying or reading the row of a state that has seen ``length`` tokens raises, ``times`` times."""

    def __init__(self, method: str, length: int, times: int = 1) -> None:
        super().__init__(contract())
        self.method, self.length, self.times = method, length, times

    def _fail(self, method: str, row: int) -> None:
        if method == self.method and self.past_length[row] == self.length and self.times:
            self.times -= 1
            raise BackendError("out of something")

    def _copy_row(self, source: int, target: int) -> None:
        self._fail("copy", source)
        super()._write_row(target, super()._read_row(source))

    def _read_row(self, row: int) -> State:
        self._fail("read", row)
        return super()._read_row(row)


def run_all(
    scheduler: Scheduler, sequences: list[Sequence], after_step: Callable[[], None] = lambda: None
) -> dict[int, list[Event]]:
    for sequence in sequences:
        scheduler.submit(sequence)
    events: dict[int, list[Event]] = defaultdict(list)
    while scheduler.busy:
        for event in scheduler.step():
            events[event.sequence.index].append(event)
        after_step()
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert all(s.row is None for s in sequences)
    return events


def test_a_state_that_cannot_be_read_ends_only_its_sequence() -> None:
    scheduler = Scheduler(BrokenRows("read", 2 + 4))
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=4)
    sequences = [factory.sequence([i] * i, params, index=i, keep_state=True) for i in (1, 2, 3)]
    events = run_all(scheduler, sequences)
    assert "out of something" in str(events[2][-1].error)
    assert all(e.token is None or e.token.finish_reason is None for e in events[2])  # the error alone ends it
    assert [s.state is not None for s in sequences] == [True, False, True]
    assert [tokens(events[i]) for i in (1, 3)] == [expected([i] * i, 4) for i in (1, 3)]


@pytest.mark.parametrize("times", [1, 2])
def test_a_row_that_cannot_be_copied_to_twins_ends_them(times: int) -> None:
    scheduler = Scheduler(BrokenRows("copy", 5, times))
    factory, params = SequenceFactory(scheduler.backend, None, ()), SamplingParams(max_new_tokens=4)
    events = run_all(scheduler, [factory.sequence([6] * 5, params, index=i) for i in range(3)])
    for index in range(3):
        if 1 <= index <= times:
            (only,) = events[index]
            assert "out of something" in str(only.error)
        else:
            assert tokens(events[index]) == expected([6] * 5, 4)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_row_that_cannot_be_moved_ends_only_its_sequence(cancelled: bool) -> None:
    """The first sequence ends, or is cancelled, when the last one, whose row is to fill its place, has seen 4 + 3."""
    scheduler = Scheduler(BrokenRows("copy", 4 + 3))
    factory = SequenceFactory(scheduler.backend, None, ())
    counts = {1: 90 if cancelled else 6, 2: 9, 4: 9}
    sequences = [factory.sequence([i] * i, SamplingParams(max_new_tokens=n), index=i) for i, n in counts.items()]
    cancels = []

    def cancel() -> None:
        if cancelled and not cancels and len(sequences[2].token_ids) == 4:
            cancels.append(scheduler.cancel(sequences[0]))

    events = run_all(scheduler, sequences, cancel)
    assert cancels == [True] * cancelled
    assert "out of something" in str(events[4][-1].error)
    assert tokens(events[4]) == expected([4] * 4, len(events[4]) - 1)
    assert tokens(events[2]) == expected([2] * 2, 9)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize(("method", "length", "bad"), [("read", 4, 0), ("copy", 6, 1), ("", 0, None)])
def test_a_prompt_in_the_way_moves(method: str, length: int, bad: int | None, rows: int) -> None:
    """The second prompt is fed first, and goes on in the row where the first one has seen as many tokens."""
    backend = BrokenRows(method, length)
    scheduler, lengths = Scheduler(backend, rows=rows, piece=2), (12, 6 if method == "copy" else 4)
    factory, params = SequenceFactory(backend, None, ()), SamplingParams(max_new_tokens=5)
    events = run_all(scheduler, [factory.sequence([i + 1] * n, params, index=i) for i, n in enumerate(lengths)])
    assert backend.times == (bad is None)  # it did happen
    for index, n in enumerate(lengths):
        if index == bad:
            (only,) = events[index]
            assert "out of something" in str(only.error)
        else:
            assert tokens(events[index]) == expected([index + 1] * n, 5)


def test_a_loaded_state_is_dropped_once_it_is_in_its_row() -> None:
    """It is as large as the row."""
    state = run_one(HashBackend(contract()), [1, 2], max_new_tokens=2)[0].state
    scheduler = Scheduler(HashBackend(contract()))
    sequence = SequenceFactory(scheduler.backend, None, ()).sequence(
        [3], SamplingParams(max_new_tokens=9), prefix=state
    )
    scheduler.submit(sequence)
    scheduler.step()
    assert sequence.active
    assert sequence.prefix is None


def test_somebody_else_in_the_rows_is_noticed() -> None:
    backend = HashBackend(contract())
    scheduler = Scheduler(backend)
    scheduler.submit(SequenceFactory(backend, None, ()).sequence([1], SamplingParams()))
    scheduler.step()
    backend.reset_rows([0])
    with pytest.raises(UsageError, match="another run"):
        scheduler.step()


def test_rows_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends by that: a later step may find the memory."""

    def full(self: HashBackend, batch: int) -> None:
        raise BackendError("out of something")

    scheduler = Scheduler(HashBackend(contract()))
    sequence = SequenceFactory(scheduler.backend, None, ()).sequence([1, 2], SamplingParams(max_new_tokens=3))
    scheduler.submit(sequence)
    with monkeypatch.context() as patch:
        patch.setattr(HashBackend, "_open", full)
        for _ in range(2):
            with pytest.raises(BackendError, match="out of something"):
                scheduler.step()
    assert tokens(run_all(scheduler, [])[0]) == expected([1, 2], 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"rows": 4}, "1 to 3 rows"), ({"rows": 0}, "1 to 3"), ({"piece": 5}, "1 to 4 tokens"), ({"piece": 0}, "1 to 4")],
)
def test_impossible_sizes(options: dict[str, int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Scheduler(HashBackend(contract()), **options)


# ------------------------------------------------------------------ states


def run_one(backend: Backend, prompt: Any, prefix: RowState | None = None, **params: Any) -> tuple[Sequence, str]:
    scheduler = Scheduler(backend)
    tokenizer = letter_tokenizer()
    sequence = SequenceFactory(backend, tokenizer).sequence(
        prompt, SamplingParams(**params), prefix=prefix, keep_state=True
    )
    # A second one beside it: the row of the first is not the only one, and moves.
    scheduler.submit(SequenceFactory(backend, tokenizer).sequence([5], SamplingParams(max_new_tokens=2)))
    scheduler.submit(sequence)
    text = ""
    while scheduler.busy:
        text += "".join(e.token.text for e in scheduler.step() if e.token and e.sequence is sequence)
    return sequence, text


def test_a_state_goes_on_where_the_text_ended() -> None:
    """It has seen prompt and text, whatever the text's length."""
    prompt = [1, 2, 3, 4, 5, 6]
    for count in (1, 2, 5):
        first, _ = run_one(HashBackend(contract()), prompt, max_new_tokens=count, ignore_eos=True)
        assert first.state is not None
        assert first.state.length == len(prompt) + count
        history = [*prompt, *first.token_ids, 9]
        second, _ = run_one(HashBackend(contract()), [9], first.state, max_new_tokens=4, ignore_eos=True)
        assert tuple(second.token_ids) == expected(history, 4)


@pytest.mark.parametrize(("params", "seen"), [({}, 1 + 2), ({"stop": "bc"}, 1 + 2), ({"stop_token_ids": [2]}, 1 + 2)])
def test_a_state_lacks_what_ended_the_text(params: dict[str, Any], seen: int) -> None:
    script = [*ids("ab"), 27] if not params else ids("abc")
    # Both sequences follow the script: position 1 on.
    sequence, text = run_one(HashBackend(contract(), [0, *script, 27, 27, 27]), [0], **params)
    assert sequence.state is not None
    assert sequence.state.length == seen
    assert text == ("a" if "stop" in params else "ab")


def test_no_state_unless_asked() -> None:
    scheduler = Scheduler(HashBackend(contract()))
    sequence = SequenceFactory(scheduler.backend, None, ()).sequence([1], SamplingParams(max_new_tokens=2))
    scheduler.submit(sequence)
    while scheduler.busy:
        scheduler.step()
    assert sequence.state is None


def test_the_tiny_decoder_has_the_policies() -> None:
    """The requests above are longer than the slots: rows evict."""
    assert {layer.policy.name for layer in CONTRACT.layers} <= set(POLICIES)
    assert all(layer.capacity < 14 for name, layer in POLICIES.items() if name != "full")
