"""Budgets and their split, recipes and the layer plan: all arithmetic, no model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from less_export.config import DEFAULT_HALF_LIFE, MAX_HALF_LIFE, ExportConfig
from less_export.contract import LayerSpec, Policy
from less_export.errors import UsageError
from less_export.hf import recipes
from less_export.less.policies import EvictionPolicy
from less_export.plan import budget_tokens, default_context, plan_layers, split_budget, unused_kernels

H2O, TOVA, SINK, WINDOW, FULL = Policy.H2O, Policy.TOVA, Policy.SINK, Policy.WINDOW, Policy.FULL


def layer(window: int = 0) -> SimpleNamespace:
    return SimpleNamespace(query_heads=4, kv_heads=2, head_dim=8, scale=0.35, window=window)


def plan(*windows: int, context: int = 1000, ranks: dict[int, int] | None = None, **options: Any) -> list[LayerSpec]:
    return list(plan_layers([layer(w) for w in windows], ExportConfig(**options), context, ranks or {}))


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("budget", "context", "tokens"),
    [
        ("256", 4096, 256),
        (" 7 ", 7, 7),
        ("1", 4096, 1),
        ("5%", 4096, 204),
        ("5%", 1024, 50),
        ("2.5%", 1000, 24),
        ("100%", 255, 254),
        ("29%", 200, 58),  # 57.99999 in floats
        ("0.2%", 1000, 2),
    ],
)
def test_budget(budget: str, context: int, tokens: int) -> None:
    assert budget_tokens(budget, context) == tokens


def test_percentages_are_even_and_rounded_down() -> None:
    for context in (1, 63, 64, 1000, 4095, 131072):
        for percent in (1, 3, 5, 7, 29, 58, 99, 100):
            tokens = 2 * (percent * context // 200)
            if tokens:
                assert budget_tokens(f"{percent}%", context) == tokens
            else:
                with pytest.raises(UsageError, match="leaves no token"):
                    budget_tokens(f"{percent}%", context)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("0", "leaves no token of a context of 64"),
        ("0%", "leaves no token"),
        ("-5", "leaves no token"),
        ("-5%", "leaves no token"),
        ("1%", "leaves no token"),
        ("65", "more than the context of 64 tokens"),
        ("200%", "more than the context"),
        ("", "neither a number"),
        ("%", "neither a number"),
        ("five", "neither a number"),
        ("5%%", "neither a number"),
        ("1/0%", "neither a number"),
        ("nan%", "neither a number"),
        ("inf%", "neither a number"),
        ("2.5", "neither a number"),
    ],
)
def test_refused_budgets(budget: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        budget_tokens(budget, 64)


@pytest.mark.parametrize(
    ("policy", "options", "heavy", "recent"),
    [
        (H2O, {"budget": "50"}, 25, 25),
        (H2O, {"budget": "51"}, 25, 26),
        (H2O, {"budget": "1"}, 0, 1),
        (H2O, {}, 25, 25),  # 5% of 1000
        (SINK, {"budget": "50"}, 4, 46),
        (SINK, {"budget": "4"}, 3, 1),
        (SINK, {"budget": "1"}, 0, 1),
        (TOVA, {"budget": "50"}, 49, 1),
        (TOVA, {"budget": "50", "recent": 1}, 49, 1),
        (TOVA, {"heavy": 30}, 30, 1),
        (TOVA, {"heavy": 30, "budget": "31"}, 30, 1),
        (H2O, {"budget": "50", "heavy": 10}, 10, 40),
        (H2O, {"budget": "50", "recent": 10}, 40, 10),
        (H2O, {"budget": "50", "heavy": 0}, 0, 50),
        (SINK, {"heavy": 8, "recent": 30}, 8, 30),
        (SINK, {"heavy": 8, "recent": 30, "budget": "38"}, 8, 30),
        (H2O, {"heavy": 999, "recent": 1}, 999, 1),
    ],
)
def test_split(policy: EvictionPolicy, options: dict[str, Any], heavy: int, recent: int) -> None:
    assert split_budget(policy, ExportConfig(**options), 1000) == (heavy, recent)
    (spec,) = plan(0, policy=policy.name, **options)
    assert (spec.policy, spec.heavy, spec.recent, spec.capacity) == (policy, heavy, recent, heavy + recent)


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        (H2O, {"budget": "50", "heavy": 20, "recent": 20}, "do not add up"),
        (H2O, {"budget": "50", "heavy": 50}, "50 heavy and 0 recent"),
        (H2O, {"budget": "50", "recent": 51}, "-1 heavy"),
        (H2O, {"heavy": 999, "recent": 2}, "more than the context of 1000"),
        (TOVA, {"recent": 2}, "drop --recent"),
        (TOVA, {"heavy": 30, "budget": "50"}, "do not add up"),
        (H2O, {"budget": "1001"}, "more than the context"),
        (FULL, {"budget": "50"}, "drop --budget"),
        (FULL, {"heavy": 5}, "drop --budget, --heavy"),
        (FULL, {"recent": 5}, "drop --budget, --heavy and --recent"),
    ],
)
def test_refused_splits(policy: EvictionPolicy, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan(0, policy=policy.name, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "window"}, "cannot be chosen"),
        ({"policy": "lru"}, "unknown policy 'lru': choose one of h2o"),
        ({"target": "cuda"}, "choose one of ort, trt, both"),
        ({"dtype": "int8"}, "choose one of float32"),
        ({"heavy": -1}, "--heavy must be at least 0"),
        *[
            ({n: 0}, f"--{n.replace('_', '-')} must be at least 1, not 0")
            for n in ("context", "recent", "rank", "max_batch", "chunk", "num_hidden_layers")
        ],
    ],
)
def test_refused_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ExportConfig(**options)


# ------------------------------------------------------------------ the layer plan


def test_sliding_layers_keep_their_window() -> None:
    specs = plan(128, 0, 0, policy="sink", budget="40", ranks={0: 3, 1: 5})
    assert [s.policy for s in specs] == [WINDOW, SINK, SINK]
    assert (specs[0].capacity, specs[0].window, specs[0].recent, specs[0].absorb) == (128, 128, 128, False)
    assert [(s.rank, s.absorb) for s in specs] == [(1, False), (5, True), (1, False)]
    assert unused_kernels(specs, [0, 1]) == [0]
    assert [s.policy for s in plan(128, 0, policy="full", context=64)] == [WINDOW, FULL]


def test_compress_sliding() -> None:
    specs = plan(128, 40, 30, 0, budget="40", compress_sliding=True, ranks={0: 2})
    assert [s.policy for s in specs] == [H2O, WINDOW, WINDOW, H2O]  # only if it saves memory
    assert (specs[0].capacity, specs[0].window, specs[0].absorb, specs[0].rank) == (40, 128, True, 2)
    assert specs[3].window == 0
    assert plan(128, policy="full", compress_sliding=True)[0].policy is WINDOW


def test_full_keeps_the_context() -> None:
    (spec,) = plan(0, policy="full", context=77, ranks={0: 4})
    assert (spec.capacity, spec.heavy, spec.recent, spec.absorb, spec.rank) == (77, 0, 77, False, 1)


def test_default_context() -> None:
    assert [default_context(n) for n in (None, 1024, 4096, 131072)] == [4096, 1024, 4096, 4096]


# ------------------------------------------------------------------ recipes


def test_every_recipe_is_valid() -> None:
    assert {"llama2-7b", "gemma3-270m", "tinyllama-1.1b"} <= set(recipes.names())
    for name in recipes.names():
        recipe = recipes.load(name)
        assert recipe is not None
        config = ExportConfig(num_hidden_layers=1).with_defaults(recipe.options())
        (spec,) = plan_layers([layer()], config, recipe.context, {})
        assert spec.capacity == budget_tokens(recipe.budget, recipe.context)
        assert config.chunk == recipe.chunk
    assert recipes.load("nope") is None


def test_options_win_over_the_recipe() -> None:
    recipe = {"policy": "h2o", "budget": "5%", "context": 1000, "chunk": 64, "compress_sliding": True}

    def settled(**options: Any) -> ExportConfig:
        return ExportConfig(**options).with_defaults(recipe)

    assert settled() == ExportConfig(**recipe)
    assert settled(compress_sliding=False).compress_sliding is False
    assert settled(budget="10%", chunk=8) == ExportConfig(**recipe | {"budget": "10%", "chunk": 8})
    for options in (
        {"policy": "full"},
        {"heavy": 100, "recent": 200},
        {"policy": "tova", "heavy": 100},
        {"policy": "sink", "heavy": 4, "recent": 10},
    ):
        config = settled(**options)
        assert config.budget is None, options
        plan_layers([layer()], config, 1000, {})  # no contradiction
    assert settled(heavy=10).budget == "5%"
    assert plan_layers([layer()], settled(heavy=10), 1000, {})[0].recent == 40
    assert ExportConfig().with_defaults(recipe | {"policy": "full"}).budget is None


def test_half_life_of_scores() -> None:
    def planned(recipe: int | str | None = None, **options: Any) -> int | None:
        defaults = {} if recipe is None else {"score_half_life": recipe}
        config = ExportConfig(budget="12", **options).with_defaults(defaults)
        return plan_layers([layer()], config, 1000, {})[0].score_half_life

    assert planned() == (None if DEFAULT_HALF_LIFE == "none" else DEFAULT_HALF_LIFE)
    assert planned(score_half_life=7) == 7
    assert planned(256) == 256
    assert planned(256, score_half_life="none") is None
    assert planned("none", score_half_life=7) == 7
    assert planned(256, policy="sink") is None  # the recipe's is for h2o
    assert planned(policy="tova", score_half_life="none") is None
    with pytest.raises(UsageError, match="policy tova accumulates no scores: drop --score-half-life"):
        planned(policy="tova", score_half_life=7)
    for wrong in (0, -1, MAX_HALF_LIFE + 1, 1.5, True, "512"):
        with pytest.raises(UsageError, match=r"--score-half-life must be from 1 to 1048576 tokens or none, not"):
            ExportConfig(score_half_life=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("hub =", "hubb ="), "unknown key hubb: did you mean hub?"),
        (
            ("num_key_value_heads", "num_kv_heads"),
            "architecture.num_kv_heads: did you mean architecture.num_key_value_",
        ),
        (("rope_theta", "rope_thetaa"), "unknown key architecture.rope_thetaa: did you mean architecture.rope_theta?"),
        (("chunk = 256", "chunk = 1.5"), "chunk must be a whole number, not 1.5"),
        (("chunk = 256", 'chunk = 1\ncompress_sliding = "yes"'), "compress_sliding must be true or false, not 'yes'"),
        (('budget = "93"', "budget = 5"), "budget must be text in quotes, not 5"),
        (("rank = 4", 'rank = "8"'), "rank must be a whole number, not '8'"),
        (("rank = 4", "rank = 800"), "rank must be at most 64, not 800"),
        (("rms_norm_eps = 1e-06", 'rms_norm_eps = "small"'), "architecture.rms_norm_eps must be a number, not 'small'"),
        (("tie_word_embeddings = true", "tie_word_embeddings = 1"), "tie_word_embeddings must be true or false, not 1"),
        (("[architecture]", "[[architecture]]"), "architecture must be a table, not [{'model_type'"),
        (('budget = "93"', 'budget = "five"'), "neither a number"),
        (('budget = "93"', 'budget = "5000"'), "more than the context"),
        (("context = 1024", 'context = "1024"'), "context must be a whole number, not '1024'"),
        (("chunk = 256", "chunk = 0"), "--chunk must be at least 1"),
        (("chunk = 256", 'chunk = 1\nscore_half_life = "long"'), "--score-half-life must be from 1 to"),
        (("chunk = 256", "chunk = 1\nscore_half_life = 1.5"), "score_half_life must be a whole number or text"),
        (('policy = "h2o"', 'policy = "window"'), "cannot be chosen"),
        (('"google/gemma', '"gemma'), "hub an id like org/name"),
        (("hidden = 128", ""), "missing 1 required"),
        (("hidden_size = 640", ""), "architecture.hidden_size must be a positive whole number, not None"),
        (
            ("num_hidden_layers = 18", "num_hidden_layers = 1.5"),
            "architecture.num_hidden_layers must be a whole number",
        ),
        (("num_attention_heads = 4", "num_attention_heads = true"), "architecture.num_attention_heads must be"),
        (("num_key_value_heads = 1", "num_key_value_heads = 3"), "multiple of KV heads"),
        (('model_type = "gemma3_text"', ""), "architecture.model_type must name"),
        (("=", "", 1), "Expected '='"),
    ],
)
def test_damaged_recipe(edit: tuple[Any, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = recipes._files()["gemma3-270m"].read_text()
    file = tmp_path / "mine.toml"
    monkeypatch.setattr(recipes, "_files", lambda: {"mine": file})
    file.write_text(good)
    assert recipes.load("mine") is not None
    bad = good.replace(*edit)
    assert bad != good
    file.write_text(bad)
    with pytest.raises(UsageError, match=r"recipe mine.toml is not valid \(.*its keys are hub, policy") as caught:
        recipes.load("mine")
    assert says in str(caught.value)


def test_recipe_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b'hub = "\xff\xfe"')
    monkeypatch.setattr(recipes, "_files", lambda: {"mine": file})
    with pytest.raises(UsageError, match=r"mine\.toml is not valid"):
        recipes.load("mine")
