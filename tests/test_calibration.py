"""Calibration of int8 slots: the constants, the command, and where exports, trainings and evaluations measure them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from less_export import calibrate, open_bundle
from less_export.bundle.artifact import Bundle
from less_export.config import ExportConfig
from less_export.contract import LayerSpec, Policy
from less_export.errors import ModelError
from less_export.evaluation import perplexity, variants
from less_export.evaluation.subject import Subject, open_subject
from less_export.exporter import calibrate as exporter_calibrate
from less_export.exporter.calibrate import calibrated
from less_export.hf import calibration, data, running, sources
from less_export.hf.model import open_model
from less_export.hf.surgery import discover, less_attention
from less_export.less import int8, simulate
from less_export.less.feature_maps import Kernels
from less_export.progress import Silent
from less_export.training import end_to_end, fit, job
from less_export.training.additions import Addition

from . import bundles
from .bundles import Run, refused
from .test_training_resources import RecordedProgress
from .training_support import OPTIONS, model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]


# ------------------------------------------------------------------ the constants


def keys(**sizes: int) -> torch.Tensor:
    """Keys [1,2,N,16] with channels far from zero, of sizes from 1 to 8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, sizes.get("count", 500), 16, generator=generator)
    return x * torch.linspace(1, 8, 16) + torch.linspace(-300, 300, 16)


def test_mean_and_std_do_not_depend_on_the_pieces() -> None:
    x = keys()
    whole, pieces = calibration.Moments(2, 16), calibration.Moments(2, 16)
    whole.add(x)
    for piece in x.split([1, 99, 250, 150], 2):
        pieces.add(piece)
    for moments in (whole, pieces):
        mean, std = moments.centring()
        torch.testing.assert_close(mean, x.double().mean((0, 2)).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(std, x.double().std((0, 2), correction=0).float(), rtol=1e-6, atol=1e-6)


def test_a_mean_that_is_large_does_not_swallow_the_spread() -> None:
    x = torch.randn(1, 1, 1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = calibration.Moments(1, 4)
    for piece in (x + 1e8).split(10, 2):
        moments.add(piece)
    std = (moments._squares / 1000).sqrt()
    torch.testing.assert_close(std, x.std((0, 2), correction=0), rtol=1e-6, atol=0)


def test_channels_that_hardly_vary_are_clamped() -> None:
    """A constant channel, and one that varies a thousandth as much as the others."""
    x = keys()
    x[..., 0], x[..., 1] = 3.0, 1e-3 * torch.randn(x.shape[:3], generator=torch.Generator().manual_seed(1))
    moments = calibration.Moments(2, 16)
    moments.add(x)
    mean, std = moments.centring()
    rms = x.double().std((0, 2), correction=0).square().mean(-1).sqrt()
    for channel in (0, 1):
        torch.testing.assert_close(std[:, channel], (calibration.SMALLEST_SHARE * rms).float())
    # What another text does in them does not ruin the other channels.
    x[..., 0] += rms.float().mean()
    error = int8.rounded_keys(x, int8.Centring(mean, std)) - x
    assert float(error[..., 2:].square().mean()) < 1e-3 * float(rms.square().mean())


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e30])
def test_heads_that_do_not_vary(value: float) -> None:
    """Keys that are constant throughout, and others where such were calibrated, make no NaN or inf."""
    moments = calibration.Moments(1, 4)
    moments.add(torch.full((1, 1, 50, 4), value))
    centring = moments.centring()
    assert bool((centring.std > 0).all())
    for k in (torch.full((1, 1, 3, 4), value), torch.full((1, 1, 3, 4), value + 1.0), torch.zeros(1, 1, 3, 4)):
        assert bool(int8.rounded_keys(k, centring).isfinite().all())


