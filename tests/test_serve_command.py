"""``less-export serve`` as a process on 127.0.0.1, with OpenAI's client: a bundle, signals, a killed server."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from less_export import open_bundle
from less_export.cli.commands import COMMANDS
from less_export.serving.server import environment_key

from .bundles import PROMPT, Run, refused

pytest_plugins = ["tests.bundles"]
#: Seconds after which a test fails that waits for something.
LONG = 90


class Process:
    """A server process; ``url`` is that of its API."""

    def __init__(self, bundle: Path, *arguments: object, environment: dict[str, str] | None = None) -> None:
        argv = [sys.executable, "-m", "less_export", "serve", str(bundle), "--port", "0", "--threads", "1"]
        self.child = subprocess.Popen(
            [*argv, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._deadline = threading.Timer(LONG, self.child.kill)
        self._deadline.daemon = True
        self._deadline.start()
        assert self.child.stderr is not None
        self.lines: list[str] = []
        for line in self.child.stderr:
            self.lines.append(line)
            if match := re.search(r"serving (\S+) at (http\S+)", line):
                self.name, self.url = match.groups()
                break
        else:
            raise AssertionError("".join(self.lines))
        self.client = openai.OpenAI(base_url=self.url, api_key="key", max_retries=0, timeout=LONG)

    def health(self) -> int | None:
        """Status of /health; None if nobody listens."""
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=LONG)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self.child.wait(LONG)
        assert self.child.stderr is not None
        self.lines += self.child.stderr.readlines()
        return code

    def close(self) -> None:
        self._deadline.cancel()
        self.client.close()
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        assert self.child.stderr is not None
        self.child.stderr.close()


@contextlib.contextmanager
def process(bundle: Path, *arguments: object, **options: Any) -> Iterator[Process]:
    server = Process(bundle, *arguments, **options)
    try:
        yield server
    finally:
        server.close()


def test_serving_until_a_signal(plain: Path) -> None:
    """A bundle's answers are those of generate; SIGTERM finishes what runs, and ends with 0."""
    generator = open_bundle(plain)
    (want,) = generator.generate([PROMPT], max_new_tokens=12)
    messages = [{"role": "user", "content": "Alice"}]
    assert generator.tokenizer is not None
    (answer,) = generator.generate([generator.tokenizer.encode_chat(messages)], max_new_tokens=12)
    with process(plain, "--max-new-tokens", 5000, "--served-model-name", "tiny") as server:
        assert server.name == "tiny"
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
        assert server.client.completions.create(prompt=PROMPT, **options).choices[0].text == want.text
        chat = server.client.chat.completions.create(messages=messages, **options)
        assert chat.choices[0].message.content == answer.text
        assert server.health() == 200
        long = {**options, "max_tokens": 2500, "extra_body": {"ignore_eos": True}}
        stream = iter(server.client.completions.create(prompt=PROMPT, stream=True, **long))
        next(stream)
        server.child.send_signal(signal.SIGTERM)
        last = [chunk.choices[0].finish_reason for chunk in stream][-1]
        assert last == "length"
        assert server.wait() == 0
        assert "Alice" not in "".join(server.lines)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(plain: Path) -> None:
    """Requests that run are told; nobody waits for their end."""
    with process(plain, "--max-new-tokens", 10**6) as server:
        stream = iter(
            server.client.completions.create(
                model=plain.name, prompt=PROMPT, max_tokens=10**6, stream=True, extra_body={"ignore_eos": True}
            )
        )
        next(stream)
        server.child.send_signal(signal.SIGINT)
        while server.health() == 200:
            pass
        server.child.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(stream)
        assert server.wait() == 0


def test_a_killed_server_loses_no_session(plain: Path, tmp_path: Path) -> None:
    """Nor does its client send the conversation again; the key comes from the environment."""
    arguments, environment = ("--state-dir", tmp_path / "state"), {"LESS_EXPORT_API_KEY": "key"}
    generator = open_bundle(plain)
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    options: dict[str, Any] = {"model": plain.name, "max_tokens": 6, "temperature": 0}
    with process(plain, *arguments, environment=environment) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="other").models.list()
        extra = {"session_id": "new", "ignore_eos": True}
        first = server.client.completions.create(prompt=PROMPT, extra_body=extra, **options)
        server.child.kill()
        server.child.wait(LONG)
    with process(plain, *arguments, environment=environment) as server:
        extra = {"session_id": first.session_id, "ignore_eos": True}
        second = server.client.completions.create(prompt=" on the bank", extra_body=extra, **options)
    begin = generator.generate([PROMPT], max_new_tokens=6, ignore_eos=True)[0]
    assert begin.text == first.choices[0].text
    # The same steps without a server: the prompt's chunks, each new token, then the continuation's chunk.
    state = generator.prefill(PROMPT)
    for token in begin.token_ids:
        state = generator.prefill([token], prefix=state)
    (want,) = generator.generate([" on the bank"], prefix=state, max_new_tokens=6, ignore_eos=True)
    assert second.choices[0].text == want.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--ssl-certfile", "cert.pem"], "--ssl-certfile and --ssl-keyfile belong together"),
        (["--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem"], "cannot read cert.pem: no such file"),
        (["--chat-template", "none.jinja"], "none.jinja"),
        (["--max-rows", "3"], "1 to 2 rows"),
        (["--max-queue", "-1"], "max_queue must be at least 0"),
        (["--prefill-chunk", "17"], "1 to 16 tokens"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens must be more than 0"),
        (["--timeout", "0"], "--timeout must be more than 0"),
        (["--state-limit", "inf"], "--state-limit must be a number of GB, not inf"),
        (["--state-limit", "nan"], "--state-limit must be a number of GB, not nan"),
        (["--state-limit", "0"], "--state-limit must be more than 0"),
        (["--api-key", ""], "the API key is empty"),
        (["--state-dir", "taken"], "cannot make the folder taken"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--backend", "torch", "--threads", "1"], "--threads is for ONNX Runtime"),
    ],
)
def test_refusals(
    arguments: list[str], says: str, run: Run, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    refused(run("serve", plain, *(["--port", "0"] if "--port" not in arguments else []), *arguments), says)


def test_tls_files_that_are_none(run: Run, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("x")
    files = ["--ssl-certfile", tmp_path / "x.pem", "--ssl-keyfile", tmp_path / "x.pem"]
    refused(run("serve", plain, "--port", "0", *files), "cannot use the TLS files")


def test_the_extra_is_named(run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("less_export.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(run("serve", plain), "the server needs uvicorn: pip install 'less-export[serve]'")


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens on this machine only, keeps no sessions and logs nothing."""
    args = COMMANDS["serve"].parser().parse_args(["x"])
    assert (args.host, args.port, args.state_dir, args.log_prompts, args.log_requests) == (
        "127.0.0.1", 8000, None, False, False,
    )  # fmt: skip
    monkeypatch.setenv("LESS_EXPORT_API_KEY", "")
    assert environment_key() is None
