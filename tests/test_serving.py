"""The server, through OpenAI's own client: completions, chats, streams, sessions, errors and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from pydantic import BaseModel, ValidationError

from less_export import __version__
from less_export.errors import UsageError
from less_export.runtime.backend import RowState
from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generator
from less_export.runtime.sampler import TokenLogprobs
from less_export.runtime.tokenizer import Tokenizer
from less_export.serving import app as serving_app
from less_export.serving import server as serving_server
from less_export.serving import sessions
from less_export.serving.conversations import continuation
from less_export.serving.gate import Gate
from less_export.serving.options import ServerOptions
from less_export.serving.replies import Reply
from less_export.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from less_export.serving.server import Listening, Server
from less_export.serving.sessions import SessionStore

from .chat_templates import TEMPLATES
from .serving_support import LONG, MODEL, Served, serving
from .test_generate import HashBackend, contract, expected, letter_tokenizer
from .test_service_engine import GatedBackend

PROMPT = "abcde"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(HashBackend(contract()), max_new_tokens=60, max_prompt_tokens=50) as server:
        yield server


@pytest.fixture
def complete(served: Served) -> Callable[..., Any]:
    """A greedy completion that ignores eos."""

    def call(prompt: Any = PROMPT, max_tokens: int = 8, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        defaults = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True, **(extra or {})}}
        return served.client.completions.create(prompt=prompt, max_tokens=max_tokens, **{**defaults, **options})

    return call


def text_of(served: Served, prompt: list[int], count: int) -> str:
    return served.tokenizer.decode(expected(prompt, count))


def ids(served: Served, text: str) -> list[int]:
    return served.tokenizer.encode(text)


# ------------------------------------------------------------------ completions


def test_completion(served: Served, complete: Callable[..., Any]) -> None:
    reply = complete()
    prompt = ids(served, PROMPT)
    assert (reply.object, reply.model) == ("text_completion", MODEL)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text_of(served, prompt, 8), "length", 0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (6, 8, 14)
    assert complete(prompt).choices[0].text == choice.text  # the same as token ids


def test_streamed_equals_unstreamed(complete: Callable[..., Any]) -> None:
    for options in ({}, {"n": 2, "temperature": 1.5, "seed": 3}, {"stop": "w"}, {"logprobs": 2}):
        whole = complete(max_tokens=20, **options)
        chunks = list(complete(max_tokens=20, stream=True, stream_options={"include_usage": True}, **options))
        assert chunks[-1].usage == whole.usage
        assert chunks[-1].choices == []
        assert all(c.usage is None for c in chunks[:-1])
        for choice in whole.choices:
            parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
            assert "".join(p.text for p in parts) == choice.text
            assert [p.finish_reason for p in parts if p.finish_reason] == [choice.finish_reason]
            if choice.logprobs:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    joined = [x for p in parts for x in getattr(p.logprobs, name)]
                    assert joined == getattr(choice.logprobs, name), name
    assert len({c.id for c in chunks}) == 1


def test_prompt_lists_and_n(served: Served, complete: Callable[..., Any]) -> None:
    reply = complete(["ab", "cde"], n=2, max_tokens=5)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    want = [text_of(served, ids(served, p), 5) for p in ("ab", "cde")]
    assert [c.text for c in reply.choices] == [want[0], want[0], want[1], want[1]]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3 + 4, 20)
    reply = complete([[1, 2], [3]], max_tokens=5)
    assert [c.text for c in reply.choices] == [text_of(served, p, 5) for p in ([1, 2], [3])]


def test_seed(complete: Callable[..., Any]) -> None:
    texts = [[c.text for c in complete(max_tokens=20, temperature=1.5, seed=s, n=2).choices] for s in (1, 1, 2, -5)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] != texts[3]
    assert texts[0][0] != texts[0][1]  # two choices are two samples


def test_stop(served: Served, complete: Callable[..., Any]) -> None:
    text = complete(max_tokens=20).choices[0].text
    stop = text[3:5]
    (choice,) = complete(max_tokens=20, stop=["@", stop]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    third = expected(ids(served, PROMPT), 3)[2]
    (choice,) = complete(max_tokens=20, extra={"stop_token_ids": [third]}).choices
    assert choice.finish_reason == "stop"
    assert choice.text == text_of(served, ids(served, PROMPT), 2)


def test_sampling_options_reach_the_sampler(served: Served, complete: Callable[..., Any]) -> None:
    first = expected(ids(served, PROMPT), 1)[0]
    plain = complete(max_tokens=1).choices[0].text
    assert complete(max_tokens=1, logit_bias={str(first): -100}).choices[0].text != plain
    assert complete(max_tokens=1, temperature=2, extra={"top_k": 1}).choices[0].text == plain
    assert complete(max_tokens=1, temperature=2, extra={"min_p": 1.0}).choices[0].text == plain
    only_texts = {str(i): -100 for i in range(33, 40)}
    tokens = (
        complete(
            max_tokens=12, frequency_penalty=2.0, logit_bias=only_texts, logprobs=0, extra={"repetition_penalty": 50.0}
        )
        .choices[0]
        .logprobs.tokens
    )
    assert len(set(tokens)) == 12  # nothing is repeated


def test_log_probabilities(served: Served, complete: Callable[..., Any]) -> None:
    report = complete(max_tokens=4, logprobs=3).choices[0].logprobs
    assert [len(top) for top in report.top_logprobs] == [3] * 4
    for text, logprob, top in zip(report.tokens, report.token_logprobs, report.top_logprobs, strict=True):
        assert max(top.values()) == top[text] == logprob  # greedy
    chat = served.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert bytes(entry.bytes).decode() == entry.token


def test_impossible_tokens_in_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity."""
    backend = HashBackend(contract())
    step = backend._step

    def forbidding(*inputs: Any) -> Any:
        logits = step(*inputs)
        logits[..., 2:] = -np.inf
        return logits

    monkeypatch.setattr(backend, "_step", forbidding)
    with serving(backend) as served:
        for stream in (False, True):
            reply = served.client.completions.create(
                model=MODEL, prompt="a", max_tokens=1, logprobs=3, temperature=0, stream=stream
            )
            (choice,) = (next(iter(reply)) if stream else reply).choices
            assert sorted(choice.logprobs.top_logprobs[0].values())[0] == -9999.0


