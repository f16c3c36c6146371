"""Exports with a largest distance: against Hugging Face, at any length, clamped, saved, evaluated and refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from less_export import calibrate, open_bundle
from less_export.bundle.artifact import Bundle
from less_export.config import ExportConfig
from less_export.contract import Contract, StateBits, limits_distances
from less_export.errors import BackendError, KernelError, UsageError
from less_export.evaluation import perplexity
from less_export.evaluation.subject import open_subject
from less_export.evaluation.variants import Variant, build
from less_export.exporter import targets
from less_export.hf import calibration, recipes
from less_export.hf.model import OpenModel, open_model
from less_export.hf.sources import resolve
from less_export.less import state16
from less_export.less.feature_maps import Kernels, random_kernels
from less_export.less.rotary import table_of
from less_export.progress import Silent
from less_export.runtime.row_state import RowState
from less_export.runtime.torch import TorchBackend

from . import bundles, families
from .families import CONTEXT, Tiny
from .marks import exhaustive_but
from .sharing import once

pytest_plugins = ["tests.bundles"]

#: Chunks past windows and small budgets, 46 tokens.
STEPS = (16, 9, 1, 1, 16, 1, 1, 1)
#: Largest distance of the bundles that clamp, and of their siblings that do not.
NEAR, FAR = 7, 60
FAMILIES = ("llama", "gemma3", "glm", "gpt_neox", "cohere2", "falcon_new", "llama3_rope", "yarn_rope")
FAMILIES += ("rope_per_layer_kind", "gemma4", "smollm3", "qwen3", "phi")


def exported(shared: Path, family: str, name: str, **options: Any) -> Tiny:
    checkpoint = once(shared / f"distance-{family}", lambda folder: families.save(family, folder))
    make = {"logits": "all", **options}
    out = once(shared / f"distance-{family}-{name}", lambda path: families.export(checkpoint, path, **make))
    return Tiny(checkpoint, out)


def exact(shared: Path, family: str) -> Tiny:
    return exported(shared, family, "full", policy="full", context=CONTEXT, max_distance=FAR)


# ------------------------------------------------------------------ what a bundle computes


@pytest.mark.parametrize("family", exhaustive_but(FAMILIES, "gemma3", "glm"))
def test_below_the_largest_distance_it_is_hugging_face(family: str, shared: Path) -> None:
    tiny, ids = exact(shared, family), families.text(families.ROWS, sum(STEPS))
    expected, own = families.truth(families.load(tiny.checkpoint), ids)
    logits = np.concatenate(families.feed(tiny.backend("ort"), ids, STEPS), 1)
    assert families.relative(logits, expected) < 1e-6 + 4 * own
    contract = tiny.opened.manifest.artifacts[0].contract
    assert contract.position_limit is None
    nope = {"smollm3": [1], "cohere2": [1]}.get(family, [])
    want = [None if i in nope else min(FAR, s.window or FAR) for i, s in enumerate(contract.layers)]
    assert [s.max_distance for s in contract.layers] == want


def test_beyond_it_slots_are_seen_nearer(shared: Path) -> None:
    """The first tokens equal Hugging Face, later ones do not, and both backends agree on them."""
    tiny = exported(shared, "glm", "near", policy="full", context=CONTEXT, max_distance=NEAR)
    ids = families.text(families.ROWS, sum(STEPS))
    expected, own = families.truth(families.load(tiny.checkpoint), ids)
    runs = [np.concatenate(families.feed(tiny.backend(n), ids, [1] * 24), 1) for n in ("ort", "torch")]
    unit = np.abs(expected).max()
    error = np.abs(runs[0] - expected[:, :24]).max((0, 2)) / unit
    assert error[: NEAR + 1].max() < 1e-6 + 4 * own
    assert error[NEAR + 1 :].min() > 1e-3
    assert families.relative(*runs) < 1e-5


@pytest.mark.parametrize(("state", "starts"), [(32, (0, 1000, 2**30)), (16, (0, 3 * state16.PERIOD, 2**30))])
@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_length_of_the_text_does_not_matter(
    backend: str, state: StateBits, starts: tuple[int, ...], shared: Path
) -> None:
    """A row that begins at any position, evicts and clamps computes the same, bit for bit on one backend; with a state
    of 16 bits, up to the dither's period."""
    tiny = evicting(shared, state)
    ids = families.text(1, sum(STEPS))
    engine = tiny.backend(backend, len(starts))
    logits = []
    for at in range(0, sum(STEPS), 8):
        chunk = ids[:, at : at + 8]
        engine.past_length[:] = [s + at for s in starts]
        logits.append(engine.step(np.repeat(chunk, len(starts), 0), np.full(len(starts), chunk.shape[1])))
    first, *others = np.concatenate(logits, 1)
    assert all(np.array_equal(first, other) for other in others)
    assert families.evicted(engine) > 10


