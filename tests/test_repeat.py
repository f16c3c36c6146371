"""Layers that are repeated in the graph instead of traced: the same graph as a whole trace gives."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as tr
from onnx import numpy_helper
from torch import nn

from less_export.config import ExportConfig
from less_export.contract import Contract
from less_export.errors import ValidationError
from less_export.exporter import graphs, repeat, trace
from less_export.exporter.check import self_check
from less_export.hf import weights
from less_export.hf.decoder import LessDecoder
from less_export.hf.surgery import discover
from less_export.less.feature_maps import Kernels
from less_export.plan import plan_layers

from . import families
from .families import ONE, WINDOW
from .marks import exhaustive_but

_SLIDING, _FULL = "sliding_attention", "full_attention"

_THREE: dict[str, Any] = {**ONE, "num_hidden_layers": 3}

#: Decoders with several layers of a kind, and the first layer of each one's kind.
REPEATING: dict[str, tuple[families.Make, list[int]]] = {
    "llama": (lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**_THREE)), [0, 0, 0]),
    "gemma3": (
        lambda: tr.Gemma3ForCausalLM(
            tr.Gemma3TextConfig(
                **_THREE, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
                layer_types=[_SLIDING, _FULL, _SLIDING],
            )
        ),
        [0, 1, 0],
    ),
    "gpt2": (
        lambda: tr.GPT2LMHeadModel(
            tr.GPT2Config(
                vocab_size=families.VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512, initializer_range=0.3,
                attn_implementation="eager", scale_attn_by_inverse_layer_idx=True,
            )
        ),
        [0, 1, 2],
    ),
    "qwen3_moe": (
        lambda: tr.Qwen3MoeForCausalLM(
            tr.Qwen3MoeConfig(
                **_THREE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                decoder_sparse_step=2,
            )
        ),
        [0, 1, 0],
    ),
    "gpt_neox": (lambda: families.MAIN["gpt_neox"](3), [0, 0, 0]),
    "smollm3": (
        lambda: tr.SmolLM3ForCausalLM(tr.SmolLM3Config(**_THREE, no_rope_layer_interval=2)),
        [0, 1, 0],
    ),
}  # fmt: skip


def _decoder(model: Any) -> LessDecoder:
    config = ExportConfig(budget="8", slots="model", max_distance="none")
    plan = plan_layers(discover(model), config, 64, {})
    return LessDecoder(model, Contract(plan, families.VOCAB, "float32", 16, 2), Kernels({}, {})).eval()


def _five() -> Any:
    return tr.LlamaConfig(**{**_THREE, "num_hidden_layers": 5})


@pytest.mark.parametrize("name", REPEATING)
def test_layers_of_one_kind_are_found(name: str) -> None:
    make, kinds = REPEATING[name]
    bare = weights.bare_model(families.build(make).config, torch.float32)
    names = {f"model.{n}" for n, _ in bare.named_parameters()}
    found = repeat.find(_decoder(bare), names)
    assert list(found.first if found else range(len(kinds))) == kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slots"),
    exhaustive_but(
        [("llama", "int8"), ("gemma3", "model"), ("gemma3", "int8"), ("qwen3_moe", "model"), ("smollm3", "model")],
        ("gemma3", "int8"),
        ("qwen3_moe", "model"),
    ),
)
def test_the_graph_is_that_of_a_whole_trace(
    name: str, slots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, kinds = REPEATING[name]
    checkpoint = families.save(make, tmp_path / "checkpoint")
    kernels = families.kernels(families.load(checkpoint), tmp_path / "kernels.safetensors")
    options: dict[str, Any] = {"kernels": kernels, "budget": "8", "context": families.CONTEXT, "slots": slots}
    if slots == "int8":
        options |= {"max_distance": 32, "policy": "h2o"}
    unrolled: list[Any] = []
    original = repeat.unroll
    monkeypatch.setattr(repeat, "unroll", lambda *args: unrolled.append(args[1].copies) or original(*args))
    repeated = families.export(checkpoint, tmp_path / "repeated", **options)
    assert unrolled == [{i: first for i, first in enumerate(kinds) if i != first}]
    monkeypatch.setattr(graphs, "trace", functools.partial(trace.trace, repeating=False))
    whole = families.export(checkpoint, tmp_path / "whole", **options)
    ours, theirs = (onnx.load(x.bundle / "model.onnx", load_external_data=False) for x in (repeated, whole))
    assert _operators(ours) == _operators(theirs)
    assert _tensors(ours) == _tensors(theirs)
    assert _interface(ours) == _interface(theirs)
    ids, sizes = families.text(2, 40), [12, 1, 1, 16, 10]
    results = [families.feed(x.backend("ort", 2), ids, sizes) for x in (repeated, whole)]
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


def _interface(model: onnx.ModelProto) -> list[Any]:
    """Names, types and shapes of inputs and outputs; unknown sizes by the order in which they come."""
    names: dict[str, int] = {}
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [
                d.dim_value or f"size {names.setdefault(d.dim_param, len(names))}"
                for d in value.type.tensor_type.shape.dim
            ],
        )
        for value in [*model.graph.input, *model.graph.output]
    ]


def _operators(model: onnx.ModelProto) -> collections.Counter[Any]:
    """How often the graph has each operator, with its attributes."""
    return collections.Counter(
        (n.domain, n.op_type, n.overload, tuple(sorted(a.SerializeToString() for a in n.attribute)))
        for n in model.graph.node
    )


def _tensors(model: onnx.ModelProto) -> collections.Counter[Any]:
    """The graph's weights by where their bytes are, and its constants by their values."""
    return collections.Counter(
        (x.data_type, tuple(x.dims), tuple((e.key, e.value) for e in x.external_data))
        if x.external_data
        else (x.data_type, tuple(x.dims), numpy_helper.to_array(x).tobytes())
        for x in model.graph.initializer
    )


