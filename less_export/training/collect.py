"""Inputs of the attention layers (q, k and v of every sequence, on disk) and the layers' output projections."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle.files import flush
from ..contract import LayerSpec
from ..errors import LessExportError, ModelError, UnsupportedModelError
from ..hf.compat import Conv1D
from ..hf.rotary import arranged
from ..hf.running import run_decoder
from ..hf.surgery import AttentionCall, less_attention
from ..less import simulate
from ..less.rotary import RotaryTable
from ..progress import Progress
from . import resources, work

_MARK = "collected.json"
#: Bytes that are read at a time.
_PIECE = 1 << 24


class Activations:
    """q, k and v of some layers for N sequences, one file a layer: [N, Hq + 2 Hk, T, D], memory-mapped."""

    def __init__(self, folder: Path, plan: Sequence[LayerSpec], count: int, length: int, dtype: torch.dtype) -> None:
        self.folder, self._plan = folder, plan
        self._count, self._length, self._dtype = count, length, dtype

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.bin"

    def shape(self, layer: int) -> torch.Size:
        spec = self._plan[layer]
        return torch.Size((self._count, spec.query_heads + 2 * spec.kv_heads, self._length, spec.head_dim))

    def tensor(self, layer: int) -> Tensor:
        shape = self.shape(layer)
        size = shape.numel()
        return torch.from_file(str(self._file(layer)), shared=True, size=size, dtype=self._dtype).view(shape)

    def nbytes(self, layer: int) -> int:
        return self.shape(layer).numel() * self._dtype.itemsize

    def reserve(self, layers: Sequence[int]) -> None:
        """Create the missing files of ``layers`` and reserve all their disk space.

        Raises:
            LessExportError: not enough disk space.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for layer in layers:
                file, size = self._file(layer), self.nbytes(layer)
                if not file.exists() or file.stat().st_size != size:
                    resources.reserve(file, size)
        except OSError as error:
            self.remove()  # before free space is measured below
            total, free = sum(map(self.nbytes, layers)), shutil.disk_usage(self.folder.parent).free
            raise LessExportError(
                f"{total / 1e9:.2f} GB of activations do not fit beside --out, where {free / 1e9:.2f} GB are free "
                f"({error.strerror or error}): free disk space, or use fewer --seqs or a shorter --seq-len"
            ) from error

    def marked(self) -> set[int]:
        """Layers that :meth:`mark_done` has marked."""
        return {*self._checksums()}

    def done(self) -> set[int]:
        """Layers whose files are complete: marked, and as they were then."""
        return {i for i, stated in self._checksums().items() if self._checksum(i) == stated}

    def mark_done(self, layers: Sequence[int]) -> None:
        for layer in layers:
            flush(self._file(layer))
        checksums = {str(i): self._checksum(i) for i in layers}
        work.save(self.folder / _MARK, json.dumps(checksums).encode())

    def _checksums(self) -> dict[int, int]:
        content = work.load(self.folder / _MARK)
        return {} if content is None else {int(i): checksum for i, checksum in json.loads(content).items()}

    def _checksum(self, layer: int) -> int | None:
        """CRC-32 of a layer's file: billions of bytes, of which only accidents are to be noticed; None if it is cut."""
        file, checksum = self._file(layer), 0
        if not file.is_file() or file.stat().st_size != self.nbytes(layer):
            return None
        with open(file, "rb") as content:
            while piece := content.read(_PIECE):
                checksum = zlib.crc32(piece, checksum)
        return checksum

    def drop(self) -> None:
        """Delete the files, to free their disk space."""
        for file in (self.folder / _MARK, *self.folder.glob("layer_*.bin")):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.inference_mode()
def collect(
    model: PreTrainedModel,
    ids: Tensor,
    plan: Sequence[LayerSpec],
    layers: Sequence[int],
    activations: Activations,
    share: tuple[int, int],
    progress: Progress,
    rotary: Sequence[RotaryTable] = (),
) -> None:
    """Run the model with its own full attention and write the inputs of ``layers`` to ``activations``.

    ``share`` = (rank, processes): this process runs every ``processes``-th sequence. With ``rotary``, tables of
    distances below T, queries and keys are written as layers with a largest distance get them.

    Raises:
        LessExportError: a layer's input holds NaN or inf, or the disk is full.
    """
    activations.reserve(layers)
    files = {i: activations.tensor(i) for i in layers}
    rank, processes = share
    rows = list(range(rank, len(ids), processes))
    row = 0

    def record(call: AttentionCall) -> Tensor:
        call, angles = arranged(call, rotary)
        if call.layer in files:
            inputs = torch.cat([call.q, call.k, call.v], 1)
            if not bool(inputs.isfinite().all()):
                raise ModelError(
                    f"the input of layer {call.layer} holds NaN or inf: "
                    f"the weights are damaged, or overflow {inputs.dtype}"
                )
            files[call.layer][row] = inputs[0]
        return simulate.full(call.q, call.k, call.v, plan[call.layer], angles)

    with progress.phase("collecting activations", len(rows)) as step, less_attention(model, record):
        for row in rows:
            run_decoder(model, ids[row : row + 1].to(model.device), rotates=not rotary)
            step()


def output_projections(model: PreTrainedModel, plan: Sequence[LayerSpec]) -> dict[int, Tensor]:
    """The matrix that projects each layer's attention output to the hidden size, f32 [Hq * D, width].

    Raises:
        UnsupportedModelError: no linear map is applied to a layer's attention output.
    """
    projections: dict[int, Tensor] = {}
    pending: list[int] = []

    def attention(call: AttentionCall) -> Tensor:
        pending.append(call.layer)
        return torch.zeros_like(call.q)

    def linear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if pending:
            layer = pending.pop()
            width = plan[layer].query_heads * plan[layer].head_dim
            weight = module.get_parameter("weight").detach()
            weight = weight if isinstance(module, Conv1D) else weight.T
            if weight.shape[0] == width:
                projections[layer] = weight.float()

    with _hooks(model, linear), less_attention(model, attention), torch.no_grad():
        run_decoder(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))
    missing = [i for i in range(len(plan)) if i not in projections]
    if missing:
        raise UnsupportedModelError(f"layer {missing[0]}: its attention is not followed by a linear output projection")
    return projections


@contextlib.contextmanager
def _hooks(model: nn.Module, hook: object) -> Iterator[None]:
    kinds = (nn.Linear, Conv1D)
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, kinds)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def groups(layers: Sequence[int], activations: Activations, max_bytes: int) -> list[list[int]]:
    """Split ``layers`` so that the files of each group fit into ``max_bytes`` of disk (at least one layer each)."""
    result: list[list[int]] = []
    used = 0
    for layer in layers:
        size = activations.nbytes(layer)
        if not result or used + size > max_bytes:
            result.append([])
            used = 0
        result[-1].append(layer)
        used += size
    return result
