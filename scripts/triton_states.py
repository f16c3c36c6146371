"""What Triton's core does with the states that less-export configures: needs a C compiler and a running tritonserver.

Triton's backends for ONNX Runtime and TensorRT are in no wheel. ``triton_states.c`` is a backend that takes their
place, and says which states it was handed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

from less_export._version import __version__
from less_export.contract import Contract
from less_export.serving.triton_implicit import write_implicit

NAME, BACKEND = "states", "less_states"
#: How ``triton_states.c`` marks.
_SCALE, _MODULUS = 3, 251


def build_backend(backends: Path) -> None:
    """Compile the backend into a folder of backends."""
    folder = backends / BACKEND
    folder.mkdir()
    library, source = folder / f"libtriton_{BACKEND}.so", Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)


def write_model(repository: Path, bundle: Path) -> None:
    """The repository that ``less-export triton --implicit-state`` writes, but for the name of its backend."""
    config = write_implicit(repository, NAME, bundle, "ort", __version__) / "config.pbtxt"
    text, count = re.subn('backend: "onnxruntime"', f'backend: "{BACKEND}"', config.read_text(encoding="utf-8"))
    assert count == 1
    config.write_text(text, encoding="utf-8")


def check(address: str, contract: Contract) -> dict[str, int]:
    """Two sequences, one inside the other: each begins with the empty state, and gets its own states after that."""
    states = sorted(contract.state(), key=lambda s: s.past.name)
    empty = [np.array(s.field.empty, s.dtype).tobytes()[0] for s in states]
    positions = [byte for byte, s in zip(empty, states, strict=True) if s.field.name == "position"]
    assert positions == [255] * len(positions) != []  # int32 of -1
    client = grpc.InferenceServerClient(address)

    def step(sequence: int, length: int, **marks: bool) -> list[int]:
        """The bytes that fill the states before the step."""
        options: dict[str, Any] = {"sequence_id": sequence, **marks}
        values = client.infer(NAME, _inputs(length), **options).as_numpy("logits").ravel().astype(int)
        count, dims = values[-2:]
        assert (count, dims) == (len(states), 1), values
        return list(values[:count])

    assert step(1, 10, sequence_start=True) == empty
    assert step(2, 200, sequence_start=True) == empty
    assert step(1, 20) == _marks(states, 10)
    assert step(2, 100) == _marks(states, 200)
    assert step(1, 0, sequence_end=True) == _marks(states, 20)
    assert step(1, 30, sequence_start=True, sequence_end=True) == empty
    assert step(2, 0, sequence_end=True) == _marks(states, 100)
    client.close()
    print(f"ok: Triton's core hands over {len(states)} states", flush=True)
    return {"states": len(states), "positions_that_begin_with_-1": len(positions), "sequences": 3, "requests": 7}


def _marks(states: Sequence[Any], length: int) -> list[int]:
    """What fills the states after a step of ``length``."""
    return [(_SCALE * rank + length) % _MODULUS for rank in range(len(states))]


def _inputs(length: int) -> list[grpc.InferInput]:
    inputs = []
    for name, values in (
        ("input_ids", np.zeros((1, 3), np.int64)),
        ("past_length", np.full((1, 1), length, np.int32)),
        ("new_length", np.full((1, 1), 3, np.int32)),
    ):
        kind = "INT64" if values.dtype == np.int64 else "INT32"
        inputs.append(grpc.InferInput(name, values.shape, kind).set_data_from_numpy(values))
    return inputs
