"""Exported tiny models of the basic families, on the torch and ONNX Runtime backends.

``h2o`` bundles evict (24 slots; sliding layers keep their window of 10) and have random kernels; ``full`` bundles
must be the untouched Hugging Face model. Tolerances are shares of the largest value; those against Hugging
Face are earned: twice the error that its own float32 run has against its float64 run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import transformers as tr

from less_export.contract import Policy
from less_export.hf import recipes
from less_export.runtime.backend import Backend, RowState

from . import families
from .conftest import Exported, Opened
from .families import BUDGET, ROWS, differences, evicted, feed, feed_ragged, relative, text
from .marks import slow_but

#: Tolerance of results that differ only in the order of float32 sums.
ROUNDING = 2e-5
#: Below this, the error of a float32 run is meaningless (one rounding of the largest logit is 6e-8).
FLOOR = 1e-6

all_families = pytest.mark.parametrize("family", slow_but(families.MAIN, "gemma3"))
both_backends = pytest.mark.parametrize("name", ["torch", "ort"])
#: Tokens a step of three rows: ragged, one row parked now and then, past 24 slots, then one at a time.
RAGGED = np.array([[7, 16, 3], [9, 0, 11], [16, 5, 4], [1, 16, 12], [0, 1, 1], *[[1, 1, 1]] * 6, [1, 0, 1]])


def steps(backend: Backend) -> list[npt.NDArray[np.float32]]:
    """The logits of the ragged steps, for rows that were not parked."""
    ids = text(ROWS, 64)
    logits = feed_ragged(backend, ids, RAGGED)
    assert all(np.isfinite(x).all() for x in logits)
    return [x[new > 0] for x, new in zip(logits, RAGGED, strict=True)]


def snapshot(backend: Backend, row: int) -> dict[str, bytes]:
    return {n: x.tobytes() for n, x in backend.read_row(row).tensors.items()}


# ------------------------------------------------------------------ one truth


@all_families
def test_onnx_runtime_agrees_with_torch_past_eviction(family: str, opened: Opened) -> None:
    torch, ort = opened(family, "h2o", "torch"), opened(family, "h2o", "ort")
    errors = [relative(a, b) for a, b in zip(steps(ort), steps(torch), strict=True)]
    assert max(errors) < ROUNDING
    assert evicted(ort) >= 5
    assert max(differences(ort, torch).values()) < ROUNDING
    lowrank = [i for i, s in enumerate(ort.contract.layers) if s.absorb]
    assert lowrank == [i for i, s in enumerate(ort.contract.layers) if s.policy is Policy.H2O]
    for i in lowrank:  # every token is in one place: z counts the evicted ones
        state = ort.read_row(0)
        held = (state.tensors[f"past.{i}.position"] >= 0).sum(-1)
        np.testing.assert_allclose(held + state.tensors[f"past.{i}.z"].sum(-1), state.length, rtol=1e-5)


@all_families
@both_backends
def test_full_is_the_hugging_face_model(family: str, name: str, exported: Exported, opened: Opened) -> None:
    ids = text(2, 48)
    expected, own_error = families.truth(families.load(exported(family, "full").checkpoint), ids)
    backend = opened(family, "full", name, rows=2)
    logits = np.concatenate(feed(backend, ids, [16, 9, 1, 1, 16, 1, 1, 3]), 1)
    assert relative(logits, expected) <= max(2 * own_error, FLOOR)


@all_families
@both_backends
def test_budget_longer_than_the_text_is_the_hugging_face_model(
    family: str, name: str, exported: Exported, opened: Opened
) -> None:
    ids = text(2, BUDGET, seed=1)
    expected, own_error = families.truth(families.load(exported(family, "h2o").checkpoint), ids)
    backend = opened(family, "h2o", name, rows=2)
    sizes = [11, 8, *[1] * 5]
    logits = np.concatenate(feed(backend, ids, sizes), 1)
    assert relative(logits, expected[:, np.cumsum(sizes) - 1]) <= max(2 * own_error, FLOOR)


@all_families
def test_eviction_is_not_the_hugging_face_model(family: str, exported: Exported, opened: Opened) -> None:
    # The tests above would show nothing if attention were nearly uniform, or nothing were evicted.
    ids = text(2, 48)
    expected, _ = families.truth(families.load(exported(family, "h2o").checkpoint), ids)
    logits = feed(opened(family, "h2o", "ort", rows=2), ids, [16, 16, 15, 1])[-1]
    sliding = all(
        s.policy is Policy.WINDOW for s in exported(family, "h2o").opened.manifest.artifacts[0].contract.layers
    )
    assert (relative(logits[:, 0], expected[:, -1]) < ROUNDING) == sliding


# ------------------------------------------------------------------ chunks (DESIGN section 1)


@pytest.mark.parametrize("family", slow_but(["llama", "gemma3", "falcon_mqa"], "gemma3"))
@both_backends
def test_chunking_does_not_change_full_and_window(family: str, name: str, opened: Opened) -> None:
    ids = text(2, 40, seed=2)
    whole, small = opened(family, "full", name, rows=2), opened(family, "full", name, rows=2, copy=1)
    a = np.concatenate(feed(whole, ids, [16, 16, 8]), 1)
    b = np.concatenate(feed(small, ids, [1] * 13 + [5, 5, 5, 12]), 1)
    assert relative(a, b) < ROUNDING
    assert max(differences(whole, small).values()) < ROUNDING
    for i, layer in enumerate(whole.contract.layers):
        x, y = (backend.read_row(0).tensors[f"past.{i}.position"] for backend in (whole, small))
        if layer.policy is Policy.FULL:  # exactly the same slots
            np.testing.assert_array_equal(x, y)
        else:
            assert sorted(x[0]) == list(range(40 - families.WINDOW, 40))


@pytest.mark.slow
@both_backends
def test_prefill_hands_over_to_decode(name: str, opened: Opened, tmp_path: Path) -> None:
    # Decoding needs only the state after prefill, saved and loaded elsewhere.
    ids = text(1, 60, seed=3)
    for family in families.MAIN:
        here, there = opened(family, "h2o", name, rows=1), opened(family, "h2o", name, rows=2, copy=1)
        feed(here, ids, [16, 16, 4])
        here.read_row(0).save(tmp_path / "state")
        feed(there, text(2, 60, seed=4), [16, 3])
        there.write_row(1, RowState.load(tmp_path / "state"))
        there.reset_rows([0])
        for at in range(36, 44):
            token = ids[:, at : at + 1]
            padded = np.concatenate([np.full((2, 1), token[0, 0]), np.full((2, 4), 5)], 1)
            there_logits = there.step(padded, [0, 1])[1]  # a padded chunk of one, as engines of fixed size decode
            assert relative(there_logits, here.step(token)[0]) < ROUNDING, family
        assert max(differences(here, there, [(0, 1)]).values()) < ROUNDING, family


# ------------------------------------------------------------------ rows are independent


@all_families
@both_backends
def test_permuted_rows_give_permuted_results(family: str, name: str, opened: Opened) -> None:
    ids, order = text(ROWS, 64), np.array([2, 0, 1])
    one, two = opened(family, "h2o", name), opened(family, "h2o", name, copy=1)
    a, b = feed_ragged(one, ids, RAGGED), feed_ragged(two, ids[order], RAGGED[:, order])
    for x, y, new in zip(a, b, RAGGED, strict=True):
        live = new[order] > 0
        assert relative(y[live], x[order][live]) < ROUNDING
    assert max(differences(one, two, [(int(s), t) for t, s in enumerate(order)]).values()) < ROUNDING


@all_families
@both_backends
def test_ragged_rows_equal_rows_run_alone(family: str, name: str, opened: Opened) -> None:
    ids = text(ROWS, 64)
    together, alone = opened(family, "h2o", name), opened(family, "h2o", name, rows=1, copy=1)
    logits = feed_ragged(together, ids, RAGGED, rubbish=96)
    for row in range(ROWS):
        alone.open(1)
        active = RAGGED[:, row] > 0
        own = feed_ragged(alone, ids[row : row + 1], RAGGED[active, row : row + 1])
        mixed = [x for x, live in zip(logits, active, strict=True) if live]
        assert max(relative(x[row], y[0]) for x, y in zip(mixed, own, strict=True)) < ROUNDING
        assert max(differences(together, alone, [(row, 0)]).values()) < ROUNDING


@all_families
@both_backends
def test_parked_rows_keep_every_bit(family: str, name: str, opened: Opened) -> None:
    backend, ids = opened(family, "h2o", name), text(ROWS, 64)
    feed(backend, ids, [16, 13])
    before = [snapshot(backend, row) for row in range(ROWS)]
    assert np.isfinite(backend.step(ids[:, :7], [0, 7, 0])).all()
    assert np.isfinite(backend.step(ids[:, :1], [0, 1, 0])).all()
    assert snapshot(backend, 0) == before[0]
    assert snapshot(backend, 2) == before[2]
    assert snapshot(backend, 1) != before[1]
    assert list(backend.past_length) == [29, 37, 29]
    backend.step(ids[:, :3], [0, 0, 0])
    assert snapshot(backend, 0) == before[0]


@all_families
@both_backends
def test_resetting_a_row_leaves_the_others_alone(family: str, name: str, opened: Opened) -> None:
    backend, fresh = opened(family, "h2o", name), opened(family, "h2o", name, copy=1)
    ids, more = text(ROWS, 64), text(ROWS, 40, seed=5)
    feed(backend, ids, [16, 14])
    before = [snapshot(backend, row) for row in range(ROWS)]
    backend.reset_rows([1])
    assert [snapshot(backend, row) for row in (0, 2)] == [before[0], before[2]]
    assert snapshot(backend, 1) == snapshot(fresh, 1)
    for at in range(0, 40, 8):  # the row starts a new sequence while the others continue
        chunk = np.stack([ids[0, 30:38], more[1, at : at + 8], ids[2, 30:38]])
        assert np.array_equal(backend.step(chunk)[1], fresh.step(chunk)[1])
    assert snapshot(backend, 1) == snapshot(fresh, 1)


@all_families
@both_backends
def test_nan_in_empty_slots_reaches_nothing(family: str, name: str, opened: Opened) -> None:
    clean, poisoned = opened(family, "h2o", name), opened(family, "h2o", name, copy=1)
    ids, marked = text(ROWS, 64), 0
    lengths = np.array([[5, 0, 9], [3, 2, 1], *RAGGED[:3], [1, 1, 1], [1, 1, 1]])
    for step, new in enumerate(lengths):
        for row in range(ROWS):
            state = poisoned.read_row(row)
            for i in range(len(poisoned.contract.layers)):
                empty = state.tensors[f"past.{i}.position"] < 0
                for field in ("key", "value", "psi", "score"):
                    state.tensors[f"past.{i}.{field}"][empty] = np.nan
                marked += int(empty.sum())
            poisoned.write_row(row, state)
        a, b = (feed_ragged(backend, ids, lengths[step : step + 1])[0] for backend in (clean, poisoned))
        assert np.array_equal(a[new > 0], b[new > 0])
        assert np.isfinite(b).all()
    assert marked > 100
    worst = differences(clean, poisoned)
    assert set(worst.values()) == {0.0}


# ------------------------------------------------------------------ options


@pytest.mark.slow
def test_last_logits_are_the_last_of_all_logits(exported: Exported, opened: Opened, tmp_path: Path) -> None:
    checkpoint, ids = exported("llama", "full").checkpoint, text(ROWS, 64)
    last = families.export(checkpoint, tmp_path / "last", policy="full", context=families.CONTEXT)
    for name in ("torch", "ort"):
        every, only = opened("llama", "full", name), last.backend(name)
        for new, a, b in zip(RAGGED, feed_ragged(every, ids, RAGGED), feed_ragged(only, ids, RAGGED), strict=True):
            assert a.shape == (ROWS, max(new.max(), 1), families.VOCAB)
            assert b.shape == (ROWS, 1, families.VOCAB)
            for row in np.flatnonzero(new):
                assert relative(b[row, 0], a[row, new[row] - 1]) < ROUNDING


@pytest.mark.slow
def test_compressed_sliding_layers_absorb(tmp_path: Path) -> None:
    # Mistral slides over 10 tokens in every layer; 6 slots and the state replace them.
    checkpoint = families.save(families.shallow("mistral"), tmp_path / "m")
    kernels = families.kernels(families.load(checkpoint), tmp_path / "kernels.safetensors", sliding=True)
    tiny = families.export(checkpoint, tmp_path / "b", budget="6", kernels=kernels, compress_sliding=True)
    torch, ort = tiny.backend("torch"), tiny.backend("ort")
    (layer,) = ort.contract.layers
    assert (layer.policy, layer.capacity, layer.window, layer.absorb) == (Policy.H2O, 6, 10, True)
    assert max(relative(a, b) for a, b in zip(steps(ort), steps(torch), strict=True)) < ROUNDING
    assert max(differences(ort, torch).values()) < ROUNDING
    state = ort.read_row(0)
    position, z = state.tensors["past.0.position"], state.tensors["past.0.z"]
    assert ((position < 0) | (position > state.length - 10)).all()  # tokens that the next query cannot see are gone
    np.testing.assert_allclose((position >= 0).sum(-1) + z.sum(-1), state.length, rtol=1e-5)


@pytest.mark.exhaustive
def test_more_layers_than_any_recipe(tmp_path: Path) -> None:
    # OPT's layers are the quickest to trace; test_runtime has more.
    count = 1 + max(r.architecture["num_hidden_layers"] for r in recipes.all_recipes())
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_attention_heads": 2}
    deep = tr.OPTConfig(**families.OPT | sizes, num_hidden_layers=count)
    checkpoint = families.save(lambda: tr.OPTForCausalLM(deep), tmp_path / "model", max_shard_size="20KB")
    tiny = families.export(checkpoint, tmp_path / "bundle", policy="sink", budget="6")
    assert len(tiny.opened.manifest.artifacts[0].contract.layers) == count
    ids = text(1, 9)
    actual, expected = (feed(tiny.backend(name, 1), ids, [8, 1]) for name in ("ort", "torch"))
    assert max(relative(a, b) for a, b in zip(actual, expected, strict=True)) <= 1e-4
