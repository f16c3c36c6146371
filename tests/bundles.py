"""Checkpoints of a few kilobytes and their bundles, for tests of files, faults and the command line.

A pytest plugin: modules with ``pytest_plugins = ["tests.bundles"]`` use its fixtures, created once for all workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from less_export.bundle.artifact import MANIFEST, Bundle, Manifest
from less_export.bundle.files import sha256
from less_export.cli.main import main
from less_export.config import ExportConfig
from less_export.contract import Contract, Heads
from less_export.exporter import build, graphs
from less_export.exporter.trace import trace
from less_export.hf.decoder import LessDecoder
from less_export.less.feature_maps import random_kernels

from .sharing import once, shared_folder

CORPUS = ("Alice was beginning to get very tired of sitting by her sister on the bank. ", "Once upon a time, a cat.")
#: Longer than the 12 slots (5% of 256) that bundles have by default.
PROMPT = "Alice was tired of sitting by the bank, once upon a time; so she was beginning to sit on a cat."
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CONTEXT = 256
HEADS = [Heads(4, 2, 8)] * 2
#: Options of a quick export, as fields and as arguments.
QUICK: dict[str, Any] = {"validate": False, "chunk": 16, "max_batch": 2, "slots": "model", "max_distance": "none"}
QUICK_OPTIONS = ("--no-validate", "--chunk", "16", "--max-batch", "2", "--slots", "model", "--max-distance", "none")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with <s> and </s>, trained on a few sentences."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
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
    sizes |= {"vocab_size": len(text), "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder, max_shard_size=shard_size)
    text.save_pretrained(folder)
    return folder


def gguf_file(
    path: Path, source: Path, change: Callable[[gguf.GGUFWriter], None] = lambda _: None, with_tokenizer: bool = True
) -> Path:
    """The checkpoint of :func:`checkpoint` as an unquantised GGUF file; ``change`` adds keys and tensors."""
    config, text = (json.loads((source / n).read_text()) for n in ("config.json", "tokenizer.json"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if with_tokenizer:
        tokens = sorted(text["model"]["vocab"], key=text["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
        writer.add_token_merges([" ".join(m) for m in text["model"]["merges"]])
        writer.add_bos_token_id(0)
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, x in load_file(source / "model.safetensors").items():
        count = heads.get(name.split(".")[-2])
        if count:  # llama.cpp rotates neighbours, Hugging Face halves
            x = x.reshape(count, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit_json(file: Path, **changes: Any) -> None:
    """Change values of a JSON object in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def kernels(path: Path, parametrisation: str = "exp", layers: Iterable[int] = (0, 1), rank: int = 3) -> Path:
    """Save random kernels for :func:`checkpoint`'s model."""
    random_kernels(HEADS, list(layers), rank, 6, parametrisation).save(path)
    return path


def bundle(source: Path, out: Path, **options: Any) -> Path:
    """Export ``source`` to ``out`` with :data:`QUICK` options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "trace", trace_once)
        return build.export(str(source), out, ExportConfig(**QUICK | options))


_graphs: dict[str, ir.Model] = {}


def trace_once(decoder: LessDecoder, contract: Contract, unbound: Iterable[str] = ()) -> ir.Model:
    """:func:`less_export.exporter.trace.trace`, which takes seconds, cached for equal models."""
    maps = [(n, type(m).__name__, m.rank, m.hidden, m.length) for n, m in decoder.maps.items()]
    config = {n: v for n, v in decoder.model.config.to_dict().items() if n != "_name_or_path"}
    names = sorted(unbound)
    key = json.dumps([contract.to_dict(), config, maps, names], default=str)
    if key not in _graphs:
        _graphs[key] = trace(decoder, contract, names)
    return _graphs[key].clone()


def copy(source: Path, out: Path) -> Path:
    """A copy of a folder without hard links, for tests that damage it."""
    return Path(shutil.copytree(source, out))


def snapshot(folder: Path) -> dict[str, str]:
    """Hash of every file below ``folder`` by relative name, hidden ones included."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }


def resign(bundle: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> None:
    """Change a bundle folder's manifest and update its hashes, those of the graphs included."""
    file = bundle / MANIFEST
    manifest = change(Manifest.parse(file.read_bytes(), "manifest"))
    rehashed = [dataclasses.replace(a, sha256=sha256(bundle / a.file)) for a in manifest.artifacts]
    file.write_bytes(dataclasses.replace(manifest, artifacts=tuple(rehashed)).dump())


# ------------------------------------------------------------------ the command line


@dataclasses.dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(argument, ...)`` runs the command line in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(w) for w in arguments])
        return Result(code, *capsys.readouterr())

    return call


def refused(result: Result, *says: str, after: int = 0, code: int = 1) -> None:
    """Assert that the command failed with one line that holds ``says``, after ``after`` lines of progress."""
    *progress, last = result.err.splitlines()
    assert result.code == code
    assert last.startswith("less-export: error: "), result.err
    assert len(progress) == after, result.err
    assert all(line.startswith("less-export: ") and "error" not in line for line in progress), result.err
    for text in says:
        assert text in last


def generated(run: Run, bundle: Path, *arguments: object) -> str:
    """Output of ``generate`` for 12 new tokens."""
    result = run("generate", bundle, "--max-new-tokens", 12, *arguments)
    assert result.code == 0, result.err
    assert result.out.endswith("\n")
    assert result.err.startswith("prompt ")
    assert "tokens/s" in result.err
    return result.out


# ------------------------------------------------------------------ fixtures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test reuse traces of other tests."""
    monkeypatch.setattr(graphs, "trace", trace_once)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the checkpoints and bundles of all workers; no test may change them."""
    folder = shared_folder(tmp_path_factory, "bundles")
    yield folder
    for manifest in folder.glob(f"*/{MANIFEST}"):
        Bundle.open(manifest.parent, full=True)


@pytest.fixture(scope="session")
def source(shared: Path) -> Path:
    """A checkpoint folder with a chat template."""
    return once(shared / "checkpoint", lambda path: checkpoint(path, chat=True))


@pytest.fixture(scope="session")
def kernel_file(shared: Path) -> Path:
    """Random kernels of rank 3 for both layers of ``source``."""
    return once(shared / "kernels.safetensors", kernels)


@pytest.fixture(scope="session")
def plain(source: Path, shared: Path) -> Path:
    """A folder bundle for ONNX Runtime: h2o, 12 slots, no kernels."""
    return once(shared / "plain", lambda path: bundle(source, path))


@pytest.fixture(scope="session")
def kernelled(source: Path, kernel_file: Path, shared: Path) -> Path:
    """A folder bundle for both targets, with kernels."""
    return once(shared / "kernelled", lambda path: bundle(source, path, kernels=kernel_file, target="both"))


@pytest.fixture(scope="session")
def streaming(source: Path, kernel_file: Path, shared: Path) -> Path:
    """A bundle with kernels that gives the logits of every token: 12 slots."""
    return once(shared / "streaming", lambda path: bundle(source, path, kernels=kernel_file, logits="all"))


@pytest.fixture(scope="session")
def single(source: Path, shared: Path) -> Path:
    """``x.onnx`` with its companions: policy full, 32 slots, one layer."""
    return once(
        shared / "single" / "x.onnx",
        lambda path: bundle(source, path, policy="full", context=32, num_hidden_layers=1),
    )


@pytest.fixture
def place(plain: Path, tmp_path: Path) -> Path:
    """A folder with a bundle ``out``, for exports that replace it."""
    folder = tmp_path / "place"
    copy(plain, folder / "out")
    return folder
