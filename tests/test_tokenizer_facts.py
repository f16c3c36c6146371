"""Facts of tokenizers outside their vocabulary, from checkpoint to bundle, and tokenizers that are not trusted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, processors
from transformers import AutoTokenizer

from less_export.bundle import artifact
from less_export.bundle.artifact import Bundle, Manifest
from less_export.errors import BundleError, LessExportError, UsageError
from less_export.runtime import tokenizer as runtime_tokenizer
from less_export.runtime.generate import Generator
from less_export.runtime.open import load_backend, load_generator, load_tokenizer
from less_export.runtime.tokenizer import Tokenizer

from . import bundles
from .bundles import edit_json

pytest_plugins = ["tests.bundles"]

TEXT = "Alice was tired of sitting by the bank, once upon a time"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return bundles.copy(source, tmp_path / "mine")


def exported(folder: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer of a bundle of ``folder``, and transformers' of the same folder."""
    out = bundles.bundle(folder, folder.parent / "out", policy="full", context=32, num_hidden_layers=1)
    tokenizer = load_tokenizer(Bundle.open(out))
    assert tokenizer is not None
    return tokenizer, AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------ as in transformers


@pytest.mark.usefixtures("quick")
def test_truncation_and_padding_are_switched_off(mine: Path) -> None:
    stored = tokenizers.Tokenizer.from_file(str(mine / "tokenizer.json"))
    stored.enable_truncation(5)
    stored.enable_padding(length=64)
    stored.save(str(mine / "tokenizer.json"))
    ours, theirs = exported(mine)
    assert len(ours.encode(TEXT)) > 5
    for text in (TEXT, "", "a"):
        assert ours.encode(text) == theirs(text).input_ids
    again = Tokenizer(mine / "tokenizer.json")
    assert again.encode(TEXT) == ours.encode(TEXT)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_may_be_split(split: bool, mine: Path) -> None:
    edit_json(mine / "tokenizer_config.json", split_special_tokens=split)
    ours, theirs = exported(mine)
    for text in ("a</s> b", "<s>", "x <s><s>"):
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.encode("</s>", special=False) == [1]) != split


@pytest.mark.usefixtures("quick")
def test_special_tokens_are_variables_of_templates(mine: Path) -> None:
    names = {"turn_token": "<|turn|>", "end_token": "<|end|>"}
    template = "{{ bos_token }}{{ turn_token }}{{ messages[0].content }}{{ end_token }}{{ pad_token }}{{ unk_token }}|"
    template += "{{ eos_token is defined }}{{ sep_token is defined }}"
    (mine / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(mine / "tokenizer_config.json", extra_special_tokens=names, pad_token="</s>", chat_template=template)
    ours, theirs = exported(mine)
    want = theirs.apply_chat_template(USER, tokenize=False)
    assert want.startswith("<s><|turn|>hi<|end|></s>|")
    assert ours.chat(USER, add_generation_prompt=False) == want
    assert ours.chat(USER, turn_token="T").startswith("<s>Thi")
    assert ours.encode_chat(USER) == theirs.apply_chat_template(USER, return_dict=False)


@pytest.mark.usefixtures("quick")
def test_named_chat_templates(mine: Path) -> None:
    named = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools }}", "rag": "R{{ documents }}"}
    (mine / "chat_template.jinja").unlink(missing_ok=True)
    listed = [{"name": n, "template": t} for n, t in named.items()]
    edit_json(mine / "tokenizer_config.json", chat_template=listed)
    ours, theirs = exported(mine)
    for options in ({}, {"tools": [{"a": 1}]}, {"tools": []}, {"chat_template": "rag"}, {"chat_template": "tool_use"}):
        want = theirs.apply_chat_template(USER, tokenize=False, **{"tools": None, **options})
        assert ours.chat(USER, **options) == want
    with pytest.raises(UsageError, match="no chat template 'x': choose one of default, rag, tool_use"):
        ours.chat(USER, chat_template="x")


def words(**facts: Any) -> Tokenizer:
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    raw.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(raw, **{"bos_id": 8, "eos_ids": (9,), **facts})


def test_templates_without_a_default() -> None:
    tokenizer = words(chat_template={"tool_use": "T", "a\x1b": "A"})
    assert tokenizer.chat(USER, tools=[{}]) == "T"
    with pytest.raises(UsageError, match="no chat template 'default': choose one of") as caught:
        tokenizer.chat(USER)
    assert str(caught.value).isprintable()
    assert words(chat_template="S").chat(USER, chat_template="default") == "S"
    with pytest.raises(UsageError, match="choose one of default"):
        words(chat_template="S").chat(USER, chat_template="tool_use")
    with pytest.raises(UsageError, match="has no chat template"):
        words().chat(USER)


