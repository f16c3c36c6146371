"""A decoder whose layers can run from any of them to any other, and whose head can run alone.

Training needs what a layer gets and what a model predicts many times over for the same sequences: what no trained
parameter changes is computed once, kept as hidden states, and handed to the layers above by standing in for those
below. No family's forward pass is repeated here: the model's own one runs, with stand-ins for parts of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..contract import LayerSpec
from ..errors import UnsupportedModelError
from ..less import simulate
from ..plan import AttentionLayer
from .compat import on_interface
from .running import position_ids
from .surgery import AttentionCall, Handler, less_attention

#: Tokens of the sequence that :class:`LayerwiseDecoder` tries itself on.
_PROBE = 8


class _Reached(Exception):
    """The last layer that was asked for has been reached."""


@dataclass
class Passed:
    """What a run passed: the input of the layer to keep, the output of the module it stopped at, and what the head
    gets if it ran to the end; each [B,T,W]."""

    kept: Tensor | None = None
    output: Tensor | None = None
    last: Tensor | None = None


class LayerwiseDecoder:
    """Runs parts of a model.

    Raises:
        UnsupportedModelError: the model's layers do not pass on hidden states alone.
    """

    def __init__(self, model: PreTrainedModel, attention: Sequence[AttentionLayer | LayerSpec]) -> None:
        self.model = model
        self._decoder, self.layers = layer_list(model, len(attention))
        self._as_tuple = False
        self._output: type[Any] = object
        self._try(attention)

    def run(
        self, ids: Tensor, handler: Handler, rotates: bool = True, begin: int = 0, hidden: Tensor | None = None,
        keep: int | None = None, until: nn.Module | int | None = None,
    ) -> Passed:  # fmt: skip
        """Run layers over sequences ``ids`` [B,T].

        Args:
            handler: computes attention, see :func:`~.surgery.less_attention`.
            rotates: see :func:`~.running.position_ids`.
            begin, hidden: the first layer to run, and its input [B,T,W]; by default all layers run.
            keep: a layer whose input is wanted.
            until: stop after this module, or once ``handler`` has been called for this layer.
        """
        ids, passed = ids.to(self.model.device), Passed()
        # Without transformers' interface, layers are numbered as they are called.
        skipped = 0 if on_interface(self.model) else begin

        def attend(call: AttentionCall) -> Tensor:
            call.layer += skipped
            out = handler(call)
            if call.layer == until:
                raise _Reached
            return out

        def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            passed.kept = args[0] if args else kwargs["hidden_states"]

        def keep_output(_: nn.Module, __: Any, output: Tensor) -> None:
            passed.output = output
            raise _Reached

        with contextlib.ExitStack() as stack:
            if keep is not None:
                stack.callback(self.layers[keep].register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            if isinstance(until, nn.Module):
                stack.callback(until.register_forward_hook(keep_output).remove)
            if begin:
                assert hidden is not None, "layers that are skipped need a result"
                result = (hidden,) if self._as_tuple else hidden
                for layer in range(begin):
                    stack.enter_context(stand_in(self.layers[layer], lambda *args, **kwargs: result))
            stack.enter_context(less_attention(self.model, attend))
            with contextlib.suppress(_Reached):
                out = self._decoder(input_ids=ids, position_ids=position_ids(ids, rotates), use_cache=False)
                passed.last = out[0]
        return passed

    def log_probabilities(self, hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """[P,W] inputs of the head -> [P,V] log probabilities f32, of the tokens ``vocabulary`` alone if given."""
        head = self.model.get_output_embeddings()
        output = self._output(last_hidden_state=hidden[None])
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(stand_in(self._decoder, lambda *args, **kwargs: output))
            if vocabulary is not None:
                weight, bias = head.get_parameter("weight")[vocabulary], getattr(head, "bias", None)
                few = None if bias is None else bias[vocabulary]
                stack.enter_context(stand_in(head, lambda x: F.linear(x, weight, few)))
            logits = self.model(input_ids=ids, position_ids=position_ids(ids), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)

    @torch.no_grad()
    def _try(self, attention: Sequence[AttentionLayer | LayerSpec]) -> None:
        """Run in one piece and in two; the results must be the same."""
        ids = torch.arange(_PROBE, device=self.model.device)[None] % self.model.get_input_embeddings().weight.shape[0]
        middle = len(attention) // 2

        def full(call: AttentionCall) -> Tensor:
            return simulate.full(call.q, call.k, call.v, attention[call.layer])

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)

        def note_type(_: nn.Module, __: Any, output: Any) -> None:
            self._output = type(output)

        hooks = [self.layers[0].register_forward_hook(note), self._decoder.register_forward_hook(note_type)]
        try:
            with less_attention(self.model, full):
                want = self.model(input_ids=ids, position_ids=position_ids(ids), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        try:
            kept = self.run(ids, full, keep=middle).kept
            last = self.run(ids, full, begin=middle, hidden=kept).last
            assert last is not None
            got, want = self.log_probabilities(last[0]), torch.log_softmax(want.float(), -1)
            same = got.shape == want.shape and bool(((got == want) | (got.isnan() & want.isnan())).all())
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            same = False
        if not same:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: its layers pass on more than hidden states, so they cannot be trained "
                "in sequence"
            )


def layer_list(model: PreTrainedModel, count: int) -> tuple[nn.Module, nn.ModuleList]:
    """The part of a model that runs its ``count`` layers, and their list.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise UnsupportedModelError(f"{type(model).__name__} keeps its {count} layers in no list, so it cannot be trained")


@contextlib.contextmanager
def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` stand in for a module's own."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous
