"""Sequences that come, go and are cancelled at any step: each gets the tokens that it gets alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import BackendError, UsageError
from less_export.runtime.backend import Backend, RowState
from less_export.runtime.generate import Generator
from less_export.runtime.ort import OrtBackend
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory

from .scheduling import RAISES, FaultyBackend, Request, assert_as_alone, play, run_all, tokens
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


@given(REQUESTS, st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_tokens_do_not_depend_on_the_others(requests: list[Request], rows: int, piece: int, by_index: bool) -> None:
    backend = HashBackend(contract())
    backend.rows_by_index = by_index
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
    """Between two tokens of any other request there is one piece of it at most, and one decode step."""
    backend = HashBackend(contract(chunk=256, max_batch=8))
    scheduler, factory = Scheduler(backend), SequenceFactory(backend, None, ())
    others = [factory.sequence([i, i], SamplingParams(max_new_tokens=20)) for i in range(7)]
    late = [factory.sequence([7] * 768, SamplingParams(max_new_tokens=2))]
    for sequence in others:
        scheduler.submit(sequence)
    calls: dict[Sequence, list[int]] = defaultdict(list)  # how many the backend had when a token came
    while scheduler.busy:
        if late and len(calls[others[-1]]) >= 3:
            scheduler.submit(late.pop())
        for event in scheduler.step():
            calls[event.sequence].append(len(backend.calls))
    pieces = [place for place, (width, _) in enumerate(backend.calls) if width > 2]
    assert [backend.calls[place] for place in pieces] == [(256, [256])] * 3
    for sequence in others:
        assert len(calls[sequence]) == 20
        assert calls[sequence][0] <= pieces[0] < pieces[-1] < calls[sequence][-1]  # it decodes all the while
        for before, after in itertools.pairwise(calls[sequence]):
            widths = [width for width, _ in backend.calls[before:after]]
            assert sum(width > 1 for width in widths) <= 1
            assert widths.count(1) <= 1


def test_rows_are_packed() -> None:
    backend = HashBackend(contract())
    play(Scheduler(backend), [Request((1, 1), 6, 0), Request((2, 2), 12, 0), Request((3, 3), 12, 0)])
    sizes = [len(new) for width, new in backend.calls if width == 1]
    assert [size for size, _ in itertools.groupby(sizes)] == [1, 2, 3, 2, 1]


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_several_answers_to_one_prompt_are_prefilled_once(rows: int, by_index: bool) -> None:
    """As far as rows are free; each is another sample, and the same as without the others."""
    backend, prompt, params = HashBackend(contract()), (3, 1, 4, 1, 5, 9, 2, 6), {"temperature": 1.5, "seed": 5}
    backend.rows_by_index = by_index
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
