"""Sessions of the server: states that go on without their prompts, and the folder that holds them."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from less_export.errors import UsageError
from less_export.runtime.backend import RowState
from less_export.serving import range_locks, session_files
from less_export.serving.conversations import continuation
from less_export.serving.sessions import BusySessionError, SessionStore

from .chat_templates import TEMPLATES
from .serving_support import LONG, MODEL, Served, ids, serving, text_of
from .test_generate import HashBackend, contract, expected, letter_tokenizer
from .test_service_engine import GatedBackend

pytest_plugins = ["tests.serving_support"]


def files(folder: Path) -> list[str]:
    """What is in a folder of sessions, beside the file of their locks."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".locks")


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
        assert len(files(tmp_path)) == 1


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
        assert files(store) == []


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
    assert [name[0] for name in files(tmp_path)] == ["2", "3", "n"]
    SessionStore(tmp_path, 1, lambda state: None).save("4" * 32, state)  # too large alone: it stays
    assert [name[0] for name in files(tmp_path)] == ["4", "n"]


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
    assert files(tmp_path) == [other.name]
    backend = HashBackend(contract())
    backend.open(1)
    store.save("b" * 32, backend.read_row(0))
    assert (tmp_path / f"{'b' * 32}.safetensors").stat().st_mode & 0o777 == 0o600
    assert store.load("b" * 32).length == 0

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(session_files.temporary, "file", refuse)
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

    monkeypatch.setattr(session_files, "replace", full)
    with serving(HashBackend(contract()), state_dir=tmp_path) as served:
        for stream in (False, True):
            options = {"max_tokens": 2, "stream": stream, "extra_body": {"session_id": "new"}}
            with pytest.raises(openai.APIError, match="could not save the session") as caught:
                list(served.client.completions.create(model=MODEL, prompt="a", **options))
            assert str(tmp_path) not in str(caught.value)
    assert files(tmp_path) == []


# ------------------------------------------------------------------ servers that share a folder


def test_a_session_is_busy_in_every_server_that_shares_the_folder(tmp_path: Path) -> None:
    """Two requests of one session at a time would each go on from the same state, and one answer would be lost."""
    backend = GatedBackend(free=True)
    with serving(backend, state_dir=tmp_path) as one, serving(HashBackend(contract()), state_dir=tmp_path) as other:

        def ask(served: Served, session: str, prompt: str) -> Any:
            extra = {"session_id": session, "ignore_eos": True}
            return served.client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=3, temperature=0, extra_body=extra
            )

        session = ask(one, "new", "a").session_id
        backend.gate = threading.Semaphore(0)
        backend.inside.clear()
        with ThreadPoolExecutor() as pool:
            first = pool.submit(ask, one, session, "b")
            assert backend.inside.wait(LONG)
            with pytest.raises(openai.ConflictError):
                ask(other, session, "c")
            assert ask(other, "new", "c").choices  # others are not
            backend.gate.release(10**6)
            first.result(LONG)
        history = [*ids(one, "a")]
        for prompt in ("b", "d"):
            history += expected(history, 3)
            history += one.tokenizer.encode(prompt, special=False)
        assert ask(other, session, "d").choices[0].text == text_of(one, history, 3)


HOLDER = """
import sys
from pathlib import Path
from less_export.serving.sessions import BusySessionError, SessionStore

store = SessionStore(Path(sys.argv[1]), 10**9, lambda state: None)
store.claim(sys.argv[2])
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_killed_server_has_no_sessions(tmp_path: Path) -> None:
    name, store = "3" * 32, SessionStore(tmp_path, 10**9, lambda state: None)
    argv = [sys.executable, "-c", HOLDER, str(tmp_path), name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(BusySessionError):
            store.claim(name)
        assert store.claim("4" * 32)
        other.kill()
        other.wait(LONG)
    assert store.claim(name) == name
    with pytest.raises(BusySessionError):
        store.claim(name)
    store.release(name)
    assert SessionStore(tmp_path, 10**9, lambda state: None).claim(name) == name
    assert files(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server then knows its own requests, and of two servers the latest one to save wins."""
    store = SessionStore(tmp_path, 10**9, lambda state: None)

    def unsupported(file: int, command: int, lock: bytes) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(range_locks.fcntl, "fcntl", unsupported)
    assert store.claim("5" * 32)
    with pytest.raises(BusySessionError):
        store.claim("5" * 32)
    store.release("5" * 32)
    assert store.claim("5" * 32)
