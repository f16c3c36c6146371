"""The tokens that begin and end a model's texts, from its tokenizer and configuration."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from .sources import ModelSource


def adds_bos(tokenizer: Any) -> bool:
    """Whether texts start with the bos token."""
    return bool(tokenizer("Hello").input_ids[:1] == [tokenizer.bos_token_id])


def eos_ids(source: ModelSource, hf_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids: the tokenizer's own first, then the config's and generation_config.json's."""
    generation = source.folder / "generation_config.json"
    stated: list[Any] = [tokenizer.eos_token_id, getattr(hf_config.get_text_config(), "eos_token_id", None)]
    if source.gguf is None and generation.is_file():
        with contextlib.suppress(ValueError, OSError):
            stated.append(json.loads(generation.read_text()).get("eos_token_id"))
    distinct: dict[int, None] = {}
    for ids in stated:
        distinct.update(dict.fromkeys(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []))
    return tuple(distinct)