# ------------------------------------------------------------------ chats


def test_chat(served: Served) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "yz"}]}]
    options = {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    reply = served.client.chat.completions.create(max_completion_tokens=6, **options)
    prompt = served.tokenizer.encode("<s>sx.uyz.a", special=False)
    assert reply.choices[0].message.content == text_of(served, prompt, 6)
    assert (reply.choices[0].message.role, reply.object) == ("assistant", "chat.completion")
    assert reply.usage.prompt_tokens == len(prompt)
    chunks = list(served.client.chat.completions.create(max_completion_tokens=6, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert served.client.chat.completions.create(**options).usage.completion_tokens == 60  # --max-new-tokens


def test_tools_reach_the_template(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    options = {"model": MODEL, "messages": [{"role": "user", "content": "b"}], "temperature": 0, "max_tokens": 3}
    for choice, prompt in (("auto", "<s>ub.za"), ("none", "<s>ub.a")):
        reply = served.client.chat.completions.create(
            tools=[tool], tool_choice=choice, extra_body={"ignore_eos": True}, **options
        )
        want = text_of(served, served.tokenizer.encode(prompt, special=False), 3)
        assert reply.choices[0].message.content == want


# ------------------------------------------------------------------ sessions


def test_a_session_goes_on_without_its_prompt(tmp_path: Path) -> None:
    """In a completion, and in a chat, also in another server; what the client sends is only what is new."""
    with serving(HashBackend(contract()), state_dir=tmp_path) as served:

        def ask(session: str, prompt: str, **options: Any) -> Any:
            extra = {"session_id": session, "ignore_eos": True}
            return served.client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=5, temperature=0, extra_body=extra, **options
            )

        first = ask("new", "abc")
        history = [*ids(served, "abc"), *expected(ids(served, "abc"), 5)]
        chunks = list(ask(first.session_id, "de", stream=True))
        history += served.tokenizer.encode("de", special=False)
        assert "".join(c.choices[0].text for c in chunks) == text_of(served, history, 5)
        assert {c.session_id for c in chunks} == {first.session_id}
    history += expected(history, 5)
    with serving(HashBackend(contract()), state_dir=tmp_path) as served:
        third = served.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "f"}], max_tokens=4, temperature=0,
            extra_body={"session_id": first.session_id, "ignore_eos": True},
        )  # fmt: skip
        history += served.tokenizer.encode(".uf.a", special=False)  # after the answer, without bos
        assert third.choices[0].message.content == text_of(served, history, 4)
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["llama", "qwen", "gemma", "mistral"])
def test_a_continued_chat_is_the_rest_of_the_whole_one(name: str) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    begin = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    new = [{"role": "user", "content": "Really?"}]
    whole = tokenizer.chat([*begin, *new])
    rest = continuation(tokenizer, new, {})
    assert whole.endswith(f"Because.{rest}")
    assert "Really?" in rest


