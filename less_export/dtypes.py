"""The dtypes of tensors, by the names that contracts use, and their names in other libraries.

Needs numpy only; torch and onnx_ir are imported by the functions that return their types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


class Dtype(NamedTuple):
    """Bytes of an element, and the dtype's name in safetensors files, in ONNX and in TensorRT."""

    itemsize: int
    safetensors: str
    onnx: str
    tensorrt: str


#: Every dtype of a contract or of a weight file; numpy and torch use the same names.
DTYPES = {
    "float32": Dtype(4, "F32", "FLOAT", "FLOAT"),
    "float16": Dtype(2, "F16", "FLOAT16", "HALF"),
    "bfloat16": Dtype(2, "BF16", "BFLOAT16", "BF16"),
    "int64": Dtype(8, "I64", "INT64", "INT64"),
    "int32": Dtype(4, "I32", "INT32", "INT32"),
    "int8": Dtype(1, "I8", "INT8", "INT8"),
    "uint8": Dtype(1, "U8", "UINT8", "UINT8"),
}
#: dtypes a graph may compute in; the plugin numbers them in this order.
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


def item_bytes(name: str) -> int:
    """Bytes of one element."""
    return DTYPES[name].itemsize


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """numpy dtype; bfloat16, which numpy lacks, is represented by its bits as uint16."""
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype."""
    import torch

    if name not in DTYPES:
        raise KeyError(name)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def onnx_dtype(name: str) -> ir.DataType:
    """onnx_ir data type."""
    import onnx_ir as ir

    return ir.DataType[DTYPES[name].onnx]


def onnx_type(name: str) -> str:
    """Type of a tensor in ONNX schemas and in ONNX Runtime, like "tensor(float)"."""
    return f"tensor({DTYPES[name].onnx.lower()})"


def from_torch(dtype: Any) -> str:
    """Name of a torch dtype, or of one in a config, like "torch.bfloat16"."""
    return str(dtype).removeprefix("torch.")


def from_safetensors(code: str) -> str | None:
    """Name of a safetensors dtype like "BF16"; None for an unsupported one."""
    return next((n for n, d in DTYPES.items() if d.safetensors == code), None)


def from_tensorrt(dtype: Any) -> str:
    """Name of a TensorRT data type; for an unsupported one, TensorRT's own name in lower case."""
    return next((n for n, d in DTYPES.items() if d.tensorrt == dtype.name), str(dtype.name).lower())
