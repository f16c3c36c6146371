"""What a layer gets when the evicting layers below it run compressed, and what its attention adds with full caches.

Two streams of hidden states run through the model for every sequence: one with full caches, one with the caches and
kernels that are served. They stop at each layer that is to be fitted, where the second gives queries, keys and values
and the first the target, and go on from there once the layer has kernels.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bundle.files import flush
from ..contract import LayerSpec
from ..errors import LessExportError, ModelError
from ..hf.layerwise import LayerwiseDecoder
from ..hf.rotary import arranged
from ..hf.surgery import AttentionCall
from ..less import simulate
from ..less.feature_maps import FeatureMap
from ..less.int8 import Centring
from ..less.rotary import RotaryTable
from ..progress import Progress
from . import resources, work
from .additions import Addition

_MARK = "collected.json"
#: Bytes that are read at a time.
_PIECE = 1 << 24
#: Sequences that run together (the eviction loop takes the same time for several), and most bytes of their logits.
_ROWS, _LOGITS = 4, 256 << 20


class Activations:
    """What layers get and are to give for N sequences, in memory-mapped files of the model's dtype.

    ``layer_I``: q, k and v of layer I, [N, Hq + 2 Hk, T, D]. ``target_I``: what its attention adds with full caches,
    [N,T,W]. ``hidden_I``: its input with full caches, and with the caches that are served, [2,N,T,W].
    """

    def __init__(
        self, folder: Path, plan: Sequence[LayerSpec], count: int, length: int, width: int, dtype: torch.dtype
    ) -> None:
        self.folder, self._plan = folder, plan
        self._count, self._length, self._width, self._dtype = count, length, width, dtype

    def shapes(self, layer: int) -> dict[str, torch.Size]:
        """Shapes of a layer's files by name."""
        spec = self._plan[layer]
        hidden = (self._count, self._length, self._width)
        return {
            f"layer_{layer}": torch.Size((self._count, *_inputs(spec, self._length))),
            f"target_{layer}": torch.Size(hidden),
            f"hidden_{layer}": torch.Size((2, *hidden)),
        }

    def tensors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and hidden states of a layer."""
        inputs, targets, hidden = (
            torch.from_file(str(self._file(n)), shared=True, size=s.numel(), dtype=self._dtype).view(s)
            for n, s in self.shapes(layer).items()
        )
        return inputs, targets, hidden

    def nbytes(self, layer: int) -> int:
        return sum(s.numel() for s in self.shapes(layer).values()) * self._dtype.itemsize

    def reserve(self, layer: int) -> None:
        """Create the files of ``layer`` that are missing and reserve their disk space.

        Raises:
            LessExportError: not enough disk space.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, shape in self.shapes(layer).items():
                file, size = self._file(name), shape.numel() * self._dtype.itemsize
                if not file.exists() or file.stat().st_size != size:
                    resources.reserve(file, size)
        except OSError as error:
            self.remove()  # before free space is measured below
            free = shutil.disk_usage(self.folder.parent).free
            raise LessExportError(
                f"{self.nbytes(layer) / 1e9:.2f} GB of activations do not fit beside --out, where {free / 1e9:.2f} GB "
                f"are free ({error.strerror or error}): free disk space, or use fewer --seqs or a shorter --seq-len"
            ) from error

    def done(self) -> int | None:
        """The layer whose files are complete: marked, and as they were then."""
        content = work.load(self.folder / _MARK)
        if content is None:
            return None
        stated = json.loads(content)
        layer = int(stated.pop("layer"))
        return layer if stated == self._checksums(layer) else None

    def marked(self) -> bool:
        """Whether files of some layer are marked as complete."""
        return work.load(self.folder / _MARK) is not None

    def mark_done(self, layer: int) -> None:
        """State that the files of ``layer`` are complete, and delete those of other layers."""
        for name in self.shapes(layer):
            flush(self._file(name))
        work.save(self.folder / _MARK, json.dumps({"layer": layer, **self._checksums(layer)}).encode())
        own = {self._file(n) for n in self.shapes(layer)}
        for file in self.folder.glob("*.bin"):
            if file not in own:
                file.unlink()

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _checksums(self, layer: int) -> dict[str, int | None]:
        return {n: self._checksum(n, s.numel() * self._dtype.itemsize) for n, s in self.shapes(layer).items()}

    def _checksum(self, name: str, size: int) -> int | None:
        """CRC-32 of a file: billions of bytes, of which only accidents are to be noticed; None if it is cut."""
        file, checksum = self._file(name), 0
        if not file.is_file() or file.stat().st_size != size:
            return None
        with open(file, "rb") as content:
            while piece := content.read(_PIECE):
                checksum = zlib.crc32(piece, checksum)
        return checksum


