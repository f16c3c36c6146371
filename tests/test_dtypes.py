"""The table of dtypes against the libraries that it names dtypes of."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save

from less_export import dtypes
from less_export.contract import LayerSpec, Policy


@pytest.mark.parametrize("name", dtypes.DTYPES)
def test_one_dtype_under_every_name(name: str) -> None:
    kind, size = dtypes.torch_dtype(name), dtypes.item_bytes(name)
    assert (str(kind), kind.itemsize) == (f"torch.{name}", size)
    assert dtypes.from_torch(kind) == dtypes.from_torch(str(kind)) == dtypes.from_torch(name) == name
    assert dtypes.numpy_dtype(name).itemsize == size
    assert dtypes.numpy_dtype(name) == ("uint16" if name == "bfloat16" else name)
    assert dtypes.onnx_dtype(name) == ir.DataType[dtypes.DTYPES[name].onnx]
    assert dtypes.onnx_dtype(name).itemsize == size
    schema_types = onnx.defs.get_schema("Cast").type_constraints[0].allowed_type_strs
    assert dtypes.onnx_type(name) in schema_types
    header = save({"x": torch.zeros(2, dtype=kind)})
    assert f'"dtype":"{dtypes.DTYPES[name].safetensors}"'.encode() in header
    assert dtypes.from_safetensors(dtypes.DTYPES[name].safetensors) == name
    assert dtypes.from_tensorrt(SimpleNamespace(name=dtypes.DTYPES[name].tensorrt)) == name


def test_what_is_not_in_the_table() -> None:
    assert dtypes.from_safetensors("F8_E4M3") is None
    assert dtypes.from_tensorrt(SimpleNamespace(name="FP8")) == "fp8"
    with pytest.raises(KeyError):
        dtypes.torch_dtype("float64")


def test_state_fields_have_known_dtypes() -> None:
    model = LayerSpec(4, 2, 8, 0.35, Policy.H2O, 2, 2, 0, True, 4, 3)
    int8 = dataclasses.replace(model, slot_dtype="int8")
    for compute in dtypes.COMPUTE_DTYPES:
        stated = {layer.slot_dtype: {f.dtype_in(layer, compute) for f in layer.state_fields} for layer in (model, int8)}
        assert stated == {
            "model": {compute, "float32", "int32"},
            "int8": {compute, "float32", "int32", "int8"},
        }
        assert all(isinstance(dtypes.numpy_dtype(n), np.dtype) for n in stated["int8"])
