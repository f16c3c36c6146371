"""The state of one sequence, in memory and as a file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import ALL_FIELDS, Contract
from ..dtypes import numpy_dtype
from ..errors import BackendError, UsageError, one_line

Array = npt.NDArray[np.generic]

#: Longest sequence: its length is an int32.
MAX_LENGTH = 2**31 - 1
_FORMAT = "less-state"
#: safetensors' names of the dtypes that states are stored in.
_STORED_DTYPES = ("F32", "F16", "I32", "U16", "I8")
_TENSOR_NAME = re.compile(rf"past\.(\d+)\.({'|'.join(f.name for f in ALL_FIELDS)})")
#: Largest magnitude of the codes in slots.
_LARGEST_CODE = 127
#: Fields that are never negative.
_NOT_NEGATIVE = ("z", "key_scale", "value_scale", "h_scale")
#: Fields that belong to features, not to slots.
_OF_FEATURES = ("h", "z", "h_scale")


class RowState:
    """The state of one sequence: its length and its tensors by past name, without the batch axis.

    Its size does not depend on the length of the sequence. :meth:`save` and :meth:`load` store it in a
    file, to prefill a shared prefix once or to resume a session elsewhere.

    The file is a safetensors file. Its tensors are those of the contract, called by their past names
    (``past.0.key``, ...), each with its row shape: float32 as F32, float16 as F16, int32 as I32, int8 as I8, and the
    bits of bfloat16 as U16. Its metadata:

    - ``format``: ``less-state``.
    - ``length``: number of tokens of the sequence, 0..2^31-1, in decimal ASCII digits.
    - ``identity``: the bundle's identity, "" if unknown.
    - ``sha256``: lower-case hex digest of these bytes, in this order: ``length``, a zero byte, ``identity``, a
      zero byte; then for every tensor, sorted by name (by bytes): its name, a zero byte, its data as it is in
      the file (little-endian, row-major). Strings in UTF-8. Files without ``sha256``, from earlier versions,
      are read without this check.

    Values, which :meth:`load` checks: every position is in -1..length-1 (-1 marks an empty slot); key, value, psi
    and score of a slot with a position >= 0, its key_scale and value_scale where slots are int8, and all of h, z and
    h_scale, are finite; int8 keys and values are in -127..127, int8 psi in 0..127; scales and z are not negative. What
    an empty slot holds besides its position does not matter.
    """

    def __init__(self, length: int, tensors: Mapping[str, Array], identity: str = "") -> None:
        self.length = length
        self.tensors = dict(tensors)
        self.identity = identity

    def check(self, contract: Contract, identity: str = "") -> None:
        """Raise :class:`BackendError` unless length, names, shapes, dtypes and identity fit ``contract`` and bundle."""
        if identity and self.identity and identity != self.identity:
            raise BackendError("this state belongs to another export (model or kernels differ): prefill again")
        expected = {s.past.name: (s.row_shape, numpy_dtype(s.dtype)) for s in contract.state()}
        actual = {n: (x.shape, x.dtype) if isinstance(x, np.ndarray) else None for n, x in self.tensors.items()}
        if expected != actual:
            names = expected.keys() ^ actual.keys() or {n for n in expected if expected[n] != actual[n]}
            raise BackendError(f"this state belongs to another export ({one_line(min(names))} differs): prefill again")
        if not isinstance(self.length, int | np.integer) or not 0 <= self.length <= MAX_LENGTH:
            raise BackendError(f"this state is damaged (length {self.length}): prefill again")

    def save(self, path: str | Path) -> None:
        """Write the file atomically, with the permissions that the umask gives.

        Raises:
            UsageError: the file cannot be written.
        """
        from ..bundle.files import write_atomically

        data = self.content()
        try:
            write_atomically(path, data)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error

    def content(self) -> bytes:
        """What :meth:`save` writes."""
        from safetensors.numpy import save

        tensors = {n: np.ascontiguousarray(x) for n, x in self.tensors.items()}
        metadata = {"format": _FORMAT, "length": str(self.length), "identity": self.identity}
        return save(tensors, {**metadata, "sha256": self._sha256()})

    @classmethod
    def load(cls, path: str | Path) -> RowState:
        """Read a file written by :meth:`save`.

        Raises:
            BackendError: the file cannot be read, is not a saved state, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        def refuse(reason: object) -> BackendError:
            return BackendError(f"cannot read the saved state {path}: {one_line(reason)}")

        if not Path(path).is_file():
            raise refuse("no such file")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise BackendError(f"{path} is not a saved state")
                tensors = {}
                for name in file.keys():  # noqa: SIM118
                    dtype = file.get_slice(name).get_dtype()
                    if dtype not in _STORED_DTYPES:
                        raise refuse(f"{name} has dtype {dtype}, which states do not have")
                    tensors[name] = file.get_tensor(name)
        except OSError as error:
            raise refuse(error.strerror or error) from error
        except SafetensorError as error:
            raise refuse(f"not a safetensors file, or damaged ({error})") from error
        length = metadata.get("length", "")
        if not re.fullmatch(r"[0-9]{1,10}", length) or int(length) > MAX_LENGTH:
            raise refuse(f"its length is not a whole number in 0..{MAX_LENGTH} ({one_line(length, 40)})")
        state = cls(int(length), tensors, metadata.get("identity", ""))
        if "sha256" in metadata and metadata["sha256"] != state._sha256():
            raise refuse("it is damaged (its hash differs from the stated one)")
        fault = state._invalid_values()
        if fault:
            raise refuse(f"it is damaged ({fault})")
        return state

    def _sha256(self) -> str:
        """The checksum of the file format."""
        digest = hashlib.sha256(f"{self.length}\0{self.identity}\0".encode())
        for name in sorted(self.tensors, key=str.encode):
            digest.update(name.encode() + b"\0")
            digest.update(np.ascontiguousarray(self.tensors[name]).data)
        return digest.hexdigest()

    def _invalid_values(self) -> str | None:
        """The first tensor with values that no state has, and which; None if there is none."""
        for name in sorted(self.tensors):
            match = _TENSOR_NAME.fullmatch(name)
            if match is None:
                continue  # for `check` to refuse
            layer, field = match.groups()
            values: npt.NDArray[Any] = self.tensors[name]
            positions: npt.NDArray[Any] | None = self.tensors.get(f"past.{layer}.position")
            if field == "position":
                if not ((values >= -1) & (values < self.length)).all():
                    return f"{name} has positions outside of -1..{self.length - 1}"
                continue
            if field not in _OF_FEATURES:
                if positions is None or values.shape[:2] != positions.shape:
                    continue
                values = values[positions >= 0]
            if not _is_finite(values).all():
                return f"{name} holds NaN or infinity"
            if values.dtype == np.int8 and field != "h" and (values < -_LARGEST_CODE).any():
                return f"{name} holds a code of -128"
            if (field in _NOT_NEGATIVE or (field == "psi" and values.dtype == np.int8)) and (values < 0).any():
                return f"{name} is negative"
        return None


def _is_finite(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which values are finite; uint16 holds the bits of bfloat16."""
    if values.dtype == np.uint16:
        return np.asarray((values & 0x7F80) != 0x7F80)
    return np.asarray(np.isfinite(values))