def test_a_template_that_hides_answers_cannot_go_on() -> None:
    tokenizer, new = letter_tokenizer(), [{"role": "user", "content": "Really?"}]
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UsageError, match="does not write an answer as it is"):
        continuation(tokenizer, new, {})


@pytest.mark.parametrize(
    "session", ["", "a" * 32, "../../etc/passwd", "/etc/passwd", "new\n", "A" * 32, "x", "\u0661" * 32]
)
def test_what_is_no_session(session: str, tmp_path: Path) -> None:
    store = tmp_path / "state"
    with serving(HashBackend(contract()), state_dir=store) as served:
        with pytest.raises(openai.NotFoundError) as caught:
            served.client.completions.create(model=MODEL, prompt="a", extra_body={"session_id": session})
        assert caught.value.code == "session_not_found"
        assert str(tmp_path) not in str(caught.value)
        assert list(store.iterdir()) == []


def test_sessions_are_offered_only_with_a_folder(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="--state-dir"):
        served.client.completions.create(model=MODEL, prompt="a", extra_body={"session_id": "new"})


def test_a_session_belongs_to_its_model_and_to_one_request(tmp_path: Path) -> None:
    backend = GatedBackend(free=True)
    backend.identity = "one"
    with serving(backend, state_dir=tmp_path) as served:
        extra = {"session_id": "new", "ignore_eos": True}
        session = served.client.completions.create(model=MODEL, prompt="a", max_tokens=2, extra_body=extra).session_id
        with pytest.raises(openai.BadRequestError, match="one prompt with n = 1"):
            served.client.completions.create(model=MODEL, prompt="a", n=2, extra_body=extra)
        backend.gate = threading.Semaphore(0)
        backend.inside.clear()
        with ThreadPoolExecutor() as pool:
            extra = {"session_id": session, "ignore_eos": True}
            first = pool.submit(served.client.completions.create, model=MODEL, prompt="b", extra_body=extra)
            assert backend.inside.wait(LONG)
            with pytest.raises(openai.ConflictError):
                served.client.completions.create(model=MODEL, prompt="c", extra_body=extra)
            backend.gate.release(10**6)
            assert first.result(LONG).session_id == session
    other = HashBackend(contract())
    other.identity = "two"
    with serving(other, state_dir=tmp_path) as served, pytest.raises(openai.NotFoundError, match="of this model"):
        served.client.completions.create(model=MODEL, prompt="a", extra_body=extra)


def test_the_oldest_sessions_are_dropped(tmp_path: Path) -> None:
    backend = HashBackend(contract())
    backend.open(1)
    state = backend.read_row(0)
    (tmp_path / "notes.safetensors").write_text("not a session")
    probe = SessionStore(tmp_path, 10**9, lambda state: None)
    probe.save("0" * 32, state)
    size = (tmp_path / f"{'0' * 32}.safetensors").stat().st_size
    store = SessionStore(tmp_path, 2 * size + 1, lambda state: None)
    for digit in "123":
        store.save(digit * 32, state)
    assert sorted(p.stem[0] for p in tmp_path.iterdir()) == ["2", "3", "n"]
    SessionStore(tmp_path, 1, lambda state: None).save("4" * 32, state)  # too large alone: it stays
    assert sorted(p.stem[0] for p in tmp_path.iterdir()) == ["4", "n"]


