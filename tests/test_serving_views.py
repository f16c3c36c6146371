"""The page of the server, and the views of running requests behind it."""

from __future__ import annotations

import gc
import http.client
import weakref
from pathlib import Path
from typing import Any

import openai
import pytest

from less_export.runtime.backend import Backend
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Event, Scheduler
from less_export.runtime.sequence import Sequence, SequenceFactory
from less_export.serving import views
from less_export.view import pages
from less_export.view.occupancy import Pieces

from .serving_support import LONG, MODEL, PROMPT, Served, ids, serving, text_of
from .test_generate import HashBackend, contract, expected
from .test_service_engine import GatedBackend

pytest_plugins = ["tests.serving_support"]
VIEW = {"live_view": True, "ignore_eos": True}


def get(served: Served, path: str, key: str | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=LONG)
    connection.request("GET", path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    reply = connection.getresponse()
    result = reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    connection.close()
    return result


def pieces(served: Served, token_ids: list[int]) -> list[str]:
    known = Pieces(served.tokenizer)
    known.extend(token_ids)
    return known.texts


# ------------------------------------------------------------------ the page


def test_the_page_and_its_policy(served: Served) -> None:
    for path, (name, kind) in pages.FILES.items():
        status, headers, content = get(served, path)
        assert (status, headers["content-type"], content) == (200, kind, pages.read(name))
        policy = dict(p.strip().partition(" ")[::2] for p in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/page/", "/page/page.py", "/page/../app.py", "/page/%2e%2e/occupancy.py", "/page//etc/passwd"):
        assert get(served, path)[0] == 404


def test_only_the_page_itself_is_open() -> None:
    with serving(HashBackend(contract()), api_key="secret") as served:
        for path in pages.FILES:
            assert get(served, path)[0] == 200
        reply = served.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, extra_body=VIEW)
        for path in (f"/v1/views/{reply.id}", "/v1/views/x", "/page/x", "/v1/models"):
            assert get(served, path)[0] == 401
            assert get(served, path, "wrong")[0] == 401
        assert get(served, f"/v1/views/{reply.id}", "secret")[0] == 200


# ------------------------------------------------------------------ views


def test_a_view_follows_its_request() -> None:
    """Between two steps, without the thread of the server; at the end it has all but the last token."""
    backend = GatedBackend()
    with serving(backend) as served:
        stream = served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "abc"}], max_tokens=5, temperature=0, stream=True,
            extra_body=VIEW,
        )  # fmt: skip
        prompt = served.tokenizer.encode("<s>uabc.a", special=False)  # seven tokens, in pieces of four
        name = next(iter(stream)).id
        assert served.http("GET", f"/v1/views/{name}") == (200, {"final": False})
        for length in (4, 7, 8):  # two pieces, and the first step of decode
            backend.gate.release()
            served.until(lambda length=length: served.http("GET", f"/v1/views/{name}")[1].get("length") == length)
        backend.gate.release(10**6)
        text = "".join(c.choices[0].delta.content or "" for c in stream)
        _, data = served.http("GET", f"/v1/views/{name}?layer=0")
        assert (data["final"], data["first"], data["length"]) == (True, 0, len(prompt) + 4)
        assert data["tokens"] == pieces(served, [*prompt, *expected(prompt, 4)])
        assert text == text_of(served, prompt, 5)
        assert len(data["held"]) == len(data["tokens"]) == data["length"]
        assert data["layers"][0]["heads"][0]["positions"] == []  # this backend fills no slots
        assert data["layers"][0]["heads"][0]["mass"] > 0


def test_a_view_of_a_session_begins_where_the_request_does(tmp_path: Path) -> None:
    with serving(HashBackend(contract()), state_dir=tmp_path) as served:

        def ask(session: str, prompt: str) -> Any:
            return served.client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=4, temperature=0, extra_body={**VIEW, "session_id": session}
            )

        first = ask("new", "abc")
        second = ask(first.session_id, "de")
        _, data = served.http("GET", f"/v1/views/{second.id}")
        assert (data["first"], data["length"]) == (4 + 4, 4 + 4 + 2 + 4)  # a saved state has its last token
        new = served.tokenizer.encode("de", special=False)
        before = [*ids(served, "abc"), *expected(ids(served, "abc"), 4), *new]
        assert data["tokens"] == pieces(served, [*new, *expected(before, 4)])