def test_layers_differ_by_any_attribute() -> None:
    bare = weights.bare_model(_five(), torch.float32)
    names = {f"model.{n}" for n, _ in bare.named_parameters()}
    bare.model.layers[3].self_attn.scaling *= 2
    bare.model.layers[2].post_attention_layernorm.register_buffer("more", torch.ones(1))
    bare.model.layers[4].mlp.act_fn = nn.GELU()
    found = repeat.find(_decoder(bare), names)
    assert found is not None
    assert found.first == (0, 0, 2, 3, 4)


def test_a_tensor_whose_value_stays_must_be_equal() -> None:
    bare = weights.bare_model(_five(), torch.float32)
    for i, layer in enumerate(bare.model.layers):
        layer.register_buffer("constant", torch.full((2,), float(i // 2)))
    found = repeat.find(_decoder(bare), {f"model.{n}" for n, _ in bare.named_parameters()})
    assert found is not None
    assert found.first == (0, 0, 2, 2, 4)


class _Uneven(tr.LlamaForCausalLM):
    """Adds to each layer's input something of its own, outside of the layers or as an argument."""

    outside = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.register_forward_pre_hook(functools.partial(self._shift, i), with_kwargs=True)

    def _shift(self, i: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.outside:
            return (args[0] + 0.25 * i, *args[1:]), kwargs
        return args, {**kwargs, "cache_position": args[0][..., i]}


@pytest.mark.parametrize("outside", [True, False])
def test_what_only_one_layer_gets_is_never_lost(outside: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = families.build(lambda: _Uneven(tr.LlamaConfig(**_THREE)))
    model.outside = outside
    decoder, names = _decoder(model), {f"model.{n}" for n, _ in model.named_parameters()}
    with caplog.at_level("INFO", "less_export"):
        graph = trace.trace(decoder, decoder.contract, names)
    assert ("tracing all layers: layer 1 does not get what layer 0 gets" in caplog.text) is not outside
    added = [n for n in graph.graph if n.op_type == "Add" and any(_is_shift(x) for x in n.inputs)]
    assert len(added) == (2 if outside else 0)
    assert decoder.absent == ()


def _is_shift(value: Any) -> bool:
    constant = None if value is None else value.const_value
    return constant is not None and constant.size == 1 and float(constant.numpy()) in (0.25, 0.5, 0.75, 1.0)


def test_a_wrong_copy_fails_the_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes with the number of its layer, which is not compared, is found there."""
    config = families.build(REPEATING["llama"][0]).config
    decoder = _decoder(weights.bare_model(config, torch.float32))
    copied = repeat.copy_node

    def wrong(node: Any, values: Any, suffix: str) -> Any:
        node = copied(node, values, suffix)
        if node.op_type == "LessAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 2 * node.attributes["scale"].as_float())
        return node

    monkeypatch.setattr(repeat, "copy_node", wrong)
    with pytest.raises(ValidationError, match="is not exported correctly"):
        self_check(config, decoder.contract, tmp_path)
