"""GGUF files: what they state beside what transformers' loader reads is honoured, refused or named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Qwen3MoeConfig, StableLmConfig

from less_export import open_bundle
from less_export.bundle.artifact import Bundle
from less_export.errors import LessExportError, ModelError
from less_export.hf import sources, weights
from less_export.hf.gguf_file import GgufFile
from less_export.runtime.open import load_tokenizer

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused
from .test_weight_choice import IDS, greedy

pytest_plugins = ["tests.bundles"]

Change = Callable[[gguf.GGUFWriter], None]
Numbers = npt.NDArray[np.float64]
WIDTH, BASE = 8, 10000.0
FREQUENCIES: Numbers = BASE ** (-np.arange(0, WIDTH, 2) / WIDTH)


def keys(**values: Any) -> Change:
    """Add keys of the architecture; ``_`` for the dots of ``rope.scaling``."""

    def change(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = f"llama.{re.sub('^rope_(scaling_)?', lambda m: m[0].replace('_', '.'), name)}"
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)

    return change


def table(values: npt.ArrayLike, change: Change = lambda _: None) -> Change:
    def both(writer: gguf.GGUFWriter) -> None:
        change(writer)
        writer.add_tensor("rope_freqs.weight", np.asarray(values, np.float32))

    return both


def llama3(factor: float, low: float, high: float, length: int, frequencies: Numbers = FREQUENCIES) -> Numbers:
    """The tensor that llama.cpp's converter writes for Llama 3's scaling."""
    found = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found)


def yarn(factor: float, length: int, fast: float = 32, slow: float = 1) -> Numbers:
    """Frequencies of ggml's ``rope_yarn``."""

    def corner(turns: float) -> float:
        return WIDTH * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(BASE))

    low, high = max(0, np.floor(corner(fast))), min(WIDTH - 1, np.ceil(corner(slow)))
    ramp = 1 - np.clip((np.arange(WIDTH // 2) - low) / max(0.001, high - low), 0, 1)
    mixed: Numbers = FREQUENCIES / factor * (1 - ramp) + FREQUENCIES * ramp
    return mixed


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(change: Change = lambda _: None, name: str = "tiny.gguf", **options: Any) -> Path:
        return bundles.gguf_file(tmp_path / name, source, change, **options)

    return make


def rotary(path: Path) -> Any:
    config = sources.resolve(str(path)).config()
    return weights.bare_model(config, torch.float32).model.rotary_emb


# ------------------------------------------------------------------ rotary positions

HONOURED: dict[str, tuple[Change, Numbers]] = {
    "nothing": (keys(), FREQUENCIES),
    "another base": (keys(rope_freq_base=500.0), 500.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)),
    "linear": (keys(rope_scaling_type="linear", rope_scaling_factor=8.0), FREQUENCIES / 8),
    "a factor without its type": (keys(rope_scaling_factor=2.0), FREQUENCIES / 2),
    "older files": (keys(rope_scale_linear=4.0), FREQUENCIES / 4),
    "older key beside the newer": (keys(rope_scale_linear=4.0, rope_scaling_factor=2.0), FREQUENCIES / 2),
    "no scaling, but a factor": (keys(rope_scaling_type="none", rope_scaling_factor=8.0), FREQUENCIES),
    "a factor of 0": (keys(rope_scaling_type="linear", rope_scaling_factor=0.0), FREQUENCIES),
    "yarn": (
        keys(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_scaling_original_context_length=64),
        yarn(4, 64),
    ),
    "yarn, the context's length": (keys(rope_scaling_type="yarn", rope_scaling_factor=4.0), yarn(4, bundles.CONTEXT)),
    "yarn, other corners": (
        keys(
            rope_scaling_type="yarn", rope_scaling_factor=2.0, rope_scaling_original_context_length=4096,
            rope_scaling_yarn_beta_fast=16.0, rope_scaling_yarn_beta_slow=2.0, rope_scaling_yarn_ext_factor=1.0,
        ),
        yarn(2, 4096, 16, 2),
    ),
    "divisors of 1": (table(np.ones(WIDTH // 2)), FREQUENCIES),
    **{
        f"llama3 {values}": (table(llama3(*values)), FREQUENCIES / llama3(*values))
        for values in (
            (8, 1, 4, 8192), (32, 1, 4, 8192), (8, 1, 4, 64), (4, 1, 4, 32), (8, 2, 3, 100), (16, 1, 32, 5000),
        )
    },
    "llama3 with another base": (
        table(llama3(8, 1, 4, 8192, 5e5 ** (-np.arange(0, WIDTH, 2) / WIDTH)), keys(rope_freq_base=5e5)),
        5e5 ** (-np.arange(0, WIDTH, 2) / WIDTH) / llama3(8, 1, 4, 8192, 5e5 ** (-np.arange(0, WIDTH, 2) / WIDTH)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
def test_frequencies(name: str, file: Callable[..., Path]) -> None:
    change, want = HONOURED[name]
    module = rotary(file(change))
    np.testing.assert_allclose(module.inv_freq, want, rtol=2e-3)
    factor = 4 if "yarn" in name and "corners" not in name else 2 if "yarn" in name else 1
    assert module.attention_scaling == pytest.approx(1 + 0.1 * np.log(factor))


REFUSED: dict[str, tuple[Change, str]] = {
    "longrope": (keys(rope_scaling_type="longrope", rope_scaling_factor=4.0), "rotary scaling 'longrope'"),
    "unknown": (keys(rope_scaling_type="spiral"), "rotary scaling 'spiral'"),
    "factors of longrope": (
        lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)),
        "rotary scaling 'longrope'",
    ),
    "yarn of attention": (
        keys(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_scaling_attn_factor=0.5),
        "attn_factor 0.5",
    ),
    "no extrapolation": (
        keys(rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_scaling_yarn_ext_factor=0.0),
        "yarn_ext_factor 0.0",
    ),
    "another table": (table([1, 5, 2, 8]), "no table of Llama 3's scaling"),
    "a table of another width": (table(llama3(8, 1, 4, 64)[:3]), "no table of Llama 3's scaling"),
    "a table and a factor": (table(llama3(8, 1, 4, 64), keys(rope_scaling_factor=2.0)), "a scaling by 2"),
    "a negative factor": (keys(rope_scaling_factor=-2.0), "must be a positive number, not -2.0"),
    "no number": (keys(rope_scaling_factor="2"), "must be a positive number, not 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scalings_that_are_refused(name: str, file: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    change, says = REFUSED[name]
    refused(run(file(change), "--out", tmp_path / "b", *QUICK_OPTIONS), says)
    assert not (tmp_path / "b").exists()


def test_layers_that_slide_are_not_scaled(file: Callable[..., Path]) -> None:
    found = GgufFile(file(keys(rope_scaling_type="linear", rope_scaling_factor=8.0, rope_freq_base=2e6)))
    config = Gemma3TextConfig()
    found.honour(config)
    full, sliding = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("linear", 8.0, 2e6)
    assert (sliding["rope_type"], sliding["rope_theta"]) == ("default", 10000.0)


def test_heads_that_rotate_a_part(file: Callable[..., Path]) -> None:
    config = StableLmConfig(hidden_size=64, num_attention_heads=4, partial_rotary_factor=0.25)
    GgufFile(file(keys(rope_dimension_count=8, rope_freq_base=3e4))).honour(config)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 3e4


def test_sizes_that_transformers_leaves_to_the_class(file: Callable[..., Path]) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_expert_feed_forward_length(48)
        writer.add_final_logit_softcapping(20.0)

    found, config = GgufFile(file(change)), Qwen3MoeConfig(head_dim=16)
    found.honour(config)
    assert (config.head_dim, config.moe_intermediate_size) == (32, 48)
    assert isinstance(config.head_dim, int)
    assert found.unread_keys(config) == ["llama.final_logit_softcapping"]  # which this class does not have
    gemma = Gemma2Config()
    found.honour(gemma)
    assert gemma.final_logit_softcapping == 20.0


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 8.0}, {"rope_type": "llama3"}])
def test_an_export_rotates_as_the_file_says(scaling: dict[str, Any], file: Callable[..., Path], tmp_path: Path) -> None:
    change = keys(rope_scaling_factor=8.0)
    if scaling["rope_type"] == "llama3":
        scaling |= dict(zip(("factor", "low_freq_factor", "high_freq_factor"), (8.0, 1.0, 4.0), strict=True))
        scaling["original_max_position_embeddings"] = 64
        change = table(llama3(8, 1, 4, 64))
    folder = bundles.checkpoint(tmp_path / "model", rope_parameters={"rope_theta": BASE, **scaling})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = AutoModelForCausalLM.from_pretrained(bundles.checkpoint(tmp_path / "plain")).eval()
    assert greedy(model) != greedy(plain)
    bundle = bundles.bundle(file(change), tmp_path / "b", policy="full", dtype="float32")
    (answer,) = open_bundle(bundle).generate([IDS], max_new_tokens=8, ignore_eos=True)
    assert list(answer.token_ids) == greedy(model)


# ------------------------------------------------------------------ what is no whole model


def test_parts_of_a_split_file(file: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    split = file(lambda w: (w.add_uint16("split.no", 1), w.add_uint16("split.count", 3)))
    refused(run(split, "--out", tmp_path / "b"), "is part 2 of 3 of a split GGUF file", "llama-gguf-split --merge")
    named = tmp_path / "m-00002-of-00003.gguf"
    named.write_bytes(b"GGUF")
    refused(run(named, "--out", tmp_path / "b"), "is part 2 of 3 of a split GGUF file")
    whole = file(lambda w: w.add_uint16("split.count", 1), "m-00001-of-00001.gguf")
    assert sources.resolve(str(whole)).config().num_hidden_layers == 2


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_other_kinds_of_files(kind: str, file: Callable[..., Path]) -> None:
    path = file(lambda w: w.add_type(kind))
    with pytest.raises(ModelError, match=f"holds no model: its general.type is {kind}"):
        sources.resolve(str(path)).config()
    with pytest.raises(LessExportError):
        sources.resolve(str(path)).tokenizer()


# ------------------------------------------------------------------ tokenizers


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_without_a_tokenizer(
    kind: str | None, file: Callable[..., Path], run: Run, tmp_path: Path, quick: None
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(17)
        if kind is not None:
            writer.add_tokenizer_model(kind)

    result = run(file(change, with_tokenizer=False), "--out", tmp_path / "b", *QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert "the model ships no tokenizer: generate will take token ids only" in result.err
    bundle = Bundle.open(tmp_path / "b")
    assert load_tokenizer(bundle) is None
    assert bundle.manifest.eos_ids() == (17,)
    assert run("generate", tmp_path / "b", "--token-ids", "1,2,3", "--max-new-tokens", 2).code == 0


def test_an_unknown_tokenizer_is_refused(file: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    path = file(lambda w: w.add_tokenizer_model("rwkv"), with_tokenizer=False)
    refused(run(path, "--out", tmp_path / "b", *QUICK_OPTIONS), "cannot read the tokenizer", "rwkv")


@pytest.mark.parametrize(
    ("templates", "want"),
    [
        ("D", "D"),
        (
            [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
            {"default": "D", "tool_use": "T"},
        ),
        ([{"name": "tool_use", "template": "T"}], {"tool_use": "T"}),
    ],
)
def test_chat_templates(templates: Any, want: Any, file: Callable[..., Path]) -> None:
    tokenizer = sources.resolve(str(file(lambda w: w.add_chat_template(templates)))).tokenizer()
    assert tokenizer is not None
    assert tokenizer.chat_template == want


def test_pre_tokenizers(
    file: Callable[..., Path], recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take digits apart; one that nobody knows is named."""
    pieces = {}
    for kind in ("llama-bpe", "gpt-2", "default", "smollm", "new"):
        monkeypatch.setattr(
            gguf.GGUFWriter, "add_tokenizer_pre", lambda w, _, kind=kind: w.add_string("tokenizer.ggml.pre", kind)
        )
        tokenizer = sources.resolve(str(file())).tokenizer()
        assert tokenizer is not None
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2024, it's")
        pieces[kind] = [piece for piece, _ in split]
    assert pieces["gpt-2"] == pieces["default"] == pieces["new"] == ["in", "Ġ2024", ",", "Ġit", "'s"]
    assert pieces["smollm"] == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s"]
    (warning,) = [str(w.message) for w in recwarn if "pre-tokenizer" in str(w.message)]
    assert "'new'" in warning


@pytest.mark.slow
def test_the_ends_of_turns_and_messages(file: Callable[..., Path], tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(40)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 41)

    bundle = bundles.bundle(file(change), tmp_path / "b")
    assert Bundle.open(bundle).manifest.eos_ids() == (1, 40, 41)


# ------------------------------------------------------------------ what is left out


@pytest.mark.slow
def test_what_is_not_read_is_named(file: Callable[..., Path], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        keys(attention_key_length=8)(writer)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_expert_count(0)
        writer.add_sliding_window(64)
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))

    bundle = bundles.bundle(file(change), tmp_path / "b", num_hidden_layers=1, dtype="float32")
    (warning,) = [str(w.message) for w in recwarn if "does not read" in str(w.message)]
    stated = "blk.0.attn_q.bias, llama.attention.sliding_window, llama.attention_key_length"
    assert warning.startswith(f"tiny.gguf states {stated}, which transformers does not read")
    assert not any("bias" in name for name in load_file(bundle / "converted.safetensors"))


@pytest.mark.slow
def test_a_file_that_is_read_whole_names_nothing(
    file: Callable[..., Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    change = table(np.ones(4), keys(rope_dimension_count=8, rope_freq_base=BASE, rope_scaling_finetuned=0))
    bundles.bundle(file(change), tmp_path / "b")
    assert not [str(w.message) for w in recwarn if "read" in str(w.message)]
