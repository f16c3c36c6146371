"""What a state holds of its text: the data, the file that shows them, and the files of the page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export import open_bundle
from less_export.runtime.tokenizer import Tokenizer
from less_export.view import pages
from less_export.view.occupancy import Occupancy, Pieces, view

from . import bundles
from .bundles import PROMPT, Run, refused
from .test_generate import HashBackend, contract

pytest_plugins = ["tests.bundles"]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 \"'"


class Parsed(HTMLParser):
    """The elements of a document, the contents of scripts and styles, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.contents.append((self._inside, data))

    def content(self, tag: str) -> list[str]:
        return [data for name, data in self.contents if name == tag]


@pytest.fixture(scope="module")
def opened(kernelled: Path) -> Any:
    return open_bundle(kernelled, "ort")


@pytest.fixture(scope="module")
def seen(opened: Any) -> tuple[Occupancy, list[int]]:
    ids = opened.tokenizer.encode(PROMPT)
    opened.prefill(ids)
    return Occupancy.read(opened.backend, 0), ids


# ------------------------------------------------------------------ the data


def test_fields_of_a_row_are_those_of_its_state(opened: Any, seen: Any) -> None:
    """In ONNX Runtime, which copies no others, and in a backend that knows whole states only."""
    plain = HashBackend(contract())
    plain.open(2)
    plain.step([[1, 2], [3, 4]])
    for backend, row in ((opened.backend, 0), (plain, 1)):
        state = backend.read_row(row).tensors
        layers = backend.read_fields(row, ("position", "z"))
        assert len(layers) == len(backend.contract.layers)
        for index, layer in enumerate(layers):
            assert layer.keys() == {"position", "z"}
            for name, x in layer.items():
                np.testing.assert_array_equal(x, state[f"past.{index}.{name}"])


def test_data_of_a_view(opened: Any, seen: tuple[Occupancy, list[int]]) -> None:
    occupancy, ids = seen
    shape = opened.backend.contract
    state = opened.backend.read_row(0).tensors
    texts = [str(i) for i in ids]
    data = view(occupancy, shape, texts, layers=[1])
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["tokens"], data["first"], data["length"]) == (texts, 0, len(ids))
    assert data["state_bytes"] == sum(x.nbytes for x in state.values())
    assert data["full_bytes"] == shape.full_cache_bytes(len(ids))
    positions = [[state[f"past.{i}.position"][h] for h in range(2)] for i in range(2)]
    assert data["pairs"] == 4
    for place in range(len(ids)):
        assert data["held"][place] == sum(place in p for layer in positions for p in layer)
    assert 0 < sum(data["held"]) < 4 * len(ids)  # some were evicted
    for index, layer in enumerate(data["layers"]):
        assert (layer["policy"], layer["slots"], layer["absorbs"]) == ("h2o", 12, True)
        for head, facts in enumerate(layer["heads"]):
            taken = {int(p) for p in positions[index][head] if p >= 0}
            assert facts["held"] == len(taken)
            assert facts["mass"] == pytest.approx(state[f"past.{index}.z"][head].sum(), rel=1e-3)
            assert facts["mass"] > 0
            if index == 0:  # was not asked for
                assert facts["positions"] is facts["scores"] is None
                continue
            assert facts["positions"] == sorted(taken)
            scores = dict(zip(positions[index][head].tolist(), state[f"past.{index}.score"][head], strict=True))
            assert facts["scores"] == pytest.approx([scores[p] for p in facts["positions"]], rel=1e-3)


def test_a_text_whose_beginning_is_not_known(opened: Any, seen: tuple[Occupancy, list[int]]) -> None:
    occupancy, ids = seen
    whole, first = view(occupancy, opened.backend.contract, [str(i) for i in ids]), 9
    rest = view(occupancy, opened.backend.contract, [str(i) for i in ids[first:]], first=first)
    assert rest["tokens"] == whole["tokens"][first:]
    assert rest["held"] == whole["held"][first:]
    assert rest["held_before"] == sum(whole["held"][:first]) > 0


def test_an_empty_row() -> None:
    backend = HashBackend(contract())
    backend.open(1)
    data = view(Occupancy.read(backend, 0), backend.contract, [])
    assert (data["length"], data["held"], data["full_bytes"]) == (0, [], 0)
    assert data["layers"][0]["heads"] == [{"held": 0, "mass": 0.0, "positions": None, "scores": None}]


