"""Putting LESS into a Hugging Face decoder, and restoring the decoder afterwards.

A decoder calls its attention through transformers' attention interface, or (Falcon) through
``F.scaled_dot_product_attention``. Inside :func:`less_attention` both routes lead to one handler, which
receives a layer's new q, k and v before they are repeated; outside it the model is unchanged. :func:`discover` sends a
probe down the same route and refuses what LESS cannot express.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..plan import AttentionLayer
from . import compat
from .compat import on_interface

#: ``handler(call) -> [B,Hq,T,D]``
Handler = Callable[["AttentionCall"], Tensor]


@dataclass
class AttentionCall:
    """One layer's attention as the model calls it; k and v have Hk heads."""

    layer: int
    module: nn.Module | None
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    scale: float
    options: dict[str, Any]


_handler: contextvars.ContextVar[Handler] = contextvars.ContextVar("less_attention_handler")


def _interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function "less" of transformers' attention interface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = int(getattr(module, "layer_idx", -1))
    out = _handler.get()(AttentionCall(layer, module, query, key, value, attention_mask, scale, options))
    return out.transpose(1, 2).contiguous(), None


compat.register_attention("less", _interface_attention)


@contextlib.contextmanager
def _sdpa_route(model: nn.Module) -> Iterator[None]:
    """Decoders that do not use the interface: the i-th call of F.scaled_dot_product_attention is layer i.

    The function itself is replaced: a TorchFunctionMode would come too late, after torch has parsed the
    arguments, and parsing refuses the symbolic ``is_causal`` that Falcon computes while it is traced.
    """
    attentions = [m for m in model.modules() if hasattr(m, "num_kv_heads") and hasattr(m, "layer_idx")]
    kv_heads_of = {int(m.layer_idx): int(m.num_kv_heads) for m in attentions}  # type: ignore[arg-type]
    counter = itertools.count()
    original = F.scaled_dot_product_attention
    own_handler = _handler.get()

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: Any = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        handler = _handler.get(None)
        if handler is not own_handler:  # another thread's model
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        layer = next(counter)
        k, v = key, value
        kv_heads = kv_heads_of.get(layer, k.shape[1])
        if k.shape[1] != kv_heads:  # Falcon's new architecture repeats K and V before the call
            repeats = k.shape[1] // kv_heads
            k, v = k[:, ::repeats], v[:, ::repeats]
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        options = {"is_causal": is_causal} if attn_mask is None else {}
        return own_handler(AttentionCall(layer, None, query, k, v, attn_mask, scale, options))

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextlib.contextmanager
def _masks(model: nn.Module, make: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Replace every transformers mask function the model can reach by ``make(name, args, kwargs)``."""

    def stand_in(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: make(name, args, kwargs)

    swapped: list[tuple[dict[Any, Any], Any, Any]] = []
    names = {id(f): n for n, f in compat.MASK_FUNCTIONS.items()}
    try:
        for space in compat.mask_namespaces(model):
            for key, value in list(space.items()):
                if id(value) in names:
                    swapped.append((space, key, value))
                    space[key] = stand_in(names[id(value)])
        yield
    finally:
        for space, key, value in swapped:
            space[key] = value


@contextlib.contextmanager
def less_attention(
    model: PreTrainedModel,
    handler: Handler,
    make_mask: Callable[[str, tuple[Any, ...], dict[str, Any]], Any] = lambda *_: None,
) -> Iterator[None]:
    """Send every attention of ``model`` to ``handler`` while the context is open.

    Masks are not built (``handler`` masks by position); ``make_mask`` may return others instead. Afterwards weights,
    buffers, configuration and transformers itself are restored. Use it in one thread at a time: the mask functions are
    replaced for the whole process.
    """
    token = _handler.set(handler)
    interface = on_interface(model)
    try:
        with (
            compat.attention_implementation(model, "less" if interface else "sdpa"),
            _masks(model, make_mask),
            contextlib.nullcontext() if interface else _sdpa_route(model),
            # As batched products mixtures of experts trace without data-dependent shapes.
            compat.experts_implementation(model, "batched_mm"),
        ):
            yield
    finally:
        _handler.reset(token)


# ------------------------------------------------------------------ discovery


class _Mask:
    """Represents a mask while probing: the window it slides over, or why LESS cannot express it."""

    ndim = 4

    def __init__(self, window: int = 0, refusal: str | None = None) -> None:
        self.window, self.refusal = window, refusal

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedModelError(
            "layer 0: the model computes with its attention mask itself; its attention is neither on "
            "transformers' attention interface nor scaled_dot_product_attention with a plain causal mask"
        )

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModelError(f"layer 0: the model edits its attention mask (.{name}): not plain causal")

    def __getitem__(self, index: Any) -> _Mask:
        if all(isinstance(x, slice) and x in (slice(None), slice(0, None)) for x in index):  # all of it (Gemma 4)
            return self
        raise UnsupportedModelError("layer 0: the model edits its attention mask (slices it): not plain causal")


def _mask_kind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Mask:
    """The mask that a call of a transformers mask function asks for."""
    config = kwargs.get("config", args[0] if args else None)
    overlays = [k for k in ("or_mask_function", "and_mask_function", "block_sequence_ids") if kwargs.get(k) is not None]
    if name == "create_recurrent_attention_mask":
        raise UnsupportedModelError("the model has recurrent (state space or linear attention) layers beside attention")
    if name not in ("create_causal_mask", "create_sliding_window_causal_mask"):
        return _Mask(refusal=f"its mask comes from {name}; only causal and sliding masks are supported")
    if overlays:
        return _Mask(refusal=f"its causal mask is overlaid ({overlays[0]}), e.g. by bidirectional spans")
    if not getattr(config, "is_causal", True):
        return _Mask(refusal="attention is not causal (is_causal = False)")
    sliding = name == "create_sliding_window_causal_mask"
    return _Mask(window=int(getattr(config, "sliding_window", 0)) if sliding else 0)


#: Arguments of an attention call that do not change what it computes.
_HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "past_key_values", "cache", "layer_past",
    "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
    "num_items_in_batch", "shared_kv_states", "target_dtype", "deterministic",
}  # fmt: skip


def discover(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """The attention layers of a decoder, found by running it once on two fake tokens.

    Raises:
        UnsupportedModelError: the decoder needs something LESS cannot express; names layer and reason.
    """
    refuse_by_config(model)
    layers: dict[int, AttentionLayer] = {}

    def probe(call: AttentionCall) -> Tensor:
        where = f"layer {call.layer}"
        if call.layer < 0:
            raise UnsupportedModelError(f"{type(model).__name__}: attention is called without a layer index")
        if call.layer in layers:
            raise UnsupportedModelError(f"{where}: attends more than once in a forward pass")
        layers[call.layer] = _accept(call, where)
        return torch.empty_like(call.q)

    try:
        with (
            less_attention(model, probe, _mask_kind),
            compat.fake_tensors(),
            torch.no_grad(),
            compat.quiet_transformers(),
        ):
            ids = torch.zeros(1, 2, dtype=torch.long)
            model(input_ids=ids, position_ids=torch.arange(2)[None], use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if compat.untraceable(error):
            reason = f"it branches on the values of its tensors, which cannot be traced ({reason})"
        raise UnsupportedModelError(f"{type(model).__name__} does not run as a plain decoder: {reason}") from error
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(layers) != list(range(expected)):
        route = "the attention interface" if on_interface(model) else "scaled_dot_product_attention"
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(layers)} of {expected} layers attend through {route}; "
            "the others are recurrent, skipped, or use an attention of their own, which LESS cannot replace"
        )
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no layers: num_hidden_layers is {expected}")
    return tuple(layers[i] for i in range(expected))


def _accept(call: AttentionCall, where: str) -> AttentionLayer:
    """The layer's attention; raises with the reason if LESS cannot express it."""

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{where}: {reason}")

    options = {k: v for k, v in call.options.items() if v is not None}
    if options.get("softcap"):
        raise refuse("attention softcap (logits go through tanh)")
    if "s_aux" in options:
        raise refuse("learned attention sinks (s_aux)")
    if "position_bias" in options:
        raise refuse("a position bias is added to the logits (alibi or relative positions)")
    if options.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise refuse("attention is not causal")
    known = _HARMLESS | {"softcap", "is_causal", "sliding_window", "window_size"}
    unknown = sorted(k for k, v in options.items() if k not in known and v is not False)
    if unknown:
        raise refuse(f"attention takes an argument LESS does not know ({', '.join(unknown)})")
    if call.q.shape[-1] != call.v.shape[-1] or call.k.shape[-1] != call.v.shape[-1]:
        raise refuse(f"keys and values differ in width (Dk {call.k.shape[-1]}, Dv {call.v.shape[-1]})")
    if call.mask is not None and not isinstance(call.mask, _Mask):
        raise refuse("its attention mask is neither plain causal nor sliding")
    if call.mask is not None and call.mask.refusal:
        raise refuse(call.mask.refusal)
    window = call.mask.window if call.mask is not None else 0
    stated = options.get("sliding_window") or 0
    if call.mask is not None and stated and stated != window:
        raise refuse(f"its mask slides over {window or 'all'} tokens, its attention over {stated}")
    heads, kv_heads = int(call.q.shape[1]), int(call.k.shape[1])
    return AttentionLayer(heads, kv_heads, int(call.q.shape[-1]), call.scale, int(window or stated))


def refuse_by_config(model: PreTrainedModel) -> None:
    """Refusals that need no forward pass: rotary that depends on the batch, position biases, no position_ids."""
    import inspect

    config, base = model.config.get_text_config(), model.base_model
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    if alibi or hasattr(base, "build_alibi_tensor"):  # not stated in Bloom's config
        raise UnsupportedModelError("layer 0: alibi adds a bias that depends on the distance of every token")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("layer 0: an encoder-decoder has cross attention; only decoders are supported")
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and kind in ("longrope", "dynamic"):
                raise UnsupportedModelError(
                    f"{name or 'model'}: rotary embedding '{kind}' depends on the longest row of the batch, "
                    "so cached keys would change with every token (all layers)"
                )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embedding, so it is no language model")
    if hasattr(base, "position_bias") or hasattr(base, "relative_positional_encoding"):  # CpmAnt, XLNet
        raise UnsupportedModelError("layer 0: attention adds a bias by the relative position of every token")
    if hasattr(getattr(base, "embeddings", None), "create_position_ids_from_input_ids"):  # RoBERTa and similar models
        raise UnsupportedModelError("layer 0: positions are counted past the padding token's id, not from 0")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        why = "it is recurrent, or counts positions in a cache, where evicted tokens are missing"
        if any(n.endswith((".encoder_attn", ".cross_attn")) for n, _ in model.named_modules()):
            why = "it is the decoder of an encoder-decoder and attends to the encoder"
        raise UnsupportedModelError(f"{type(model).__name__} takes no position_ids: {why}")


def learned_positions(model: PreTrainedModel) -> int | None:
    """Number of positions in a table, learned or not; ``None`` for decoders that compute theirs (rotary)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    token_table = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not token_table and limit in _table_sizes(module):
            return int(limit)
        tables = [b for n, b in module.named_buffers(recurse=False) if "pos" in n and b.ndim == 2]
        if any(len(table) == limit for table in tables):  # a table of sines (GPT-J)
            return int(limit)
    return None


def _table_sizes(table: nn.Embedding) -> tuple[int, int]:
    return table.num_embeddings, table.num_embeddings - int(getattr(table, "offset", 0))
