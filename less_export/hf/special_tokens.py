"""The tokens that begin and end a model's texts, from its tokenizer and configuration."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from .sources import ModelSource


def adds_bos(tokenizer: Any) -> bool:
    """Whether texts start with the bos token."""
    return bool(tokenizer("Hello").input_ids[:1] == [tokenizer.bos_token_id])


def eos_ids(source: ModelSource, hf_config: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """End-of-sequence ids: the tokenizer's own first, then the config's, generation_config.json's or the GGUF file's.

    A generation_config.json that is damaged, or that holds no object, is ignored.
    """
    stated: list[Any] = [getattr(tokenizer, "eos_token_id", None)]
    stated += [getattr(hf_config.get_text_config(), "eos_token_id", None), source.gguf_eos_ids()]
    generation = source.folder / "generation_config.json"
    if source.gguf is None and generation.is_file():
        with contextlib.suppress(ValueError, OSError, RecursionError):
            config = json.loads(generation.read_text(encoding="utf-8"))
            stated.append(config.get("eos_token_id") if isinstance(config, dict) else None)
    ids = [i for value in stated for i in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and i >= 0))
