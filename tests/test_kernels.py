"""Kernel files, both parametrisations against numpy in float64, and kernels through an export."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from less_export import open_bundle
from less_export.contract import Heads, LayerSpec, Policy, SlotDtype
from less_export.errors import KernelError
from less_export.less.feature_maps import PARAMETRISATIONS, Kernels, random_kernels
from less_export.less.int8 import Centring

from . import bundles
from .marks import slow_but
from .sharing import once

pytest_plugins = ["tests.bundles"]

HEADS = [Heads(6, 2, 8), Heads(6, 2, 8), Heads(4, 1, 16)]
BOTH = pytest.mark.parametrize("family", ["exp", "paper"])


def some(family: str, layers: tuple[int, ...] = (0, 2), rank: int = 5, hidden: int = 7) -> Kernels:
    return random_kernels(HEADS, layers, rank, hidden, family, seed=3)


def centred(family: str, layers: tuple[int, ...] = (0, 2), at: tuple[int, ...] = (2,)) -> Kernels:
    """Kernels with the centring of keys in the layers ``at``."""
    constants = {
        i: Centring(
            torch.randn(HEADS[i].kv_heads, HEADS[i].head_dim), torch.full((HEADS[i].kv_heads, HEADS[i].head_dim), 2.0)
        )
        for i in at
    }
    return replace(some(family, layers), centring=constants)


# ------------------------------------------------------------------ files


@BOTH
def test_round_trip(family: str, tmp_path: Path) -> None:
    before = Kernels(some(family).layers, {"model": "org/name", "budget": "5%", "errors": {"0": 0.1}, "data": ["a"]})
    before.save(tmp_path / "k.safetensors")
    after = Kernels.load(tmp_path / "k.safetensors")
    assert after.provenance == before.provenance
    assert (after.parametrisation, after.hidden, sorted(after.layers)) == (family, 7, [0, 2])
    for index, layer in before.layers.items():
        loaded = after.layers[index]
        assert (type(loaded), loaded.heads, loaded.rank) == (type(layer), layer.heads, layer.rank)
    assert after.tensors().keys() == before.tensors().keys()
    assert all(torch.equal(x, after.tensors()[n]) for n, x in before.tensors().items())
    assert after.nbytes() == sum(x.numel() * 4 for x in load_file(tmp_path / "k.safetensors").values())
    after.check(HEADS)
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def test_layers_may_differ_in_rank_and_dtype(tmp_path: Path) -> None:
    layers = {**some("exp", (0,), 2).layers, **some("exp", (1,), 9).layers}
    layers[1].to(torch.bfloat16)
    Kernels(layers, {}).save(tmp_path / "k.safetensors")
    loaded = Kernels.load(tmp_path / "k.safetensors").layers
    assert (loaded[0].rank, loaded[1].rank) == (2, 9)
    assert loaded[1].get_parameter("q_in").dtype == torch.bfloat16
    assert loaded[1].log_phi(torch.randn(1, 6, 3, 8)).dtype == torch.float32


@pytest.mark.parametrize("layers", [(0, 2), ()])
def test_centring_is_kept(layers: tuple[int, ...], tmp_path: Path) -> None:
    """Beside feature maps, or alone; a file without it is one of format 1, which older versions read."""
    before = centred("exp", layers, at=(0, 2))
    before.save(tmp_path / "k.safetensors")
    after = Kernels.load(tmp_path / "k.safetensors")
    assert sorted(after.layers) == list(layers)
    assert sorted(after.centring) == [0, 2]
    for index, constants in before.centring.items():
        assert all(torch.equal(a, b) for a, b in zip(constants, after.centring[index], strict=True))
    after.check(HEADS)
    with pytest.raises(KernelError, match="centring of keys for layer 2 of another model"):
        replace(after, layers={}).check([*HEADS[:2], Heads(4, 2, 16)])
    stated = {}
    for name, kernels in (("with", before), ("without", some("exp"))):
        kernels.save(tmp_path / name)
        with safe_open(tmp_path / name, "pt") as file:
            stated[name] = json.loads(file.metadata()["less_kernels"])["format_version"]
    assert stated == {"with": 2, "without": 1}


def test_no_layers_at_all(tmp_path: Path) -> None:
    Kernels({}, {"model": "x"}).save(tmp_path / "k.safetensors")
    loaded = Kernels.load(tmp_path / "k.safetensors")
    assert (dict(loaded.layers), loaded.parametrisation, loaded.nbytes()) == ({}, None, 0)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (HEADS[:2], "kernels for layer 2, but the model has 2 layers"),
        (
            [*HEADS[:2], Heads(4, 1, 8)],
            "layer 2 has 4 query heads, 1 KV heads and head_dim 8, the kernels are for 4, 1",
        ),
        ([Heads(8, 2, 8), *HEADS[1:]], "layer 0 has 8 query heads"),
        ([Heads(6, 3, 8), *HEADS[1:]], "layer 0 has 6 query heads, 3 KV heads"),
    ],
)
def test_another_model(model: list[Heads], says: str) -> None:
    with pytest.raises(KernelError, match=says):
        some("exp").check(model)
    some("exp").check([*HEADS, *HEADS])  # layers without kernels stay sparse


Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
ONE, STD = "layers.0.k_in", "centring.2.std"
#: Changes to the header and the tensors, and the error message.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "newer": (lambda h, t: h.update(format_version=5), "newer less-export"),
    "no version": (lambda h, t: h.pop("format_version"), "format_version"),
    "unknown family": (lambda h, t: h.update(parametrisation="rbf"), "rbf"),
    "no provenance": (lambda h, t: h.pop("provenance"), "provenance"),
    "provenance is a number": (lambda h, t: h.update(provenance=1), "not a usable kernel file"),
    "layers are a list": (lambda h, t: h.update(layers=[1]), "not a usable kernel file"),
    "layer is no number": (lambda h, t: h.update(layers={"x": 1}), "not a usable kernel file"),
    "rank": (lambda h, t: h["layers"]["0"].update(rank=4), "wrong shape"),
    "negative rank": (lambda h, t: h["layers"]["0"].update(rank=-4), "not a usable kernel file"),
    "huge rank": (lambda h, t: h["layers"]["0"].update(rank=10**15), "not a usable kernel file"),
    "heads": (lambda h, t: h["layers"]["0"]["heads"].update(kv_heads=3), "wrong shape"),
    "more heads": (lambda h, t: h["layers"]["0"]["heads"].update(more=3), "more"),
    "shape": (lambda h, t: t.update({ONE: t[ONE][:, :, 1:].contiguous()}), f"{ONE} has the wrong shape"),
    "integers": (lambda h, t: t.update({ONE: t[ONE].int()}), "dtype"),
    "float64": (lambda h, t: t.update({ONE: t[ONE].double()}), "dtype"),
    "NaN": (lambda h, t: t[ONE][0, 0, :1].fill_(math.nan), f"{ONE} holds NaN"),
    "inf": (lambda h, t: t[ONE][0, 0, :1].fill_(math.inf), f"{ONE} holds NaN or inf"),
    "a tensor missing": (lambda h, t: t.pop(ONE), ONE),
    "centring missing": (lambda h, t: h.update(centring=[1]), "centring.1.mean"),
    "centring of no layer": (lambda h, t: h.update(centring=["x"]), "not a usable kernel file"),
    "centring of two shapes": (lambda h, t: t.update({STD: t[STD][:, :1].contiguous()}), f"{STD} has the wrong shape"),
    "centring in float16": (lambda h, t: t.update({STD: t[STD].half()}), f"{STD} has the wrong shape or dtype"),
    "a length of 0": (
        lambda h, t: h["layers"]["0"].update(length=0),
        "layer 0 was trained on sequences of an impossible",
    ),
    "a length in words": (lambda h, t: h["layers"]["0"].update(length="long"), "impossible length: train it again"),
    "a std of 0": (lambda h, t: t[STD][0, 0].fill_(0), "the centring of layer 2 is not finite, or has a std of 0"),
    "a std of inf": (lambda h, t: t[STD][0, 0].fill_(math.inf), "calibrate again"),
    "a mean of NaN": (lambda h, t: t["centring.2.mean"][0, 0].fill_(math.nan), "calibrate again"),
}


def rewrite(path: Path, damage: Damage) -> None:
    """Change a kernel file's header and tensors."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["less_kernels"])
    damage(header, tensors)
    save_file(tensors, path, {"less_kernels": json.dumps(header)})


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_header_or_tensor(name: str, tmp_path: Path) -> None:
    damage, says = DAMAGES[name]
    path = tmp_path / "k.safetensors"
    centred("exp").save(path)
    rewrite(path, lambda h, t: None)
    Kernels.load(path)  # rewriting alone is harmless
    rewrite(path, damage)
    with pytest.raises(KernelError) as caught:
        Kernels.load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "no kernels", "cut header", "cut data", "foreign", "folder", "absent"])