def test_a_request_that_is_cancelled_closes_its_view() -> None:
    backend = GatedBackend()
    with serving(backend) as served:
        stream = served.client.completions.create(
            model=MODEL, prompt="abc", max_tokens=500, temperature=0, stream=True, extra_body=VIEW
        )  # a sampled token may have no text, so that no chunk comes
        backend.gate.release(2)
        name = next(iter(stream)).id
        stream.close()

        def ended() -> bool:
            backend.gate.release()  # the server notices between two steps
            return served.engine.running == 0

        served.until(ended)
        assert served.engine.counts["cancelled"] == 1
        served.until(lambda: served.http("GET", f"/v1/views/{name}")[1]["final"])


def test_views_are_few_and_only_of_who_asked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MOST_VIEWS", 2)

    def ask(**extra: Any) -> str:
        reply = served.client.completions.create(model=MODEL, prompt="ab", max_tokens=2, extra_body=extra)
        return str(reply.id)

    names = [ask(live_view=True) for _ in range(3)] + [ask()]
    statuses = [served.http("GET", f"/v1/views/{n}")[0] for n in names]
    assert statuses == [404, 200, 200, 404]
    status, reply = served.http("GET", "/v1/views/cmpl-x")
    assert (status, reply["error"]["code"]) == (404, "view_not_found")
    for layer in ("1", "-1", "x"):
        status, reply = served.http("GET", f"/v1/views/{names[1]}?layer={layer}")
        assert (status, "layer" in reply["error"]["message"]) == (400, True)
    with pytest.raises(openai.BadRequestError, match="live_view takes one prompt"):
        served.client.completions.create(model=MODEL, prompt="ab", n=2, extra_body={"live_view": True})


def test_a_view_outlives_its_sequence() -> None:
    """Which has a state, and its client's texts besides."""
    backend = HashBackend(contract())
    backend.open(1)
    sequence = SequenceFactory(backend, eos_ids=[]).sequence([1, 2], SamplingParams(max_new_tokens=3))
    alive = weakref.ref(sequence)
    live = views.LiveView(sequence, backend.contract, None)
    backend.step([[1, 2]])
    assert sequence.observer is not None
    sequence.observer(backend, 0)
    live.close()
    sequence.observer(backend, 0)  # the engine may be in a step
    del sequence
    gc.collect()
    assert alive() is None
    assert (live.content(None)["length"], live.content(0)["final"]) == (2, True)


def test_a_view_changes_no_answer(served: Served) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    texts = [served.client.completions.create(**options, extra_body={"live_view": x}).choices[0].text for x in (0, 1)]
    assert texts[0] == texts[1]


# ------------------------------------------------------------------ observers


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(HashBackend(contract()), rows=2)


def submit(scheduler: Scheduler, prompt: list[int], observer: Any = None, **options: Any) -> Sequence:
    factory = SequenceFactory(scheduler.backend, eos_ids=[])
    sequence = factory.sequence(prompt, SamplingParams(max_new_tokens=3), **options)
    sequence.observer = observer
    scheduler.submit(sequence)
    return sequence


def events_of(scheduler: Scheduler) -> dict[Sequence, list[Event]]:
    events: dict[Sequence, list[Event]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            events.setdefault(event.sequence, []).append(event)
    return events


def test_an_observer_sees_every_piece_and_token(scheduler: Scheduler) -> None:
    """In the row that the sequence has at that time, with what that row has seen."""
    seen: list[tuple[int, int]] = []
    submit(scheduler, [9])  # ends first, and the other moves into its row

    def observe(backend: Backend, row: int) -> None:
        seen.append((row, int(backend.past_length[row])))

    sequence = submit(scheduler, [1] * 6, observe)
    events_of(scheduler)
    assert [length for _, length in seen] == [4, 6, 7, 8]
    assert len(sequence.token_ids) == 3
    assert (seen[0][0], seen[-1][0]) == (1, 0)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_observer_that_fails_ends_its_sequence_only(call: int, scheduler: Scheduler) -> None:
    calls: list[int] = []

    def observe(backend: Backend, row: int) -> None:
        calls.append(row)
        if len(calls) == call:
            raise OSError("full")

    other = submit(scheduler, [5, 5])
    failing = submit(scheduler, [1] * 6, observe)
    events = events_of(scheduler)
    assert isinstance(events[failing][-1].error, OSError)
    assert len(calls) == call
    assert [e.error for e in events[other]] == [None] * 3
    assert scheduler.running == 0