def evicting(shared: Path, state: StateBits = 16) -> Tiny:
    """h2o with kernels, int8 slots and a clamp below the budget."""

    def options(folder: Path) -> Path:
        model = families.build("gemma3")
        return families.kernels(model, folder, sliding=True)

    file = once(shared / "distance-kernels.safetensors", options)
    return exported(
        shared, "gemma3", f"h2o-{state}", policy="h2o", budget=str(families.BUDGET), context=CONTEXT, kernels=file,
        max_distance=NEAR + 4, slots="int8", state=state,
    )  # fmt: skip


def test_backends_agree(shared: Path) -> None:
    tiny, ids = evicting(shared), families.text(families.ROWS, sum(STEPS))
    runs = [np.concatenate(families.feed(tiny.backend(n), ids, STEPS), 1) for n in ("ort", "torch")]
    assert families.relative(*runs) < 0.02  # a code that rounds to its neighbour
    assert families.relative(runs[0][:, :16], runs[1][:, :16]) < 1e-5


def test_a_saved_row_continues_elsewhere(shared: Path, tmp_path: Path) -> None:
    tiny, ids = exact(shared, "gemma3"), families.text(1, 20)
    first = tiny.backend("ort", 1)
    first.step(ids[:, :16])
    first.read_row(0).save(tmp_path / "row")
    want = first.step(ids[:, 16:])
    second = tiny.backend("torch", 2)
    second.write_row(1, RowState.load(tmp_path / "row"))
    got = second.step(ids[[0, 0], 16:], np.array([0, 4]))
    assert families.relative(got[1], want[0]) < 1e-5


def test_tables_are_in_the_kernel_file(shared: Path) -> None:
    """One for each kind of layer, as long as the distance and the chunk need; without kernels, nothing else."""
    bundle = exact(shared, "gemma3").opened
    facts = bundle.manifest.kernels
    assert facts is not None
    assert (facts.parametrisation, facts.layers) == (None, ())
    tables = Kernels.load(bundle.path(facts.file)).rotary
    assert [(t.layers, t.order, tuple(t.angles.shape)) for t in tables] == [
        ((0,), None, (16, 16)),  # it slides
        ((1,), None, (FAR + 1, 16)),
    ]
    artifact = bundle.manifest.artifacts[0]
    assert limits_distances(TorchBackend(bundle, artifact).contract.layers)
    farther = tuple(replace(s, max_distance=FAR + 1) for s in artifact.contract.layers)
    with pytest.raises(BackendError, match="kernel file has another rotary table for layer 0"):
        TorchBackend(bundle, replace(artifact, contract=replace(artifact.contract, layers=farther)))


# ------------------------------------------------------------------ with text: commands, evaluation, calibration


@pytest.fixture(scope="module")
def limited(source: Path, shared: Path) -> Path:
    """A bundle that clamps, checked by the export."""
    return once(
        shared / "limited", lambda out: bundles.bundle(source, out, max_distance=20, validate=True, logits="all")
    )


def test_info_names_distance_and_tables(limited: Path, run: bundles.Run) -> None:
    shown = run("info", limited)
    assert shown.code == 0
    assert all(text in shown.out for text in ("distance", " 20 ", "rotary tables"))


def test_no_warning_past_the_trained_length(limited: Path) -> None:
    """The model was trained for 256 positions, and sees no distance beyond 36."""
    contract = Bundle.open(limited).manifest.artifacts[0].contract
    assert (contract.trained_length, contract.known_length()) == (256, None)
    farther = replace(contract, layers=tuple(replace(s, max_distance=241) for s in contract.layers))
    assert farther.known_length() == 256
    engine = open_bundle(limited, backend="ort").backend
    engine.open(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(17):
            engine.step(np.full((1, 16), 7))


def test_simulation_is_streaming(source: Path) -> None:
    subject = open_subject(str(source), ExportConfig(budget="12", max_distance=20), None, True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 300, (2, 60)))
    positions = torch.arange(30, 59)
    (full,) = build(["full"], subject.plan, subject.kernels, 60, "float32")
    absolute = open_subject(str(source), ExportConfig(budget="12", max_distance="none"), None, True)
    for variant in (full, Variant("sparse", subject.plan, subject.kernels)):
        tables = subject.rotary_tables(variant.plan, 60)
        fast = perplexity.simulated(subject.model, ids, variant, 4, positions, rotary=tables)
        slow = perplexity.streamed(subject.backend(variant, "torch", 2, 4), ids.numpy(), 4, positions.tolist())
        np.testing.assert_allclose(fast, slow, rtol=1e-4)
        if variant.kind == "full":  # at true distances, whatever the limit
            (other,) = build(["full"], absolute.plan, absolute.kernels, 60, "float32")
            assert not limits_distances(other.plan)
            plain = perplexity.simulated(absolute.model, ids, other, 4, positions)
            np.testing.assert_allclose(fast, plain, rtol=1e-4)


