"""The module that is traced: a decoder whose cache and low-rank state are plain inputs and outputs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contract import Contract, limits_distances
from ..dtypes import torch_dtype
from ..less import operators
from ..less.feature_maps import FeatureMap, Kernels, weight_limit
from ..less.int8 import Centring
from .surgery import AttentionCall, less_attention


class LessDecoder(nn.Module):
    """``forward(input_ids, past_length, new_length, state) -> (logits, *state)`` as the contract says.

    The Hugging Face model is not changed: LESS is put in for the duration of one forward pass.

    absent: layers that do not run, as something stands in for them; neither ``state`` nor the results have theirs.
    """

    def __init__(self, model: PreTrainedModel, contract: Contract, kernels: Kernels) -> None:
        super().__init__()
        self.model, self.contract = model, contract
        self.absent: Collection[int] = ()
        self.maps = nn.ModuleDict(
            {str(i): m for i, m in kernels.layers.items() if i < len(contract.layers) and contract.layers[i].absorb}
        )
        self.centring = nn.ModuleDict(
            {
                str(i): _Constants(kernels.centring.get(i) or Centring.none(layer.kv_heads, layer.head_dim))
                for i, layer in enumerate(contract.layers)
                if layer.int8
            }
        )
        tables = kernels.rotary if limits_distances(contract.layers) else ()
        self.rotary = nn.ParameterList(nn.Parameter(t.angles, requires_grad=False) for t in tables)
        for kind, t in enumerate(tables):
            if t.order is not None:
                self.register_buffer(f"order_{kind}", torch.tensor(t.order), persistent=False)
        self._lengths = sorted({m.length for m in kernels.layers.values() if m.length is not None})
        self._kind = {layer: kind for kind, t in enumerate(tables) for layer in t.layers}

    def parts_of(self, layer: int) -> tuple[int | None, dict[str, nn.Module]]:
        """What a layer has beside the model: the number of its rotary table, and its own modules by where they are."""
        own = {"maps": self.maps, "centring": self.centring}
        return self._kind.get(layer), {n: m[str(layer)] for n, m in own.items() if str(layer) in m}

    def forward(
        self, input_ids: Tensor, past_length: Tensor, new_length: Tensor, state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """[B,T] i64, [B] i32, [B] i32, the contract's state -> logits f32 and the state after the chunk."""
        fields = [0 if i in self.absent else len(x.state_fields) for i, x in enumerate(self.contract.layers)]
        begin = [0, *itertools.accumulate(fields)]
        present: list[list[Tensor]] = [[] for _ in fields]

        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        position = past_length[:, None].long() + steps
        limits = {n: weight_limit(position, n) for n in self._lengths}

        def attend(call: AttentionCall) -> Tensor:
            i, call = call.layer, self._arranged(call)
            out, *present[i] = operators.run(
                self.contract.layers[i],
                (call.q, call.k, call.v, *self._features(call, limits)),
                state[begin[i] : begin[i + 1]],
                (past_length, new_length),
                self._constants(i),
                self.rotary[self._kind[i]] if i in self._kind else None,
            )
            return out

        if limits_distances(self.contract.layers):  # the operator rotates; one position makes cos and sin constants
            position = torch.zeros_like(position[:1, :1])
        elif self.contract.position_limit is not None:  # padding may exceed the learned table
            position = position.clamp(max=self.contract.position_limit - 1)
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: self._last(new_length, args))
        try:
            with less_attention(self.model, attend):
                logits = self.model(input_ids=input_ids, position_ids=position, use_cache=False).logits
        finally:
            hook.remove()
        missing = [i for i, after in enumerate(present) if not after and i not in self.absent]
        assert not missing, f"layer {missing[0]} never attended"
        return (logits.float(), *itertools.chain(*present))

    def _arranged(self, call: AttentionCall) -> AttentionCall:
        """The call with the channels of q and k in the order of the layer's table."""
        order = getattr(self, f"order_{self._kind.get(call.layer)}", None)
        return call if order is None else replace(call, q=call.q[..., order], k=call.k[..., order])

    def _features(self, call: AttentionCall, limits: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """log phi and psi; ``limits``: what log phi loses, by the length that kernels were trained at."""
        key = str(call.layer)
        if key not in self.maps:  # rank 1, psi = 0: the op skips the low-rank term
            return torch.zeros_like(call.q[..., :1], dtype=torch.float32), torch.zeros_like(call.k[..., :1])
        features = self.maps[key]
        assert isinstance(features, FeatureMap)
        log_phi = features.log_phi(call.q)
        return log_phi if features.length is None else log_phi + limits[features.length], features.psi(call.k)

    def _constants(self, layer: int) -> Centring | None:
        """With which the layer's int8 slots centre keys."""
        if str(layer) not in self.centring:
            return None
        constants = self.centring[str(layer)]
        assert isinstance(constants, _Constants)
        return Centring(constants.mean, constants.std)

    def _last(self, new_length: Tensor, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Pass only each row's last valid hidden state to the output embedding."""
        if self.contract.logits == "all":
            return None
        hidden = args[0]
        last = (new_length.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (hidden.gather(1, last), *args[1:])


class _Constants(nn.Module):
    """The constants of a layer's keys, as tensors of the graph."""

    def __init__(self, centring: Centring) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(x.float(), requires_grad=False) for x in centring)


def parameter_of(tensor: str) -> str:
    """The parameter of :class:`LessDecoder` that a tensor of the kernel file is."""
    return f"maps.{tensor.removeprefix('layers.')}" if tensor.startswith("layers.") else tensor


def fresh_state(contract: Contract, batch: int, device: str = "cpu") -> list[Tensor]:
    """State of ``batch`` empty rows, in the graph's order."""
    return [
        torch.full((batch, *s.row_shape), s.field.empty, dtype=torch_dtype(s.dtype), device=device)
        for s in contract.state()
    ]
