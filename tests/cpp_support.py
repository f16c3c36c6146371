"""Builds of the C++ runtime for tests, bundles around plans, and its test engine in numpy."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.bundle.artifact import Artifact, KernelFacts, Layout, Manifest, TokenizerFacts, WeightFile
from less_export.contract import Contract
from less_export.dtypes import numpy_dtype
from less_export.runtime.backend import Array, Backend, State, empty

from .sharing import once, shared_folder
from .trt_support import HEADER

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "plugins_trt" / "runtime"


@dataclass(frozen=True)
class Result:
    """Exit code and output of a program."""

    code: int
    out: str
    err: str


def call(*arguments: object, feed: str = "") -> Result:
    process = subprocess.run([str(w) for w in arguments], input=feed, capture_output=True, text=True, encoding="utf-8")
    return Result(process.returncode, process.stdout, process.stderr)


def cmake(source: Path, folder: Path, *options: str) -> Path:
    """Configure and build, warnings as errors; a missing tool or library fails with cmake's own message."""
    assert shutil.which("cmake"), "the tests of the C++ runtime need cmake and a C++17 compiler"
    for command in (
        ["-S", source, "-B", folder, "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options],
        ["--build", folder, "--parallel", "2"],
    ):
        process = call("cmake", *command)
        assert process.code == 0, process.out + process.err
    return folder


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the unit tests, ``less_runtime_probe`` and the fuzz targets, under AddressSanitizer and UBSan."""
    flags = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"
    options = ["-DLESS_RUNTIME_TENSORRT=OFF", "-DLESS_RUNTIME_TESTS=ON", "-DLESS_RUNTIME_FUZZ=ON"]
    options.append("-DCMAKE_BUILD_TYPE=None")
    options.append(f"-DCMAKE_CXX_FLAGS={flags}")
    return once(shared_folder(tmp_path_factory, "cpp") / "tools", lambda folder: cmake(RUNTIME, folder, *options))


@pytest.fixture(scope="session")
def less_generate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, linked against TensorRT-RTX's library and the static CUDA runtime."""
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
    example = ROOT / "examples" / "cpp"
    folder = once(shared_folder(tmp_path_factory, "cpp") / "example", lambda folder: cmake(example, folder, *options))
    return folder / "less_generate"


# ------------------------------------------------------------------ bundles

#: Values that are hard in JSON: floats, text that is not ASCII, values that are not numbers.
MODEL: Mapping[str, Any] = {
    "name": 'Größe 😀 \u2028 \x7f \\ "quoted"',
    "class": "Größe",
    "parameters": 2**40,
    "config": {
        "eps": 1e-05,
        "theta": 1000000.0,
        "big": 2**70,
        "tiny": 5e-324,
        "z": [True, None, -0.0, {}, [], "", "\ud800"],
    },
    "odd": [float("inf"), float("-inf"), float("nan"), 1e16, 1e22, 123456789.123456789, 0.1, 100.0],
    "ключ": {"b": 1, "a\n": 2, "Z": 3, "é": 4, "😀": 5, "\uffff": 6},
}
TOKENIZER = TokenizerFacts("tokenizer.json", "0" * 64, 2, (1, 7), True, "{{ messages }}")
KERNELS = KernelFacts("kernels.safetensors", "1" * 64, 10, "exp", 4, 8, (0,))
WEIGHTS = (WeightFile("a.safetensors", 1, "2" * 64, "3" * 64), WeightFile("b.safetensors", 1, "4" * 64, "5" * 64))
PLAN = HEADER(b"vtrt", 99, 1, 7, 1, 116).ljust(99)


def bundle(
    path: Path,
    contract: Contract,
    plan: bytes = PLAN,
    details: Mapping[str, Any] | None = None,
    tokenizer: TokenizerFacts | None = TOKENIZER,
    kernels: KernelFacts | None = KERNELS,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a plan and its manifest: a folder, or ``x.plan`` with its companion."""
    layout = Layout.of(path)
    layout.folder.mkdir(parents=True, exist_ok=True)
    file = layout.artifact or "engine.plan"
    (layout.folder / file).write_bytes(plan)
    artifact = Artifact("plan", file, hashlib.sha256(plan).hexdigest(), contract, dict(details or {}))
    graph = Artifact("trt", "model.trt.onnx", "6" * 64, contract)
    manifest = Manifest(MODEL, dict(settings or {}), (graph, artifact), WEIGHTS, {}, tokenizer, kernels)
    (layout.folder / layout.manifest).write_bytes(manifest.dump())
    return path


def describe(tools: Path, path: Path, option: str = "verified") -> Any:
    """What the runtime reads of a bundle, or the line that refuses it; ``option``: unverified, trust."""
    done = call(tools / "less_runtime_probe", "describe", path, option)
    assert done.code in (0, 1), done.err
    return json.loads(done.out) if done.code == 0 else done.err


def edit(manifest: Path, change: Any) -> None:
    """Change a manifest's data and update its hash."""
    data = json.loads(manifest.read_bytes())
    data.pop("manifest_sha256")
    change(data)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({"manifest_sha256": digest, **data}))


# ------------------------------------------------------------------ the test engine


class MixingBackend(Backend):
    """The arithmetic of ``plugins_trt/runtime/tests/host_machine.hpp``."""

    name = "mixing"

    def _open(self, batch: int) -> None:
        self._rows = [
            [np.frombuffer(empty(t, 1).tobytes(), np.uint8).copy() for t in self.contract.state()] for _ in range(batch)
        ]
        self.steps: list[tuple[int, int]] = []

    def _close(self) -> None:
        self._rows = []

    def _step(self, input_ids: Any, past_length: Any, new_length: Any, rows: Any) -> Any:
        self.steps.append(input_ids.shape)
        batch, width = input_ids.shape
        hashes = np.zeros((batch, width), np.uint64)
        for row, tensors in enumerate(self._rows[i] for i in rows):
            for t in range(new_length[row]):
                for i, state in enumerate(tensors):
                    place = np.arange(len(state), dtype=np.int64)
                    at = int(input_ids[row, t]) + int(past_length[row]) + t + 7 * i
                    state[...] = (state * np.int64(31) + at + place) % 256
                    hashes[row, t] += np.sum(state * (place.astype(np.uint64) * 2654435761 + i + 1), dtype=np.uint64)
        if self.contract.logits == "last":
            hashes = hashes[np.arange(batch), np.maximum(new_length - 1, 0)][:, None]
        with np.errstate(over="ignore"):
            salt = np.arange(self.contract.vocab_size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (hashes[..., None] ^ salt) * np.uint64(0xBF58476D1CE4E5B9)
        return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-20)

    def _read_row(self, row: int) -> State:
        tensors = zip(self.contract.state(), self._rows[row], strict=True)
        return {t.past.name: x.copy().view(numpy_dtype(t.dtype)).reshape(t.row_shape) for t, x in tensors}

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        for tensor, x in zip(self.contract.state(), self._rows[row], strict=True):
            x[...] = np.frombuffer(np.ascontiguousarray(tensors[tensor.past.name]).tobytes(), np.uint8)


def lines(prompts: Sequence[Sequence[int]]) -> str:
    return "".join(" ".join(map(str, p)) + "\n" for p in prompts)
