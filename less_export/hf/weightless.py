"""Running a bare model, whose parameters have shapes but no memory, on real numbers.

Its vectors are ones. Its matrices are random, but never in memory: a product takes a few inputs times a small random
matrix, and a table gives a random row for each of its ids. Modules with stacks of matrices (experts) give zeros. So a
model of any size runs in seconds, its norms, rotary embeddings and attention as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import compat

#: Inputs of a product that count.
_INPUTS = 16


@contextlib.contextmanager
def without_weights(model: nn.Module) -> Iterator[None]:
    """Let a bare model compute while the context is open; afterwards it is as before."""
    cells = [p.detach().as_strided((1,), (1,)) for p in model.parameters()]
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.element_size(), "the probe is for bare models"
    stubs = [m for m in model.modules() if any(p.ndim > 2 for p in m.parameters(recurse=False))]
    mode = _RandomMatrices()
    try:
        for cell in cells:
            cell.fill_(1)
        for module in stubs:
            module.forward = _zeros_of(module.forward, mode)
        with mode:
            yield
    finally:
        for module in stubs:
            del module.forward
        for cell in cells:
            cell.zero_()


def _zeros_of(forward: Any, mode: _RandomMatrices) -> Any:
    """A function with zeros for the results of ``forward``, which runs on shapes alone."""

    def zeros(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.zeros(value.shape, dtype=value.dtype)
        return type(value)(map(zeros, value)) if isinstance(value, tuple | list) else value

    def stub(*args: Any, **kwargs: Any) -> Any:
        with mode.paused(), compat.fake_tensors() as fake:
            args, kwargs = _faked(fake, args), _faked(fake, kwargs)
            result = forward(*args, **kwargs)
        return zeros(result)

    return stub


def _faked(fake: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fake.from_tensor(value)
    if isinstance(value, dict):
        return {k: _faked(fake, v) for k, v in value.items()}
    return type(value)(_faked(fake, v) for v in value) if isinstance(value, tuple | list) else value


class _RandomMatrices(TorchFunctionMode):
    """Products with a bare matrix, and rows of a bare table, are random instead: a few inputs times a small matrix."""

    def __init__(self) -> None:
        super().__init__()
        self._generator, self._paused = torch.Generator().manual_seed(0), False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let torch compute as always while the context is open."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._paused:
            if func is F.embedding:
                ids, table = (*args, *kwargs.values())[:2]
                if _is_bare(table):
                    unique, inverse = ids.unique(return_inverse=True)
                    return self._random(len(unique), table.shape[1])[inverse]
            elif func is F.linear:
                x, weight, bias = (*args, *kwargs.values(), None)[:3]
                if _is_bare(weight):
                    product = self._product(x, weight.shape[0])
                    return product if bias is None else product + bias
            elif func is torch.addmm and _is_bare(args[2]):
                return args[0] + self._product(args[1], args[2].shape[1])
            elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and _is_bare(args[1]):
                return self._product(args[0], args[1].shape[1])
        return func(*args, **kwargs)

    def _product(self, x: Tensor, outputs: int) -> Tensor:
        inputs = np.linspace(0, x.shape[-1] - 1, min(_INPUTS, x.shape[-1])).astype(int)
        return x[..., inputs] @ self._random(len(inputs), outputs) * _INPUTS**-0.5

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def _is_bare(x: Any) -> bool:
    """Whether a matrix has a shape but no memory."""
    return isinstance(x, Tensor) and x.ndim == 2 and x.numel() > 1 and not any(x.stride())