def test_a_session_is_claimed_until_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the time of the request ends before."""
    go_on, save = threading.Event(), SessionStore.save
    with serving(HashBackend(contract()), state_dir=tmp_path, timeout=0.5) as served:

        def ask(session: str) -> Any:
            extra = {"session_id": session, "ignore_eos": True}
            return served.client.completions.create(model=MODEL, prompt="a", max_tokens=2, extra_body=extra)

        def late(store: SessionStore, session: str, state: RowState) -> None:
            assert go_on.wait(LONG)
            save(store, session, state)

        def is_free() -> bool:
            try:
                return bool(ask(session))
            except openai.ConflictError:
                return False

        session = ask("new").session_id
        monkeypatch.setattr(SessionStore, "save", late)
        with pytest.raises(openai.InternalServerError, match="took longer"):
            ask(session)
        try:
            with pytest.raises(openai.ConflictError):
                ask(session)
        finally:
            go_on.set()
        served.until(is_free)
        assert RowState.load(tmp_path / f"{session}.safetensors").length == 2 + 2 + 1 + 2 + 1 + 2


def test_the_folder_of_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried when the server starts; what killed servers left is removed; nobody else can read a state."""
    left, other = tmp_path / f".{'a' * 32}.safetensors.less-export-abcdefgh", tmp_path / ".notes"
    left.touch()
    other.touch()
    store = SessionStore(tmp_path, 10**9, lambda state: None)
    assert list(tmp_path.iterdir()) == [other]
    backend = HashBackend(contract())
    backend.open(1)
    store.save("b" * 32, backend.read_row(0))
    assert (tmp_path / f"{'b' * 32}.safetensors").stat().st_mode & 0o777 == 0o600
    assert store.load("b" * 32).length == 0

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sessions.temporary, "file", refuse)
    with pytest.raises(UsageError, match=r"cannot write into the folder .*: Permission denied"):
        SessionStore(tmp_path, 10**9, lambda state: None)


def test_a_loaded_state_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HashBackend(contract())
    backend.open(1)
    backend.read_row(0).save(tmp_path / "x.safetensors")
    calls, hashed = [], RowState._sha256
    monkeypatch.setattr(RowState, "_sha256", lambda state: calls.append(1) or hashed(state))
    RowState.load(tmp_path / "x.safetensors")
    assert len(calls) == 1


