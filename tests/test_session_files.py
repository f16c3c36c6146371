"""Sessions in an object store, through fsspec's own store in memory."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import openai
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from less_export.errors import BackendError, UsageError
from less_export.runtime.backend import RowState
from less_export.serving.session_files import Folder, ObjectStore, session_files
from less_export.serving.sessions import NoSuchSessionError, SessionStore

from .serving_support import MODEL, Served, ids, serving, text_of
from .test_generate import HashBackend, contract, expected


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of the store in memory, which all of a process share."""
    place = f"memory://{uuid.uuid4().hex}"
    yield place
    store = fsspec.filesystem("memory")
    if store.exists(place):
        store.rm(place, recursive=True)


def _state() -> RowState:
    backend = HashBackend(contract())
    backend.open(1)
    return backend.read_row(0)


def _names(url: str) -> list[str]:
    store = fsspec.filesystem("memory")
    store.invalidate_cache()
    return sorted(Path(name).stem[0] for name in store.find(url))


def test_what_a_place_names(tmp_path: Path, url: str) -> None:
    """A folder has locks, however it is named."""
    assert isinstance(session_files(tmp_path), Folder)
    assert isinstance(session_files(str(tmp_path)), Folder)
    assert isinstance(session_files(url), ObjectStore)


def test_a_session_goes_on_in_another_server(url: str) -> None:
    def ask(served: Served, prompt: str, session: str) -> Any:
        extra = {"session_id": session, "ignore_eos": True}
        return served.client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=4, temperature=0, extra_body=extra
        )

    with serving(HashBackend(contract()), state_dir=url) as one:
        first = ask(one, "a", "new")
        history = [*ids(one, "a"), *expected(ids(one, "a"), 4)]
        with serving(HashBackend(contract()), state_dir=url) as other:
            second = ask(other, "b", first.session_id)
            history += other.tokenizer.encode("b", special=False)
            assert second.choices[0].text == text_of(other, history, 4)
        with pytest.raises(openai.NotFoundError, match="no such session"):
            ask(one, "b", "0" * 32)


def test_the_oldest_are_dropped(url: str) -> None:
    state, store = _state(), fsspec.filesystem("memory")
    store.pipe_file(f"{url}/notes.safetensors", b"not a session")
    size = len(state.content())
    sessions = SessionStore(url, 2 * size + 1, lambda state: None)
    for digit in "3120":
        sessions.save(digit * 32, state)
        time.sleep(0.01)
    assert _names(url) == ["0", "2", "n"]
    SessionStore(url, 1, lambda state: None).save("4" * 32, state)  # too large alone: it stays
    assert _names(url) == ["4", "n"]


def test_a_state_is_checked_when_it_is_loaded(url: str) -> None:
    store, sessions = fsspec.filesystem("memory"), SessionStore(url, 10**9, lambda state: None)
    sessions.save("a" * 32, _state())
    content = bytearray(store.cat_file(f"{url}/{'a' * 32}.safetensors"))
    content[-1] ^= 1
    store.pipe_file(f"{url}/{'b' * 32}.safetensors", bytes(content))
    assert sessions.load("a" * 32).length == 0
    for missing in "bc":
        with pytest.raises(NoSuchSessionError, match="no such session of this model"):
            sessions.load(missing * 32)


def test_what_the_store_refuses(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sessions = SessionStore(url, 1, lambda state: None)
    sessions.save("a" * 32, _state())

    class RefusedError(Exception):
        """Of a store's own kind."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise RefusedError("over quota\nsecond line")

    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    sessions.save("a" * 32, _state())
    assert "cannot list the sessions: over quota" in caplog.text
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(BackendError, match="could not save the session"):
        sessions.save("a" * 32, _state())
    with pytest.raises(UsageError, match=rf"cannot write to {url}: over quota second line"):
        SessionStore(url, 1, lambda state: None)
    with pytest.raises(UsageError, match=r"cannot write to nostore://x: .*nostore"):
        SessionStore("nostore://x", 1, lambda state: None)
