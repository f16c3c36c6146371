"""From a decoder and a contract to an ONNX graph with one LessAttention node per layer."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common

from ..contract import BATCH, CHUNK, Contract
from ..errors import UnsupportedModelError
from ..hf.decoder import LessDecoder, fresh_state
from . import onnx_op, repeat

#: Example sizes; not 0 or 1, which torch.export would treat as constants.
_BATCH, _CHUNK = 2, 7


def trace(decoder: LessDecoder, contract: Contract, unbound: Iterable[str] = (), repeating: bool = True) -> ir.Model:
    """Trace ``decoder`` with dynamic batch and chunk.

    ``unbound`` names initializers whose values are bound to files afterwards: they are emptied before
    optimisation, so that no pass folds a placeholder. Bodies are not added. ``repeating``: trace one layer of each kind
    and repeat it, where that is possible.

    Raises:
        UnsupportedModelError: the model cannot be traced, or nodes and layers do not match.
    """
    unbound = frozenset(unbound)
    repetition = repeat.find(decoder, unbound) if repeating else None
    model = None
    if repetition is not None:
        try:
            with repeat.marked(decoder, repetition):
                model = _traced(decoder, contract, unbound)
            repeat.unroll(model, repetition, contract, unbound)
            with _silent("onnx_ir"):
                _finish(model)
        except repeat.UnrepeatableError as error:
            logging.getLogger(__name__).info("tracing all layers: %s", error)
            model = None
    model = _traced(decoder, contract, unbound) if model is None else model
    _tidy(model)
    count = len(onnx_op.less_nodes(model))
    if count != len(contract.layers):
        raise UnsupportedModelError(f"the graph has {count} LessAttention nodes for {len(contract.layers)} layers")
    return model


def _traced(decoder: LessDecoder, contract: Contract, unbound: Collection[str]) -> ir.Model:
    """The graph of the decoder, without the state of its absent layers."""
    name = type(decoder.model).__name__
    batch = torch.export.Dim(BATCH, min=1, max=4096)
    chunk = torch.export.Dim(CHUNK, min=1, max=1 << 20)
    absent = [s for s in contract.state() if s.layer in decoder.absent]
    unused = {s.past.name for s in absent} | {s.present.name for s in absent}
    state = [
        x for x, s in zip(fresh_state(contract, _BATCH), contract.state(), strict=True) if s.layer not in decoder.absent
    ]
    example = (
        torch.zeros(_BATCH, _CHUNK, dtype=torch.long),
        torch.zeros(_BATCH, dtype=torch.int32),
        torch.full((_BATCH,), _CHUNK, dtype=torch.int32),
        state,
    )
    shapes = ({0: batch, 1: chunk}, {0: batch}, {0: batch}, [{0: batch} for _ in state])
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        _uncollected(),
        _silent("torch", "onnxscript", "onnx_ir", "transformers"),
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if reason.startswith("Constraints violated"):
                reason = "its code, such as a loop over experts, is valid only for the sizes it was traced with"
            raise UnsupportedModelError(f"{name} cannot be traced with dynamic batch and chunk: {reason}") from error
        try:
            result = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table={**onnx_op.translation_table(), **repeat.translation()},
                input_names=[s.name for s in contract.inputs() if s.name not in unused],
                output_names=[s.name for s in contract.outputs() if s.name not in unused],
                opset_version=onnx_op.OPSET,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines()[0]
            raise UnsupportedModelError(f"{name} cannot be written as ONNX: {reason}") from error
        assert result is not None
        for initializer in unbound:
            if initializer in result.model.graph.initializers:
                result.model.graph.initializers[initializer].const_value = None
        return _optimise(result.model)


def _optimise(model: ir.Model) -> ir.Model:
    """Inline, fold constants, merge equal nodes; pattern rewrites are left to the runtimes (and are slow)."""
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    return _finish(model)


def _finish(model: ir.Model) -> ir.Model:
    """Remove what is unused, merge what is equal, and make names unique."""
    finish = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    return finish(model).model


def _tidy(model: ir.Model) -> None:
    """Drop the exporter's own metadata (stack traces, which name paths of this machine)."""
    model.producer_name, model.producer_version = "less-export", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector, which takes a sixth of a trace's time and finds nothing to free."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _silent:
    """Suppresses INFO and WARNING messages of libraries while a graph is made."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(n) for n in names]

    def __enter__(self) -> None:
        self.levels = [x.level for x in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *exc: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
