"""Parts of a decoder, run alone, compute what they do in the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.errors import UnsupportedModelError
from less_export.hf.layerwise import LayerwiseDecoder
from less_export.hf.running import position_ids
from less_export.hf.surgery import AttentionCall, discover, less_attention
from less_export.less import simulate
from less_export.plan import plan_layers
from less_export.training.additions import additions

from . import families
from .training_support import sliding_folder

pytest_plugins = ["tests.bundles"]


def planned(model: torch.nn.Module) -> tuple[LayerSpec, ...]:
    return plan_layers(discover(model), ExportConfig(budget="12", slots="model", max_distance="none"), 256, {})


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_decoder_goes_on_where_it_stopped(family: str) -> None:
    """Also where layers are numbered as they are called; and what attention adds is found in every family."""
    model = families.build(family).eval()
    plan, called = planned(model), list[int]()

    def full(call: AttentionCall) -> Tensor:
        called.append(call.layer)
        return simulate.full(call.q, call.k, call.v, plan[call.layer])

    decoder, last = LayerwiseDecoder(model, plan), len(plan) - 1
    ids = torch.randint(3, families.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with less_attention(model, full):
            want = model(input_ids=ids, position_ids=position_ids(ids), use_cache=False).logits
        called.clear()
        stopped = decoder.run(ids, full, keep=last, until=last)
        assert called == list(range(last + 1))
        assert stopped.last is None
        called.clear()
        passed = decoder.run(ids, full, begin=last, hidden=stopped.kept)
        assert called == [last]
        assert passed.last is not None
        at = torch.tensor([3, 19])
        got = decoder.log_probabilities(passed.last[1, at])
        torch.testing.assert_close(got, torch.log_softmax(want[1, at].float(), -1))
        few = torch.tensor([5, 2, 30])
        got = decoder.log_probabilities(passed.last[1, at], few)
        torch.testing.assert_close(got, torch.log_softmax(want[1, at][:, few].float(), -1))
        again = model(input_ids=ids, position_ids=position_ids(ids), use_cache=False).logits
        torch.testing.assert_close(again, want, rtol=1e-3, atol=1e-3)  # the model is what it was
    for layer, addition in zip(plan, additions(model, plan), strict=True):
        assert addition.weight.shape[0] == layer.query_heads * layer.head_dim
        assert (addition.norm is not None) == (family in ("gemma2", "gemma3", "olmo2"))


def test_what_attention_adds_is_what_the_model_adds(tmp_path: Path) -> None:
    """After the norm that follows it, and with the bias of its projection."""
    from transformers import AutoModelForCausalLM

    gemma = AutoModelForCausalLM.from_pretrained(sliding_folder(tmp_path / "model"))
    torch.manual_seed(0)
    sizes = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64)
    gpt2 = GPT2LMHeadModel(sizes).eval()
    torch.nn.init.normal_(gpt2.transformer.h[1].attn.c_proj.bias)
    torch.nn.init.normal_(gemma.model.layers[1].post_attention_layernorm.weight)
    for model, block in ((gemma, gemma.model.layers[1]), (gpt2, gpt2.transformer.h[1])):
        plan, seen = planned(model), dict[int, Tensor]()

        def record(call: AttentionCall, plan: tuple[LayerSpec, ...] = plan, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[call.layer] = simulate.full(call.q, call.k, call.v, plan[call.layer])
            return seen[call.layer]

        decoder, addition = LayerwiseDecoder(model, plan), additions(model, plan)[1]
        ids = torch.arange(20)[None]
        with torch.no_grad():
            before = decoder.run(ids, record, keep=1, until=addition.module)
            got = addition(seen[1].unflatten(1, (plan[1].kv_heads, plan[1].group)))
            torch.testing.assert_close(got, before.output)
            kept: list[Tensor] = []
            norm = block.pre_feedforward_layernorm if model is gemma else block.ln_2
            hook = norm.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            decoder.run(ids, record)
            hook.remove()
            torch.testing.assert_close(before.kept + got, kept[0])


def test_a_decoder_that_passes_on_more_than_hidden_states_is_refused() -> None:
    model = families.build("llama").eval()
    first, second = model.model.layers[0], model.model.layers[-1]
    forward = first.forward

    def with_a_side_effect(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        second.more = out
        return out

    first.forward = with_a_side_effect
    second.register_forward_hook(lambda module, args, out: out + second.__dict__.pop("more", 0))
    with pytest.raises(UnsupportedModelError, match="its layers pass on more than hidden states"):
        LayerwiseDecoder(model, planned(model))
