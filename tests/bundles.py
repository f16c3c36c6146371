"""Checkpoints of a few kilobytes and the bundles made of them, for tests of files, faults and the command line."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from less_export.config import ExportConfig
from less_export.exporter.build import export
from less_export.feature_maps import Heads, random_kernels

CORPUS = ("Alice was beginning to get very tired of sitting by her sister on the bank. ", "Once upon a time, a cat.")
#: Long enough for the 12 slots of the bundles to evict.
PROMPT = "Alice was tired of sitting by the bank, once upon a time; so she was beginning to sit on a cat."
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
HEADS = [Heads(4, 2, 8)] * 2
CONTEXT = 256


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> and </s>, trained on a sentence."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def checkpoint(folder: Path, shard_size: str = "1GB", chat: bool = False, **changes: Any) -> Path:
    """Save a random two-layer Llama with its tokenizer; ``changes`` go to its config."""
    text = tokenizer()
    if chat:
        text.chat_template = CHAT_TEMPLATE
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    config = LlamaConfig(
        vocab_size=len(text), initializer_range=0.2, bos_token_id=0, eos_token_id=None, **sizes | changes
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    text.save_pretrained(folder)
    return folder


def kernels(path: Path, heads: list[Heads] | None = None, rank: int = 3, parametrisation: str = "exp") -> Path:
    """Save random kernels, for the checkpoint's own heads unless told otherwise."""
    heads = heads or HEADS
    random_kernels(heads, range(len(heads)), rank, 6, parametrisation).save(path)
    return path


def small(**options: Any) -> ExportConfig:
    """Options of a quick export: no self-check, chunks short enough for several of them."""
    return ExportConfig(**{"validate": False, "chunk": 16, "max_batch": 2} | options)


def bundle(source: Path, out: Path, **options: Any) -> Path:
    """Export ``source`` to ``out`` quickly."""
    return export(str(source), out, small(**options))


def copy(source: Path, out: Path) -> Path:
    """A copy of a bundle folder whose files are its own (no hard links), to be damaged."""
    return Path(shutil.copytree(source, out))


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below ``folder`` by relative name, hidden ones included."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }
