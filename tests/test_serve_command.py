"""``less-export serve`` as a process on 127.0.0.1, with OpenAI's client: a bundle, signals, a killed server."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import ssl
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from less_export import open_bundle
from less_export.cli.commands import COMMANDS
from less_export.runtime.row_state import RowState
from less_export.serving.server import environment_key

from .bundles import PROMPT, Run, refused
from .server_process import LONG, Process, process

pytest_plugins = ["tests.bundles"]
#: A certificate for 127.0.0.1 that signs itself, and its key.
TLS = Path(__file__).parent / "data" / "tls"


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


def turns(bundle: Path, prompts: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The answers of a session without a server, and the tokens that its state has seen after each.

    The steps are those of the server: the prompt's chunks, then each new token.
    """
    generator = open_bundle(bundle)
    state = None
    for prompt in prompts:
        (answer,) = generator.generate([prompt], prefix=state, max_new_tokens=6, ignore_eos=True)
        state = generator.prefill(prompt, prefix=state)
        for token in answer.token_ids:
            state = generator.prefill([token], prefix=state)
        yield answer.text, state.length


def take_turn(server: Process, session: str, prompt: str) -> Any:
    extra = {"session_id": session, "ignore_eos": True}
    return server.client.completions.create(
        model=server.name, prompt=prompt, max_tokens=6, temperature=0, extra_body=extra
    )


def test_a_killed_server_loses_no_session(plain: Path, tmp_path: Path) -> None:
    """Nor does its client send the conversation again; the key comes from the environment."""
    arguments, environment = ("--state-dir", tmp_path / "state"), {"LESS_EXPORT_API_KEY": "key"}
    with process(plain, *arguments, environment=environment) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="other").models.list()
        first = take_turn(server, "new", PROMPT)
        server.child.kill()
        server.child.wait(LONG)
    with process(plain, *arguments, environment=environment) as server:
        second = take_turn(server, first.session_id, " on the bank")
    want = [text for text, _ in turns(plain, (PROMPT, " on the bank"))]
    assert [reply.choices[0].text for reply in (first, second)] == want


def kill_in_a_save(server: Process, folder: Path) -> None:
    """Kill it while the file of a save is not complete."""

    def saves() -> bool:
        return any("less-export" in name for name in os.listdir(folder))

    while True:
        while not saves():
            assert server.child.poll() is None
        server.child.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(server.child.pid, os.WUNTRACED)[1])
        if saves():
            break
        server.child.send_signal(signal.SIGCONT)  # it was complete before the server stopped
    server.child.kill()


def kill_soon(server: Process, folder: Path) -> None:
    time.sleep(0.02)
    server.child.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_saves(plain: Path, tmp_path: Path) -> None:
    """The session goes on from the last answer that its client has, or from the one that was on its way."""
    folder, prompt = tmp_path / "state", " on the bank"
    coming, known = turns(plain, itertools.repeat(prompt)), []
    session, done = "new", 0  # turns that the state has seen

    def talk(server: Process, heard: list[str]) -> None:
        """Turn after turn, until the server is gone."""
        with contextlib.suppress(openai.APIConnectionError):
            while True:
                heard.append(take_turn(server, session, prompt).choices[0].text)

    for kill in (kill_in_a_save, kill_in_a_save, kill_soon, kill_in_a_save):
        with process(plain, "--state-dir", folder) as server, ThreadPoolExecutor() as pool:
            assert not [name for name in os.listdir(folder) if "less-export" in name]  # what the kill left
            first = take_turn(server, session, prompt)
            session, heard = first.session_id, [first.choices[0].text]
            talking = pool.submit(talk, server, heard)
            while len(heard) < 3 and not talking.done():
                time.sleep(0.001)
            kill(server, folder)
            talking.result(LONG)
        known += itertools.islice(coming, done + len(heard) + 1 - len(known))
        assert heard == [text for text, _ in known[done : done + len(heard)]]
        done += len(heard)
        length = RowState.load(folder / f"{session}.safetensors").length
        assert length in (known[done - 1][1], known[done][1])
        done += length == known[done][1]


def test_tls_a_template_and_another_origin(plain: Path, tmp_path: Path) -> None:
    """A client that knows the certificate gets the answer to the file's template; one that does not gets none."""
    template = "{% for m in messages %}Once upon a time, {{ m['content'] }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    generator, messages = open_bundle(plain), [{"role": "user", "content": "Alice"}]
    assert generator.tokenizer is not None
    own = generator.tokenizer.encode_chat(messages)
    generator.tokenizer.chat_template = template
    prompt = generator.tokenizer.encode_chat(messages)
    assert len(prompt) != len(own)
    (want,) = generator.generate([prompt], max_new_tokens=12)
    origin, files = "https://page.example", ("--ssl-certfile", TLS / "cert.pem", "--ssl-keyfile", TLS / "key.pem")
    with process(plain, *files, "--chat-template", tmp_path / "chat.jinja", "--cors", origin) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with pytest.raises(openai.APIConnectionError) as caught:
            server.client.models.list()
        assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value.__cause__)
        known = ssl.create_default_context(cafile=TLS / "cert.pem")
        with httpx2.Client(verify=known, timeout=LONG) as client:
            options: dict[str, Any] = {"model": plain.name, "messages": messages, "max_tokens": 12, "temperature": 0}
            chat = server.client.with_options(http_client=client).chat.completions.create(**options)
            assert (chat.choices[0].message.content, chat.usage.prompt_tokens) == (want.text, len(prompt))
            for page, allowed in ((origin, origin), ("https://other.example", None)):
                reply = client.get(f"{server.url}/models", headers={"Origin": page})
                assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (200, allowed)


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
