"""Clients of the server that leave, dawdle or flood, failures on the way, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from less_export.errors import UsageError
from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generator
from less_export.runtime.sampler import TokenLogprobs
from less_export.runtime.tokenizer import Tokenizer
from less_export.serving import runs
from less_export.serving import server as serving_server
from less_export.serving.gate import Gate
from less_export.serving.options import ServerOptions
from less_export.serving.replies import Reply
from less_export.serving.server import Listening, Server

from .scheduling import RAISES, SPOILS, FaultyBackend
from .serving_support import LONG, MODEL, Served, serving, text_of
from .test_generate import HashBackend, contract, letter_tokenizer
from .test_service_engine import GatedBackend

pytest_plugins = ["tests.serving_support"]


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


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of five hundred connections are files of this process: more than shells allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def idle(served: Served, begun: threading.Event) -> None:
    connections = [served.connect() for _ in range(500)]
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


@pytest.mark.usefixtures("many_files")
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
        for _ in range(5):
            reply = served.client.completions.create(model=MODEL, prompt="a", max_tokens=3, temperature=0)
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


class GatedFaults(GatedBackend, FaultyBackend):
    """Steps that wait for the test, and fail at bad tokens."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("bad", "message", "touched"), [(SPOILS, "nan logits", {1}), (RAISES, "out of something", {0, 1})]
)
def test_a_step_that_fails_ends_what_it_touches(bad: int, message: str, touched: set[int], stream: bool) -> None:
    """Of four requests the second takes a bad token: the first decodes in the step that fails, the others wait."""
    backend, prompts = GatedFaults(), [[1, 2], [3, 1], [5] * 12, [4]]
    with serving(backend, rows=3, piece=4) as served, ThreadPoolExecutor() as pool:

        def ask(index: int) -> str:
            reply = served.client.completions.create(
                model=MODEL, prompt=prompts[index], max_tokens=6, temperature=0, stream=stream,
                logit_bias={str(bad): 100} if index == 1 else None, extra_body={"ignore_eos": True},
            )  # fmt: skip
            return "".join(c.choices[0].text for c in (reply if stream else [reply]))

        asked = []
        for index in range(len(prompts)):
            asked.append(pool.submit(ask, index))
            served.until(lambda: served.engine.counts["accepted"] == len(asked))
        backend.gate.release(10**6)
        for index, answer in enumerate(asked):
            if index in touched:
                with pytest.raises(openai.APIError, match=message):
                    answer.result(LONG)
            else:
                assert answer.result(LONG) == text_of(served, prompts[index], 6)
        counts = served.engine.counts
        assert (counts["failed"], counts["finished_length"]) == (len(touched), len(prompts) - len(touched))
        assert ask(0) == text_of(served, prompts[0], 6)


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
    monkeypatch.setattr(runs, "_LAST_SECONDS", 0.01)

    class Failing:
        timeout = float(LONG)

        async def chunks(self, with_usage: bool) -> AsyncIterator[bytes]:
            raise UsageError("it failed")
            yield b""

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        stream = runs.EventStream(Failing(), False, contextlib.AsyncExitStack())  # type: ignore[arg-type]
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
