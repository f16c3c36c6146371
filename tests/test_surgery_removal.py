"""Removing LESS from a decoder: afterwards the model, transformers and torch are as before."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from less_export.config import ExportConfig
from less_export.contract import Contract
from less_export.errors import UnsupportedModelError
from less_export.hf.decoder import LessDecoder, fresh_state
from less_export.hf.surgery import (
    AttentionCall,
    discover,
    less_attention,
)
from less_export.less.feature_maps import Kernels
from less_export.plan import plan_layers

from . import families
from .families import VOCAB
from .test_surgery import GQA


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """All parts of a decoder, and the parts of transformers and torch that LESS changes."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert tensors.keys() >= model.state_dict().keys()
    modules = list(model.modules())
    files = {cls.__module__ for m in modules for cls in type(m).__mro__ if cls.__module__.startswith("transformers.")}
    return {
        "bits": {n: (t.dtype, t.detach().flatten().view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()},
        "config": copy.deepcopy([vars(m.config) for m in modules if isinstance(m, PreTrainedModel)]),
        "config.json": model.config.to_json_string(use_diff=False),
        "attention": model.config._attn_implementation,
        "experts": getattr(model.config, "_experts_implementation", None),
        "attributes": [sorted(vars(m)) for m in modules],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        "identities": [id(t) for t in tensors.values()],
        "masks": {n: id(f) for n, f in vars(masking_utils).items() if callable(f)},
        "patterns": {n: id(f) for n, f in masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.items()},
        "code": {(n, k): id(v) for n in sorted(files) for k, v in vars(sys.modules[n]).items()},
        "interface": {n: id(f) for n, f in ALL_ATTENTION_FUNCTIONS.items()},
        "sdpa": id(F.scaled_dot_product_attention),
    }


def decoder_of(model: PreTrainedModel) -> LessDecoder:
    layers = plan_layers(discover(model), ExportConfig(budget="8"), 64, {})
    return LessDecoder(model, Contract(layers, VOCAB, "float32", 16, 2), Kernels({}, {}))


def use_discover(model: PreTrainedModel) -> None:
    discover(model)


def use_forward(model: PreTrainedModel) -> None:
    decoder = decoder_of(model)
    length = torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        logits, *_ = decoder(torch.arange(3, 15)[None], length, length + 12, fresh_state(decoder.contract, 1))
    assert bool(logits.isfinite().all())


def use_failing_handler(model: PreTrainedModel) -> None:
    def fail(call: AttentionCall) -> Tensor:
        raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"), less_attention(model, fail):
        model(input_ids=torch.arange(3, 15)[None], use_cache=False)


def use_failing_forward(model: PreTrainedModel) -> None:
    decoder = decoder_of(model)
    length = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IndexError), torch.no_grad():  # no such token
        decoder(torch.full((1, 3), 10 * VOCAB), length, length + 3, fresh_state(decoder.contract, 1))


def use_trace(model: PreTrainedModel) -> None:
    decoder = decoder_of(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    state, length = fresh_state(decoder.contract, 2), torch.zeros(2, dtype=torch.int32)
    shapes = ({0: batch}, {0: batch}, {0: batch}, [{0: batch} for _ in state])
    torch.export.export(
        decoder, (torch.zeros(2, 5, dtype=torch.long), length, length + 5, state), dynamic_shapes=shapes, strict=False
    )


@pytest.mark.parametrize("use", [use_discover, use_forward, use_failing_handler, use_failing_forward, use_trace])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_mqa", "qwen3_moe"])
def test_afterwards_the_model_is_as_before(family: str, use: Callable[[PreTrainedModel], None]) -> None:
    model = families.build(family)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        before = fingerprint(model)
        use(model)
        after = fingerprint(model)
        assert {n for n in before if before[n] != after[n]} == set()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


def test_a_refused_model_is_as_before() -> None:
    torch.manual_seed(0)
    model = tr.Gemma2ForCausalLM(tr.Gemma2Config(**GQA, head_dim=8)).eval()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="softcap"):
        discover(model)
    after = fingerprint(model)
    assert {n for n in before if before[n] != after[n]} == set()


def test_inside_the_model_is_another() -> None:
    # The fingerprint detects changes: while the context is open, configuration and masks differ.
    for family, parts in (
        ("gemma3", {"config", "attention", "masks", "patterns", "code"}),
        ("falcon_mqa", {"config", "attention", "masks", "patterns", "code", "sdpa"}),
        ("qwen3_moe", {"config", "attention", "experts", "masks", "patterns", "code"}),
    ):
        model = families.build(family)
        before = fingerprint(model)
        with less_attention(model, lambda call: call.q):
            inside = fingerprint(model)
        assert {n for n in before if before[n] != inside[n]} == parts, family


def test_another_thread_keeps_its_attention() -> None:
    # Falcon's surgery replaces F.scaled_dot_product_attention, which other threads may be using.
    model = families.build("falcon_mqa")
    q = torch.randn(1, 2, 3, 4)
    expected, seen = F.scaled_dot_product_attention(q, q, q, is_causal=True), []
    with less_attention(model, lambda call: call.q):
        other = threading.Thread(target=lambda: seen.append(F.scaled_dot_product_attention(q, q, q, is_causal=True)))
        other.start()
        other.join()
    assert torch.equal(seen[0], expected)