@pytest.mark.parametrize("tools", ["x", {"a": 1}, [lambda: 1], 3, ["x"]])
def test_tools_that_are_no_schemas(tools: Any) -> None:
    with pytest.raises(UsageError, match="tools must be a list of JSON schemas"):
        words(chat_template="S").chat(USER, tools=tools)


@pytest.mark.parametrize("messages", ["hi", {"role": "user", "content": "hi"}])
def test_one_message_is_no_conversation(messages: Any) -> None:
    with pytest.raises(UsageError, match="messages must be a list"):
        words(chat_template="S").chat(messages)


def test_manifests_without_these_facts(plain: Path) -> None:
    """Those of earlier versions know the ids of bos and eos only."""
    data = json.loads((plain / "manifest.json").read_text())
    for name in ("special_tokens", "split_special_tokens"):
        del data["tokenizer"][name]
    data.pop("manifest_sha256")
    text = json.dumps({"manifest_sha256": artifact._digest(data), **data}).encode()
    facts = Manifest.parse(text, "m").tokenizer
    assert facts is not None
    assert (facts.special_tokens, facts.split_special_tokens) == (None, False)
    assert words().special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert words(special_tokens={"pad_token": "p"}).special_tokens == {"pad_token": "p"}


# ------------------------------------------------------------------ eos without a tokenizer


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "generation", ['{"eos_token_id": [5, 7, 5]}', "null", "[]", "3", "{", '{"eos_token_id": "x"}', ""]
)
def test_eos_ids_of_a_model_without_tokenizer(generation: str, mine: Path, run: bundles.Run) -> None:
    for file in mine.glob("*token*"):
        file.unlink()
    edit_json(mine / "config.json", eos_token_id=3)
    (mine / "generation_config.json").write_text(generation)
    with pytest.warns(UserWarning, match="no tokenizer"):
        out = bundles.bundle(mine, mine.parent / "out", policy="full", context=32, num_hidden_layers=1)
    opened = Bundle.open(out)
    want = (3, 5, 7) if "[5" in generation else (3,)
    assert opened.manifest.tokenizer is None
    assert opened.manifest.settings["eos_ids"] == list(want)
    generator = load_generator(opened, load_backend(opened))
    assert generator.eos_ids == set(want)
    # One of them ends a text, in Python and on the command line.
    ids = [10, 11, 12]
    tokens = generator.generate([ids], max_new_tokens=8, ignore_eos=True)[0].token_ids
    generator = Generator(generator.backend, eos_ids=[tokens[2]])
    (ended,) = generator.generate([ids], max_new_tokens=8)
    assert (ended.token_ids, ended.finish_reason) == (tokens[: tokens.index(tokens[2]) + 1], "eos")
    eos = list(tokens[2:3])
    bundles.resign(out, lambda m: _with_settings(m, eos_ids=eos))
    result = run("generate", out, "--token-ids", "10,11,12", "--max-new-tokens", 8)
    assert result.out.strip() == ",".join(map(str, ended.token_ids))


def _with_settings(manifest: Manifest, **settings: Any) -> Manifest:
    return dataclasses.replace(manifest, settings={**manifest.settings, **settings})


def test_bundles_of_earlier_versions_have_the_configs(plain: Path) -> None:
    manifest = Bundle.open(plain).manifest

    def eos(config: Any, **settings: Any) -> tuple[int, ...]:
        return dataclasses.replace(manifest, tokenizer=None, model={"config": config}, settings=settings).eos_ids()

    assert eos({"eos_token_id": 3}) == (3,)
    assert eos({"eos_token_id": [3, 4]}) == (3, 4)
    assert eos({"eos_token_id": 3, "text_config": {"eos_token_id": 9}}) == (9,)
    assert eos({"eos_token_id": None}) == eos({}) == eos({"eos_token_id": True}) == ()
    assert eos({"eos_token_id": 3}, eos_ids=[1]) == (1,)
    assert eos({"eos_token_id": 3}, eos_ids="x") == ()
    assert manifest.tokenizer is not None
    assert manifest.eos_ids() == manifest.tokenizer.eos_ids


# ------------------------------------------------------------------ not trusted


def damaged(**parts: Any) -> dict[str, Any]:
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    raw.add_special_tokens(["<s>"])
    state: dict[str, Any] = json.loads(raw.to_str())
    state["model"] |= parts.pop("model", {})
    return {**state, **parts}


