"""Property tests of budgets, their split and division, and the slots of kept tokens."""

from __future__ import annotations

import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from less_export.config import DEFAULT_BUDGET, ExportConfig
from less_export.contract import LayerSpec
from less_export.errors import UsageError
from less_export.less.policies import EvictionPolicy, Policy
from less_export.less.reference import place
from less_export.plan import budget_tokens, layer_tokens, plan_layers, sparse_layer, split_budget
from less_export.training import allocate

from .refusal import refused_or

CONTEXTS = st.one_of(st.integers(1, 64), st.integers(1, 1 << 20))
#: Percentages with up to three decimals, as text and exactly.
PERCENTAGES = st.integers(1, 120_000).map(lambda n: (f"{n / 1000:g}%", Fraction(n, 1000)))
POLICY = st.sampled_from([Policy.H2O, Policy.TOVA, Policy.SINK])


def tokens_of(budget: str, context: int) -> int:
    """Tokens of a budget, 0 if it is refused."""
    return refused_or(lambda: budget_tokens(budget, context)) or 0


# ------------------------------------------------------------------ budgets


@given(PERCENTAGES, CONTEXTS)
@example(("29%", Fraction(29)), 200)  # 57.99999 in floats
def test_a_percentage_is_the_largest_even_number_of_tokens_in_it(share: tuple[str, Fraction], context: int) -> None:
    text, percent = share
    tokens = tokens_of(text, context)
    exact = percent * context / 100
    if 2 <= exact <= context:
        assert tokens % 2 == 0
        assert tokens <= exact < tokens + 2
    elif tokens:
        assert exact - 2 < tokens <= context  # 101% of 31 tokens are 31.31, more than 31; 30 are fewer


@given(PERCENTAGES, PERCENTAGES, CONTEXTS, CONTEXTS)
def test_more_is_not_fewer_tokens(
    one: tuple[str, Fraction], two: tuple[str, Fraction], context: int, other: int
) -> None:
    (less, _), (more, percent) = sorted((one, two), key=lambda share: share[1])
    small, large = sorted((context, other))
    assume(percent <= 100)
    assert tokens_of(less, context) <= tokens_of(more, context)
    assert tokens_of(more, small) <= tokens_of(more, large)


@given(st.integers(-5, 1 << 20), CONTEXTS)
def test_a_number_of_tokens_is_itself(number: int, context: int) -> None:
    assert tokens_of(str(number), context) == (number if 1 <= number <= context else 0)


@given(st.text("0123456789.%/eE+-_ x", max_size=7), CONTEXTS)
def test_any_budget_is_a_number_of_tokens_or_refused(text: str, context: int) -> None:
    assert 0 <= tokens_of(text, context) <= context


# ------------------------------------------------------------------ the split


@given(POLICY, st.integers(1, 5000))
def test_a_policy_splits_all_of_a_budget(policy: EvictionPolicy, budget: int) -> None:
    heavy, recent = policy.split(budget)
    assert heavy + recent == budget
    assert heavy >= 0
    assert recent >= 1
    assert {
        Policy.H2O: recent - heavy in (0, 1),
        Policy.TOVA: recent == 1,
        Policy.SINK: heavy == min(4, budget - 1),
    }[policy]


OPTIONAL = st.one_of(st.none(), st.integers(0, 80))


@given(POLICY, st.one_of(st.none(), st.integers(1, 80)), OPTIONAL, OPTIONAL, st.integers(1, 80))
def test_a_split_is_what_was_asked_for(
    policy: EvictionPolicy, budget: int | None, heavy: int | None, recent: int | None, context: int
) -> None:
    assume(recent != 0)  # refused with the options
    config = ExportConfig(budget=None if budget is None else str(budget), heavy=heavy, recent=recent)
    split = refused_or(lambda: split_budget(policy, config, context))
    if split is None:
        contradicts = policy is Policy.TOVA and recent not in (None, 1)
        alone = budget is None and (heavy is None or (recent is None and policy is not Policy.TOVA))
        total = tokens_of(DEFAULT_BUDGET, context) if alone else budget or (heavy or 0) + (recent or 1)
        parts = (heavy, 1 if policy is Policy.TOVA else recent)
        whole = None not in parts and budget is not None and sum(x or 0 for x in parts) != budget
        assert contradicts or whole or not 0 < total <= context or max(heavy or 0, (recent or 1) - 1) >= total
        return
    assert split[0] >= 0
    assert split[1] >= 1
    assert sum(split) <= context
    for wanted, got in ((heavy, split[0]), (recent, split[1]), (budget, sum(split))):
        assert wanted in (None, got)
    if policy is Policy.TOVA:
        assert split[1] == 1
    if (heavy, recent) == (None, None):
        assert split == policy.split(tokens_of(config.budget or DEFAULT_BUDGET, context))


# ------------------------------------------------------------------ budgets of layers

LAYERS = st.integers(1, 6)
BUDGETS = st.dictionaries(st.integers(0, 5), st.integers(1, 64), min_size=1)


@given(BUDGETS)
def test_layer_budgets_are_read_as_they_are_written(slots: dict[int, int]) -> None:
    assert layer_tokens(allocate.option(slots), 64) == slots


@given(st.text("0123456789:,%. x", max_size=12))
def test_any_layer_budgets_are_read_or_refused(text: str) -> None:
    slots = refused_or(lambda: layer_tokens(text, 64))
    if slots is not None:
        assert slots
        assert all(1 <= n <= 64 for n in slots.values())
        assert layer_tokens(allocate.option(slots), 64) == slots


