"""Weights that contradict config.json: reported, used or refused, never dropped silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from less_export.bundle.artifact import Bundle
from less_export.errors import LessExportError, ModelError
from less_export.hf import checkpoint, sources, weight_files, weights
from less_export.runtime.open import load_backend

from . import bundles, families
from .bundles import QUICK_OPTIONS, Run, refused
from .marks import exhaustive_but

pytest_plugins = ["tests.bundles"]

WEIGHTS = "model.safetensors"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The checkpoint's tensors, edited in place."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def remarks(folder: Path, out: Path, **options: object) -> list[str]:
    """Warnings of an export, except those about the tokenizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        families.export(folder, out, policy="full", context=64, logits="all", **options)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    return [s for s in messages if "config.json" in s]


def left_out(folder: Path) -> list[str]:
    source = sources.resolve(str(folder))
    bare = weights.bare_model(source.config(), torch.float32)
    surveyed = weights.survey(bare, weight_files.checkpoint_files(folder))
    return checkpoint.unused_weights(bare, surveyed.unused, source.is_part())


# ------------------------------------------------------------------ tensors without a parameter


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIANTS])
def test_every_weight_of_the_families_has_its_place(family: str, tmp_path: Path) -> None:
    assert left_out(families.save(family, tmp_path / "model")) == []


@pytest.mark.slow
def test_biases_that_the_config_does_not_know(tmp_path: Path) -> None:
    folder = families.save("attention_bias", tmp_path / "model")
    bundles.edit_json(folder / "config.json", attention_bias=False)
    (message,) = remarks(folder, tmp_path / "b")
    assert message.startswith("config.json has no place for model.layers.0.self_attn.k_proj.bias (and 3 more tensors")


@pytest.mark.slow
def test_fewer_layers(tmp_path: Path, run: Run, source: Path, quick: None) -> None:
    folder = families.save(families.small(num_hidden_layers=2), tmp_path / "model")
    assert remarks(folder, tmp_path / "asked", num_hidden_layers=1) == []
    bundles.edit_json(folder / "config.json", num_hidden_layers=1)
    (message,) = remarks(folder, tmp_path / "said")
    assert "no place for model.layers.1.input_layernorm.weight (and 8 more" in message
    bundles.edit_json(folder / "config.json", num_hidden_layers=0)
    refused(run(folder, "--out", tmp_path / "none", *QUICK_OPTIONS), "has no layers: num_hidden_layers is 0")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_fewer_layers_of_experts_that_are_stored_apart(tmp_path: Path) -> None:
    mixtral = tr.MixtralConfig(**{**families.ONE, "num_hidden_layers": 2}, num_local_experts=2, sliding_window=None)
    folder = families.save(lambda: tr.MixtralForCausalLM(mixtral), tmp_path / "model")
    assert any("experts.0" in n for n in load_file(folder / WEIGHTS))
    assert remarks(folder, tmp_path / "asked", num_hidden_layers=1) == []
    bundles.edit_json(folder / "config.json", num_hidden_layers=1)
    assert [n for n in left_out(folder) if "experts.0" in n]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached", "model.position_ids"]),
        ("gpt2", ["transformer.h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias"]),
        ("glm4_moe", ["model.layers.92.mlp.gate.weight"]),
    ],
)
def test_what_older_checkpoints_hold_besides(family: str, names: list[str], tmp_path: Path) -> None:
    folder = families.save(family, tmp_path / "model")
    change(folder, lambda t: t.update({n: torch.ones(3) for n in names}))
    change(folder, lambda t: t.update({"mask": torch.ones(3, dtype=torch.uint8)}))
    assert left_out(folder) == []
    change(folder, lambda t: t.update({"adapter.weight": torch.ones(3)}))
    assert left_out(folder) == ["adapter.weight"]


