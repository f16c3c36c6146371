"""The form of a manifest: one table of its fields.

The C++ runtime follows the same rules, and tests/manifest_cases.py lists manifests that break them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..config import DISTANCE_LIMIT, MAX_HALF_LIFE
from ..contract import SLOT_DTYPES
from ..dtypes import COMPUTE_DTYPES
from .strict_json import SchemaError, shown

#: Most layers, files or other entries of a list.
MAX_ENTRIES = 4096
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


class Rule(Protocol):
    """What a value must be."""

    def check(self, value: Any, place: str) -> None:
        """Raise :class:`SchemaError`, which names ``place``, for another value."""


def _require(ok: bool, place: str, what: str, value: Any) -> None:
    if not ok:
        raise SchemaError(f"{place} must be {what}, not {shown(value)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


@dataclass(frozen=True)
class Anything:
    """Any JSON value."""

    def check(self, value: Any, place: str) -> None:
        pass


@dataclass(frozen=True)
class Text:
    """Text, or one of ``choices``; with ``printable``, on one line and without control characters."""

    choices: tuple[str, ...] = ()
    printable: bool = False

    def check(self, value: Any, place: str) -> None:
        what = f"one of {', '.join(self.choices)}" if self.choices else "printable text" if self.printable else "text"
        ok = _is_text(value) and (not self.choices or value in self.choices)
        _require(ok and (not self.printable or value.isprintable()), place, what, value)


@dataclass(frozen=True)
class Hash:
    """A SHA-256 in lower-case hexadecimal; with ``empty``, it may be missing."""

    empty: bool = False

    def check(self, value: Any, place: str) -> None:
        ok = isinstance(value, str) and (re.fullmatch("[0-9a-f]{64}", value) or (self.empty and value == ""))
        _require(bool(ok), place, "a SHA-256 in hexadecimal", value)


@dataclass(frozen=True)
class FileName:
    """The name of a file in the manifest's folder; with ``empty``, it may be missing."""

    empty: bool = False

    def check(self, value: Any, place: str) -> None:
        ok = isinstance(value, str) and (is_file_name(value) or (self.empty and value == ""))
        _require(ok, place, "the name of a file beside the manifest", value)


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in a folder: no path, and nothing that a terminal would not show."""
    is_path = name in (".", "..") or "/" in name or "\\" in name
    return name.isprintable() and not is_path and 0 < len(name.encode()) <= 255


@dataclass(frozen=True)
class Integer:
    """A whole number from ``low`` to ``high``."""

    low: int = 0
    high: int = INT64_MAX

    def check(self, value: Any, place: str) -> None:
        ok = type(value) is int and self.low <= value <= self.high  # True is an int, and no number here
        _require(ok, place, f"a whole number from {self.low} to {self.high}", value)


@dataclass(frozen=True)
class Number:
    """A finite number."""

    def check(self, value: Any, place: str) -> None:
        ok = type(value) in (int, float) and abs(value) <= 1e300
        _require(ok, place, "a finite number", value)


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, value: Any, place: str) -> None:
        _require(isinstance(value, bool), place, "true or false", value)


@dataclass(frozen=True)
class Nullable:
    """Null, or what ``rule`` says."""

    rule: Rule

    def check(self, value: Any, place: str) -> None:
        if value is not None:
            self.rule.check(value, place)


@dataclass(frozen=True)
class TextOr:
    """Text, or what ``rule`` says of anything else."""

    rule: Rule

    def check(self, value: Any, place: str) -> None:
        (Text() if isinstance(value, str) else self.rule).check(value, place)


@dataclass(frozen=True)
class ListOf:
    """A list of ``least`` to ``most`` values."""

    rule: Rule
    least: int = 0
    most: int = MAX_ENTRIES

    def check(self, value: Any, place: str) -> None:
        _require(isinstance(value, list), place, "a list", value)
        if not self.least <= len(value) <= self.most:
            raise SchemaError(f"{place} has {len(value)} entries, {self.least} to {self.most} are allowed")
        for index, item in enumerate(value):
            self.rule.check(item, f"{place}[{index}]")


@dataclass(frozen=True)
class Record:
    """An object with these fields. Other keys are refused unless ``others`` is a rule for their values."""

    required: Mapping[str, Rule] = field(default_factory=dict)
    optional: Mapping[str, Rule] = field(default_factory=dict)
    others: Rule | None = None

    def check(self, value: Any, place: str) -> None:
        _require(isinstance(value, dict), place or "the manifest", "an object", value)
        prefix = f"{place}." if place else ""
        for key in self.required:
            if key not in value:
                raise SchemaError(f"{prefix}{key} is missing")
        for key, item in value.items():
            rule = self.required.get(key) or self.optional.get(key) or self.others
            name = key if key.isidentifier() and key.isascii() else shown(key)
            if rule is None:
                raise SchemaError(f"{prefix}{name} is unknown")
            rule.check(item, prefix + name)


@dataclass(frozen=True)
class WhereNull:
    """An object as ``rule`` says, and as ``then`` says too where its field ``key`` is null."""

    rule: Record
    key: str
    then: Record

    def check(self, value: Any, place: str) -> None:
        self.rule.check(value, place)
        if value[self.key] is None:
            self.then.check(value, place)


# ------------------------------------------------------------------ the table

_POSITIVE = Integer(1, INT32_MAX)
_COUNT = Integer(0, INT32_MAX)
_TOKEN = Integer(-(2**31), INT32_MAX)
_OBJECT = Record(others=Anything())
_TEXTS = Record(others=Text())

LAYER = Record(
    {
        "query_heads": _POSITIVE,
        "kv_heads": _POSITIVE,
        "head_dim": _POSITIVE,
        "scale": Number(),
        "policy": Text(printable=True),
        "heavy": _COUNT,
        "recent": _POSITIVE,
        "window": _COUNT,
        "absorb": Flag(),
        "capacity": _POSITIVE,
        "rank": _POSITIVE,
    },
    {
        "score_half_life": Nullable(Integer(1, MAX_HALF_LIFE)),
        "slot_dtype": Text(SLOT_DTYPES),
        "max_distance": Nullable(Integer(1, DISTANCE_LIMIT)),
        "state_bits": Integer(16, 32),
    },
)
CONTRACT = Record(
    {
        "layers": ListOf(LAYER, least=1),
        "vocab_size": _POSITIVE,
        "dtype": Text(COMPUTE_DTYPES),
        "chunk": _POSITIVE,
        "max_batch": _POSITIVE,
        "logits": Text(("last", "all")),
    },
    {"position_limit": Nullable(_POSITIVE), "trained_length": Nullable(_POSITIVE)},
)
PLUGIN = Record(
    {"library": Text(printable=True), "sha256": Hash(), "version": Text(printable=True), "inside": Flag()},
    {"rows_by_index": Flag()},
)
DETAILS = Record(
    optional={
        "flavour": Text(printable=True),
        "version": Text(printable=True),
        "gpu_arch": Nullable(Text()),
        "bytes": Integer(),
        "seconds": Number(),
        "layers": Integer(),
        "plugin_layers": Integer(),
        "plugin": Nullable(PLUGIN),
    },
    others=Anything(),
)
ARTIFACT = Record(
    {
        "kind": Text(("ort", "trt", "plan")),
        "file": FileName(),
        "sha256": Hash(),
        "contract": CONTRACT,
        "details": DETAILS,
    }
)
WEIGHT = Record({"file": FileName(), "bytes": Integer(), "header_sha256": Hash(), "sha256": Hash()})
TOKENIZER = Record(
    {
        "file": FileName(),
        "sha256": Hash(),
        "bos_id": Nullable(_TOKEN),
        "eos_ids": ListOf(_TOKEN),
        "add_bos": Flag(),
        "chat_template": Nullable(TextOr(_TEXTS)),
    },
    {"special_tokens": Nullable(_TEXTS), "split_special_tokens": Flag()},
)
KERNELS = Record(
    {
        "file": FileName(empty=True),
        "sha256": Hash(empty=True),
        "bytes": Integer(),
        "parametrisation": Nullable(Text(printable=True)),
        "rank": _COUNT,
        "hidden": _COUNT,
        "layers": ListOf(Integer(0, MAX_ENTRIES)),
    }
)
_ZERO = Integer(0, 0)
#: Of kernels without parametrisation, whose file holds no feature maps.
_NO_MAPS = Record({"rank": _ZERO, "hidden": _ZERO, "layers": ListOf(Anything(), most=0)}, others=Anything())
_CONFIG = Record(optional={"text_config": Nullable(_OBJECT)}, others=Anything())
MODEL = Record(
    {"name": Text(), "class": Text(), "parameters": Integer(), "config": _CONFIG},
    {"max_position_embeddings": Nullable(Integer())},
    others=Anything(),
)
_INODE = Integer(0, 2**64 - 1)
ON_DISK = Record(
    {
        "manifest_inode": _INODE,
        "weights": Record(others=Record({"mtime_ns": Integer(-INT64_MAX), "inode": _INODE})),
    }
)
#: What is read before the hash is compared: a newer format may differ in the rest.
HEAD = Record({"format_version": _POSITIVE, "manifest_sha256": Hash()}, others=Anything())
MANIFEST = Record(
    {
        "format_version": _POSITIVE,
        "model": MODEL,
        "settings": _OBJECT,
        "artifacts": ListOf(ARTIFACT, least=1),
        "weights": ListOf(WEIGHT),
        "tokenizer": Nullable(TOKENIZER),
        "kernels": Nullable(WhereNull(KERNELS, "parametrisation", _NO_MAPS)),
        "tools": _TEXTS,
    },
    {"on_disk": ON_DISK},
    others=Anything(),
)
