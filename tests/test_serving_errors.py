"""What the server refuses, and how it says so."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ValidationError

from less_export.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

from .serving_support import LONG, MODEL, Endpoint, Served, serving
from .test_generate import HashBackend, contract, expected
from .test_service_engine import GatedBackend

pytest_plugins = ["tests.serving_support"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (openai.NotFoundError, "model 'gpt-4' does not exist", {"model": "gpt-4"}),
        (openai.BadRequestError, "tokens, and this server takes 50", {"prompt": "x" * 51}),
        (openai.BadRequestError, "characters, which are more than the 50 tokens", {"prompt": "a" * 201}),
        (openai.BadRequestError, "max_tokens is 61", {"max_tokens": 61}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 0}),
        (openai.BadRequestError, "temperature", {"temperature": -1}),
        (openai.BadRequestError, "top_p", {"top_p": 2}),
        (openai.BadRequestError, "100 answers .* are more than the 67", {"n": 100}),
        (openai.BadRequestError, "logit_bias", {"logit_bias": {"99": 1}}),
        (openai.BadRequestError, "logit_bias", {"logit_bias": {"1": 1e39}}),
        (openai.BadRequestError, "stop strings", {"stop": [""]}),
        (openai.BadRequestError, "stop", {"stop": ["x"] * 17}),
        (openai.BadRequestError, "stop", {"stop": "x" * 257}),
    ],
)
def test_errors_have_types(error: type[Exception], match: str, options: Any, stream: bool, ask: Endpoint) -> None:
    refuse(error, match, ask, stream, options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("a prompt is empty", {"prompt": ""}),
        ("a prompt is empty", {"prompt": []}),
        ("prompt", {"prompt": [[1.5]]}),
        (r"0\.\.39", {"prompt": [40]}),
        ("51 tokens, and this server takes 50", {"prompt": [1] * 51}),
        ("100000 answers", {"prompt": ["a"] * 100_000}),
        ("not supported", {"echo": True}),
        ("not supported", {"best_of": 4}),
    ],
)
def test_completion_errors(match: str, options: Any, stream: bool, complete: Endpoint) -> None:
    refuse(openai.BadRequestError, match, complete, stream, options)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("messages", {"messages": []}),
        ("text only", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("must not contain messages", {"extra_body": {"chat_template_kwargs": {"messages": []}}}),
    ],
)
def test_chat_errors(match: str, options: Any, served: Served) -> None:
    refuse(openai.BadRequestError, match, Endpoint(served, chat=True), False, options)


def refuse(error: type[Exception], match: str, ask: Endpoint, stream: bool, options: dict[str, Any]) -> None:
    """Assert that a request is the client's fault, and that no stream begins."""
    with pytest.raises(error, match=match) as caught:
        ask(**{"stream": stream, **options})
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[attr-defined]


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
        nulls = dict.fromkeys([*schema.model_fields, "functions", "structured_outputs"])
        replies = [served.http("POST", path, {**extra, **common, **needed}) for extra in ({}, nulls)]
        assert [status for status, _ in replies] == [200, 200], replies
        assert replies[0][1]["choices"] == replies[1][1]["choices"]
        assert served.http("POST", path, {**common, **dict.fromkeys(needed)})[0] == 400


@pytest.mark.parametrize(
    "extra",
    [{"functions": [{}]}, {"structured_outputs": {}}, {"min_tokens": 2}, {"use_beam_search": True}],
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
        # It is said if the body does not arrive, and not lost where one does: a connection that closes with data
        # unread is reset.
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        for length, sent in ((90, 0), (1_000_000, 1_000_000)):
            answer = served.raw(head % length + b" " * sent)
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"try again later" in answer
        backend.gate.release(10**6)
        assert all(f.result(LONG).choices[0].finish_reason for f in waiting)
        assert ask("c").usage.completion_tokens <= 2
