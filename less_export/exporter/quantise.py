"""Weight-only quantisation: the matrices of linear layers as int8 or int4, written to one file, matrix by matrix.

Codes are symmetric (zero point 0) with a positive scale for every block of input features, as TensorRT requires.
They are stored [in, out] with blocks along the first axis, so that ONNX Runtime fuses DequantizeLinear and MatMul
into MatMulNBits, which reads the codes directly. A block has as many features as the options say (by default 64, which
divides the widths of all families here; TensorRT documents int4 blocks of 64 and 128), or half of them, and so on down
to 16, where that does not divide the width. ONNX Runtime's round-to-nearest computes the codes. The output embedding is
int8 by default even with int4, because its errors reach the logits undamped.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import nn
from transformers import PreTrainedModel

from ..config import DEFAULT_BLOCK, DEFAULT_HEAD, ExportConfig
from ..errors import UsageError, install_hint
from ..hf.compat import Conv1D
from ..hf.weights import CODES, DTYPES, SCALES, Stored, StoredTensor

#: Smallest block.
_SMALLEST = 16
BITS = {"int8": 8, "int4": 4}
#: Number of weights quantised at a time; round-to-nearest works in float64.
_PIECE = 1 << 22


def linear_weights(model: PreTrainedModel, graph: ir.Graph) -> dict[str, bool]:
    """Parameters of linear layers that ``graph`` uses only as the second factor of a product.

    The value is True where the graph transposes them first (``nn.Linear``), False where it does not (``Conv1D``).
    """
    transposes = {}
    for name, module in model.named_modules():
        value = graph.initializers.get(f"model.{name}.weight")
        if value is None or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        uses = list(value.uses())
        transposed = all(node.op_type == "Transpose" for node, _ in uses)
        if transposed:
            uses = [use for node, _ in uses for use in node.outputs[0].uses()]
        if uses and all(_multiplies(node) and index == 1 for node, index in uses):
            transposes[f"{name}.weight"] = transposed
    return transposes


def _multiplies(node: ir.Node) -> bool:
    turned = node.attributes.get("transB")
    return node.op_type in ("MatMul", "Gemm") and (turned is None or not turned.as_int())


def block_of(matrix: tuple[int, ...], bits: int, largest: int = DEFAULT_BLOCK) -> int | None:
    """Block size for a matrix [in, out], ``largest`` or less; None where it cannot be quantised.

    At least two blocks: TensorRT-RTX 1.7.1 fails on several int8 products of one input with a single block.
    """
    if bits == 4 and matrix[1] % 2:  # two codes to a byte, within a row
        return None
    block = largest
    while matrix[0] % block or matrix[0] <= block:
        block //= 2
        if block < _SMALLEST:
            return None
    return block


@dataclass(frozen=True)
class _Matrix:
    """A weight to quantise, [in, out] or, ``transposed``, [out, in]."""

    stored: Stored
    transposed: bool
    bits: int
    block: int

    def entries(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of codes and scales in the file."""
        rows, columns = self.stored.shape[:: -1 if self.transposed else 1]
        codes = ("U8", (rows, columns // 2)) if self.bits == 4 else ("I8", (rows, columns))
        return {name + CODES[self.transposed]: codes, name + SCALES: ("F32", (rows // self.block, columns))}

    def quantised(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Codes (int4 two to a byte) and scales, computed for some output features at a time."""
        quant_tensor = load_quantiser()
        weight = self.stored.read()
        outputs = weight if self.transposed else weight.T  # [out, in]
        columns, rows = outputs.shape
        codes = np.empty((rows, columns * self.bits // 8), np.uint8)
        scales = np.empty((rows // self.block, columns), np.float32)
        step = 2 * max(_PIECE // rows // 2, 1)
        for at in range(0, columns, step):
            piece = outputs[at : at + step].float().contiguous().numpy()
            flat, scale, _ = quant_tensor(piece, self.bits, self.block, "sym", "int")
            whole = flat.astype(np.int8).reshape(len(piece), rows).T
            if self.bits == 4:
                whole = whole[:, ::2] & 15 | whole[:, 1::2] << 4
            first = at * self.bits // 8
            codes[:, first : first + whole.shape[1]] = whole.view(np.uint8)
            scales[:, at : at + len(piece)] = scale.reshape(len(piece), -1).T
        return codes, scales


def load_quantiser() -> Callable[..., Any]:
    """ONNX Runtime's round-to-nearest over the rows of a matrix; raises :class:`UsageError` without ONNX Runtime."""
    try:
        from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor
    except ImportError:
        raise UsageError(f"--weights needs ONNX Runtime: {install_hint('cpu')}") from None
    return quant_tensor


def write(
    path: Path, model: PreTrainedModel, graph: ir.Graph, tensors: Mapping[str, Stored], config: ExportConfig
) -> list[str]:
    """Write the parameters of ``model`` to a safetensors file, the matrices of linear layers quantised.

    At most one matrix is in memory at a time. Everything else (embeddings, norms) is copied unchanged,
    so that the bundle needs no other weight file.

    Args:
        path: the file.
        model: the bare model, its output embedding untied. graph: its traced graph.
        tensors: the checkpoint's, by parameter name. config: its ``weights``, ``block`` and ``head``.

    Returns:
        Names of the matrices that are not quantised, embeddings excepted.
    """
    head, linear = model.get_output_embeddings(), linear_weights(model, graph)
    outputs = {f"{n}.weight" for n, m in model.named_modules() if m is head}
    kinds = {False: str(config.weights), True: config.head or DEFAULT_HEAD}
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    matrices: dict[str, _Matrix] = {}
    for name, transposed in linear.items():
        stored, bits = tensors[name], BITS[kinds[name in outputs]]
        block = block_of(stored.shape[:: -1 if transposed else 1], bits, config.block or DEFAULT_BLOCK)
        if block is not None:
            matrices[name] = _Matrix(stored, transposed, bits, block)
    plain: dict[Stored, str] = {}
    for name, stored in tensors.items():
        if name not in matrices:
            plain.setdefault(stored, name)  # tied names once
    entries = {k: e for name, matrix in matrices.items() for k, e in matrix.entries(name).items()}
    entries |= {name: (_plain(stored).dtype, stored.shape) for stored, name in plain.items()}
    with _Writer(path, entries) as file:
        for name, matrix in matrices.items():
            codes, scales = matrix.quantised()
            file.put(name + CODES[matrix.transposed], [codes.data])
            file.put(name + SCALES, [scales.data])
        for stored, name in plain.items():
            file.put(name, _bytes_of(_plain(stored)))
    return [n for n in plain.values() if len(entries[n][1]) > 1 and n not in tables]


def _plain(stored: Stored) -> StoredTensor:
    assert isinstance(stored, StoredTensor)
    return stored


def _bytes_of(stored: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, a piece at a time."""
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        for at in range(0, stored.length, _PIECE):
            yield file.read(min(_PIECE, stored.length - at))


class _Writer:
    """A safetensors file that is filled tensor by tensor, in any order; the widest dtypes come first."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -DTYPES[e[1][0]].itemsize):
            begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = {n: 8 + len(text) + e["data_offsets"][0] for n, e in header.items() if n in entries}
        self.file = open(path, "wb")  # noqa: SIM115
        self.file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Write the bytes of a tensor."""
        self.file.seek(self.start[name])
        self.file.writelines(data)
