"""Policies from outside the package: registered here, then planned, exported, run, simulated and trusted."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from less_export.bundle.artifact import Bundle
from less_export.cli.main import main
from less_export.config import ExportConfig
from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import BundleError, EngineError, UsageError
from less_export.exporter import onnx_op
from less_export.less import policies, simulate
from less_export.less.policies import Candidates, EvictionPolicy, ScoredPolicy
from less_export.less.reference import less_attention
from less_export.tensorrt import plugin
from less_export.testing import empty_state

from . import families
from .families import Tiny
from .marks import exhaustive_but

STRIDE, ROUNDING = 3, 1e-4


class Strided(EvictionPolicy):
    """All that fits; then the newest ``recent`` and, before them, the newest ``heavy`` at multiples of STRIDE."""

    name = "strided"
    code = 1000

    def split(self, budget: int) -> tuple[int, int]:
        return budget // 3, budget - budget // 3

    def why_impossible(self, layer: policies.LayerNumbers) -> str | None:
        return None if layer.heavy else "strided needs a heavy token"

    def keep(self, c: Candidates, heavy: int, recent: int) -> torch.Tensor:
        near = c.position >= c.end - recent
        regular = (c.position % STRIDE == 0) & (c.position >= c.end - recent - STRIDE * heavy)
        return c.live & (near | regular | (c.end <= heavy + recent))

    def keep_onnx(self, op: Any, c: Any, heavy: Any, recent: Any, capacity: Any) -> Any:
        first = op.Sub(c.end, recent)
        near = op.GreaterOrEqual(c.position, first)
        regular = op.Equal(op.Mod(c.position, op.i32(STRIDE)), op.i32(0))
        reach = op.GreaterOrEqual(c.position, op.Sub(first, op.Mul(heavy, op.i32(STRIDE))))
        fits = op.LessOrEqual(c.end, op.Add(heavy, recent))
        return op.And(c.live, op.Or(op.Or(near, fits), op.And(regular, reach)))


class Latest(ScoredPolicy):
    """The highest attention of the last query, as tova, but a third of the budget is for the newest tokens."""

    name = "latest-third"
    code = 1001
    scoring = "last"

    def split(self, budget: int) -> tuple[int, int]:
        return budget - budget // 3, budget // 3


OUTSIDE = {p.name: p for p in (Strided(), Latest())}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Registered while this file runs."""
    before = tuple(policies.registered())
    for policy in OUTSIDE.values():
        assert policies.register(policy) is policy
    yield
    for policy in OUTSIDE.values():
        policies.unregister(policy)
    assert tuple(policies.registered()) == before


@pytest.fixture(scope="module", params=exhaustive_but(OUTSIDE, "latest-third"))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return OUTSIDE[request.param]


