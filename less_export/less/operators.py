"""The reference as operators of torch, which ``torch.export`` keeps as one node each, and the one of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..contract import OP_DOMAIN, LayerSpec, state_fields
from .int8 import Centring
from .reference import less_attention, less_attention_int8, less_attention_state16

_Function = Callable[..., tuple[Tensor, ...]]

attention = torch.library.custom_op(f"{OP_DOMAIN}::attention", less_attention, mutates_args=())
attention_int8 = torch.library.custom_op(f"{OP_DOMAIN}::attention_int8", less_attention_int8, mutates_args=())
attention_state16 = torch.library.custom_op(f"{OP_DOMAIN}::attention_state16", less_attention_state16, mutates_args=())


def _fake(fields: int) -> Callable[..., tuple[Tensor, ...]]:
    """Shapes and dtypes of the results: those of q, and of the ``fields`` past tensors behind the first five."""

    def shapes(*args: Tensor | float | int) -> tuple[Tensor, ...]:
        like = (args[0], *args[5 : 5 + fields])
        return tuple(x.new_empty(x.shape) for x in like if isinstance(x, Tensor))

    return shapes


attention.register_fake(_fake(len(state_fields(False, False))))
attention_int8.register_fake(_fake(len(state_fields(True, False))))
attention_state16.register_fake(_fake(len(state_fields(True, True))))


def _of(layer: LayerSpec) -> tuple[_Function, _Function]:
    """The operator of a layer, and its function in plain torch."""
    if layer.state16:
        return attention_state16, less_attention_state16
    return (attention_int8, less_attention_int8) if layer.int8 else (attention, less_attention)


def run(
    layer: LayerSpec, tokens: Sequence[Tensor], state: Sequence[Tensor], lengths: Sequence[Tensor],
    centring: Centring | None = None, rotary: Tensor | None = None, opaque: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator of ``layer``, as one node for ``torch.export`` or (``opaque`` false) as plain torch.

    Args:
        tokens: q, k, v, log_phi_q, psi_k. state: the layer's fields. lengths: past_length, new_length.
        centring: of keys in int8 slots; none by default. rotary: the table of a layer with ``max_distance``.

    Returns:
        The output and the state after the chunk.
    """
    inputs = [*tokens, *state, *lengths]
    operator, function = _of(layer)
    if layer.int8:
        inputs += centring or Centring.none(layer.kv_heads, layer.head_dim)
    assert (rotary is None) == (layer.max_distance is None), "a table belongs to a largest distance"
    call = operator if opaque else function
    return tuple(call(*inputs, **layer.attributes(), max_distance=layer.max_distance or 0, rotary=rotary))
