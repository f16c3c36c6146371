"""The contract of a bundle: sizes, shapes, limits, JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from less_export.contract import Contract, LayerSpec, Policy
from less_export.dtypes import COMPUTE_DTYPES
from less_export.errors import BundleError, UsageError
from less_export.less.policies import by_name, registered

H2O, TOVA, SINK, WINDOW, FULL = Policy.H2O, Policy.TOVA, Policy.SINK, Policy.WINDOW, Policy.FULL

SPECS = (
    LayerSpec(8, 2, 16, 0.25, H2O, 3, 4, 0, True, 7, 5),
    LayerSpec(8, 2, 16, 0.25, WINDOW, 0, 32, 32, False, 32, 1),
    LayerSpec(8, 1, 16, 0.25, FULL, 0, 100, 0, False, 100, 1),
)


def contract(dtype: str = "float16", **changes: Any) -> Contract:
    return dataclasses.replace(Contract(SPECS, 1000, dtype, 64, 4), **changes)


@pytest.mark.parametrize("changes", [{}, {"logits": "all"}, {"position_limit": 2048}, {"dtype": "bfloat16"}])
def test_contract_survives_json(changes: dict[str, Any]) -> None:
    before = contract(**changes)
    after = Contract.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert [s.name for s in after.inputs()] == [s.name for s in before.inputs()]
    assert all(a.policy is b.policy for a, b in zip(after.layers, before.layers, strict=True))


def test_state_bytes_by_hand() -> None:
    # per KV head and slot: key and value 16 each, psi R, in T; score f32 and position i32; H R x 16 and z R in f32
    def heads(count: int, slots: int, rank: int, t: int) -> int:
        return count * (slots * ((32 + rank) * t + 8) + (16 + 1) * rank * 4)

    for dtype, t in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        assert contract(dtype).state_bytes() == heads(2, 7, 5, t) + heads(2, 32, 1, t) + heads(1, 100, 1, t)
    # an ordinary cache: the sliding layer holds 32 tokens at most
    assert contract().full_cache_bytes(1000) == 2 * 16 * 2 * (2 * 1000 + 2 * 32 + 1 * 1000)
    assert contract().full_cache_bytes(10) == 2 * 16 * 2 * 10 * 5


def test_limits_of_a_contract() -> None:
    assert contract().token_limit() == 100
    assert contract(position_limit=50).token_limit() == 50
    assert contract(layers=SPECS[:2]).token_limit() is None


def test_shapes_of_a_contract() -> None:
    names = [s.name for s in contract().inputs()]
    assert names[:4] == ["input_ids", "past_length", "new_length", "past.0.key"]
    assert len(names) == 3 + 3 * 7
    assert len(set(names)) == len(names)
    by_name = {s.name: s for s in contract().outputs()}
    assert by_name["logits"].sized(3, 5) == (3, 1, 1000)
    assert contract(logits="all").logits_spec().sized(3, 5) == (3, 5, 1000)
    assert by_name["present.0.h"].sized(3) == (3, 2, 5, 16)
    dtypes = {n: by_name[f"present.0.{n}"].dtype for n in ("key", "psi", "score", "position", "h", "z")}
    assert dtypes == dict.fromkeys(("key", "psi"), "float16") | dict.fromkeys(("score", "h", "z"), "float32") | {
        "position": "int32"
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d.update(extra=1),
        lambda d: d["layers"][0].update(policy="lru"),
        lambda d: d["layers"][0].update(heavy=4),
        lambda d: d["layers"][0].pop("scale"),
        lambda d: d.update(dtype="int8"),
        lambda d: d.update(chunk=0),
        lambda d: d.update(logits="some"),
    ],
)
def test_damaged_contract(damage: Any) -> None:
    data = json.loads(json.dumps(contract().to_dict()))
    damage(data)
    with pytest.raises(BundleError, match="contract is damaged"):
        Contract.from_dict(data)


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        (0, {"kv_heads": 0}, "must be positive"),
        (0, {"query_heads": 7}, "multiple of KV heads"),
        (0, {"head_dim": -1}, "must be positive"),
        (0, {"scale": math.nan}, "finite"),
        (0, {"scale": math.inf}, "finite"),
        (0, {"heavy": -1, "capacity": 3}, "heavy, window >= 0"),
        (0, {"recent": 0, "capacity": 3}, "recent >= 1"),
        (0, {"window": -1}, "window >= 0"),
        (0, {"rank": 0}, "at least 1"),
        (0, {"absorb": False}, "has rank 1"),
        (0, {"capacity": 8}, "equal the capacity"),
        (0, {"policy": TOVA}, "only the newest"),
        (0, {"score_half_life": 0}, "at least 1 token"),
        (1, {"score_half_life": 512}, "only accumulated scores"),
        (1, {"window": 31}, "keeps its window"),
        (1, {"absorb": True}, "absorbs nothing"),
        (2, {"window": 5}, "evicts and absorbs nothing"),
        (2, {"heavy": 1, "capacity": 101}, "evicts and absorbs nothing"),
        (2, {"absorb": True}, "evicts and absorbs nothing"),
    ],
)
def test_impossible_layers(base: int, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(SPECS[base], **changes)


def test_layer_attributes_are_the_ops() -> None:
    numbers = {"scale": 0.25, "policy": 0, "heavy": 3, "recent": 4, "window": 0, "absorb": 1}
    assert SPECS[0].attributes() == {**numbers, "decay": 1.0}
    assert dataclasses.replace(SPECS[0], score_half_life=2).decay == pytest.approx(0.5**0.5)
    assert dataclasses.replace(SPECS[0], score_half_life=1).decay == 0.5
    assert [p.code for p in registered()] == [0, 1, 2, 3, 4]
    assert [p.name for p in registered()] == ["h2o", "tova", "sink", "window", "full"]
    assert all(by_name(p.name) is p for p in registered())
    assert SPECS[0].group == 4
    assert COMPUTE_DTYPES == ("float32", "float16", "bfloat16")