@given(POLICY, LAYERS, BUDGETS, st.integers(1, 64), st.sets(st.integers(0, 5)))
def test_every_layer_has_the_slots_it_was_given(
    policy: EvictionPolicy, count: int, slots: dict[int, int], budget: int, kernels: set[int]
) -> None:
    layers = [SimpleNamespace(query_heads=4, kv_heads=2, head_dim=8, scale=0.35, window=0)] * count
    config = ExportConfig(policy=policy.name, budget=str(budget), layer_budgets=allocate.option(slots))
    if max(slots) >= count:
        with pytest.raises(UsageError, match=f"names layer {max(slots)}, but the model has {count} layers"):
            plan_layers(layers, config, 64, {})
        return
    planned = plan_layers(layers, config, 64, dict.fromkeys(kernels, 3))
    assert [s.capacity for s in planned] == [slots.get(i, budget) for i in range(count)]
    assert [(s.heavy, s.recent) for s in planned] == [policy.split(s.capacity) for s in planned]
    assert [s.absorb for s in planned] == [i in kernels for i in range(count)]


@given(POLICY, st.integers(1, 64), st.integers(0, 63), st.integers(1, 200))
def test_a_sparse_layer_has_its_slots_and_the_users_heavy_tokens(
    policy: EvictionPolicy, capacity: int, heavy: int, slots: int
) -> None:
    assume(heavy < capacity)
    assume(policy is not Policy.TOVA or heavy == capacity - 1)
    layer = LayerSpec(4, 2, 8, 0.35, policy, heavy, capacity - heavy, 0, True, capacity, 4)
    own = (heavy, capacity - heavy) != policy.split(capacity)
    assume(not own or slots > heavy)
    sparse = sparse_layer(layer, slots)
    assert (sparse.capacity, sparse.absorb, sparse.rank) == (slots, False, 1)
    assert (sparse.heavy, sparse.recent) == ((heavy, slots - heavy) if own else policy.split(slots))


# ------------------------------------------------------------------ dividing a budget among layers


def spec(capacity: int, head_dim: int) -> LayerSpec:
    return LayerSpec(4, 2, head_dim, 0.35, Policy.H2O, capacity // 2, capacity // 2, 0, True, capacity, 4)


TRIED = (4, 8, 16, 32)


@settings(max_examples=12)
@given(st.lists(st.tuples(st.floats(0.3, 2), st.floats(0.3, 2)), min_size=3, max_size=3))
def test_no_other_division_costs_less(laws: list[tuple[float, float]]) -> None:
    """Three layers whose costs are powers of their slots, against every division of 48 slots."""
    costs = {i: {n: a * n**-p for n in TRIED} for i, (a, p) in enumerate(laws)}

    def total(slots: tuple[int, ...]) -> float:
        return sum(a * n**-p for (a, p), n in zip(laws, slots, strict=True))

    division = tuple(allocate.divide(costs, [spec(16, 8)] * 3).values())
    choices = [c for c in itertools.product(range(4, 34, 2), repeat=3) if sum(c) <= 48]
    assert sum(division) == 48
    assert total(division) == pytest.approx(min(map(total, choices)), rel=1e-9)


@given(
    st.lists(
        st.tuples(st.integers(4, 40), st.sampled_from([8, 16, 64]), st.lists(st.floats(0, 9), min_size=4, max_size=4)),
        min_size=1,
        max_size=5,
    )
)
def test_a_division_keeps_to_the_bytes_and_to_what_was_measured(
    layers: list[tuple[int, int, list[float]]],
) -> None:
    """For any costs, including zeros and costs that rise with the slots."""
    plan = [spec(2 * half, head_dim) for half, head_dim, _ in layers]
    costs = {
        i: dict(zip(sorted({s.capacity // 2, s.capacity, 2 * s.capacity, 4}), measured, strict=False))
        for i, (s, (_, _, measured)) in enumerate(zip(plan, layers, strict=True))
    }
    slots = allocate.divide(costs, plan)
    assert slots.keys() == costs.keys()
    for layer, count in slots.items():
        assert min(costs[layer]) <= count <= max(costs[layer])
        assert (count - min(costs[layer])) % 2 == 0
    room = sum(s.capacity * s.head_dim for s in plan)
    used = sum(slots[i] * s.head_dim for i, s in enumerate(plan))
    assert used <= room
    more = [i for i, n in slots.items() if n + 2 <= max(costs[i])]
    assert all(used + 2 * plan[i].head_dim > room for i in more)  # no further step fits


# ------------------------------------------------------------------ slots


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 7), st.integers(1, 7))
def test_where_kept_tokens_go(data: st.DataObject, rows: int, heads: int, slots: int, chunk: int) -> None:
    kept = data.draw(arrays.arrays(bool, (rows, heads, slots + chunk)))
    free = slots - kept[..., :slots].sum(-1, keepdims=True)
    kept[..., slots:] &= kept[..., slots:].cumsum(-1) <= free  # no more than the free slots
    sources = place(torch.from_numpy(kept), slots).numpy()
    assert sources.shape == (rows, heads, slots)
    for row, head in np.ndindex(rows, heads):
        source, keep = sources[row, head], kept[row, head]
        for slot in np.flatnonzero(keep[:slots]):
            assert source[slot] == slot  # kept tokens stay in their slots
        filled = source[~keep[:slots]]
        arrivals = slots + np.flatnonzero(keep[slots:])
        # Each kept new token once, in order, into the first slots that are free; the others stay empty.
        assert filled.tolist() == [*arrivals, *[-1] * (len(filled) - len(arrivals))]