@pytest.fixture(scope="module")
def tiny(policy: EvictionPolicy, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Gemma 3 (a sliding and a full layer) exported with kernels by the command line, self-check included."""
    folder = tmp_path_factory.mktemp(policy.name)
    checkpoint = families.save("gemma3", folder / "model")
    kernels = families.kernels(families.load(checkpoint), folder / "kernels.safetensors")
    argv = [str(checkpoint), "--out", str(folder / "bundle"), "--policy", policy.name, "--kernels", str(kernels)]
    argv += ["--budget", str(families.BUDGET), "--chunk", str(families.CHUNK)]
    assert main(argv) == 0
    return Tiny(checkpoint, folder / "bundle")


def contract_of(tiny: Tiny) -> Contract:
    artifact = tiny.opened.artifact("ort")
    assert artifact is not None
    return artifact.contract


def layer_of(policy: EvictionPolicy, window: int = 0) -> LayerSpec:
    return LayerSpec(4, 2, 8, 0.4, policy, *policy.split(9), window, True, 9, 3)


@pytest.mark.slow
def test_plan_and_graph(tiny: Tiny, policy: EvictionPolicy) -> None:
    assert ExportConfig(policy=policy.name).policy in policies.choosable(evicting=True)
    sliding, evicting = contract_of(tiny).layers
    assert sliding.policy is Policy.WINDOW
    assert evicting.policy is policy
    assert (evicting.heavy, evicting.recent) == policy.split(families.BUDGET)
    model = ir.load(tiny.bundle / "model.onnx")
    overloads = {f.overload for f in model.functions.values() if f.name == "LessAttention"}
    kinds = {re.sub(r"(_\d+(x\d+)+)?$", "", name) for name in overloads}
    assert kinds == {f"{policy.name}_int8_state16_distance_lowrank", "window_int8_distance"}
    divided = {name for name in overloads if name not in kinds}  # with a way of its own for one token
    assert len(divided) == 1 + policy.takes_one_slot
    assert [n.attributes["policy"].as_int() for n in onnx_op.less_nodes(model)] == [Policy.WINDOW.code, policy.code]


def test_onnx_runtime_agrees_with_torch_past_eviction(tiny: Tiny, policy: EvictionPolicy) -> None:
    ort, reference = tiny.backend("ort", 2), tiny.backend("torch", 2)
    ids, sizes = families.text(2, 70), [16, 16, 7, 16, *[1] * 15]
    mine, theirs = families.feed(ort, ids, sizes), families.feed(reference, ids, sizes)
    errors = [families.relative(a, b) for a, b in zip(mine, theirs, strict=True)]
    assert max(errors) < ROUNDING
    assert families.evicted(ort) >= 20
    assert max(families.differences(ort, reference).values()) < ROUNDING
    if policy.name == "strided":  # the definition, computed by hand
        heavy, recent = policy.split(families.BUDGET)
        near = range(70 - recent, 70)
        older = [p for p in range(near[0] - STRIDE * heavy, near[0]) if p % STRIDE == 0 and p >= 0]
        for row in range(2):
            for held in ort.read_row(row).tensors["past.1.position"]:
                assert sorted(held[held >= 0]) == [*older, *near]


@pytest.mark.parametrize("window", [0, 14])
def test_simulation_is_the_operator(policy: EvictionPolicy, window: int) -> None:
    layer, tokens = layer_of(policy, window), 50
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, tokens, 8, generator=g) for h in (4, 2, 2))
    log_phi = torch.randn(2, 4, tokens, 3, generator=g)
    psi = torch.softmax(torch.randn(2, 2, tokens, 3, generator=g), -1)
    state, outputs = empty_state(layer, 2, poison=True), []
    one = torch.ones(2, dtype=torch.int32)
    for at in range(tokens):
        position = state[4]
        piece = [x[:, :, at : at + 1] for x in (q, k, v, log_phi, psi)]
        out, *state = less_attention(*piece, *state, one * at, one, **layer.attributes())
        outputs.append(out)
    got = simulate.attend(q, k, v, layer, (log_phi, psi), 1)
    torch.testing.assert_close(got, torch.cat(outputs, 2), rtol=2e-5, atol=2e-5)
    left = simulate.evictions(simulate.logits(q, k, layer), layer)
    slots = [set(row[row >= 0].tolist()) for row in position.flatten(0, 1)]  # tokens that the last query finds there
    assert [set((row[:-1] == tokens).nonzero()[:, 0].tolist()) for row in left.flatten(0, 1)] == slots
    assert all(0 < len(s) <= layer.capacity for s in slots)


def test_the_plugin_refuses_it(policy: EvictionPolicy, plugin_library: Path) -> None:
    contract = Contract((layer_of(policy),), 97, "float16", 16, 2)
    with pytest.raises(EngineError, match=r"^the plugin cannot run layer 0 \(unknown policy\): --no-plugin builds"):
        plugin.check_layers(plugin_library, contract)


def test_its_own_numbers_are_checked() -> None:
    with pytest.raises(UsageError, match=r"impossible layer \(strided\): strided needs a heavy token"):
        LayerSpec(4, 2, 8, 0.4, OUTSIDE["strided"], 0, 9, 0, False, 9, 1)


def test_a_bundle_needs_the_registration(tiny: Tiny, policy: EvictionPolicy) -> None:
    policies.unregister(policy)
    try:
        with pytest.raises(BundleError, match=f"policy '{policy.name}' is not registered: register it"):
            Bundle.open(tiny.bundle)
        with pytest.raises(UsageError, match=f"unknown policy '{policy.name}': choose one of h2o"):
            ExportConfig(policy=policy.name)
    finally:
        policies.register(policy)


def test_copies_are_the_registered_policy(policy: EvictionPolicy) -> None:
    layer = layer_of(policy)
    assert copy.deepcopy(layer).policy is pickle.loads(pickle.dumps(layer)).policy is policy
    assert copy.deepcopy(layer) == layer


@dataclass(frozen=True)
class _Named:
    name: str
    code: int


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("h2o", 2000, "'h2o' is already registered"),
        ("another", 1000, "has code 1000, which is that of 'strided'"),
        ("another", 0, "has code 0, which is that of 'h2o'"),
        ("Another", 2000, "lower-case letters"),
        ("another_lowrank", 2000, "lower-case letters"),
        ("another", -1, "from 0 to"),
        ("another", 2**31, "from 0 to"),
    ],
)
def test_refused_registrations(name: str, code: int, says: str) -> None:
    before = tuple(policies.registered())
    with pytest.raises(UsageError, match=says):
        policies.register(_Named(name, code))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not registered"):
        policies.unregister(_Named(name, code))  # type: ignore[arg-type]
    assert tuple(policies.registered()) == before
