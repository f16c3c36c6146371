"""Bad manifests, as data: what both runtimes refuse, each damaged from a valid manifest and signed again.

``CASES`` is the table. :meth:`Case.render` makes a file's bytes from a valid manifest (an object with an artifact, a
weight file, a tokenizer and kernels), and ``reason`` stands in the one line that refuses it. ``FINE`` are odd ones that
are accepted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from less_export.bundle.artifact import (
    ARTIFACT_FILES,
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    KernelFacts,
    Manifest,
    TokenizerFacts,
    WeightFile,
    _digest,
    header_sha256,
)
from less_export.bundle.files import sha256
from less_export.bundle.strict_json import MAX_BYTES, MAX_DEPTH
from less_export.config import DISTANCE_LIMIT, MAX_HALF_LIFE
from less_export.contract import Contract, LayerSpec, Policy

Place = tuple[str | int, ...]
MISSING = object()
LAYER: Place = ("artifacts", 0, "contract", "layers", 0)
CONTRACT: Place = ("artifacts", 0, "contract")
ARTIFACT: Place = ("artifacts", 0)
WEIGHT: Place = ("weights", 0)

MODEL = {"name": "tiny", "class": "Tiny", "parameters": 6, "config": {"a": 1}, "max_position_embeddings": None}
#: Kernels of a plan whose file held no feature maps, only the centring of keys.
NO_MAPS = {"file": "", "sha256": "", "bytes": 64, "parametrisation": None, "rank": 0, "hidden": 0, "layers": []}
TINY = Contract((LayerSpec(4, 2, 8, 0.35, Policy.H2O, 2, 2, 0, True, 4, 3),), 20, "float32", 4, 2)
#: A plugin's entry from before rows by index.
PLUGIN = {"library": "x.so", "sha256": "0" * 64, "version": "1", "inside": False}
#: Its layer with a state of 16 bits.
STATE16 = {**TINY.to_dict()["layers"][0], "slot_dtype": "int8", "state_bits": 16}


def write_bundle(folder: Path, kind: str, content: bytes) -> Manifest:
    """Write a bundle with one artifact, whose files are what its manifest says; returns the manifest."""
    folder.mkdir()
    artifact, tokenizer = folder / ARTIFACT_FILES[kind], folder / "tokenizer.json"
    weights, kernels = folder / "model.safetensors", folder / "kernels.safetensors"
    artifact.write_bytes(content)
    tokenizer.write_text("{}")
    save_file({"a": np.arange(6, dtype=np.float32)}, weights)
    save_file({"b": np.arange(6, dtype=np.float32)}, kernels)
    manifest = Manifest(
        MODEL,
        {"policy": "h2o"},
        (Artifact(kind, artifact.name, sha256(artifact), TINY),),
        (WeightFile(weights.name, weights.stat().st_size, header_sha256(weights), sha256(weights)),),
        {"torch": "2"},
        TokenizerFacts(tokenizer.name, sha256(tokenizer), 1, (2,), True, None),
        KernelFacts(kernels.name, sha256(kernels), 24, "exp", 3, 5, (0, 1)),
    )
    (folder / MANIFEST).write_bytes(manifest.dump())
    return manifest


@dataclass(frozen=True)
class Case:
    """``value`` is put at ``path`` (MISSING removes what is there); ``text`` then changes the signed file itself."""

    name: str
    reason: str
    path: Place = ()
    value: Any = MISSING
    text: Callable[[bytes], bytes] | None = None

    def render(self, valid: dict[str, Any]) -> bytes:
        """The bytes of the bad manifest."""
        data = copy.deepcopy({k: v for k, v in valid.items() if k != "manifest_sha256"})
        unsigned = self.path == ("manifest_sha256",)
        if self.path and not unsigned:
            place(data, self.path, self.value)
        signed = {"manifest_sha256": _digest(data), **data}
        if unsigned:
            place(signed, self.path, self.value)
        data_bytes = json.dumps(signed).encode()
        return self.text(data_bytes) if self.text else data_bytes


def place(data: Any, path: Place, value: Any) -> None:
    """Set or remove a value in a JSON value."""
    for key in path[:-1]:
        data = data[key]
    if value is MISSING:
        del data[path[-1]]
    else:
        data[path[-1]] = value


def nested(levels: int) -> Any:
    """Lists in one another around a number."""
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def _raw(field: str, text: str) -> Callable[[bytes], bytes]:
    """Replace the value of a field that is in the file once by JSON text."""

    def edit(data: bytes) -> bytes:
        before, rest = data.split(f'"{field}": '.encode(), 1)
        end = min(i for i in (rest.find(b","), rest.find(b"}")) if i >= 0)
        return before + f'"{field}": {text}'.encode() + rest[end:]

    return edit


def _wrong(path: Place, *values: Any) -> list[Case]:
    where = ".".join(map(str, path))
    return [
        Case(f"{where} {i} {json.dumps(v)[:30] if v is not MISSING else 'missing'}", str(path[-1]), path, v)
        for i, v in enumerate(values)
    ]  # fmt: skip


def _large(slots: int, head_dim: int, vocab_size: int, layers: int = 1) -> Any:
    """A contract whose tensors have 16 * (slots + 1) * (head_dim + 2) * layers + 8 * vocab_size bytes."""
    layer = {
        "query_heads": 1, "kv_heads": 1, "head_dim": head_dim, "scale": 1.0, "policy": "full", "heavy": 0,
        "recent": slots, "window": 0, "absorb": False, "capacity": slots, "rank": 1,
    }  # fmt: skip
    return {
        "layers": [layer] * layers, "vocab_size": vocab_size, "dtype": "float32", "chunk": 1, "max_batch": 1,
        "logits": "last", "position_limit": None, "trained_length": None,
    }  # fmt: skip


INT32 = 2**31
CASES = (
    # ---- the file
    Case("empty", "manifest", text=lambda d: b""),
    Case("not JSON", "manifest", text=lambda d: d[:-1]),
    Case("text after the object", "manifest", text=lambda d: d + b"{}"),
    Case("a list", "manifest", text=lambda d: b"[" + d + b"]"),
    Case("null", "manifest", text=lambda d: b"null"),
    Case("not UTF-8", "UTF-8", text=lambda d: d.replace(b'"model"', b'"m\xffdel"')),
    Case("UTF-16", "manifest", text=lambda d: d.decode().encode("utf-16")),
    Case("a byte order mark", "manifest", text=lambda d: b"\xef\xbb\xbf" + d),
    Case("a control character in text", "manifest", text=lambda d: d.replace(b'"model"', b'"mo\x1bdel"')),
    Case("17 MB of spaces", "MB", text=lambda d: d + b" " * (MAX_BYTES + 1 - len(d))),
    Case("65 levels", "nested too deeply", text=lambda d: _inside(d, nested(MAX_DEPTH))),
    Case("100,000 levels", "nested too deeply", text=lambda d: _deep(d, 100_000)),
    Case("a million open lists", "nested too deeply", text=lambda d: b"[" * 1_000_000),
    Case("a key twice", "duplicate key", text=lambda d: d[:-1] + b', "tools": {}}'),
    Case("a key twice inside", "duplicate key", text=lambda d: d.replace(b'"scale": ', b'"scale": 1.0, "scale": ', 1)),
    Case("NaN", "NaN", text=_raw("scale", "NaN")),
    Case("Infinity", "Infinity", text=_raw("scale", "-Infinity")),
    Case("a number beyond floats", "1e999", text=_raw("scale", "1e999")),
    Case("5,000 digits", "digits", text=_raw("vocab_size", "9" * 5000)),
    # ---- its head
    *_wrong(("format_version",), MISSING, True, False, 1.0, 1.5, 0, -1, "1", None, [1], 2**63),
    Case("a newer format", "newer less-export", ("format_version",), FORMAT_VERSION + 1),
    *_wrong(("manifest_sha256",), MISSING, None, 1, "", "0" * 63, "A" * 64),
    Case("another hash", "hash", ("manifest_sha256",), "0" * 64),
    # ---- its parts
    *_wrong(("model",), MISSING, None, [], "x"),
    *_wrong(("settings",), MISSING, None, []),
    *_wrong(("artifacts",), MISSING, None, {}, "x", []),
    *_wrong(("weights",), MISSING, None, {}, [0], [None]),
    *_wrong(("tokenizer",), [], "x", 1),
    *_wrong(("kernels",), [], "x", 1),
    *_wrong(("tools",), MISSING, None, [], {"torch": 2}),
    *_wrong(("model", "name"), MISSING, None, 1, ["x"]),
    *_wrong(("model", "class"), MISSING, None, 1, "\ud800"),
    *_wrong(("model", "max_position_embeddings"), "1", 1.0, True, -1),
    *_wrong(("model", "config"), MISSING, None, [], {"text_config": []}),
    *_wrong(("model", "parameters"), MISSING, None, "1", 1.0, True, -1, 2**63),
    # ---- an artifact
    *_wrong((*ARTIFACT, "kind"), MISSING, None, 1, "onnx", ["ort"]),
    *_wrong((*ARTIFACT, "sha256"), MISSING, None, 1, "", "0" * 63, "Z" * 64),
    *_wrong((*ARTIFACT, "details"), MISSING, None, [], "x"),
    *_wrong((*ARTIFACT, "surprise"), 1),
    *_wrong(
        (*ARTIFACT, "details"),
        {"bytes": -1}, {"seconds": "1"}, {"gpu_arch": 1}, {"flavour": 1}, {"flavour": "x\ny"}, {"version": None},
        {"layers": 1.5}, {"plugin_layers": True},
    ),
    *_wrong(
        (*ARTIFACT, "details"),
        {"plugin": {}}, {"plugin": "x"}, {"plugin": [1]},
        *({"plugin": {**PLUGIN, **bad}} for bad in (
            {"inside": 0}, {"inside": "false"}, {"inside": None}, {"library": 1}, {"library": None}, {"sha256": "0"},
            {"library": "x\n.so"}, {"sha256": None}, {"more": 1}, {"rows_by_index": 1}, {"rows_by_index": None},
        )),
    ),
    *(
        case
        for owner in (ARTIFACT, WEIGHT, ("tokenizer",), ("kernels",))
        for case in _wrong(
            (*owner, "file"),
            MISSING, None, 1, ["a"], ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "x\x1b[2Jy", "x\u202ey",
            "x\ny", "x\0y", "\ud800", "x" * 256,
        )
    ),
    # ---- a contract
    *_wrong(CONTRACT, MISSING, None, [], "x"),
    *_wrong((*CONTRACT, "layers"), MISSING, None, {}, "x", [], [None], [[]], [1]),
    Case("200,000 layers", "manifest", (*CONTRACT, "layers"), [{}] * 200_000),
    *(
        case
        for field in ("vocab_size", "chunk", "max_batch")
        for case in _wrong((*CONTRACT, field), MISSING, None, "1", 1.0, True, 0, -1, INT32, 2**63, 2**64)
    ),
    *_wrong((*CONTRACT, "dtype"), MISSING, None, 1, "float64", "int8"),
    *_wrong((*CONTRACT, "logits"), MISSING, None, 1, "first"),
    *_wrong((*CONTRACT, "position_limit"), "1", 1.0, True, 0, -1, INT32),
    *_wrong((*CONTRACT, "trained_length"), "1", 1.0, True, 0, -1, INT32),
    *_wrong((*CONTRACT, "surprise"), 1),
    Case("tensors of all rows beyond 2^60 bytes", "too large", CONTRACT, _large(2**30, 2**30, 1)),
    Case("tensors of 2^60 bytes", "too large", CONTRACT, _large(2**28 - 2, 2**28 - 1, 2)),
    Case("tensors beyond 2^63 bytes", "too large", CONTRACT, _large(2**31 - 1, 2**31 - 1, 2**31 - 1, layers=4096)),
    # ---- a layer
    *(
        case
        for field in ("query_heads", "kv_heads", "head_dim", "recent", "capacity", "rank")
        for case in _wrong((*LAYER, field), MISSING, None, "1", 1.0, True, 0, -1, INT32, 2**63)
    ),
    *(
        case
        for field in ("heavy", "window")
        for case in _wrong((*LAYER, field), MISSING, None, "1", 1.0, True, -1, INT32)
    ),
    *_wrong((*LAYER, "scale"), MISSING, None, "1", True),
    *_wrong((*LAYER, "score_half_life"), "512", 512.0, True, 0, -1, MAX_HALF_LIFE + 1),
    *_wrong((*LAYER, "slot_dtype"), None, 8, "int4", "INT8", "float32", ["int8"]),
    *_wrong((*LAYER, "state_bits"), None, "16", 16.0, True, 8, 15, 33),
    Case("a state of 17 bits", "16 or 32 bits", (*LAYER, "state_bits"), 17),
    Case("a state of 16 bits beside slots of the compute dtype", "int8 slots", (*LAYER, "state_bits"), 16),
    Case("a state of 16 bits that absorbs nothing", "int8 slots", LAYER, {**STATE16, "absorb": False, "rank": 1}),
    *_wrong((*LAYER, "max_distance"), "4096", 4096.0, True, 0, -1, DISTANCE_LIMIT + 1),
    *_wrong((*LAYER, "absorb"), MISSING, None, 0, 1, "true"),
    *_wrong((*LAYER, "policy"), MISSING, None, 0, ["h2o"]),
    Case("an unknown policy", "policy", (*LAYER, "policy"), "lru"),
    Case("a policy in capitals", "policy", (*LAYER, "policy"), "H2O"),
    Case("a scale beyond 1e300", "scale", (*LAYER, "scale"), 2e300),
    Case("heads that do not divide", "multiple", (*LAYER, "query_heads"), 3),
    Case("slots that do not add up", "capacity", (*LAYER, "heavy"), 1),
    Case("a rank without absorption", "rank", (*LAYER, "absorb"), False),
    *_wrong((*LAYER, "surprise"), 1),
    # ---- weights
    *_wrong((*WEIGHT, "bytes"), MISSING, None, "1", 1.0, True, -1, 2**63),
    *_wrong((*WEIGHT, "header_sha256"), MISSING, None, 1, "x"),
    *_wrong((*WEIGHT, "sha256"), MISSING, None, 1, "x"),
    *_wrong((*WEIGHT, "surprise"), 1),
    Case("5,000 weight files", "weights", ("weights",), [{}] * 5000),
    *_wrong(("on_disk",), None, [], {}, {"manifest_inode": -1, "weights": {}}, {"manifest_inode": 1, "weights": []},
            {"manifest_inode": 1, "weights": {"x": {"mtime_ns": 1.5, "inode": 1}}}),
    # ---- tokenizer and kernels
    *_wrong(("tokenizer", "sha256"), MISSING, None, 1, "x", ""),
    *_wrong(("tokenizer", "bos_id"), MISSING, "1", 1.0, True, INT32),
    *_wrong(("tokenizer", "eos_ids"), MISSING, None, 1, {}, ["1"], [1.0], [True], [None], [INT32], [0] * 5000),
    *_wrong(("tokenizer", "add_bos"), MISSING, None, 0, "true"),
    *_wrong(("tokenizer", "chat_template"), MISSING, 1, ["x"], "\ud800", {"default": ["x"]}),
    *_wrong(("tokenizer", "special_tokens"), 1, [], {"bos_token": 1}),
    *_wrong(("tokenizer", "split_special_tokens"), None, 0, "true"),
    *_wrong(("tokenizer", "surprise"), 1),
    *_wrong(("kernels", "sha256"), MISSING, None, 1, "x"),
    *_wrong(("kernels", "bytes"), MISSING, None, "1", 1.0, True, -1),
    *_wrong(("kernels", "parametrisation"), MISSING, 1, "exp\x1b"),
    Case("no maps of rank 3", "kernels.rank", ("kernels",), {**NO_MAPS, "rank": 3}),
    Case("no maps with a hidden width", "kernels.hidden", ("kernels",), {**NO_MAPS, "hidden": 5}),
    Case("no maps for layers", "kernels.layers", ("kernels",), {**NO_MAPS, "layers": [0]}),
    *_wrong(("kernels", "rank"), MISSING, None, "1", 1.0, -1, INT32),
    *_wrong(("kernels", "hidden"), MISSING, None, "1", 1.0, -1, INT32),
    *_wrong(("kernels", "layers"), MISSING, None, 1, {}, ["0"], [-1], [True]),
    *_wrong(("kernels", "surprise"), 1),
)  # fmt: skip

#: Odd manifests that are accepted: a field that nobody knows at the top and in ``model``, and nesting at the limit.
FINE = (
    Case("unknown at the top", "", ("later",), {"x": [1.5, None]}),
    Case("unknown in model", "", ("model", "later"), 1),
    Case("unknown in details", "", (*ARTIFACT, "details"), {"later": "x"}),
    Case("64 levels", "", text=lambda d: _inside(d, nested(MAX_DEPTH - 1))),
    Case("16 MB of spaces", "", text=lambda d: d + b" " * (MAX_BYTES - len(d))),
    Case("named templates", "", ("tokenizer", "chat_template"), {"default": "x", "tool_use": "y"}),
    Case("special tokens", "", ("tokenizer", "special_tokens"), {"bos_token": "<s>"}),
    Case("tensors of 2^60 - 8 bytes", "", CONTRACT, _large(2**28 - 2, 2**28 - 1, 1)),
    Case("slots of the compute dtype", "", (*LAYER, "slot_dtype"), "model"),
    Case("a layer of an earlier version", "", (*LAYER, "slot_dtype")),
    Case("int8 slots", "", (*LAYER, "slot_dtype"), "int8"),
    Case("a state of 32 bits", "", (*LAYER, "state_bits"), 32),
    Case("a state of 16 bits", "", LAYER, STATE16),
    Case("a layer from before them", "", (*LAYER, "state_bits")),
    Case("a largest distance", "", (*LAYER, "max_distance"), 4096),
    Case("the largest of all", "", (*LAYER, "max_distance"), DISTANCE_LIMIT),
    Case("any distance", "", (*LAYER, "max_distance"), None),
    Case("kernels without maps", "", ("kernels",), NO_MAPS),
    Case("big numbers in the config", "", ("model", "config"), {"a": 2**70, "b": 1e300}),
)


def _inside(data: bytes, value: Any) -> bytes:
    """The manifest with ``value`` under a key of its own, signed again."""
    manifest = {k: v for k, v in json.loads(data).items() if k != "manifest_sha256"} | {"later": value}
    return json.dumps({"manifest_sha256": _digest(manifest), **manifest}).encode()


def _deep(data: bytes, levels: int) -> bytes:
    """The manifest with lists that Python's own JSON cannot write; the hash does not matter."""
    return data[:-1] + b', "later": ' + b"[" * levels + b"]" * levels + b"}"
