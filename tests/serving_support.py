"""A server in a thread of the test, on 127.0.0.1, over the backend whose tokens are known."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generator
from less_export.runtime.tokenizer import Tokenizer
from less_export.serving.options import ServerOptions
from less_export.serving.server import Listening, Server

from .test_generate import HashBackend, contract, expected, letter_tokenizer

MODEL, PROMPT = "letters", "abcde"
#: Seconds after which a test fails that waits for something.
LONG = 60
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}.{% endfor %}"
    "{% if tools %}z{% endif %}{% if add_generation_prompt %}a{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server: an OpenAI client for it, and its parts."""

    client: openai.OpenAI
    engine: Engine
    backend: HashBackend
    port: int
    tokenizer: Tokenizer
    log: list[str]
    server: Server

    def http(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        result = reply.status, json.loads(reply.read())
        connection.close()
        return result

    def raw(self, data: bytes, read: bool = True) -> bytes:
        """What the server answers to these bytes until it closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            answer = b""
            while read and (piece := connection.recv(65536)):
                answer += piece
            return answer

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def until(self, condition: Any) -> None:
        """Wait for a state of the engine."""
        for _ in range(100 * LONG):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it did not happen")


def chat_tokenizer() -> Tokenizer:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@contextlib.contextmanager
def serving(backend: HashBackend, **options: Any) -> Iterator[Served]:
    """Serve ``backend``; ``rows``, ``piece`` and ``max_queue`` go to the engine, the rest to the server."""
    tokenizer = options.pop("tokenizer", chat_tokenizer())
    sizes = {n: options.pop(n) for n in ("rows", "piece", "max_queue") if n in options}
    engine = Engine(Generator(backend, tokenizer), **sizes)
    listening = Listening(port=0)
    log: list[str] = []
    opened = listening.open()
    server = Server(engine, ServerOptions(MODEL, **options), listening, opened, log.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    key = options.get("api_key") or "none"
    client = openai.OpenAI(base_url=listening.url(opened), api_key=key, max_retries=0, timeout=LONG)
    served = Served(client, engine, backend, opened.getsockname()[1], tokenizer, log, server)
    try:
        client.models.list()  # it has started
        yield served
    finally:
        client.close()
        gate = getattr(backend, "gate", None)
        if gate is not None:
            gate.release(10**6)
        server.end()
        thread.join(LONG)
        opened.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(HashBackend(contract()), max_new_tokens=60, max_prompt_tokens=50) as server:
        yield server


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Completions or chats, for tests of what both have: greedy answers that ignore eos, unless told otherwise."""

    served: Served
    chat: bool

    def __call__(
        self, prompt: Any = PROMPT, max_tokens: int = 8, extra: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        client = self.served.client
        create = client.chat.completions.create if self.chat else client.completions.create
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        defaults = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True, **(extra or {})}}
        return create(max_tokens=max_tokens, **{**asked, **defaults, **options})

    def prompt_ids(self, prompt: str = PROMPT) -> list[int]:
        """The tokens that the model sees."""
        if self.chat:
            return self.served.tokenizer.encode(f"<s>u{prompt}.a", special=False)
        return ids(self.served, prompt)

    def text(self, choice: Any) -> str:
        """The text of a choice, or of its piece in a stream."""
        if not self.chat:
            return str(choice.text)
        return str((choice.delta if hasattr(choice, "delta") else choice.message).content or "")


@pytest.fixture
def complete(served: Served) -> Endpoint:
    """Completions."""
    return Endpoint(served, chat=False)


@pytest.fixture(params=[False, True], ids=["completions", "chat"])
def ask(served: Served, request: pytest.FixtureRequest) -> Endpoint:
    """Completions, then chats."""
    return Endpoint(served, request.param)


def text_of(served: Served, prompt: list[int], count: int) -> str:
    return served.tokenizer.decode(expected(prompt, count))


def ids(served: Served, text: str) -> list[int]:
    return served.tokenizer.encode(text)