def test_pieces() -> None:
    tokenizer = Tokenizer(bundles.tokenizer().backend_tokenizer, bos_id=0, eos_ids=(1,), add_bos=True)
    text = "Alice \u00e9\U0001f600 a cat"
    ids = tokenizer.encode(text)
    pieces = Pieces(tokenizer)
    for token_id in ids:  # at any division
        pieces.extend([token_id])
    assert len(pieces.texts) == len(ids)
    assert pieces.texts[0] == "<s>"
    assert "".join(pieces.texts[1:]) == text
    assert "" in pieces.texts  # inside of a character
    bare = Pieces(None)
    bare.extend([5, 6])
    assert bare.texts == ["5 ", "6 "]


# ------------------------------------------------------------------ the file


def test_document(opened: Any, seen: tuple[Occupancy, list[int]]) -> None:
    """Its policy names its scripts and its style, which is all that a browser runs; texts are data."""
    occupancy, ids = seen
    data = view(occupancy, opened.backend.contract, [HOSTILE for _ in ids], layers=[0, 1])
    source = pages.document(data, f"{HOSTILE} title")
    parsed = Parsed(source)
    assert [tag for tag, _ in parsed.elements].count("script") == 3
    assert "img" not in dict(parsed.elements)
    facts, *code = parsed.content("script")
    assert json.loads(facts) == data
    assert "".join(parsed.content("title")).strip() == f"{HOSTILE} title"
    attributes = next(a for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a)
    policy = dict(p.strip().split(" ", 1) for p in str(attributes["content"]).split(";"))
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in code]
    assert policy["default-src"] == "'none'"
    assert policy["script-src"].split() == hashes
    (style,) = parsed.content("style")
    assert policy["style-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"


def test_inspect(kernelled: Path, run: Run, tmp_path: Path) -> None:
    text, page = tmp_path / "a <b>.txt", tmp_path / "x.html"
    text.write_text(PROMPT + HOSTILE, encoding="utf-8")
    result = run("inspect", kernelled, "--backend", "ort", "--prompt-file", text, "--html", page)
    assert result.code == 0, result.err
    parsed = Parsed(page.read_text(encoding="utf-8"))
    data = json.loads(parsed.content("script")[0])
    assert "".join(data["tokens"]).endswith(PROMPT + HOSTILE)
    assert all(h["positions"] for layer in data["layers"] for h in layer["heads"])
    kept = sum(n > 0 for n in data["held"])
    assert result.out.startswith(f"{page}: {kept} of {data['length']} tokens have a slot")
    assert "".join(parsed.content("title")) == f"{kernelled.name}: what the state holds of a <b>.txt"


@pytest.mark.parametrize(
    ("text", "html", "says"),
    [("absent", "x.html", "cannot read"), ("empty", "x.html", "empty"), ("text", "no/x.html", "cannot write")],
)
def test_inspect_refuses(text: str, html: str, says: str, plain: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a cat")
    (tmp_path / "empty").write_text("")
    result = run("inspect", plain, "--prompt-file", tmp_path / text, "--html", tmp_path / html)
    refused(result, says)
    assert not (tmp_path / html).exists()


# ------------------------------------------------------------------ the page's files


@pytest.mark.parametrize("name", [name for name, _ in pages.FILES.values()])
def test_files_load_nothing_else_and_make_no_markup_of_texts(name: str) -> None:
    source = pages.read(name).decode()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", source)
    banned = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|\bon[a-z]+=|\bstyle=|srcdoc"
    assert not re.search(banned, source)


def test_the_page_loads_its_own_files_only() -> None:
    parsed = Parsed(pages.read("chat.html").decode())
    loaded = {f"/{a[k]}" for _, a in parsed.elements for k in ("src", "href") if k in a}
    assert loaded == pages.FILES.keys() - {"/"}
    assert not any(name.startswith("on") or name == "style" for _, a in parsed.elements for name in a)
    assert parsed.content("script") == parsed.content("style") == []
    ids = {str(a["id"]) for _, a in parsed.elements if "id" in a}
    assert set(re.findall(r'\bat\("(\w+)"\)', pages.read("chat.js").decode())) <= ids


def test_a_script_can_be_inside_of_a_document() -> None:
    code = pages.read("view.js").decode().lower()
    assert "</script" not in code
    assert "<!--" not in code
