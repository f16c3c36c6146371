"""What the attention of a layer adds to the residual stream, which is where the model uses it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contract import LayerSpec
from ..errors import UnsupportedModelError
from ..hf.compat import Conv1D
from ..hf.running import run_decoder
from ..hf.surgery import AttentionCall, less_attention


@dataclass(frozen=True)
class Addition:
    """The output projection, and the norm that follows it in some families (Gemma, OLMo 2), in f32.

    weight [Hq * D, W]. bias [W] or None. norm: a copy of the model's, or None. module: the model's own module whose
    output is added.
    """

    weight: Tensor
    bias: Tensor | None
    norm: nn.Module | None
    module: nn.Module

    def __call__(self, out: Tensor) -> Tensor:
        """[N,Hk,G,P,D] attention -> [N,P,W]."""
        flat = out.flatten(1, 2).transpose(1, 2).flatten(2)
        added = flat @ self.weight
        if self.bias is not None:
            added = added + self.bias
        return added if self.norm is None else self.norm(added)

    def to(self, device: str | torch.device) -> Addition:
        """The same on ``device``."""
        norm = None if self.norm is None else copy.deepcopy(self.norm).to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return Addition(self.weight.to(device), bias, norm, self.module)


@torch.no_grad()
def additions(model: PreTrainedModel, plan: Sequence[LayerSpec]) -> list[Addition]:
    """What every layer's attention adds, found by running the model on two tokens.

    Raises:
        UnsupportedModelError: no linear map is applied to a layer's attention output.
    """
    linear: dict[int, nn.Module] = {}
    norms: dict[int, nn.Module] = {}
    projected: dict[int, Tensor] = {}
    pending: list[int] = []
    generator = torch.Generator().manual_seed(0)

    def attention(call: AttentionCall) -> Tensor:
        pending.append(call.layer)
        return torch.randn(call.q.shape, generator=generator).to(call.q)

    def after_linear(module: nn.Module, _: Any, output: Tensor) -> None:
        if pending:
            layer = pending.pop()
            linear[layer], projected[layer] = module, output.clone()

    def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        for layer, output in projected.items():
            if args and args[0].shape == output.shape and torch.equal(args[0], output):
                norms[layer] = module

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_hook(after_linear).remove)
            elif "Norm" in type(module).__name__:
                stack.callback(module.register_forward_pre_hook(before_norm).remove)
        stack.enter_context(less_attention(model, attention))
        middle = model.get_input_embeddings().weight.shape[0] // 2  # an embedding that is not zero, as padding's may be
        run_decoder(model, torch.full((1, 2), middle, device=model.device))
    return [_addition(i, layer, linear.get(i), norms.get(i)) for i, layer in enumerate(plan)]


def _addition(index: int, layer: LayerSpec, module: nn.Module | None, norm: nn.Module | None) -> Addition:
    weight = None if module is None else module.get_parameter("weight").detach()
    if weight is not None:
        weight = weight if isinstance(module, Conv1D) else weight.T
    if module is None or weight is None or weight.shape[0] != layer.query_heads * layer.head_dim:
        raise UnsupportedModelError(f"layer {index}: its attention is not followed by a linear output projection")
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float()
    own = None if norm is None else copy.deepcopy(norm).float().requires_grad_(False)
    return Addition(weight.float(), bias, own, module if norm is None else norm)