@pytest.mark.slow
def test_towers_of_models_that_see(tmp_path: Path) -> None:
    from .test_text_part import _EYES, _TEXT, _TOKENS

    config = tr.Gemma3Config(text_config=_TEXT, vision_config=_EYES, dtype="float32", **_TOKENS)
    tr.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    for old in ("language_model.model.", "model.language_model."):
        folder = bundles.copy(tmp_path / "model", tmp_path / old)
        stored = load_file(folder / WEIGHTS)
        renamed = {n.replace("language_model.model.", old): t for n, t in stored.items()}
        renamed |= {f"model.{n}": t.clone() for n, t in stored.items() if n.startswith("vision_tower")}
        change(folder, lambda t, renamed=renamed: (t.clear(), t.update(renamed)))
        assert any(n.startswith("model.vision_tower") for n in load_file(folder / WEIGHTS))
        assert left_out(folder) == []
        bias, further = f"{old}layers.1.self_attn.q_proj.bias", f"{old}layers.2.mlp.up_proj.weight"
        change(folder, lambda t, more=(bias, further): t.update({n: torch.ones(64) for n in more}))
        assert left_out(folder) == [bias, further]


# ------------------------------------------------------------------ tied, but stored separately


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", exhaustive_but([{}, {"weights": "int8"}, {"num_hidden_layers": 1}], {"weights": "int8"})
)
def test_tied_embeddings_with_different_values(options: dict[str, object], tmp_path: Path) -> None:
    folder = families.save(families.small(tie_word_embeddings=True), tmp_path / "model", torch.float16)
    table = "model.embed_tokens.weight"
    change(folder, lambda t: t.update({"lm_head.weight": t[table].clone()}))
    assert remarks(folder, tmp_path / "equal", **options) == []
    change(folder, lambda t: t["lm_head.weight"].mul_(torch.linspace(0.5, 2, 97)[:, None]))
    (message,) = remarks(folder, tmp_path / "b", **options)
    assert message.startswith(
        f"config.json ties {table} and lm_head.weight, but the checkpoint stores different values"
    )
    ids = families.text(1, 12)
    with torch.no_grad():
        want = families.load(folder)(torch.from_numpy(ids)).logits.numpy()
    bundle = Bundle.open(tmp_path / "b")
    logits = {}
    for name in ("ort", "torch"):
        backend = load_backend(bundle, name)
        backend.open(1)
        logits[name] = np.concatenate(families.feed(backend, ids, (12,)), 1)
    assert families.relative(logits["ort"], logits["torch"]) < (1e-5 if not options.get("weights") else 0.05)
    assert families.relative(logits["ort"], want) < (1e-5 if not options.get("weights") else 0.05)


@pytest.mark.slow
def test_tied_by_the_class_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = families.save(families.small(tie_word_embeddings=True), tmp_path / "model")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    bare = weights.bare_model(sources.resolve(str(folder)).config(), torch.float32)
    monkeypatch.setattr(weights, "bare_model", lambda *_: bare)
    with pytest.raises(ModelError, match=r"are one tensor in LlamaForCausalLM, but the checkpoint stores different"):
        families.export(folder, tmp_path / "b")


# ------------------------------------------------------------------ missing tensors


def test_what_no_conversion_explains_is_refused_before_loading(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(sources.ModelSource, "load", load)
    changed = bundles.copy(source, tmp_path / "mine")
    change(changed, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    result = run(changed, "--out", tmp_path / "b", *QUICK_OPTIONS)
    refused(result, "the checkpoint lacks model.layers.1.mlp.up_proj.weight (and 0 more)")
    mixture = families.save("mixtral", tmp_path / "mixture")
    change(mixture, lambda t: [t.pop(n) for n in list(t) if "experts" in n])
    with pytest.raises(LessExportError, match=r"lacks model\.layers\.0\.mlp\.experts\.gate_up_proj \(and 1 more\)"):
        families.export(mixture, tmp_path / "b")


@pytest.mark.slow
def test_what_can_be_converted_is(tmp_path: Path) -> None:
    folder = families.save(families.small(), tmp_path / "model")
    change(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].double()}))
    tiny = families.export(folder, tmp_path / "b", policy="full", context=64, logits="all")
    ids = families.text(1, 12)
    with torch.no_grad():
        want = families.load(folder)(torch.from_numpy(ids)).logits.numpy()
    assert families.relative(np.concatenate(families.feed(tiny.backend("ort", 1), ids, (12,)), 1), want) < 1e-5
