"""Tokenizers that an export cannot use: named as what they are; and prompts as their file has them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from less_export.bundle.artifact import Bundle
from less_export.cli.files import read_text
from less_export.config import ExportConfig
from less_export.errors import ModelError, UsageError
from less_export.exporter.job import usable_tokenizer
from less_export.hf import sources
from less_export.hf.random_checkpoint import random_source

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused

pytest_plugins = ["tests.bundles"]

Folder = Callable[..., Path]
OWN = {"auto_map": {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}, "tokenizer_class": "MyTokenizer"}
EMPTY = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Folder:
    """``folder(keep, name=content, ...)``: the checkpoint with these files for a tokenizer."""

    def make(*keep: str, **files: Any) -> Path:
        path = bundles.copy(source, tmp_path / "model")
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if file not in keep:
                (path / file).unlink(missing_ok=True)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name.replace("__", ".")).write_text(text)
        return path

    return make


def tokenizer_class(name: str, **values: Any) -> dict[str, Any]:
    return {"tokenizer_config__json": {"tokenizer_class": name, **values}}


NO_VOCABULARY = "the model's tokenizer has no vocabulary: its folder lacks tokenizer.json, or what it is made from"
LACKING: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "nothing": ((), {}, "the model ships no tokenizer"),
    **{
        f"{name} without a vocabulary": ((), tokenizer_class(name, bos_token="<s>", eos_token="</s>"), NO_VOCABULARY)
        for name in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer")
    },
    "an empty vocabulary": ((), {"tokenizer__json": EMPTY}, NO_VOCABULARY),
    "Python only": (
        (),
        tokenizer_class("ByT5Tokenizer"),
        "the model's tokenizer (ByT5Tokenizer) runs in Python only and has no tokenizer.json",
    ),
    "code of its own": (
        (),
        {"tokenizer_config__json": OWN, "tokenization_mine__py": "raise SystemExit(3)"},
        "the model's tokenizer is code of its own (tokenization_mine.MyTokenizer), which is never run",
    ),
    "code of its own beside a tokenizer.json": (
        ("tokenizer.json",),
        {"tokenizer_config__json": OWN, "tokenization_mine__py": "raise SystemExit(3)"},
        "the model's tokenizer is code of its own (tokenization_mine.MyTokenizer), which is never run",
    ),
    "tiktoken": ((), {"qwen__tiktoken": "IQ== 0"}, "qwen.tiktoken, which has to be made a tokenizer.json first"),
    "tekken": ((), {"tekken__json": {}}, "tekken.json, which has to be made a tokenizer.json first"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_it_is(name: str, folder: Folder) -> None:
    keep, files, says = LACKING[name]
    tokenizer, reason = usable_tokenizer(sources.resolve(str(folder(*keep, **files))))
    assert tokenizer is None
    assert reason.startswith("the model")
    assert reason.endswith(says)


def test_an_export_without_its_tokenizer(folder: Folder, run: Run, tmp_path: Path, quick: None) -> None:
    path = folder(**tokenizer_class("LlamaTokenizer"))
    bundles.edit_json(path / "config.json", eos_token_id=7)
    result = run(path, "--out", tmp_path / "b", *QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert f"{NO_VOCABULARY}: generate will take token ids only" in result.err
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    assert Bundle.open(tmp_path / "b").manifest.eos_ids() == (7,)
    refused(run("generate", tmp_path / "b", "--prompt", "a"), "text prompts need a tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", None])
def test_random_weights_keep_the_tokenizer(name: str | None, folder: Folder, tmp_path: Path) -> None:
    path = folder(*([name] if name else []), **tokenizer_class("PreTrainedTokenizerFast"))
    made = random_source(str(path), ExportConfig(), tmp_path / "b")
    found, reason = made.tokenizer_or_reason()
    assert (found is not None, reason) == (True, "") if name else (False, NO_VOCABULARY)
    assert made.tokenizer() is found


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer_config__json": "{"},
        {"vocab__json": "{}"},
        {"tokenizer__model": "no vocabulary"},
    ],
)
def test_damage_is_not_absence(files: dict[str, str], folder: Folder) -> None:
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        sources.resolve(str(folder(**files))).tokenizer()


def test_a_class_that_transformers_does_not_know(folder: Folder) -> None:
    path = folder("tokenizer.json", **tokenizer_class("NoSuchTokenizer"))
    want = bundles.tokenizer()("Alice was tired").input_ids
    assert sources.resolve(str(path)).tokenizer()("Alice was tired").input_ids == want


def test_evaluation_and_training_say_it_too(folder: Folder, run: Run, tmp_path: Path) -> None:
    path = folder(tokenizer_config__json=OWN, tokenization_mine__py="raise SystemExit(3)")
    says = "the model's tokenizer is code of its own (tokenization_mine.MyTokenizer), which is never run; "
    refused(
        run("train", path, "--data", "calibration", "--out", tmp_path / "k.safetensors"), says + "training of model"
    )


# ------------------------------------------------------------------ prompts from files

TEXTS = {
    "line ends": (b"a\r\nb\rc\n\nd", "a\r\nb\rc\n\nd"),
    "byte order mark": (b"\xef\xbb\xbfa\r\n", "a\r\n"),
    "one mark of two": (b"\xef\xbb\xbf\xef\xbb\xbfa", "\ufeffa"),
    "a mark inside": (b"a\xef\xbb\xbf", "a\ufeff"),
    "other separators": ("a\x0c\x1c\u2028b\x85".encode(), "a\x0c\x1c\u2028b\x85"),
    "nothing": (b"", ""),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_that_of_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, want = TEXTS[name]
    (tmp_path / "text").write_bytes(data)
    assert read_text(str(tmp_path / "text")) == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert read_text("-") == want


@pytest.mark.parametrize("data", ["a".encode("utf-16"), b"\xff", b"a\xc3"])
def test_other_encodings(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(UsageError, match="not UTF-8 text"):
        read_text(str(tmp_path / "text"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="stdin is closed"):
        read_text("-")


def test_a_prompt_with_line_ends(plain: Path, run: Run, tmp_path: Path) -> None:
    want = run("generate", plain, "--prompt", "Alice\r\nwas", "--max-new-tokens", 3).out
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfAlice\r\nwas")
    assert run("generate", plain, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 3).out == want
    assert run("generate", plain, "--prompt", "Alice\nwas", "--max-new-tokens", 3).out != want
