"""Vision models: only their decoder is exported, with either naming of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from less_export.errors import UnsupportedModelError
from less_export.hf.sources import resolve

from . import bundles, families
from .families import VOCAB, WINDOW

pytestmark = pytest.mark.slow

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.3, "max_position_embeddings": 512,
}  # fmt: skip
_EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_TOKENS = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92, "mm_tokens_per_image": 1}


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with a vision tower, whose decoder is called model.language_model."""
    torch.manual_seed(0)
    config = tr.Gemma3Config(text_config=_TEXT, vision_config=_EYES, dtype="float32", **_TOKENS)
    folder = tmp_path_factory.mktemp("seeing")
    tr.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def renamed(vision_model: Path, folder: Path, old: str, new: str) -> Path:
    """The checkpoint with its decoder's weights named as in another version of transformers."""
    bundles.copy(vision_model, folder)
    tensors = load_file(vision_model / "model.safetensors")
    save_file({n.replace(old, new): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_both_names_of_its_weights(vision_model: Path, tmp_path: Path) -> None:
    names = [n for n in load_file(vision_model / "model.safetensors") if "language_model" in n]
    old = "language_model.model."
    assert all(n.startswith(old) for n in names), names
    ids = families.text(1, 40) % 90  # none of the vision tower
    whole = tr.Gemma3ForConditionalGeneration.from_pretrained(vision_model, attn_implementation="eager").eval()
    with torch.no_grad():
        want = whole(torch.from_numpy(ids)).logits.numpy()
    today = renamed(vision_model, tmp_path / "today", old, "model.language_model.")
    for folder in (vision_model, today):
        source = resolve(str(folder))
        assert source.config().model_type == "gemma3_text"
        decoder = source.load(torch.float32)
        assert type(decoder) is tr.Gemma3ForCausalLM
        with torch.no_grad():
            assert families.relative(decoder(torch.from_numpy(ids)).logits.numpy(), want) < 1e-6
        out = tmp_path / f"{folder.name}.bundle"
        full = families.export(folder, out, policy="full", context=64, logits="all")
        got = np.concatenate(families.feed(full.backend("ort", 1), ids, (16, 16, 8)), 1)
        assert families.relative(got, want) < 1e-5
        assert (out / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino


def test_an_output_embedding_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    untied = tr.Gemma3Config(
        text_config=_TEXT, vision_config=_EYES, dtype="float32", tie_word_embeddings=False, **_TOKENS
    )
    whole = tr.Gemma3ForConditionalGeneration(untied).eval()
    whole.save_pretrained(tmp_path / "untied")
    bundles.edit_json(tmp_path / "untied" / "config.json", tie_word_embeddings=False)
    ids = families.text(1, 12) % 90
    with torch.no_grad():
        want = whole(torch.from_numpy(ids)).logits.numpy()
        got = resolve(str(tmp_path / "untied")).load(torch.float32)(torch.from_numpy(ids)).logits.numpy()
    assert families.relative(got, want) < 1e-6
    full = families.export(tmp_path / "untied", tmp_path / "bundle", policy="full", context=64, logits="all")
    assert families.relative(np.concatenate(families.feed(full.backend("ort", 1), ids, (12,)), 1), want) < 1e-5


def test_quantised_as_a_whole(vision_model: Path, tmp_path: Path) -> None:
    folder = bundles.copy(vision_model, tmp_path / "quantised")
    quantised: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
    bundles.edit_json(folder / "config.json", quantization_config=quantised)
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(gptq\)"):
        families.export(folder, tmp_path / "b")
