"""Headers of safetensors files: the export refuses what the safetensors library refuses, and equal names too."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from less_export.errors import ModelError
from less_export.hf.weights import read_header

LIMIT = 100_000_000
A, B = (
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]},
)


def write(path: Path, header: bytes | dict[str, Any], data: int = 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def object_of(*entries: tuple[str, Any]) -> bytes:
    """A JSON object with these entries, equal names included."""
    return ("{" + ",".join(f"{json.dumps(n)}:{json.dumps(x)}" for n, x in entries) + "}").encode()


REFUSED: dict[str, tuple[bytes | dict[str, Any], int]] = {
    "hole before": ({"a": {**A, "data_offsets": [8, 16]}}, 16),
    "hole between": ({"a": A, "b": {**B, "data_offsets": [12, 20]}}, 20),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, 12),
    "same bytes": ({"a": A, "b": A}, 8),
    "bytes that no tensor has": ({"a": A, "b": B}, 17),
    "too few bytes": ({"a": A, "b": B}, 15),
    "end before begin": ({"a": {**A, "data_offsets": [8, 0]}, "b": B}, 16),
    "shape of more bytes": ({"a": {**A, "shape": [3]}, "b": B}, 16),
    "dtype of more bytes": ({"a": {**A, "dtype": "F64"}, "b": B}, 16),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, 2),
    "unknown dtype": ({"a": {**A, "dtype": "F31"}, "b": B}, 16),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "dtype twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "three offsets": ({"a": {**A, "data_offsets": [0, 8, 8]}}, 8),
    "a fraction": ({"a": {**A, "shape": [2.0]}}, 8),
    "a boolean": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
    "a list": (b"[]", 0),
    "null": (b"null", 0),
    "byte order mark": (b"\xef\xbb\xbf{}", 0),
    "more after the object": (b"{}{}", 0),
    "not UTF-8": (b'{"\xff":1}', 0),
    "NaN": (b'{"a":NaN}', 0),
    "metadata with numbers": ({"__metadata__": {"n": 1}, "a": A}, 8),
    "metadata twice": (object_of(("__metadata__", {}), ("__metadata__", {}), ("a", A)), 8),
    "name twice, other bytes": (object_of(("a", A), ("b", {**A, "data_offsets": [8, 16]}), ("a", A)), 8),
    "too long": (b"{}" + b" " * (LIMIT - 1), 0),
}
TAKEN: dict[str, tuple[bytes | dict[str, Any], int]] = {
    "two": ({"a": A, "b": B}, 16),
    "other order": ({"b": B, "a": A}, 16),
    "none": ({}, 0),
    "empty tensor": ({"e": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}, "a": A}, 8),
    "scalar": ({"s": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}, 2),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": A}, 8),
    "spaces": (b"{} ", 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_refuses(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", *REFUSED[name])
    with pytest.raises(SafetensorError):
        safe_open(path, "np")
    with pytest.raises(
        ModelError, match=r"^model\.safetensors is corrupt or truncated \(.+\): download it again$"
    ) as e:
        read_header(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_library_takes(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", *TAKEN[name])
    with safe_open(path, "np") as file:
        assert set(file.keys()) == read_header(path).keys()


@pytest.mark.parametrize("second", [A, {**A, "shape": [1, 2]}])
@pytest.mark.parametrize("spelt", ['"a"', r'"\u0061"'])
def test_equal_names_that_the_library_takes(second: dict[str, Any], spelt: str, tmp_path: Path) -> None:
    text = f'{{"a":{json.dumps(A)},{spelt}:{json.dumps(second)}}}'
    path = write(tmp_path / "model.safetensors", text.encode(), 8)
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(ModelError, match="two entries have the name 'a'"):
        read_header(path)


def test_tensors_are_where_the_library_reads_them(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    kinds += (torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.int32)
    shapes = ((), (3,), (2, 5), (0, 2))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{i}": (8 * torch.randn(shape, generator=generator)).to(kind)
        for i, (kind, shape) in enumerate(itertools.product(kinds, shapes))
    }
    save_file(tensors, tmp_path / "all.safetensors")
    for name, stored in read_header(tmp_path / "all.safetensors").items():
        read = stored.read()
        assert (read.dtype, read.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(read.double(), tensors[name].double())
