"""What the probe of a bare model finds: turned channels, their pairs and frequencies, and other uses of positions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from torch import Tensor
from transformers import PreTrainedModel

from less_export.errors import UnsupportedModelError
from less_export.hf.rotary import Rotation, arranged, probe, tables
from less_export.hf.surgery import AttentionCall, less_attention
from less_export.hf.weights import bare_model
from less_export.less.rotary import rotate, table_of

from . import families
from .families import VOCAB
from .marks import exhaustive_but

ROOT = Path(__file__).parent.parent
#: Families whose positions are turns: by layer, the number of pairs, and whether channels are in half-split order.
TURNING: dict[str, list[tuple[int, bool] | None]] = {
    "llama": [(8, True)] * 2,
    "qwen3": [(16, True)] * 2,
    "gemma3": [(8, True)] * 2,
    "phi3": [(8, True)] * 2,
    "gpt_neox": [(2, True)] * 2,
    "falcon_mqa": [(8, True)] * 2,
    "falcon_new": [(8, True)] * 2,
    "olmo2": [(8, True)],
    "smollm3": [(8, True), None],
    "stablelm": [(2, True)],
    "phi": [(4, True)],
    "cohere": [(8, False)],
    "mixtral": [(8, True)],
    "qwen3_moe": [(8, True)],
    "llama3_rope": [(8, True)],
    "yarn_rope": [(8, True)],
    "rope_per_layer_kind": [(8, True)] * 2,
    "glm": [(4, False)],
    "cohere2": [(8, False), None],
    "gemma4": [(4, False)] * 2,
    "glm4_moe": [(4, True)] * 2,
}
USUAL = ("llama", "gemma3", "gpt_neox", "falcon_new", "smollm3", "cohere2", "yarn_rope", "glm", "gemma4")
#: Positions that the probe does not run, up to those that a table may reach.
POSITIONS = (0, 1, 11, 500, 30_000, 131_000)


def bare(model: PreTrainedModel) -> PreTrainedModel:
    return bare_model(model.config, torch.float32)


def calls_at(model: PreTrainedModel, position: int) -> dict[int, AttentionCall]:
    """The attention calls of the true model for five tokens, all at one position."""
    calls: dict[int, AttentionCall] = {}

    def record(call: AttentionCall) -> Tensor:
        calls[call.layer] = call
        return torch.zeros_like(call.q)

    with torch.no_grad(), less_attention(model, record):
        ids = torch.tensor([[3, 50, 7, 96, 21]])
        model(input_ids=ids, position_ids=torch.full((1, 5), position), use_cache=False)
    return calls


@pytest.mark.parametrize("family", exhaustive_but(TURNING, *USUAL))
def test_explains_the_true_model(family: str) -> None:
    """Queries and keys of real weights at any position are those at position 0, turned by the table."""
    model = families.build(family)
    found = probe(bare(model))
    assert [r and (len(r.first), r.order is None) for r in found] == TURNING[family]
    made = tables(found, max(POSITIONS) + 1)
    start = calls_at(model, 0)
    for position in POSITIONS:
        for layer, call in calls_at(model, position).items():
            kind = table_of(made, layer)
            want, origin = arranged(call, kind), arranged(start[layer], kind)
            turns = torch.full((5,), position)
            for x, y in ((origin.q, want.q), (origin.k, want.k)):
                turned = x if kind is None else rotate(x, kind.angles, turns)
                error = (turned - y).abs().max() / y.abs().max()
                # The model's own angles are float32, whose rounding grows with the position.
                assert error < 1e-6 + 1.2e-7 * position, (layer, position)


def test_layers_of_a_kind_share_a_table() -> None:
    found = probe(bare(families.build("rope_per_layer_kind")))
    made = tables((*found, None, *found), 9)
    assert [t.layers for t in made] == [(0, 3), (1, 4)]
    assert all(t.angles.shape == (9, 16) for t in made)


_LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3},
        {"rope_type": "yarn", "rope_theta": 1e6, **_YARN},
    ],
    ids=lambda r: r["rope_type"],
)
def test_frequencies_are_the_models_own(rope: dict[str, Any]) -> None:
    """All layers of a true width agree on them; off by at most 1e-7 radians at 131,072 tokens."""
    model = bare_model(
        tr.LlamaConfig(
            hidden_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_hidden_layers=5,
            intermediate_size=1024, vocab_size=32000, max_position_embeddings=131072, rope_parameters=rope,
        ),
        torch.float32,
    )  # fmt: skip
    (rotation,) = set(probe(model))
    assert rotation is not None
    own = model.model.rotary_emb.inv_freq.double().numpy()
    assert np.abs(np.array(rotation.frequencies) - own).max() * 131072 < 1e-7


def test_a_bare_model_stays_as_it_was() -> None:
    model = bare(families.build("mixtral"))
    before = {n: vars(m).copy() for n, m in model.named_modules()}
    probe(model)
    assert not any(bool(p.any()) for p in model.parameters())
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {n: x.keys() for n, x in before.items()}


def test_a_model_with_weights_is_not_touched() -> None:
    with pytest.raises(AssertionError, match="bare"):
        probe(families.build("llama"))


# ------------------------------------------------------------------ other uses of positions


def tabled(name: str) -> tuple[PreTrainedModel, str]:
    return bare(families.build(name)), "layer 0: its values depend on the position (a table of positions)"


def scaled() -> tuple[PreTrainedModel, str]:
    """Ministral 3 multiplies queries by the logarithm of the position."""
    model = bare_model(
        tr.Ministral3Config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        ),
        torch.float32,
    )  # fmt: skip
    return model, "layer 0: the size of its queries depends on the position"


def not_proportional() -> tuple[PreTrainedModel, str]:
    model = bare(families.build(families.small()))
    module = model.model.rotary_emb
    forward = module.forward
    module.forward = lambda x, position_ids: forward(x, position_ids.clamp(max=5000))
    return model, "layer 0: its queries do not turn by angles that are proportional to the position"


def coarse() -> tuple[PreTrainedModel, str]:
    model = bare(families.build(families.small()))
    module = model.model.rotary_emb
    forward = module.forward
    module.forward = lambda x, position_ids: tuple(t.half().float() for t in forward(x, position_ids))
    return model, "layer 0: the size of its queries depends on the position"


def keys_alone() -> tuple[PreTrainedModel, str]:
    """Queries of a layer that does not rotate them, against keys that it does."""
    model = bare(families.build(families.small()))
    module = importlib.import_module(type(model).__module__)
    original = module.apply_rotary_pos_emb

    class Attention(type(model.model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *more: (q, original(q, k, *more)[1]))
                return super().forward(*args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Attention
    return model, "layer 0: the position changes other channels of its queries than of its keys"


def beside_attention() -> tuple[PreTrainedModel, str]:
    model = bare(families.build(families.small()))
    mlp = model.model.layers[0].mlp

    class Mlp(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.arange(x.shape[1])[:, None]

    mlp.__class__ = Mlp
    return model, "layer 0: positions enter the model beside its attention"


OTHERS: dict[str, Callable[[], tuple[PreTrainedModel, str]]] = {
    "learned (GPT-2)": lambda: tabled("gpt2"),
    "learned (OPT)": lambda: tabled("opt"),
    "scaled (Ministral 3)": scaled,
    "not proportional": not_proportional,
    "half precision": coarse,
    "keys alone": keys_alone,
    "beside attention": beside_attention,
}


@pytest.mark.parametrize("case", OTHERS)
def test_refuses_other_uses(case: str) -> None:
    model, reason = OTHERS[case]()
    with pytest.raises(UnsupportedModelError) as refusal:
        probe(model)
    assert str(refusal.value) == reason


# ------------------------------------------------------------------ all architectures

ROWS = [
    r["model_type"]
    for r in json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())["rows"]
    if r["outcome"] == "supported"
]
#: Supported architectures whose positions are a table of embeddings, or scale queries.
OTHER_POSITIONS = {
    "beam", "bert", "bert-generation", "biogpt", "ctrl", "electra", "ernie", "gpt-sw3", "gpt2", "gpt_bigcode",
    "ministral3", "opt", "roc_bert",
}  # fmt: skip


@pytest.mark.parametrize("model_type", exhaustive_but(ROWS, "glm4_moe_lite", "nanochat", "persimmon"))
def test_every_architecture(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    config = importlib.import_module("zoo_configs").tiny_config(model_type)
    model = bare_model(config, torch.float32)
    if model_type in OTHER_POSITIONS:
        with pytest.raises(UnsupportedModelError, match=r"depends? on the position"):
            probe(model)
        return
    found = probe(model)
    assert len(found) == config.get_text_config().num_hidden_layers
    turning = [r for r in found if r is not None]
    assert turning
    for r in turning:
        assert isinstance(r, Rotation)
        assert abs(r.frequencies[0]) == pytest.approx(1.0, rel=1e-6)  # the first pair turns by a radian a token
