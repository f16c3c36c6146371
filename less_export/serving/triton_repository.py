"""A model repository for Triton Inference Server: its python backend over the engine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..bundle import temporary
from ..bundle.files import replace
from ..errors import UsageError, one_line

#: What a model may be called: its folder in the repository, and a part of its address.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
#: Microseconds after which Triton forgets a sequence that gets no request.
IDLE = 600 * 10**6
_MODEL = '''"""Written by less-export {version}: Triton's python backend finds the model here."""

import os
import sys

# Triton's interpreter ignores the variable, which says where less-export is.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from less_export.serving.triton_model import TritonPythonModel as TritonPythonModel
'''
_CONFIG = """# Written by less-export {version}.
name: {name}
backend: "python"
max_batch_size: {batch}
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] optional: true }},
  {{ name: "sampling" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "token_id" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] }}
]
{sequences}instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{parameters}
"""
_SEQUENCES = """sequence_batching {{
  oldest {{ max_candidate_sequences: {most} }}
  max_sequence_idle_microseconds: {idle}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] }} ] }},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
"""


@dataclass(frozen=True)
class TritonOptions:
    """How the model runs in Triton; None leaves a choice to the bundle.

    Args:
        bundle: absolute path, on the machine where Triton runs.
        backend, threads, rows, piece: as for :func:`less_export.open_bundle` and
            :class:`less_export.runtime.engine.Engine`.
        max_queue: requests that may wait for a row.
        sequences: sequences whose states are kept between their requests; 0 makes a model without sequences.
        trust_code: load native code that the bundle brings.
    """

    bundle: Path
    backend: str | None = None
    threads: int | None = None
    rows: int | None = None
    piece: int | None = None
    max_queue: int = 64
    sequences: int = 0
    trust_code: bool = False

    def parameters(self) -> dict[str, str]:
        """What the configuration holds, of which :meth:`parse` makes the options again."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: str(value) for name, value in values.items() if value is not None and value is not False}

    @classmethod
    def parse(cls, parameters: dict[str, str]) -> TritonOptions:
        """The options of a configuration.

        Raises:
            UsageError: a parameter that is missing, unknown or no number.
        """
        numbers = ("threads", "rows", "piece", "max_queue", "sequences")
        unknown = sorted(parameters.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise UsageError(f"config.pbtxt has the unknown parameter {one_line(unknown[0], 60)}")
        try:
            whole = {name: int(parameters[name]) for name in numbers if name in parameters}
            return cls(
                Path(parameters["bundle"]),
                parameters.get("backend"),
                trust_code=parameters.get("trust_code") == "True",
                **whole,
            )
        except (KeyError, ValueError) as error:
            raise UsageError(f"config.pbtxt has wrong parameters: {one_line(error)}") from None


def write_repository(repository: Path, name: str, options: TritonOptions, version: str) -> Path:
    """Write the folder of one model, whole or not at all; returns it.

    Raises:
        UsageError: a name that a model cannot have; the folder exists or cannot be written; a negative limit.
    """
    check_name(name)
    if options.sequences < 0 or options.max_queue < 0:
        raise UsageError("--sequences and --max-queue must be at least 0")
    folder = repository / name
    if folder.exists():
        raise UsageError(f"{folder} exists: remove it, or choose another --name")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with temporary.folder(folder) as part:
            model = part / "model"
            (model / "1").mkdir(parents=True)
            (model / "1" / "model.py").write_text(_MODEL.format(version=version), encoding="utf-8")
            (model / "config.pbtxt").write_text(config(name, options, version), encoding="utf-8")
            replace(model, folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def check_name(name: str) -> None:
    """Raise :class:`UsageError` unless a model can have this name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"a model cannot be called {one_line(name, 60)!r}: use letters, digits, '.', '_' and '-'")


def config(name: str, options: TritonOptions, version: str) -> str:
    """The content of ``config.pbtxt``."""
    parameters = "\n".join(
        f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"
        for key, value in options.parameters().items()
    )
    return _CONFIG.format(
        name=quoted(name),
        version=version,
        batch=1 if options.sequences else 0,
        sequences=_SEQUENCES.format(most=options.sequences, idle=IDLE) if options.sequences else "",
        parameters=parameters,
    )


def quoted(text: str) -> str:
    """A string of protobuf's text format."""
    if not text.isprintable():
        raise UsageError(f"the path {one_line(text)} has characters that a configuration cannot hold")
    return json.dumps(text, ensure_ascii=False)
