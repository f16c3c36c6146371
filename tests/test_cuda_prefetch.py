"""What a decode step asks for before it needs it: every line of 128 bytes once for each head, in rows that run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from . import emulation
from .emulation import DTYPES, emulated, kernel_layer, normal
from .oracle import TOKENS
from .scenarios import play, scenario
from .test_ops import empty

#: What of a layer makes a difference, and what is asked for of the state, beside k, v and psi of the new token.
KINDS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("window", {}, ()),
    ("h2o", {}, ("log_phi_q", "present_h", "present_z")),
    ("h2o", {"slot_dtype": "int8"}, ("log_phi_q", "present_h", "present_z")),
    ("sink", {"slot_dtype": "int8", "state_bits": 16}, ("log_phi_q", "present_h", "present_z", "present_h_scale")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("policy", "options", "state"), KINDS)
def test_what_is_prefetched(policy: str, options: dict[str, Any], state: tuple[str, ...], dtype: str) -> None:
    layer = replace(kernel_layer(policy, 140, 40, 3, 1 if policy == "window" else 9), **options)
    seen = []

    def watch(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("k", "v", "psi_k", *state):
            heads = tensors[name][0].reshape(layer.kv_heads, -1)
            for head in heads:
                counts = emulation.prefetches(head)
                assert min(counts) > 0, name
                # Tensors and heads may meet in a line at either end.
                assert set(counts[1:-1]) <= {1}, name
            seen.append(name)
            parked = tensors[name][1].reshape(layer.kv_heads, -1)
            assert not any(sum(emulation.prefetches(head)[1:-1]) for head in parked), name

    (step,) = scenario(layer, [(1, 0)], 0, normal(dtype))
    token = replace(step, inputs={n: x[:, :, :1] if n in TOKENS else x for n, x in step.inputs.items()})
    for _ in play(emulated(layer, dtype, watch=watch), [token], empty(layer, DTYPES[dtype], 2)):
        pass
    assert seen == ["k", "v", "psi_k", *state]