def opened(source: Path, **options: Any) -> OpenModel:
    return open_model(resolve(str(source)), ExportConfig(**options))


def test_calibration_is_of_the_keys_in_slots(source: Path, tmp_path: Path) -> None:
    for name, options in (("plain", {"max_distance": "none"}), ("near", {"max_distance": 20})):
        calibrate(str(source), tmp_path / name, seqs=1, seq_len=64, device="cpu", **options)
    plain, near = (Kernels.load(tmp_path / n) for n in ("plain", "near"))
    assert (plain.centring_rotated, near.centring_rotated) == (True, False)
    assert not torch.allclose(plain.centring[1].mean, near.centring[1].mean, atol=1e-3)
    model = opened(source, max_distance=20)
    loaded = model.source.load(torch.float32)
    corpus, _ = calibration.shipped_corpus(lambda text: list(text.encode()), None, 64)
    measured = calibration.measure(loaded, corpus.ids[:1], model.layers, Silent(), model.rotary_tables(64))
    plainly = calibration.measure(loaded, corpus.ids[:1], model.layers, Silent())
    # Layer 0 sees the same input: lengths of pairs do not depend on rotation, but means of rotated keys are smaller.
    assert float(measured[0].mean.square().mean()) > float(plainly[0].mean.square().mean())
    unrotated = kernel_file(tmp_path / "kernels", rotated=False)
    with pytest.raises(UsageError, match="trained on unrotated queries and keys: drop --max-distance none"):
        calibrate(str(source), tmp_path / "no", kernels=unrotated, seqs=1, seq_len=64, max_distance="none")
    with pytest.warns(UserWarning, match="plain are not used: they were measured on rotated keys"):
        assert not opened(source, slots="int8", kernels=tmp_path / "plain", max_distance=20).kernels.centring
    with pytest.warns(UserWarning, match="near are not used: they were measured on unrotated keys"):
        assert not opened(source, slots="int8", kernels=tmp_path / "near", max_distance="none").kernels.centring


# ------------------------------------------------------------------ defaults and refusals


def kernel_file(path: Path, **provenance: Any) -> Path:
    Kernels(random_kernels(bundles.HEADS, [0, 1], 3, 6).layers, {"model": "x", **provenance}).save(path)
    return path