def test_a_models_keys_are_measured(source: Path) -> None:
    """The same moments as from the keys of every layer, as its activations are collected for training."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    layers = discover(model)
    ids = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    measured = calibration.measure(model, ids, layers, Silent())
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(layers))}

    def record(call: Any) -> torch.Tensor:
        seen[call.layer].append(call.k)
        return simulate.full(call.q, call.k, call.v, layers[call.layer])

    with torch.no_grad(), less_attention(model, record):
        model(input_ids=ids, position_ids=torch.arange(40).expand(3, -1), use_cache=False)
    assert measured.keys() == seen.keys()
    for i, centring in measured.items():
        k = torch.cat(seen[i]).double()
        torch.testing.assert_close(centring.mean, k.mean((0, 2)).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(centring.std, k.std((0, 2), correction=0).float(), rtol=1e-4, atol=1e-5)


def test_nan_in_keys_names_the_layer(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="the keys of layer 1 hold NaN or inf"):
        calibration.measure(model, torch.ones(1, 4, dtype=torch.long), discover(model), Silent())


# ------------------------------------------------------------------ the command


def test_the_command(source: Path, kernel_file: Path, tmp_path: Path, run: Run) -> None:
    """Centring alone; and beside kernels, which stay as they are."""
    file = tmp_path / "text.txt"
    file.write_text(data.shipped("held_out").text[:9000])
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    options = ("--data", file, "--seqs", 3, "--seq-len", 50)
    result = run("calibrate", source, "--out", alone, *options)
    assert result.code == 0, result.err
    assert result.out.strip() == str(alone)
    kernels = Kernels.load(alone)
    assert (dict(kernels.layers), sorted(kernels.centring)) == ({}, [0, 1])
    assert kernels.provenance["model"] == source.name
    facts = kernels.provenance["centring"]
    assert (facts["data"][0]["name"], facts["sequences"]["count"], facts["sequences"]["length"]) == ("text.txt", 3, 50)
    assert run("calibrate", source, "--out", both, "--kernels", kernel_file, *options).code == 0
    given, joined = Kernels.load(kernel_file), Kernels.load(both)
    assert joined.layers.keys() == given.layers.keys()
    assert all(torch.equal(joined.tensors()[n], x) for n, x in given.tensors().items() if n.startswith("layers"))
    assert all(torch.equal(joined.tensors()[n], x) for n, x in kernels.tensors().items())
    assert run("calibrate", source, "--out", both, "--kernels", both, "--seqs", 1, "--data", file).code == 0
    assert not torch.equal(Kernels.load(both).centring[0].mean, kernels.centring[0].mean), "its own are replaced"


def test_what_calibrate_refuses(source: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "c.safetensors"
    refused(run("calibrate", source, "--out", tmp_path), "is no file: give the name of a .safetensors file")
    refused(run("calibrate", source, "--out", out, "--seqs", 0), "--seqs must be at least 1")
    refused(run("calibrate", source, "--out", out, "--seq-len", 0), "--seq-len must be at least 1")
    refused(run("calibrate", source, "--out", out, "--data", tmp_path / "none"), "No such file")
    refused(run("calibrate", source, "--out", out, "--kernels", tmp_path / "none"), "no kernel file at")
    short = tmp_path / "short.txt"
    short.write_text("Alice")
    refused(run("calibrate", source, "--out", out, "--data", short), "fewer than one sequence")
    bare = bundles.copy(source, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    refused(run("calibrate", bare, "--out", out), "calibration of bare needs one")
    assert not out.exists()


# ------------------------------------------------------------------ exports


def prepared(model: Path, **options: Any) -> tuple[Kernels, list[str], list[str]]:
    """The kernels of an export with int8 slots, its warnings and its progress."""
    source, said = sources.resolve(str(model)), RecordedProgress()
    opened = open_model(source, ExportConfig(slots="int8", max_distance="none", **options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels = calibrated(opened, source.tokenizer(), said)
    return kernels, [str(w.message) for w in caught], said.lines


def test_an_export_calibrates_what_is_not(source: Path, tmp_path: Path, run: Run) -> None:
    """The constants are those of the command, and reach the graph."""
    one = ("--num-hidden-layers", 1, *bundles.QUICK_OPTIONS)  # half the time
    result = run(source, "--out", tmp_path / "b", *one, "--slots", "int8", "--max-distance", 99)
    assert result.code == 0, result.err
    assert result.err.count("calibrating int8 slots on the text that ships with less-export") == 1
    want = Kernels.load(calibrate(str(source), tmp_path / "c.safetensors"))
    facts = Bundle.open(tmp_path / "b").manifest.kernels
    assert facts is not None
    got = Kernels.load(tmp_path / "b" / facts.file)
    assert got.tensors().keys() == {"centring.0.mean", "centring.0.std", "rotary.0"}
    assert all(torch.equal(want.tensors()[n], x) for n, x in got.tensors().items() if n != "rotary.0")
    assert got.provenance["centring"] == want.provenance["centring"]
    ids = np.random.default_rng(0).integers(2, 300, (1, 40))
    logits = {}
    for name in ("ort", "torch"):
        backend = open_bundle(tmp_path / "b", name).backend
        backend.open(1)
        logits[name] = np.concatenate([backend.step(ids[:, i : i + 8]) for i in range(0, 40, 8)], 1)
    assert np.abs(logits["ort"] - logits["torch"]).max() < 1e-4 * np.abs(logits["torch"]).max()


def test_an_export_measures_only_what_is_missing(source: Path, kernel_file: Path, tmp_path: Path) -> None:
    """Trained kernels, and constants that there are, stay as they are."""
    measured, caught, said = prepared(source)
    assert sorted(measured.centring) == [0, 1]
    assert len(said) == 1
    assert caught == []
    beside, _, _ = prepared(source, kernels=kernel_file)
    given = Kernels.load(kernel_file)
    assert {n: x for n, x in beside.tensors().items() if n.startswith("layers")}.keys() == given.tensors().keys()
    assert all(torch.equal(beside.tensors()[n], x) for n, x in {**given.tensors(), **measured.tensors()}.items())
    own = int8.Centring(torch.ones(2, 8), torch.ones(2, 8))
    Kernels({}, {}, {1: own}).save(tmp_path / "k.safetensors")
    joined, _, _ = prepared(source, kernels=tmp_path / "k.safetensors")
    assert torch.equal(joined.centring[0].mean, measured.centring[0].mean)
    assert torch.equal(joined.centring[1].mean, own.mean)
    joined.save(tmp_path / "k.safetensors")
    assert prepared(source, kernels=tmp_path / "k.safetensors")[2] == []
    first, _, _ = prepared(source, num_hidden_layers=1)
    assert torch.equal(first.centring[0].std, measured.centring[0].std)
    assert sorted(first.centring) == [0]


def test_exports_that_cannot_calibrate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = bundles.copy(source, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    reasons = {"the model has no tokenizer": prepared(bare)}
    monkeypatch.setattr(exporter_calibrate, "_MOST_PARAMETERS", 10)
    reasons["billion parameters, and running it takes long"] = prepared(source)
    monkeypatch.setattr(running, "free_memory", lambda device: 1000)
    reasons["running the model takes 0.0 GB of memory, and 0.0 GB are free"] = prepared(source)
    for reason, (kernels, (warning,), said) in reasons.items():
        assert warning.startswith("int8 slots are not calibrated, which costs quality")
        assert reason in warning
        assert "calibrate with less-export calibrate, and give its file with --kernels" in warning
        assert dict(kernels.centring) == {}
        assert said == []


# ------------------------------------------------------------------ trainings


def test_training_with_int8_slots(text: Path, tmp_path: Path) -> None:
    """Layers are fitted and judged with int8 slots, centred by what the same run measured, in every stage."""
    folder, used = model_folder(tmp_path / "model"), []
    with pytest.MonkeyPatch.context() as patch:
        real, tune = simulate.slot_keys, end_to_end.tune

        def slot_keys(k: torch.Tensor, layer: LayerSpec, centring: int8.Centring | None = None) -> torch.Tensor:
            used.append((stage[-1], layer.int8, centring))
            return real(k, layer, centring)

        stage = ["costs"]
        patch.setattr(end_to_end, "tune", lambda *args, **options: stage.append("end to end") or tune(*args, **options))
        real_fit = fit.prepare
        patch.setattr(fit, "prepare", lambda *args: stage.append("fit") or real_fit(*args))
        patch.setattr(simulate, "slot_keys", slot_keys)
        file, reports = trained(
            folder, text, steps=5, slots="int8", layer_budgets="auto", end_to_end=True, tune_steps=3
        )
    kernels = Kernels.load(file)
    assert kernels.provenance["slot_dtype"] == "int8"
    assert sorted(kernels.centring) == [0, 1]
    assert kernels.provenance["centring"]["sequences"]["count"] == 8
    assert {name for name, _, _ in used} == {"costs", "fit", "end to end"}
    means = [x.mean for x in kernels.centring.values()]
    for _, rounds, centring in used:
        assert rounds
        assert centring is not None
        assert any(torch.equal(centring.mean, mean) for mean in means)
    plain, others = trained(folder, text, steps=5, slots="model")
    assert Kernels.load(plain).provenance["slot_dtype"] == "model"
    assert dict(Kernels.load(plain).centring) == {}
    assert [r.sparse for r in reports] != [r.sparse for r in others]


@pytest.mark.parametrize("slots", ["model", "int8"])
def test_fitting_computes_the_operators_output(slots: Any) -> None:
    """What a layer's kernels are fitted through is the simulation, which is the operator."""
    layer = LayerSpec(4, 2, 8, 0.4, Policy.H2O, 5, 6, 0, True, 11, 3, None, slots)
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 8, 40, 8, generator=generator)
    activations[:, 4:6, :, 2] += 20
    moments = calibration.Moments(2, 8)
    moments.add(activations[:, 4:6])
    projection = torch.randn(32, 12, generator=generator)
    addition = Addition(projection, None, None, torch.nn.Identity())
    prepared = fit.prepare(activations, torch.zeros(2, 40, 12), layer, addition, "cpu", moments.centring())
    feature_map = fit.begin(prepared, "exp", 3, 4, generator)
    q, k, v = activations.split([4, 2, 2], 1)
    queries = torch.arange(40)
    got, _ = prepared.predict(feature_map, queries)
    features = feature_map.log_phi(q), feature_map.psi(k)
    want = simulate.attend(q, k, v, layer, features, 1, moments.centring())
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2) @ projection, rtol=1e-4, atol=1e-4)
    naive = simulate.attend(q, k, v, layer, features, 1)
    assert torch.equal(naive, want) == (slots == "model"), "the constants are used"