def template(pieces: list[dict[str, Any]], ids: int = 1) -> dict[str, Any]:
    special = {"<s>": {"id": "<s>", "ids": [8] * ids, "tokens": ["<s>"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


UNKNOWN = {"SpecialToken": {"id": "<q>", "type_id": 0}}
BOS, TEXT_PIECE = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
UNTRUSTED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "millions of ids": (lambda: damaged(post_processor=template([BOS, TEXT_PIECE], 1_000_000)), "adds 1,000,000"),
    "many special tokens": (lambda: damaged(post_processor=template([BOS] * 1000)), "adds 1,000 tokens"),
    "the text many times": (lambda: damaged(post_processor=template([TEXT_PIECE] * 5000)), "5,000 tokens of one"),
    "a long prefix": (lambda: damaged(normalizer={"type": "Prepend", "prepend": "a" * 5000}), "replaces a character"),
    "replacements": (
        lambda: damaged(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 30,
            }
        ),
        "replaces a character by",
    ),
    "a long decoding": (
        lambda: damaged(decoder={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}),
        "replaces a character by",
    ),
    "a panic in the file": (lambda: damaged(model={"merges": [["a", "b"]]}), "it is damaged"),
    "a panic at a text": (lambda: damaged(post_processor=template([UNKNOWN])), "damaged"),
    "deep": (lambda: json.loads("[" * 900 + "]" * 900), "cannot read"),
    "no object": (lambda: json.loads("3"), "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRUSTED)
def test_tokenizers_that_are_not_trusted(name: str, tmp_path: Path) -> None:
    make, why = UNTRUSTED[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(make()))
    with pytest.raises(BundleError, match=r"cannot read the tokenizer .*tokenizer.json: ") as caught:
        Tokenizer(tmp_path / "tokenizer.json")
    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_panic_leaves_nothing_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged(model={"merges": [["a", "b"]]})))
    code = (
        "import sys, os\n"
        "from less_export.errors import BundleError\n"
        "from less_export.runtime import tokenizer\n"
        "read = tokenizer._read\n"
        "def reads(path):\n"
        "    if path.name != 'tokenizer.json': os.write(2, b'of another thread')\n"
        "    return read(path)\n"
        "tokenizer._read = reads\n"
        "for name in ('tokenizer.json', 'absent'):\n"
        "    try: tokenizer.Tokenizer(name)\n"
        "    except BundleError as error: print(error)\n"
        "print('end', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == "of another threadend\n"
    assert len(done.stdout.splitlines()) == 2
    assert "No such file" in done.stdout


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged()))
    Tokenizer(path)
    monkeypatch.setattr(runtime_tokenizer, "MAX_FILE", path.stat().st_size - 1)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", None)
    with pytest.raises(BundleError, match="more than"):
        Tokenizer(path)


def test_what_real_tokenizers_add_is_fine() -> None:
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    raw.add_special_tokens(["<s>"])
    raw.post_processor = processors.TemplateProcessing("<s> $A <s>:1", special_tokens=[("<s>", 8)])
    assert Tokenizer(raw).encode("ab") == [8, 0, 1, 8]
    many = Tokenizer(raw, bos_id=8, add_bos=True)
    assert many.encode("<s>" * 5000 + "a") == [8, 0, 8]  # all of them at the start are one
    assert many.encode("") == [8]


@pytest.mark.parametrize("text", [3, None, b"ab", ["a"], "a\ud800"])
def test_texts_that_are_none(text: Any) -> None:
    with pytest.raises(UsageError, match="a text ") as caught:
        words().encode(text)
    assert str(caught.value).isprintable()


def test_failures_at_a_text_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    class Failing:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise Panic("index\nout of range")

        def decode(self, *_: Any, **__: Any) -> Any:
            raise OverflowError("too large")

    tokenizer = words()
    monkeypatch.setattr(tokenizer, "_tokenizer", Failing())
    with pytest.raises(LessExportError, match="the tokenizer fails on this text: index out of range"):
        tokenizer.encode("a")
    with pytest.raises(LessExportError, match="too large"):
        tokenizer.decode([1])


def test_long_texts_do_not_keep_other_threads_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """``encode`` of the library keeps Python's lock, so they do not pass through it; their ids are the same."""
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    raw.add_special_tokens(["<s>"])
    raw.post_processor = processors.TemplateProcessing("<s> $A <s>:1", special_tokens=[("<s>", 8)])
    for tokenizer, text in ((words(), TEXT), (Tokenizer(raw, bos_id=8, add_bos=True), "ab<s>h")):
        want = [tokenizer.encode(text, special=special) for special in (True, False)]
        long = text * (2 * runtime_tokenizer._LONG // len(text))
        assert len(tokenizer.encode(long)) > runtime_tokenizer._LONG // 50
        monkeypatch.setattr(runtime_tokenizer, "_LONG", 1)
        assert [tokenizer.encode(text, special=special) for special in (True, False)] == want
        monkeypatch.undo()

    class Locking:
        def __init__(self, inner: Any) -> None:
            self.encode_batch_fast = inner.encode_batch_fast

    tokenizer = words()
    monkeypatch.setattr(tokenizer, "_tokenizer", Locking(tokenizer._tokenizer))
    assert len(tokenizer.encode(f"{TEXT} " * 300)) > 0


def test_the_longest_token() -> None:
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    assert Tokenizer(raw).longest_token == 2
    raw.add_special_tokens(["<special>"])
    assert Tokenizer(raw).longest_token == 9