def test_not_a_kernel_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    some("paper").save(path)
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "foreign":
        save_file({"w": torch.zeros(3)}, path)
    elif content != "absent":
        path.write_bytes({"cut header": whole[:40], "cut data": whole[:-9]}.get(content, content.encode()))
    with pytest.raises(KernelError) as caught:
        Kernels.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    says = {"foreign": "holds no LESS kernels", "absent": "no kernel file at"}.get(content, "not a usable kernel file")
    assert says in str(caught.value)


# ------------------------------------------------------------------ another model, policy or budget


def trained_for(
    facts: dict[str, Any],
    policy: Policy,
    slots: int,
    *names: str,
    half_life: int | None = None,
    slot_dtype: SlotDtype = "model",
) -> list[str]:
    """Warnings about kernels with ``facts`` in a model with that policy, whose layer 1 keeps everything."""
    heavy, recent = (slots - 1, 1) if policy is Policy.TOVA else (slots // 2, slots // 2)
    plan = [
        LayerSpec(h.query_heads, h.kv_heads, h.head_dim, 0.3, policy, heavy, recent, 0, True, slots, 5) for h in HEADS
    ]
    plan = [replace(s, score_half_life=half_life, slot_dtype=slot_dtype) for s in plan]
    plan[1] = LayerSpec(6, 2, 8, 0.3, Policy.WINDOW, 0, 999, 999, False, 999, 1)
    return Kernels(some("exp", (0, 1, 2)).layers, facts).doubts(names or ("org/Name", "name-270m"), plan)


FACTS = {"model": "org/Name", "policy": "h2o", "slots": {"0": [8, 8], "1": [8, 8], "2": [8, 8]}}


@pytest.mark.parametrize(("stated", "slots"), [("model", "int8"), (None, "int8"), ("int8", "model")])
def test_kernels_trained_with_other_slots(stated: str | None, slots: SlotDtype) -> None:
    facts = FACTS if stated is None else FACTS | {"slot_dtype": stated}
    says = f"the kernels were trained with --slots {stated or 'model'}, not {slots}: quality may suffer"
    assert trained_for(facts, Policy.H2O, 16, slot_dtype=slots) == [says]
    same: SlotDtype = "int8" if stated == "int8" else "model"
    assert trained_for(facts, Policy.H2O, 16, slot_dtype=same) == []


def test_constants_of_another_model() -> None:
    centring = {0: Centring(torch.zeros(2, 8), torch.ones(2, 8))}
    plan = [LayerSpec(6, 2, 8, 0.3, Policy.H2O, 8, 8, 0, False, 16, 1, None, "int8")]
    says = "the kernels were calibrated for org/other: if name is another model, calibrate its own"
    assert Kernels({}, {"model": "org/other"}, centring).doubts(["name"], plan) == [says]
    trained = {"model": "org/name", "policy": "h2o", "score_half_life": 128}
    assert Kernels({}, trained, centring).doubts(["name"], plan) == [], "no layer has a state that half-lives matter to"


def test_kernels_for_what_they_were_trained_for() -> None:
    for slots in (4, 16, 32, 64):
        assert trained_for(FACTS, Policy.H2O, slots) == []
    for name in ("name", "NAME", "other/name", "name-270m"):
        assert trained_for(FACTS | {"model": name}, Policy.H2O, 16) == []
    assert trained_for(FACTS | {"score_half_life": 512}, Policy.H2O, 16, half_life=512) == []
    for facts in ({}, {"model": "random"}, {"model": 1, "policy": 2, "slots": {"0": "ab", "2": ["a"]}}, {"slots": 3}):
        assert trained_for(facts, Policy.TOVA, 500) == []


def test_kernels_for_something_else() -> None:
    assert trained_for(FACTS, Policy.H2O, 16, "other") == [
        "the kernels were trained for org/Name: if other is another model, train its own"
    ]
    assert trained_for(FACTS, Policy.SINK, 16) == [
        "the kernels were trained for policy h2o, not sink: quality may suffer"
    ]
    for then, now in ((None, 512), (512, None), (256, 512)):
        assert trained_for(FACTS | {"score_half_life": then}, Policy.H2O, 16, half_life=now) == [
            f"the kernels were trained with --score-half-life {then or 'none'}, not {now or 'none'}: quality may suffer"
        ]
    for slots in (2, 66):
        assert trained_for(FACTS, Policy.H2O, slots) == [
            f"the kernels were trained with 16 slots, not {slots} (layer 0): quality may suffer"
        ]


def test_other_kernels_are_said(source: Path, kernel_file: Path, quick: None, tmp_path: Path, run: bundles.Run) -> None:
    facts = {"model": "other", "policy": "tova", "slots": {"0": [59, 1], "1": [59, 1]}}
    Kernels(Kernels.load(kernel_file).layers, facts).save(tmp_path / "k.safetensors")
    arguments = ("--kernels", tmp_path / "k.safetensors", "--budget", 12)
    says = [
        "warning: the kernels were trained for other: if checkpoint is another model, train its own",
        "warning: the kernels were trained for policy tova, not h2o: quality may suffer",
        "warning: the kernels were trained with 60 slots, not 12 (layer 0): quality may suffer",
    ]
    exported = run(source, "--out", tmp_path / "out", *arguments, *bundles.QUICK_OPTIONS)
    few = ("--compare", "less", "--seqs", 1, "--seq-len", 40, "--positions", 4)
    evaluated = run("eval", source, *arguments, *few, "--slots", "model", "--max-distance", "none")
    for result in (exported, evaluated):
        assert result.code == 0, result.err
        assert [x.removeprefix("less-export: ") for x in result.err.splitlines() if "trained" in x] == says


# ------------------------------------------------------------------ formulas


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def numpy_exp(w: dict[str, np.ndarray], q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def features(side: str, x: np.ndarray) -> np.ndarray:
        return gelu(x @ w[f"{side}_in"]) @ w[f"{side}_out"] + x @ w[f"{side}_skip"] + w[f"{side}_bias"]

    e = np.exp(features("k", k))
    return features("q", q), e / e.sum(-1, keepdims=True)


def numpy_paper(w: dict[str, np.ndarray], q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi = np.abs(gelu(gelu(q @ w["q_in"]) @ w["q_out"])) * np.exp(w["q_offset"])
    base = np.abs(w["k_scale"]) * gelu(gelu(k @ w["k_in"]) @ w["k_out"])
    psi = np.abs(base + (base @ w["k_interaction"]) * w["k_scale_interaction"]) * np.abs(w["k_gain"])
    return np.log(phi), psi


@BOTH
@pytest.mark.parametrize("index", [0, 2])
def test_formulas(family: str, index: int) -> None:
    heads, rng = HEADS[index], np.random.default_rng(index)
    layer = some(family).layers[index]
    q = rng.standard_normal((2, heads.query_heads, 5, heads.head_dim)) * 2
    k = rng.standard_normal((2, heads.kv_heads, 5, heads.head_dim)) * 2
    weights = {n: p.double().numpy() for n, p in layer.named_parameters()}
    want = {"exp": numpy_exp, "paper": numpy_paper}[family](weights, q, k)
    log_phi, psi = layer.log_phi(torch.from_numpy(q).float()), layer.psi(torch.from_numpy(k).float())
    assert log_phi.shape == (2, heads.query_heads, 5, 5)
    assert psi.shape == (2, heads.kv_heads, 5, 5)
    assert psi.min() >= 0
    assert np.abs(psi.numpy() - want[1]).max() < 1e-6 * np.abs(want[1]).max()
    assert np.abs(log_phi.exp().numpy() - np.exp(want[0])).max() < 2e-6 * np.exp(want[0]).max()
    likely = np.exp(want[0]) > 1e-3 * np.exp(want[0]).max()  # float32 gelu underflows far from zero
    assert np.abs(log_phi.numpy() - want[0])[likely].max() < 1e-4


@BOTH
def test_dtypes(family: str) -> None:
    """log phi is float32 from 16-bit queries (and not merely rounded to 16 bits), psi has the keys' dtype."""
    layer = some(family).layers[0]
    q, k = torch.randn(1, 6, 40, 8).bfloat16(), torch.randn(1, 2, 40, 8).bfloat16()
    log_phi, psi = layer.log_phi(q), layer.psi(k)
    assert (log_phi.dtype, psi.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(log_phi, log_phi.bfloat16().float())
    assert (log_phi - layer.log_phi(q.float())).abs().median() < 0.05


def test_psi_of_exp_sums_to_one() -> None:
    layer = some("exp").layers[0]
    for size in (0.1, 1.0, 100.0):
        psi = layer.psi(torch.randn(3, 2, 11, 8) * size)
        assert bool(psi.isfinite().all())
        assert (psi.sum(-1) - 1).abs().max() < 1e-6


def test_log_phi_of_paper_is_minus_infinity_where_phi_is_zero() -> None:
    layer = some("paper").layers[0]
    q = torch.randn(1, 6, 4, 8)
    q[:, :, 2] = 0
    log_phi = layer.log_phi(q)
    assert bool((log_phi[:, :, 2] == -torch.inf).all())
    assert bool(log_phi[:, :, [0, 1, 3]].isfinite().all())
    assert not bool(log_phi.isnan().any())


def test_both_are_registered() -> None:
    assert {n: m.parametrisation for n, m in PARAMETRISATIONS.items()} == {"exp": "exp", "paper": "paper"}


# ------------------------------------------------------------------ through an export


def logits(bundle: Path, backend: str, ids: list[int]) -> np.ndarray:
    """[steps, V]: the logits after every step of a fixed chunking."""
    with open_bundle(bundle, backend).backend as opened:
        opened.open(1)
        out = [opened.step([ids[i : i + 16]])[0, -1] for i in range(0, 48, 16)]
        return np.stack(out + [opened.step([[i]])[0, -1] for i in ids[48:]])


@pytest.mark.parametrize("family", slow_but(["exp", "paper"], "exp"))
def test_kernels_through_an_export(
    family: str, source: Path, plain: Path, kernelled: Path, shared: Path, request: pytest.FixtureRequest
) -> None:
    bundle = kernelled
    if family == "paper":  # of one layer only: the other stays sparse
        file = once(shared / "paper.safetensors", lambda path: bundles.kernels(path, "paper", layers=[1]))
        bundle = once(shared / "papered", lambda path: bundles.bundle(source, path, kernels=file))
    ids = np.random.default_rng(0).integers(2, 300, 56).tolist()
    without, mine, theirs = logits(plain, "ort", ids), logits(bundle, "ort", ids), logits(bundle, "torch", ids)
    unit = float(np.abs(theirs).max())
    assert np.abs(mine - theirs).max() < 2e-5 * unit
    difference = np.abs(mine - without).max(-1) / unit
    assert difference[0] < 2e-5  # nothing is evicted before the first chunk's attention
    assert difference[1:].min() > 1e-3


@pytest.mark.slow
def test_no_kernels_is_said_and_kernels_are_not(source: Path, kernel_file: Path, quick: None, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bundles.bundle(source, tmp_path / "a")
    assert [str(w.message) for w in caught if "kernels" in str(w.message)] == [
        "no --kernels given: evicted tokens are forgotten (plain sparse eviction, low-rank term off)"
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bundles.bundle(source, tmp_path / "b", kernels=kernel_file)
        bundles.bundle(source, tmp_path / "c.onnx", policy="full", context=32, num_hidden_layers=1)
    assert not [w for w in caught if "kernels" in str(w.message)]