def test_an_interrupted_training_resumes_with_the_same_slots_only(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, steps=5, slots="int8")
    fitted, measured = [], []
    real_fit, real_measure = fit.fit, calibration.measure
    monkeypatch.setattr(fit, "fit", lambda *args: fitted.append(1) or real_fit(*args))
    monkeypatch.setattr(calibration, "measure", lambda *args: measured.append(1) or real_measure(*args))
    (left,) = tmp_path.glob(".model.safetensors.*")
    trained(folder, text, steps=5, slots="model")
    assert (len(fitted), len(measured)) == (2, 0)
    trained(folder, text, steps=5, slots="int8")
    assert (len(fitted), len(measured)) == (2, 0), "all was done"
    assert not left.exists()


def test_damaged_constants_are_measured_again(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    whole = Kernels.load(trained(folder, text, steps=2, slots="int8")[0]).tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_fit_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(folder, text, steps=2, slots="int8")
    (file,) = tmp_path.glob(".model.safetensors.*/centring.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = Kernels.load(trained(folder, text, steps=2, slots="int8")[0]).tensors()
    assert all(torch.equal(x, whole[n]) for n, x in again.items())


def test_the_command_trains_with_int8_slots(source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "k.safetensors"
    result = run("train", source, "--data", text, "--out", out, *OPTIONS, "--slots", "int8")
    assert result.code == 0, result.err
    assert "calibrating int8 slots" in result.err
    assert len(Kernels.load(out).centring) == 2


# ------------------------------------------------------------------ evaluations


@pytest.fixture(scope="module")
def subject(source: Path, kernel_file: Path) -> Subject:
    return open_subject(str(source), ExportConfig(budget="12", slots="int8", max_distance="none"), kernel_file, True)


@pytest.mark.parametrize("chunk", [1, 9])
@pytest.mark.parametrize("kind", variants.KINDS)
def test_the_simulation_is_the_stream(kind: variants.Kind, chunk: int, subject: Subject) -> None:
    assert sorted(subject.kernels.centring) == [0, 1]
    (variant,) = variants.build([kind], subject.plan, subject.kernels, 40, "float32")
    assert {s.slot_dtype for s in variant.plan} == {"model" if kind in ("full", "sparse16+bytes") else "int8"}
    ids = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(10, 39, 3)
    simulated = perplexity.simulated(subject.model, ids, variant, chunk, positions)
    backend = subject.backend(variant, "torch", 2, chunk)
    streamed = perplexity.streamed(backend, ids.numpy(), chunk, positions.tolist())
    np.testing.assert_allclose(simulated, streamed, rtol=1e-4)


def test_baselines_of_the_same_bytes() -> None:
    """By hand: int8 keys and values with a scale each, 16-bit psi, f32 H and z, scores and positions."""
    spec = LayerSpec(8, 2, 128, 0.1, Policy.H2O, 25, 25, 0, True, 50, 8, None, "int8")
    token = 2 * (2 * 128 + 2 * 4 + 4 + 4)
    added = 2 * (8 * 128 * 4 + 8 * 4 + 50 * 8 * 2)
    kernels = replace(Kernels({}, {}), layers={0: object()})  # type: ignore[dict-item]
    built = {v.kind: v for v in variants.build(variants.KINDS, [spec], kernels, 1024, "bfloat16")}
    less = built["less"].state_bytes("bfloat16")
    assert less == 50 * token + added
    assert built["sparse+bytes"].plan[0].capacity == 50 + -(-added // token)
    wide = 2 * (2 * 128 * 2 + 4 + 4)
    same = built["sparse16+bytes"]
    assert same.plan[0].capacity == -(-less // wide)
    assert same.plan[0].slot_dtype == "model"
    assert less <= same.state_bytes("bfloat16") < less + wide
    assert variants.kinds_for([spec], kernels) == list(variants.KINDS)
    plain = replace(spec, slot_dtype="model")
    assert variants.kinds_for([plain], Kernels({}, {})) == ["full", "sparse", "sparse+4", "sparse+bytes"]


def test_the_table_of_int8_slots(source: Path, kernel_file: Path, text: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--budget", 12, "--slots", "int8", "--seqs", 2, "--seq-len", 40, "--positions", 5)
    file = tmp_path / "x.json"
    result = run("eval", source, "--kernels", kernel_file, "--data", text, *arguments, "--json", file)
    assert result.code == 0, result.err
    assert "calibrating int8 slots" in result.err
    assert "trained with --slots" not in result.err, "random kernels were not trained"
    rows = {r["kind"]: r for r in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(variants.KINDS)
    # Keys and values of 8 channels take 2 * 8 bytes and two scales instead of 2 * 2 * 8.
    assert rows["sparse"]["state_bytes"] == 2 * 2 * 12 * (2 * 8 + 2 * 4 + 4 + 4)
