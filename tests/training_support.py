"""A text, checkpoints and quick trainings for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from less_export.training import job

from . import bundles

LENGTH = 48
#: A quick training: 4 + 4 slots of 48 tokens, 2 layers.
QUICK: dict[str, Any] = {"budget": "8", "rank": 3, "hidden": 8, "steps": 40, "seqs": 8, "seq_len": LENGTH}
QUICK |= {"slots": "model", "max_distance": "none", "layer_budgets": "equal", "end_to_end": False}
OPTIONS = ("--budget", 8, "--rank", 3, "--hidden", 8, "--steps", 5, "--seqs", 6, "--seq-len", LENGTH)
OPTIONS += ("--slots", "model", "--max-distance", "none", "--layer-budgets", "equal", "--no-end-to-end")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of the tiny tokenizer."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = bundles.PROMPT.split()
    picks = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text(" ".join(words[i] for i in picks))
    return file


def model_folder(folder: Path, heads: int = 4, kv_heads: int = 2, **changes: Any) -> Path:
    """A checkpoint whose attention is sharp enough for evictions to matter."""
    return bundles.checkpoint(
        folder, num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.6, **changes
    )


def trained(folder: Path, text: Path, **options: Any) -> tuple[Path, tuple[job.LayerReport, ...]]:
    out = folder.parent / f"{folder.name}.safetensors"
    return out, job.train(str(folder), out, [str(text)], **QUICK | options)


def sliding_folder(folder: Path) -> Path:
    """A checkpoint whose first layer slides (16 tokens) and whose second does not."""
    bundles.checkpoint(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 300, "sliding_window": 16}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 256}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, initializer_range=0.4)).save_pretrained(folder)
    return folder