def _inputs(spec: LayerSpec, length: int) -> tuple[int, int, int]:
    return spec.query_heads + 2 * spec.kv_heads, length, spec.head_dim


def served(
    plan: Sequence[LayerSpec], maps: Mapping[int, FeatureMap], centring: Mapping[int, Centring],
    rotary: Sequence[RotaryTable],
) -> Callable[[AttentionCall], Tensor]:  # fmt: skip
    """Attention over whole sequences with the caches of ``plan`` and the kernels ``maps``, one token a step.

    Layers that evict nothing attend to all that they would without LESS, in the compute dtype: what int8 slots round
    there is a hundredth of what eviction changes.
    """

    def attend(call: AttentionCall) -> Tensor:
        call, angles = arranged(call, rotary)
        layer, feature_map = plan[call.layer], maps.get(call.layer)
        if not layer.policy.evicts:
            return simulate.full(call.q, call.k, call.v, layer, angles)
        features = None if feature_map is None else feature_map.features(call.q, call.k)
        return simulate.attend(call.q, call.k, call.v, layer, features, 1, centring.get(call.layer), angles)

    return attend


@torch.inference_mode()
def collect(
    decoder: LayerwiseDecoder, ids: Tensor, plan: Sequence[LayerSpec], layer: int, addition: Addition,
    activations: Activations, maps: Mapping[int, FeatureMap], share: tuple[int, int], progress: Progress,
    centring: Mapping[int, Centring], rotary: Sequence[RotaryTable] = (), begin: int | None = None,
) -> None:  # fmt: skip
    """Write what ``layer`` gets and is to give to ``activations``.

    Args:
        maps: kernels of the layers below. share: (rank, processes); this process runs every ``processes``-th batch.
        centring: of keys in int8 slots, by layer. rotary: tables of distances below T, for plans that limit distances.
        begin: the layer whose hidden states ``activations`` has; by default the streams begin with ``ids``.

    Raises:
        LessExportError: the layer's input holds NaN or inf, or the disk is full.
    """
    before = None if begin is None else activations.tensors(begin)[2]
    activations.reserve(layer)
    inputs, targets, hidden = activations.tensors(layer)
    spec, rotates, compress = plan[layer], not rotary, served(plan, maps, centring, rotary)
    rows = max(1, min(_ROWS, _LOGITS // (4 * max(s.query_heads for s in plan) * ids.shape[1] ** 2)))
    batches = list(torch.arange(len(ids)).split(rows))[share[0] :: share[1]]
    seen: list[Tensor] = []

    # Until something has been evicted, there is one stream.
    one = begin is None and not any(s.policy.evicts for s in plan[:layer])

    def record(call: AttentionCall) -> None:
        if call.layer == layer:
            call, _ = arranged(call, rotary)
            seen[:] = [torch.cat([call.q, call.k, call.v], 1)]

    def clean(call: AttentionCall) -> Tensor:
        record(call)
        call, angles = arranged(call, rotary)
        return simulate.full(call.q, call.k, call.v, plan[call.layer], angles)

    def compressed(call: AttentionCall) -> Tensor:
        record(call)
        return torch.zeros_like(call.q) if call.layer == layer else compress(call)

    with progress.phase(f"collecting what layer {layer} gets", sum(map(len, batches))) as step:
        for batch in batches:
            place = slice(int(batch[0]), int(batch[-1]) + 1)
            start = (None, None) if before is None else before[:, place].to(decoder.model.device)
            passed = decoder.run(ids[place], clean, rotates, begin or 0, start[0], layer, addition.module)
            assert passed.kept is not None
            assert passed.output is not None
            hidden[:, place], targets[place] = passed.kept.to(hidden), passed.output.to(targets)
            if not one:
                passed = decoder.run(ids[place], compressed, rotates, begin or 0, start[1], layer, layer)
                assert passed.kept is not None
                hidden[1, place] = passed.kept.to(hidden)
            if not bool(seen[0].isfinite().all()):
                raise ModelError(
                    f"the input of layer {layer} holds NaN or inf: the weights are damaged, or overflow {seen[0].dtype}"
                )
            assert seen[0].shape[1:] == _inputs(spec, ids.shape[1])
            inputs[place] = seen[0].to(inputs)
            step("", len(batch))