def test_trained_length_as_default(source: Path, tmp_path: Path) -> None:
    def distances(**options: Any) -> set[int | None]:
        return {s.max_distance for s in opened(source, **options).plan}

    assert distances(chunk=16) == {240}
    assert distances(chunk=200) == {128}
    assert distances(chunk=16, max_distance=9) == {9}
    assert distances(max_distance="none") == distances(policy="full") == {None}
    file = kernel_file(tmp_path / "k.safetensors")
    with pytest.warns(UserWarning, match=r"positions are absolute, because .* was trained on rotated queries and"):
        assert distances(kernels=file) == {None}
    families.save(nope, tmp_path / "nope")
    with pytest.warns(UserWarning, match=r"positions are absolute, because no layer has a rotary embedding"):
        assert {s.max_distance for s in opened(tmp_path / "nope").plan} == {None}
    families.save("gpt2", tmp_path / "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its positions end, which other messages say
        assert {s.max_distance for s in opened(tmp_path / "gpt2").plan} == {None}


def test_tables_of_sliding_layers_end_at_their_window(tmp_path: Path) -> None:
    """Each kind of rotary embedding has a table as long as its layers need."""
    families.save("gemma3", tmp_path / "gemma3")
    model = opened(tmp_path / "gemma3", chunk=4, max_distance=100)
    windows = {i: s.window for i, s in enumerate(model.layers)}
    assert {bool(w) for w in windows.values()} == {False, True}
    for i, s in enumerate(model.plan):
        assert s.max_distance == (min(100, windows[i]) if windows[i] else 100)
        kind = table_of(model.kernels.rotary, i)
        assert kind is not None
        assert len(kind.angles) == max(model.plan[j].max_distance or 0 for j in kind.layers) + 1


def test_recipes_show_it(run: bundles.Run) -> None:
    recipe = next(r for r in recipes.all_recipes() if r.name == "gemma3-270m")
    length = recipe.architecture["max_position_embeddings"]
    shown = {r["name"]: r["max_distance"] for r in json.loads(run("recipes", "--json").out)}
    assert shown["gemma3-270m"] == recipe.max_distance_tokens() == length - recipe.chunk
    longer = {**recipe.architecture, "max_position_embeddings": 1 << 20}
    assert replace(recipe, architecture=longer).max_distance_tokens() == 32768
    assert replace(recipe, max_distance=4321).max_distance_tokens() == 4321
    assert replace(recipe, max_distance="none").max_distance_tokens() is None
    with pytest.raises(UsageError, match=r"--max-distance must be from 1 to 1048576 tokens or none, not 0"):
        replace(recipe, max_distance=0)


@pytest.mark.parametrize("family", ["gpt2", "nope"])
def test_a_model_that_cannot(family: str, tmp_path: Path) -> None:
    reason = {"gpt2": "layer 0: its values depend on the position (a table of positions)",
              "nope": "no layer has a rotary embedding"}[family]  # fmt: skip
    make = {"gpt2": "gpt2", "nope": nope}[family]
    families.save(make, tmp_path / "model")
    with pytest.raises(UsageError) as refusal:
        opened(tmp_path / "model", max_distance=9)
    assert str(refusal.value) == f"--max-distance 9 is impossible: {reason}; give --max-distance none"


def nope() -> Any:
    """A SmolLM3 without positions in any layer."""
    import transformers as tr

    return tr.SmolLM3ForCausalLM(tr.SmolLM3Config(**families.ONE, no_rope_layers=[0]))


def test_kernels_of_rotated_queries_and_keys(source: Path, tmp_path: Path) -> None:
    """Those of earlier versions do not say so."""
    for name, facts in (("old", {}), ("new", {"rotated": True})):
        file = kernel_file(tmp_path / name, **facts)
        with pytest.raises(UsageError, match=f"distance 9 is impossible: .*{name} was trained on rotated queries and"):
            opened(source, kernels=file, max_distance=9)
        model = opened(source, kernels=file, max_distance="none")
        assert not [d for d in model.kernels.doubts(["x"], model.plan) if "rotated" in d]
    model = opened(source, kernels=kernel_file(tmp_path / "un", rotated=False), max_distance=9)
    assert not [d for d in model.kernels.doubts(["x"], model.plan) if "rotated" in d]
    model = opened(source, kernels=tmp_path / "un", max_distance="none")
    says = "the kernels were trained on unrotated queries and keys, not for --max-distance none: train again"
    assert says in model.kernels.doubts(["x"], model.plan)
    model = opened(source, max_distance=9, rank=None)
    old = Kernels.load(tmp_path / "old")
    absorbing = [replace(s, absorb=True, rank=3) for s in model.plan]
    says = "the kernels were trained on rotated queries and keys, not for --max-distance N: train again"
    assert says in old.doubts(["x"], absorbing)


# ------------------------------------------------------------------ the kernel file


def test_tables_in_a_kernel_file(source: Path, tmp_path: Path) -> None:
    model = opened(source, max_distance=9, chunk=4)
    assert model.kernels.rotary[0].layers == (0, 1)
    model.kernels.save(tmp_path / "k.safetensors")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert json.loads(file.metadata()["less_kernels"])["format_version"] == 3
    (table,) = Kernels.load(tmp_path / "k.safetensors").rotary
    assert (table.layers, table.order) == ((0, 1), None)
    assert torch.equal(table.angles, model.kernels.rotary[0].angles)
    assert table.angles.shape == (10, 8)
    with pytest.raises(KernelError, match="rotary table for layer 1 of another model"):
        model.kernels.check([bundles.HEADS[0]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"angles": torch.ones(4, 3)}, "rotary.0 has the wrong shape or dtype"),
        ({"angles": torch.ones(4, 4, dtype=torch.float64)}, "rotary.0 has the wrong shape or dtype"),
        ({"angles": torch.full((4, 4), torch.nan)}, "rotary.0 holds what is no cosine or sine"),
        ({"order": (0, 1, 1, 3)}, "the order of rotary.0 is no order of channels"),
        ({"order": (0, 1)}, "the order of rotary.0 is no order of channels"),
    ],
)
def test_damaged_tables(change: dict[str, Any], says: str, source: Path, tmp_path: Path) -> None:
    (table,) = opened(source, max_distance=3, chunk=4).kernels.rotary
    file = tmp_path / "k.safetensors"
    Kernels({}, {}, rotary=(replace(table, angles=torch.ones(4, 4)),)).save(file)
    assert len(Kernels.load(file).rotary) == 1
    Kernels({}, {}, rotary=(replace(table, **{"angles": torch.ones(4, 4), **change}),)).save(file)
    with pytest.raises(KernelError, match=says):
        Kernels.load(file)


def test_contract_of_a_limited_model(source: Path) -> None:
    contract = targets.contract(opened(source, max_distance=9), "float32")
    assert Contract.from_dict(contract.to_dict()) == contract
    without = contract.to_dict()
    for layer in without["layers"]:
        del layer["max_distance"]
    assert not limits_distances(Contract.from_dict(without).layers)
