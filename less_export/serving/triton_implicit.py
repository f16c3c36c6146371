"""A model repository in which Triton itself keeps the state of sequences: its implicit state.

The graph runs in Triton's own backend for ONNX Runtime or TensorRT, without Python; a request is one step of one
sequence, and its client chooses the tokens.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..bundle import temporary
from ..bundle.artifact import Bundle
from ..bundle.files import replace
from ..contract import Contract, StateTensor
from ..errors import UsageError
from .triton_repository import IDLE, check_name, quoted

_TYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
}
_BACKENDS = {"ort": "onnxruntime", "trt": "tensorrt"}
_CONFIG = """# Written by less-export {version}.
name: {name}
backend: "{backend}"
default_model_filename: {file}
max_batch_size: {rows}
input [
  {{ name: "input_ids" data_type: TYPE_{ids} dims: [ -1 ] }},
  {{ name: "past_length" data_type: TYPE_{past} dims: [ 1 ] reshape {{ shape: [ ] }} }},
  {{ name: "new_length" data_type: TYPE_{new} dims: [ 1 ] reshape {{ shape: [ ] }} }}
]
output [
  {{ name: "logits" data_type: TYPE_{logits} dims: [ {dims} ] }}
]
sequence_batching {{
  oldest {{ max_candidate_sequences: {rows} }}
  max_sequence_idle_microseconds: {idle}
  state [
{states}
  ]
}}
instance_group [ {{ kind: {kind} count: 1 }} ]
"""
_STATE = """    {{
      input_name: "{past}" output_name: "{present}" data_type: TYPE_{kind} dims: [ {dims} ]
      initial_state {{ name: "empty" data_type: TYPE_{kind} dims: [ {dims} ] {content} }}
    }}"""


def write_implicit(repository: Path, name: str, bundle: Path, kind: str, version: str) -> Path:
    """Write the folder of one model, whole or not at all; returns it. Its version is a link to the bundle.

    Args:
        kind: the bundle's artifact: "ort", or "trt" without the plugin.

    Raises:
        UsageError: as :func:`.triton_repository.write_repository` does; a plan with the plugin; a single file.
    """
    check_name(name)
    opened = Bundle.open(bundle)
    if not bundle.is_dir():
        raise UsageError(f"--implicit-state needs a bundle folder, and {bundle} is a file")
    if kind not in _BACKENDS:
        raise UsageError("--implicit-state needs --backend ort or trt")
    artifact = opened.artifact(kind)
    if artifact is None:
        raise UsageError(f"{bundle} has nothing for --backend {kind}: export or build it first")
    if artifact.details.get("plugin"):
        raise UsageError("Triton's backend does not load this plan: build one with --no-plugin")
    folder = repository / name
    if folder.exists():
        raise UsageError(f"{folder} exists: remove it, or choose another --name")
    text, files = implicit_config(artifact.contract, name, kind, artifact.file, version)
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with temporary.folder(folder) as part:
            model = part / "model"
            (model / "initial_state").mkdir(parents=True)
            (model / "1").symlink_to(os.path.abspath(bundle), target_is_directory=True)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
            for file, values in files.items():
                (model / "initial_state" / file).write_bytes(values.tobytes())
            replace(model, folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def implicit_config(
    contract: Contract, name: str, kind: str, file: str, version: str
) -> tuple[str, dict[str, np.ndarray]]:
    """The content of ``config.pbtxt``, and of the files with initial states that are not zero.

    Triton's core pairs the inputs and outputs of states by their sorted names, which are in the same order here.
    """
    ids, past, new = (_TYPES[t.dtype] for t in contract.tokens())
    files: dict[str, np.ndarray] = {}
    states = []
    for state in contract.state():
        content = "zero_data: true"
        if state.field.empty:
            data = _file_of(state)
            files[data] = np.full(state.row_shape, state.field.empty, state.dtype)
            content = f"data_file: {quoted(data)}"
        dims = ", ".join(map(str, state.row_shape))
        names = {"past": state.past.name, "present": state.present.name}
        states.append(_STATE.format(**names, kind=_TYPES[state.dtype], dims=dims, content=content))
    text = _CONFIG.format(
        version=version,
        name=quoted(name),
        backend=_BACKENDS[kind],
        file=quoted(file),
        rows=contract.max_batch,
        ids=ids,
        past=past,
        new=new,
        logits=_TYPES[contract.logits_spec().dtype],
        dims=f"{1 if contract.logits == 'last' else -1}, {contract.vocab_size}",
        idle=IDLE,
        states=",\n".join(states),
        kind="KIND_GPU" if kind == "trt" else "KIND_CPU",
    )
    return text, files


def _file_of(state: StateTensor) -> str:
    return f"{state.field.name}_{'x'.join(map(str, state.row_shape))}"
