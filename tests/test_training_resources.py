"""Memory and disk use of training, leftover files, and warnings about its input."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from less_export.config import ExportConfig
from less_export.contract import LayerSpec, Policy
from less_export.errors import LessExportError, UsageError
from less_export.hf import data, running
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.model import open_model
from less_export.hf.sources import ModelSource, resolve
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.less.int8 import Centring
from less_export.progress import Silent
from less_export.training import collect, end_to_end, fit, job, resources
from less_export.training.additions import Addition
from less_export.training.options import Processes

from . import bundles
from .training_support import LENGTH, model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]

#: Bytes of a layer's activations in a quick training: 9 sequences, 4 + 2 * 2 heads of 8, f32.
LAYER = 9 * 8 * LENGTH * 8 * 4
#: Bytes of the hidden states of those sequences.
HIDDEN = 9 * LENGTH * 32 * 4


class RecordedProgress(Silent):
    """Records messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def files_in(folder: Path) -> list[str]:
    """All files and folders below ``folder``, relative, except the model's."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.parts[len(folder.parts)] != "model")


# ------------------------------------------------------------------ disk


def test_a_full_disk_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written through a mapping, where a full disk raises a signal."""
    requests = []

    def full(_: int, begin: int, size: int) -> None:
        requests.append((begin, size))
        if len(requests) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    says = r"0\.00 GB of activations do not fit beside --out, where .* GB are free \(No space left on device\)"
    with pytest.raises(LessExportError, match=says):
        trained(model_folder(tmp_path / "model"), text)
    assert requests == [(0, LAYER), (0, HIDDEN)]
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("reason", ["unsupported", "missing"])
def test_space_is_taken_where_it_cannot_be_reserved(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if reason == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    resources.reserve(tmp_path / "file", (2 << 20) + 5)
    stat = (tmp_path / "file").stat()
    assert stat.st_size == (2 << 20) + 5
    assert 512 * stat.st_blocks >= stat.st_size


def test_an_interrupt_while_collecting_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "served", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(model_folder(tmp_path / "model"), text)
    assert files_in(tmp_path) == []


def test_other_unfinished_trainings_are_named(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, steps=5)
    (stale,) = (p for p in tmp_path.iterdir() if p.name.startswith("."))
    assert (
        sum(f.stat().st_size for f in stale.rglob("*.bin")) == LAYER + 3 * HIDDEN
    )  # layer 0: inputs, targets, both streams
    with pytest.warns(UserWarning, match=f"unfinished trainings of model.safetensors .* hold 0.00 GB.*{stale.name}"):
        trained(folder, text, steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(folder, text, steps=5)  # resumes its own
    assert files_in(tmp_path) == ["model.safetensors", "model.safetensors.md"]


# ------------------------------------------------------------------ memory


def peak(call: Any) -> int:
    """Peak bytes of tensors."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


SPEC = LayerSpec(4, 2, 16, 0.3, Policy.H2O, 8, 8, 0, True, 16, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "count", "length", "width"),
    [
        (SPEC, 24, 128, 64),
        (replace(SPEC, window=64), 24, 128, 64),
        (replace(SPEC, query_heads=8, kv_heads=1, policy=Policy.SINK), 12, 256, 128),
        (replace(SPEC, kv_heads=4, head_dim=8, policy=Policy.TOVA, heavy=15, recent=1), 3, 256, 32),
        (replace(SPEC, query_heads=2, kv_heads=1, head_dim=32), 64, 128, 64),  # the sequences outweigh the rest
        (replace(SPEC, slot_dtype="int8"), 24, 128, 64),
        (replace(SPEC, kv_heads=4, head_dim=8, slot_dtype="int8"), 64, 128, 64),
        (replace(SPEC, query_heads=2, kv_heads=1, head_dim=32, slot_dtype="int8"), 64, 128, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_estimate(spec: LayerSpec, count: int, length: int, width: int, dtype: torch.dtype) -> None:
    heads = spec.query_heads + 2 * spec.kv_heads
    activations = torch.randn(count, heads, length, spec.head_dim).to(dtype)
    addition = Addition(torch.randn(spec.query_heads * spec.head_dim, width), None, None, torch.nn.Identity())
    targets = torch.randn(count, length, width).to(dtype)

    def fitted() -> None:
        ready = fit.prepare(activations, targets, spec, addition, "cpu")
        parts = ready.rows(slice(0, count - 1)), ready.rows(slice(count - 1, None))
        fit.fit(*parts, "exp", 8, 128, fit.Fit(steps=2), 0, lambda _: None)

    estimate = fit.memory(spec, width, 128, activations.shape, dtype.itemsize, "cpu")
    assert estimate / 1.5 < peak(fitted) < estimate


def test_too_little_memory_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(running, "free_memory", lambda device: 1000)
    with pytest.raises(LessExportError, match=r"takes 0\.00 GB of memory, and 0\.00 GB are free: use fewer --seqs"):
        trained(folder, text)
    assert files_in(tmp_path) == []


def test_what_fitting_takes_is_said_and_must_be_free(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, progress = model_folder(tmp_path / "model"), RecordedProgress()
    trained(folder, text, steps=1, progress=progress)
    (line,) = (x for x in progress.lines if "of memory" in x)
    assert line.startswith("2 layers, 9 sequences: up to 0.00 GB of activations on disk, and 0.00 GB of memory beside")
    most = fit.memory(replace(SPEC, head_dim=8), 32, 8, torch.Size((9, 8, LENGTH, 8)), 4, "cpu")
    monkeypatch.setattr(running, "free_memory", lambda device: most - 1)
    with pytest.raises(LessExportError, match="use fewer --seqs"):
        trained(folder, text, steps=1)
    monkeypatch.setattr(running, "free_memory", lambda device: most)
    trained(folder, text, steps=1)


def test_saved_bytes_are_those_of_gradients() -> None:
    """The input of a square once however often it is used, a weight's input, and no weight."""
    layer = torch.nn.Linear(8, 4, bias=False)
    x, other = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    assert resources.saved_bytes(lambda: (x * x + x**2).sum(), layer) == 16 * 8 * 4
    assert resources.saved_bytes(lambda: (x * other).sum(), layer) == 2 * 16 * 8 * 4
    assert resources.saved_bytes(lambda: layer(x).sum(), layer) == 16 * 8 * 4
    assert resources.saved_bytes(lambda: (x + other).sum(), layer) == 0


def test_memory_estimate_of_tuning(tmp_path: Path) -> None:
    """Of a longest prefix four times the shortest."""
    model = model_folder(tmp_path / "model", hidden_size=128, intermediate_size=256, max_position_embeddings=1024)
    source = resolve(str(model))
    opened = open_model(source, ExportConfig(budget="16", max_distance="none"), rank=4)
    plan, decoder = opened.plan, LayerwiseDecoder(source.load(torch.float32), opened.plan)
    constants = {i: Centring.none(s.kv_heads, s.head_dim) for i, s in enumerate(plan)}
    maps, train = random_kernels(plan, range(2), 4, 16).layers, torch.randint(3, 300, (3, 512))
    recipe = end_to_end.Tuning(steps=3, lengths=(0.5, 2.0), positions=24, spread=24)
    estimate = end_to_end.memory(decoder, train, 256, plan, maps, recipe, constants, ())

    def tuned() -> None:
        end_to_end.tune(decoder, train, train[:1], 256, plan, maps, recipe, 0, Silent(), None, constants)

    assert estimate / 3 < peak(tuned) < 1.2 * estimate


def test_what_tuning_takes_is_said_and_must_be_free(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, progress = model_folder(tmp_path / "model"), RecordedProgress()
    options = {"steps": 1, "end_to_end": True, "tune_steps": 1}
    trained(folder, text, **options, progress=progress)
    (line,) = (x for x in progress.lines if "tuned together" in x)
    assert line.startswith("about 0.00 GB of memory beside the model")
    monkeypatch.setattr(end_to_end, "memory", lambda *_: 1 << 50)
    with pytest.raises(LessExportError, match=r"takes about 1125899\.91 GB of memory, .* or --no-end-to-end"):
        trained(folder, text, **options | {"seed": 1})
    assert not [name for name in files_in(tmp_path) if name.startswith(".")], "nothing is left"


def test_free_memory_is_a_number() -> None:
    assert 100 << 20 < (running.free_memory("cpu") or 0) < 1 << 44
    assert running.free_memory("mps") is None


def test_the_model_is_loaded_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda *args: loads.append(1) or load(*args))
    trained(model_folder(tmp_path / "model"), text, steps=1, slots="int8", end_to_end=True, tune_steps=1)
    assert len(loads) == 1


# ------------------------------------------------------------------ results and input


def test_harmful_steps_are_undone(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model")
    start, _ = trained(folder, text, steps=0, layers="0")
    want = Kernels.load(start)
    monkeypatch.setattr(fit.Fit, "rate_at", lambda self, step: 20.0)
    file, reports = trained(folder, text, steps=5, layers="0")
    assert all(r.less == r.start for r in reports)
    got = Kernels.load(file).tensors()
    assert got.keys() == want.tensors().keys() != set()
    assert all(torch.equal(x, got[n]) for n, x in want.tensors().items())


def test_a_text_counts_once(text: Path, tmp_path: Path) -> None:
    """Otherwise training would see validation text."""
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_bytes(text.read_bytes())
    other.write_text("A cat. " + text.read_text())
    sources, again = data.distinct(data.read([str(text), str(same), str(other), str(text)]))
    assert ([s.name for s in sources], again) == (["text.txt", "other.txt"], ["same.txt", "text.txt"])
    folder, out = model_folder(tmp_path / "model"), tmp_path / "k.safetensors"
    with pytest.warns(UserWarning, match="--data same.txt: ignored, same text as another source"):
        job.train(str(folder), out, [str(text), str(same)], budget="8", seq_len=LENGTH, seqs=4, steps=0)
    assert [x["name"] for x in Kernels.load(out).provenance["data"]] == ["text.txt"]


def test_sequences_longer_than_the_model_knows(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", max_position_embeddings=64)
    with pytest.warns(UserWarning, match="--seq-len 65 is past the 64 positions the model was trained for"):
        trained(folder, text, steps=0, seq_len=65)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(folder, text, steps=0, seq_len=64)
        _, _ = trained(folder, text, steps=0, seq_len=None)
    assert Kernels.load(tmp_path / "model.safetensors").provenance["sequences"]["length"] == 64
    sizes = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    learned = bundles.checkpoint(tmp_path / "learned")
    GPT2LMHeadModel(sizes).save_pretrained(learned)
    with pytest.raises(UsageError, match="--seq-len 65 is more than the 64 positions that the model has"):
        trained(learned, text, steps=0, seq_len=65)


def test_processes_wait_as_long_as_a_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: requests.update(options))
    Processes(0, 2).join()
    assert requests["timeout"].days >= 7


def test_nothing_is_removed_before_all_have_read_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes wait for each other between reading the finished layers and joining them."""
    events: list[str] = []
    load, rmtree = Kernels.load, shutil.rmtree
    monkeypatch.setattr(Kernels, "load", lambda path: events.append("read") or load(path))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: events.append("removed") or rmtree(*args, **options))
    monkeypatch.setattr(Processes, "wait", lambda self: events.append("waited"))
    trained(model_folder(tmp_path / "model"), text, steps=0)
    assert events[-5:] == ["read", "read", "waited", "removed", "waited"]


def test_hashing_is_reported(text: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    trained(model_folder(tmp_path / "model"), text, steps=0, progress=progress)
    assert progress.lines[0].startswith("hashing 0.00 GB of weights")
