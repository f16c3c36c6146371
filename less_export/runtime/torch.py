"""The reference backend: the Hugging Face model with LESS in it, in float32 torch, from a bundle's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, PreTrainedModel

from ..bundle.artifact import Artifact, Bundle
from ..bundle.strict_json import untag_floats
from ..contract import Contract
from ..errors import BackendError
from ..hf import weights
from ..hf.decoder import LessDecoder, fresh_state
from ..less.feature_maps import Kernels
from ..less.rotary import table_length, table_of
from .backend import Array, Backend, State


def bundle_model(bundle: Bundle) -> PreTrainedModel:
    """The Hugging Face model of a bundle in float32, with weights from the bundle's files (dequantised if necessary).

    Raises:
        BackendError: a plan that contains its weights, or weights that lack a tensor.
    """
    if not bundle.manifest.weights:
        raise BackendError("this plan contains its weights: the torch backend needs a bundle with a graph")
    config_fields = untag_floats(bundle.manifest.model["config"])
    config = AutoConfig.for_model(config_fields.pop("model_type"), **config_fields)
    model = weights.bare_model(config, torch.float32)
    tensors, missing = weights.locate(model, [bundle.path(w.file) for w in bundle.manifest.weights])
    if missing:
        raise BackendError(f"the bundle's weights lack {missing[0]}: export again")
    weights.fill(model, tensors)
    return model.eval()


def bundle_kernels(bundle: Bundle) -> Kernels:
    """The kernels of a bundle; empty if it has none."""
    facts = bundle.manifest.kernels
    return Kernels.load(bundle.path(facts.file)) if facts is not None else Kernels({}, {})


class ModelBackend(Backend):
    """Runs any contract of a loaded model, in the model's dtype."""

    name = "torch"

    def __init__(self, model: PreTrainedModel, contract: Contract, kernels: Kernels, device: str = "cpu") -> None:
        super().__init__(contract)
        self._decoder = LessDecoder(model, contract, kernels).eval().to(device)
        self._device = device
        self._state: list[torch.Tensor] = []

    def _open(self, batch: int) -> None:
        self._state = fresh_state(self.contract, batch, self._device)

    def _close(self) -> None:
        self._state = []

    def _step(
        self,
        input_ids: npt.NDArray[np.int64],
        past_length: npt.NDArray[np.int32],
        new_length: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        tokens = [torch.from_numpy(x).to(self._device) for x in (input_ids, past_length, new_length)]
        adjacent = slice(rows[0], rows[-1] + 1)
        with torch.inference_mode():
            logits, *present = self._decoder(*tokens, [x[adjacent] for x in self._state])
            if len(input_ids) == self.batch:
                self._state = present
            else:
                for past, new in zip(self._state, present, strict=True):
                    past[adjacent] = new
        return np.asarray(logits.cpu().numpy())

    def _read_row(self, row: int) -> State:
        names = (s.past.name for s in self.contract.state())
        return {n: x[row].cpu().numpy().copy() for n, x in zip(names, self._state, strict=True)}

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        with torch.inference_mode():
            for spec, x in zip(self.contract.state(), self._state, strict=True):
                x[row] = torch.from_numpy(np.ascontiguousarray(tensors[spec.past.name])).to(self._device)

    def _copy_row(self, source: int, target: int) -> None:
        with torch.inference_mode():
            for x in self._state:
                x[target] = x[source]

    def _reset_rows(self, rows: Sequence[int]) -> None:
        with torch.inference_mode():
            for spec, x in zip(self.contract.state(), self._state, strict=True):
                x[list(rows)] = spec.field.empty


class TorchBackend(ModelBackend):
    """Runs an artifact's contract in float32, whatever its compute dtype: slow; the reference of ``check``."""

    def __init__(self, bundle: Bundle, artifact: Artifact, device: str = "cpu") -> None:
        contract = replace(artifact.contract, dtype="float32")
        kernels = bundle_kernels(bundle)
        kernels.check([s.heads for s in contract.layers])
        for index, layer in enumerate(contract.layers):
            kind = table_of(kernels.rotary, index)
            rows = 0 if layer.max_distance is None else table_length(layer.max_distance, contract.chunk)
            if (kind is None) != (rows == 0) or (kind is not None and len(kind.angles) < rows):
                raise BackendError(f"the bundle's kernel file has another rotary table for layer {index}: export again")
        super().__init__(bundle_model(bundle), contract, kernels, device)