def test_a_session_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears of it, but not where sessions lie."""

    def full(finished: Path, final: Path) -> None:
        raise OSError(28, "No space left on device", str(final))

    monkeypatch.setattr(sessions, "replace", full)
    with serving(HashBackend(contract()), state_dir=tmp_path) as served:
        for stream in (False, True):
            options = {"max_tokens": 2, "stream": stream, "extra_body": {"session_id": "new"}}
            with pytest.raises(openai.APIError, match="could not save the session") as caught:
                list(served.client.completions.create(model=MODEL, prompt="a", **options))
            assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ tokens and facts


def test_tokens_and_facts(served: Served) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return served.http("POST", path, body)[1]

    assert post("/tokenize", {"prompt": "abc"})["tokens"] == [26, 0, 1, 2]
    assert post("/tokenize", {"prompt": "abc", "add_special_tokens": False})["count"] == 3
    chat = post("/tokenize", {"messages": [{"role": "user", "content": "b"}]})
    assert chat["tokens"] == served.tokenizer.encode("<s>ub.a", special=False)
    assert post("/detokenize", {"tokens": [0, 1, 2]}) == {"prompt": "abc"}
    assert [m.id for m in served.client.models.list()] == [MODEL]
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'a/b' does not exist"):
        served.client.models.retrieve("a/b")
    assert post("/tokenize", {"messages": []})["error"]["param"] == "messages"
    assert served.http("GET", "/version") == (200, {"version": __version__})


def test_metrics(complete: Callable[..., Any], served: Served) -> None:
    def read() -> dict[str, float]:
        answer = served.raw(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").decode()
        lines = [line.rpartition(" ") for line in answer.splitlines() if line.startswith("less_")]
        return {name: float(value) for name, _, value in lines}

    before = read()
    complete(max_tokens=7, n=2)
    after = read()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["less_prompt_tokens_total"] == 6  # fed once, for both choices
    assert change["less_generated_tokens_total"] == 14
    assert change["less_time_to_first_token_seconds_count"] == 2
    assert change["less_time_between_tokens_seconds_count"] == 12
    assert change['less_requests_total{path="/v1/completions",status="200"}'] == 1
    assert change['less_sequences_total{outcome="finished_length"}'] == 2
    assert (after["less_rows"], after["less_rows_running"], after["less_queue_waiting"]) == (3, 0, 0)
    assert after["less_state_bytes"] == 3 * contract().state_bytes()


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (openai.NotFoundError, "model 'gpt-4' does not exist", {"model": "gpt-4"}),
        (openai.BadRequestError, "a prompt is empty", {"prompt": ""}),
        (openai.BadRequestError, "a prompt is empty", {"prompt": []}),
        (openai.BadRequestError, "prompt", {"prompt": [[1.5]]}),
        (openai.BadRequestError, r"0\.\.39", {"prompt": [40]}),
        (openai.BadRequestError, "51 tokens, and this server takes 50", {"prompt": [1] * 51}),
        (openai.BadRequestError, "201 characters, which are more than the 50 tokens", {"prompt": "a" * 201}),
        (openai.BadRequestError, "max_tokens is 61", {"max_tokens": 61}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 0}),
        (openai.BadRequestError, "temperature", {"temperature": -1}),
        (openai.BadRequestError, "top_p", {"top_p": 2}),
        (openai.BadRequestError, "100 answers .* are more than the 67", {"n": 100}),
        (openai.BadRequestError, "100000 answers", {"prompt": ["a"] * 100_000}),
        (openai.BadRequestError, "logit_bias", {"logit_bias": {"99": 1}}),
        (openai.BadRequestError, "not supported", {"echo": True}),
        (openai.BadRequestError, "not supported", {"best_of": 4}),
        (openai.BadRequestError, "stop strings", {"stop": [""]}),
        (openai.BadRequestError, "stop", {"stop": ["x"] * 17}),
        (openai.BadRequestError, "stop", {"stop": "x" * 257}),
        (openai.BadRequestError, "logit_bias", {"logit_bias": {"1": 1e39}}),
    ],
)
def test_errors_have_types(error: type[Exception], match: str, options: Any, complete: Callable[..., Any]) -> None:
    for stream in (False, True):
        with pytest.raises(error, match=match) as caught:
            complete(**{"stream": stream, **options})
        assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("messages", {"messages": []}),
        ("text only", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("not supported", {"response_format": {"type": "json_object"}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("must not contain messages", {"extra_body": {"chat_template_kwargs": {"messages": []}}}),
    ],
)
def test_chat_errors(match: str, options: Any, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=match):
        served.client.chat.completions.create(
            **{"model": MODEL, "messages": [{"role": "user", "content": "a"}], **options}
        )


MANY = 3000


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": ["a"] * MANY + [1]}),
        (CompletionRequest, {"prompt": [[1.5]] * MANY}),
        (CompletionRequest, {"prompt": [[1.5] * MANY]}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"{i}x": 1 for i in range(MANY)}}),
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [{}], "tools": [1] * MANY}),
        (TokenizeRequest, {"messages": [1] * MANY}),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ],
)
def test_a_bad_list_has_few_errors(schema: type[BaseModel], body: Any) -> None:
    """They are collected on the event loop, where a hundred thousand of them stop everybody."""
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    assert caught.value.error_count() <= 4


def test_null_is_the_same_as_nothing(served: Served) -> None:
    common = {"model": MODEL, "max_tokens": 3, "seed": 1}
    for path, needed, schema in (
        ("/v1/completions", {"prompt": "a"}, CompletionRequest),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, ChatRequest),
    ):
        nulls = dict.fromkeys([*schema.model_fields, "functions", "guided_json"])
        replies = [served.http("POST", path, {**extra, **common, **needed}) for extra in ({}, nulls)]
        assert [status for status, _ in replies] == [200, 200], replies
        assert replies[0][1]["choices"] == replies[1][1]["choices"]
        assert served.http("POST", path, {**common, **dict.fromkeys(needed)})[0] == 400


@pytest.mark.parametrize(
    "extra",
    [{"functions": [{}]}, {"guided_json": {}}, {"guided_regex": "a"}, {"min_tokens": 2}, {"use_beam_search": True}],
)
def test_what_would_change_the_answer_is_refused(extra: dict[str, Any], served: Served) -> None:
    status, reply = served.http("POST", "/v1/completions", {"prompt": "a", **extra})
    assert status == 400
    assert f"{next(iter(extra))} is not supported" in reply["error"]["message"]
    harmless = {"min_tokens": 0, "use_beam_search": False, "user": "x"}
    assert served.http("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, **harmless})[0] == 200


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "hot", [], None])
def test_odd_numbers(value: object, served: Served) -> None:
    status, reply = served.http("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": value})
    assert status == (200 if value is None else 400)
    assert value is None or "temperature" in reply["error"]["message"]


def test_a_model_without_a_tokenizer() -> None:
    with serving(HashBackend(contract()), tokenizer=None) as served:
        reply = served.client.completions.create(model=MODEL, prompt=[1, 2], max_tokens=3, temperature=0, logprobs=0)
        assert reply.choices[0].logprobs.tokens == [str(t) for t in expected([1, 2], 3)]
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            served.client.completions.create(model=MODEL, prompt="a")
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            served.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])


def test_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(HashBackend(contract()), api_key="secret", log_prompts=False) as served:
        for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/nowhere", 401)):
            head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            assert served.raw(head).startswith(f"HTTP/1.1 {status}".encode()), path
        wrong = served.client.with_options(api_key="secre")
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            wrong.completions.create(model=MODEL, prompt="a")
        assert served.engine.counts["accepted"] == 0
        served.client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    assert "secret" not in "".join(served.log)


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_are_not_logged_unless_asked(shown: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(HashBackend(contract()), log_prompts=shown) as served:
        served.client.completions.create(model=MODEL, prompt="zyx", max_tokens=1)
        with pytest.raises(openai.BadRequestError):
            served.client.completions.create(model=MODEL, prompt="zyx", temperature=-1)
    assert any("/v1/completions 200" in line for line in served.log)
    assert any("zyx" in line for line in served.log) == shown
    assert "zyx" not in "".join(capfd.readouterr())


def test_unknown_paths_and_methods(served: Served) -> None:
    for head, status in ((b"GET /x", 404), (b"GET /v1/completions", 405), (b"POST /v1/models", 405)):
        answer = served.raw(head + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        assert answer.startswith(f"HTTP/1.1 {status}".encode())
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"


def test_a_form_of_another_page_is_refused(served: Served) -> None:
    """Browsers send texts and forms to any address without asking it before."""
    before = served.engine.counts["accepted"]
    body = b'{"prompt": "a"}'
    for kind in (b"text/plain", b"application/x-www-form-urlencoded"):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: " + kind
        answer = served.raw(head + f"\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert answer.startswith(b"HTTP/1.1 400")
    assert served.engine.counts["accepted"] == before


def test_pages_of_other_origins(served: Served) -> None:
    preflight = (
        b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: https://a.example\r\n"
        b"Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n"
    )
    assert b"access-control-allow-origin" not in served.raw(preflight).lower()
    with serving(HashBackend(contract()), cors=("https://a.example",), api_key="k") as open_served:
        assert b"access-control-allow-origin: https://a.example" in open_served.raw(preflight).lower()
        assert b"allow-origin" not in open_served.raw(preflight.replace(b"a.example", b"b.example")).lower()


def test_a_full_queue() -> None:
    backend = GatedBackend()
    with serving(backend, rows=1, max_queue=1) as served, ThreadPoolExecutor() as pool:

        def ask(prompt: str) -> Any:
            return served.client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)

        waiting = [pool.submit(ask, p) for p in "ab"]
        served.until(lambda: served.engine.counts["accepted"] == 2)
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError, match="try again later") as caught:
                served.client.completions.create(model=MODEL, prompt="c", **options)
            assert caught.value.response.headers["retry-after"] == "1"
        # It is said before the body arrives.
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n"
        assert served.raw(head).startswith(b"HTTP/1.1 429")
        backend.gate.release(10**6)
        assert all(f.result(LONG).choices[0].finish_reason for f in waiting)
        assert ask("c").usage.completion_tokens <= 2


# ------------------------------------------------------------------ clients that leave, dawdle or flood


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_a_client_that_leaves_frees_its_row(when: str, stream: bool) -> None:
    backend = GatedBackend()
    with serving(backend, rows=1, piece=4) as served:
        body = {"prompt": [1] * 12, "max_tokens": 1000, "temperature": 0, "stream": stream, "ignore_eos": True}
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
        first = served.connect()
        first.sendall(request)
        assert backend.inside.wait(LONG)
        if when == "decode":
            for _ in range(4):
                backend.inside.clear()
                backend.gate.release()
                assert backend.inside.wait(LONG)
        second = None
        if when == "waiting":
            second = served.connect()
            second.sendall(request)
            served.until(lambda: served.engine.waiting == 1)
        leaver = second or first
        leaver.close()
        served.until(lambda: bool(served.engine._cancelled))
        steps = len(backend.calls)
        if when == "waiting":
            first.close()
            served.until(lambda: len(served.engine._cancelled) == 2)
        backend.gate.release()
        served.until(lambda: served.engine.running == 0 and served.engine.waiting == 0)
        assert len(backend.calls) <= steps + 1  # the one that was running


def head_without_end(served: Served, begun: threading.Event) -> None:
    with served.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-")
        begun.set()
        assert connection.recv(1000) == b""  # closed


def idle(served: Served, begun: threading.Event) -> None:
    connections = [served.connect() for _ in range(100)]
    begun.set()
    assert all(c.recv(1000) == b"" for c in connections)
    for connection in connections:
        connection.close()


def body_without_end(served: Served, begun: threading.Event) -> None:
    with served.connect() as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
        begun.set()
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def large_body(served: Served, begun: threading.Event) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{"
    for _ in range(20):
        assert served.raw(head).startswith(b"HTTP/1.1 413")
        begun.set()


def large_chunked_body(served: Served, begun: threading.Event) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with served.connect() as connection:
        connection.sendall(head)
        try:
            for _ in range(1600):  # 100 MB
                connection.sendall(chunk)
                begun.set()
            raise AssertionError("all of it was taken")
        except OSError:
            pass  # closed while sending


@pytest.mark.parametrize("attack", [head_without_end, idle, body_without_end, large_body, large_chunked_body])
def test_clients_that_attack_take_no_row(
    attack: Callable[[Served, threading.Event], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if attack in (head_without_end, idle):
        monkeypatch.setattr(serving_server, "HEAD_SECONDS", 2.0)
    limits = {"max_body": 1 << 20, "max_bodies": 1 << 22, "body_seconds": 2.0}
    monkeypatch.setattr(Gate.__init__, "__kwdefaults__", limits)
    begun = threading.Event()
    with serving(HashBackend(contract()), rows=1, max_queue=1) as served, ThreadPoolExecutor() as pool:
        attacker = pool.submit(attack, served, begun)
        assert begun.wait(LONG)
        client = served.client.with_options(max_retries=2)
        for _ in range(5):
            reply = client.completions.create(model=MODEL, prompt="a", max_tokens=3, temperature=0)
            assert reply.usage.prompt_tokens == 2
        attacker.result(2 * LONG)
        assert served.engine.counts["accepted"] == 5


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Gate.__init__, "__kwdefaults__", {"max_body": 1000, "max_bodies": 1000, "body_seconds": float(LONG)}
    )
    body = {"prompt": "a", "max_tokens": 1}
    with serving(HashBackend(contract())) as served:
        with served.connect() as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n" + b"x" * 990)
            served.until(lambda: served.http("POST", "/v1/completions", body)[0] == 429)
            assert served.http("POST", "/v1/completions", body)[1]["error"]["type"] == "rate_limit_error"
        served.until(lambda: served.http("POST", "/v1/completions", body)[0] == 200)
        for _ in range(40):  # those that have ended are not counted
            assert served.http("POST", "/v1/completions", body)[0] == 200


def test_a_request_that_takes_too_long() -> None:
    backend = GatedBackend()
    with serving(backend, timeout=0.3) as served:
        options = {"model": MODEL, "prompt": "a", "max_tokens": 9, "extra_body": {"ignore_eos": True}}
        with pytest.raises(openai.InternalServerError, match="took longer") as caught:
            served.client.completions.create(**options)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="took longer"):
            list(served.client.completions.create(stream=True, **options))
        backend.gate.release(10**6)
        served.until(lambda: served.engine.counts["cancelled"] == 2)
        assert served.engine.running == 0


def test_what_fails_in_a_stream_is_said_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HashBackend(contract())
    with serving(backend) as served:
        step = backend._step

        def failing(ids: Any, past: Any, new: Any, first: int) -> Any:
            if past[0] >= 5:
                raise RuntimeError("secret detail")
            return step(ids, past, new, first)

        monkeypatch.setattr(backend, "_step", failing)
        options = {"model": MODEL, "prompt": [1, 2], "max_tokens": 9, "temperature": 0}
        with pytest.raises(openai.APIError, match="internal error") as caught:
            list(served.client.completions.create(stream=True, extra_body={"ignore_eos": True}, **options))
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.InternalServerError):
            served.client.completions.create(extra_body={"ignore_eos": True}, **options)
        monkeypatch.setattr(backend, "_step", step)
        assert served.client.completions.create(**options).choices


def test_errors_that_nobody_expected(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They are answered and counted; what is logged does not hold the prompt."""

    def fail(prompt: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{prompt}")

    with serving(HashBackend(contract())) as served, caplog.at_level(logging.INFO):
        monkeypatch.setattr(served.engine, "sequence", fail)
        status, reply = served.http("POST", "/v1/completions", {"prompt": [1, 2, 3]})
        assert (status, reply["error"]["message"], reply["error"]["type"]) == (500, "internal error", "server_error")
        served.until(lambda: any("/v1/completions 500" in line for line in served.log))
    assert f"RuntimeError at {__file__}:" in caplog.text
    assert "[1, 2, 3]" not in caplog.text
    assert "Traceback" not in caplog.text


def test_the_error_of_a_stream_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not read cannot keep its request open after it has failed."""
    monkeypatch.setattr(serving_app, "_LAST_SECONDS", 0.01)

    class Failing:
        timeout = float(LONG)

        async def chunks(self, with_usage: bool) -> AsyncIterator[bytes]:
            raise UsageError("it failed")
            yield b""

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        stream = serving_app._EventStream(Failing(), False, contextlib.AsyncExitStack())  # type: ignore[arg-type]
        await asyncio.wait_for(stream({}, None, send), LONG)

    asyncio.run(run())


def test_options_do_not_show_the_key() -> None:
    options = ServerOptions(MODEL, api_key=" secret\n")
    assert options.api_key == "secret"
    assert "secret" not in repr(options)
    with pytest.raises(UsageError, match="the API key is empty"):
        ServerOptions(MODEL, api_key=" ")


def test_likely_tokens_with_the_same_text() -> None:
    """The likeliest of them is reported, and the chosen token always."""
    report = TokenLogprobs(-5.0, ((33, -1.0), (34, -2.0), (0, -3.0)))
    reply = Reply(MODEL, [], 1, letter_tokenizer())
    assert reply._top("b", report) == {"": -1.0, "a": -3.0, "b": -5.0}
    assert reply._top("a", report) == {"": -1.0, "a": -3.0}


# ------------------------------------------------------------------ the end


def test_draining() -> None:
    """New work is refused, and what was accepted is finished and read."""
    backend = GatedBackend()
    options = {"model": MODEL, "prompt": [1], "max_tokens": 4, "temperature": 0}
    with serving(backend) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(served.client.completions.create, extra_body={"ignore_eos": True}, **options)
        assert backend.inside.wait(LONG)
        served.server.end()
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        served.until(lambda: served.raw(head).startswith(b"HTTP/1.1 503"))
        with pytest.raises(openai.InternalServerError, match="takes no more work"):
            served.client.completions.create(**options)
        backend.gate.release(10**6)
        assert first.result(LONG).choices[0].finish_reason == "length"


def test_ending_needs_no_thread_of_the_requests() -> None:
    release, encoding = threading.Event(), threading.Semaphore(0)

    class SlowTokenizer(Tokenizer):
        def encode(self, text: str, *, special: bool = True) -> list[int]:
            encoding.release()
            assert release.wait(LONG)
            return [1]

    tokenizer = letter_tokenizer()
    tokenizer.__class__ = SlowTokenizer
    with serving(HashBackend(contract()), tokenizer=tokenizer) as served, ThreadPoolExecutor(40) as pool:
        workers = min(32, (os.cpu_count() or 1) + 4)  # of an event loop
        calls = [
            pool.submit(served.http, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
            for _ in range(workers)
        ]
        try:
            for _ in calls:
                assert encoding.acquire(timeout=LONG)
            served.server.end()
            served.engine._thread.join(10)
            ended = not served.engine._thread.is_alive()
        finally:
            release.set()
        assert ended
        assert {call.result(LONG)[0] for call in calls} == {503}


def test_an_end_before_the_beginning_is_not_lost() -> None:
    engine = Engine(Generator(HashBackend(contract()), letter_tokenizer()))
    listening = Listening(port=0)
    with listening.open() as opened:
        server = Server(engine, ServerOptions(MODEL), listening, opened)
        server.end()
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        thread.join(LONG)
        assert not thread.is_alive()
    assert not engine.accepts


def test_health_of_a_failed_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(HashBackend(contract())) as served:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert served.raw(head).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(served.engine._scheduler, "step", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            served.client.completions.create(model=MODEL, prompt="a")
        assert served.raw(head).startswith(b"HTTP/1.1 503")
        with pytest.raises(openai.InternalServerError, match="takes no more work") as caught:
            served.client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503
