"""Tokenizers of checkpoint folders that are none: without a vocabulary, of their own code, or in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import one_line

NONE = "the model ships no tokenizer"
NO_VOCABULARY = "the model's tokenizer has no vocabulary: its folder lacks tokenizer.json, or what it is made from"
#: Files that transformers makes a tokenizer from, and others that it cannot read without further packages.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OTHERS = ("tekken.json", "*.tiktoken", "*.bpe.model")
_CONFIG = "tokenizer_config.json"


def has_vocabulary(folder: Path) -> bool:
    """Whether there is a file with a vocabulary."""
    return any(next(folder.glob(name), None) for name in (*_FILES, *_OTHERS))


def absent(folder: Path) -> str | None:
    """Why there is nothing that transformers could read as a tokenizer; None if there is something."""
    if any((folder / name).exists() for name in (*_FILES, _CONFIG)):
        return None
    other = next((p for name in _OTHERS for p in sorted(folder.glob(name))), None)
    return (
        NONE if other is None else f"the model's tokenizer is {other.name}, which has to be made a tokenizer.json first"
    )


def is_object(folder: Path) -> bool:
    """Whether tokenizer_config.json can be read."""
    return _config(folder) is not None


def own_code(folder: Path) -> str | None:
    """Why a tokenizer is not read that is code in its folder; None for other tokenizers."""
    stated = (_config(folder) or {}).get("auto_map")
    names = stated.get("AutoTokenizer") if isinstance(stated, dict) else stated
    name = next((n for n in (names if isinstance(names, list) else [names]) if isinstance(n, str)), None)
    return (
        None if name is None else f"the model's tokenizer is code of its own ({one_line(name, 80)}), which is never run"
    )


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def is_empty(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers knows its special tokens only, which it makes up without a vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return not backend.get_vocab().keys() - added - {*tokenizer.all_special_tokens}


def python_only(tokenizer: Any) -> str | None:
    """Why a tokenizer of transformers cannot be written to a tokenizer.json; None if it can."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return None
    return f"the model's tokenizer ({type(tokenizer).__name__}) runs in Python only and has no tokenizer.json"
