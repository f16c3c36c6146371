"""The public API: names, signatures, fields with their defaults, errors and entry points.

A failure here is a change that users notice. If it is intended, change the expectation and say so in CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from typing import Any

import pytest

import less_export
from less_export import errors
from less_export.runtime.backend import Backend, RowState
from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generation, Generator, Timing, Token
from less_export.runtime.sampler import TokenLogprobs
from less_export.training.options import TrainConfig


def signature(function: Any) -> str:
    """Parameters with their defaults, without annotations."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def fields(kind: type) -> dict[str, Any]:
    """Fields of a dataclass in order, with their defaults; ``...`` where there is none."""
    return {f.name: ... if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}


def test_names() -> None:
    assert sorted(less_export.__all__) == [
        "ExportConfig",
        "LessExportError",
        "RowState",
        "SamplingParams",
        "__version__",
        "calibrate",
        "export",
        "open_bundle",
        "train",
    ]
    for name in less_export.__all__:
        assert getattr(less_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        less_export.exports  # noqa: B018


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (less_export.export, "(model, out, config=None, *, engine_plan=False, progress=None, **options)"),
        (less_export.open_bundle, "(path, backend=None, *, trust_code=False, **options)"),
        (
            less_export.calibrate,
            "(model, out, texts=(), *, kernels=None, max_distance=None, seqs=8, seq_len=None, device=None, "
            "progress=None)",
        ),
        (less_export.train, "(model, out, texts=(), config=None, *, progress=None, **options)"),
        (Generator, "(backend, tokenizer=None, *, eos_ids=None)"),
        (Generator.generate, "(prompts, params=None, *, prefix=None, **overrides)"),
        (Generator.stream, "(prompts, params=None, *, prefix=None, **overrides)"),
        (Generator.prefill, "(prompt, prefix=None)"),
        (Engine, "(model, *, rows=None, piece=None, max_queue=64)"),
        (Engine.sequence, "(prompt, params=None, *, index=0, prefix=None, keep_state=False, **overrides)"),
        (Engine.submit, "(sequences, sink)"),
        (Engine.cancel, "(sequences)"),
        (Engine.stream, "(prompt, params=None, **options)"),
        (Engine.drain, "(timeout=None)"),
        (Engine.stop, "()"),
        (RowState, "(length, tensors, identity='')"),
        (RowState.save, "(path)"),
        (RowState.load, "(path)"),
        (less_export.SamplingParams.with_overrides, "(**overrides)"),
        (Backend.open, "(batch=1)"),
        (Backend.step, "(input_ids, new_length=None, rows=None)"),
        (Backend.read_row, "(row)"),
        (Backend.read_fields, "(row, fields)"),
        (Backend.write_row, "(row, state)"),
        (Backend.reset_rows, "(rows)"),
        (Backend.close, "()"),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_signatures(function: Any, expected: str) -> None:
    assert signature(function) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            less_export.ExportConfig,
            {
                "target": None,
                "policy": None,
                "budget": None,
                "layer_budgets": None,
                "score_half_life": None,
                "slots": None,
                "state": None,
                "max_distance": None,
                "context": None,
                "heavy": None,
                "recent": None,
                "rank": None,
                "kernels": None,
                "dtype": None,
                "weights": None,
                "block": None,
                "head": None,
                "max_batch": 8,
                "chunk": None,
                "num_hidden_layers": None,
                "logits": "last",
                "gpu_arch": None,
                "plugin": True,
                "compress_sliding": None,
                "validate": True,
                "random_weights": False,
                "seed": None,
            },
        ),
        (
            less_export.SamplingParams,
            {
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seed": None,
                "max_new_tokens": 128,
                "stop": (),
                "ignore_eos": False,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "logit_bias": None,
                "stop_token_ids": (),
                "logprobs": None,
                "processors": (),
            },
        ),
        (
            TrainConfig,
            {
                "policy": None,
                "budget": None,
                "layer_budgets": None,
                "score_half_life": None,
                "slots": None,
                "state": None,
                "max_distance": None,
                "context": None,
                "compress_sliding": None,
                "rank": None,
                "hidden": None,
                "parametrisation": "exp",
                "quality": "fast",
                "steps": None,
                "seqs": None,
                "seq_len": None,
                "layers": None,
                "end_to_end": True,
                "tune_steps": None,
                "seed": 0,
                "device": None,
            },
        ),
        (Token, {**dict.fromkeys(("row", "token_id", "text", "finish_reason"), ...), "logprobs": None}),
        (
            Generation,
            {**dict.fromkeys(("token_ids", "text", "finish_reason", "prompt_tokens"), ...), "logprobs": None},
        ),
        (TokenLogprobs, {"logprob": ..., "top": ()}),
        (
            Timing,
            {"prefill_seconds": 0.0, "prefill_tokens": 0, "decode_seconds": 0.0, "decode_tokens": 0},
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_fields(kind: type, expected: dict[str, Any]) -> None:
    assert list(fields(kind).items()) == list(expected.items())


def test_errors() -> None:
    """Every error is a LessExportError, so that one ``except`` is enough."""
    kinds = {n: x for n, x in vars(errors).items() if isinstance(x, type) and issubclass(x, Exception)}
    assert sorted(kinds) == [
        "BackendError",
        "BundleError",
        "EngineError",
        "GatedModelError",
        "KernelError",
        "LessExportError",
        "ModelError",
        "UnsupportedModelError",
        "UsageError",
        "ValidationError",
    ]
    assert all(issubclass(kind, errors.LessExportError) for kind in kinds.values())


@pytest.mark.parametrize(
    ("group", "names"),
    [("console_scripts", ["less-export", "less-lm-eval"]), ("lm_eval.models", ["less"])],
)
def test_entry_points(group: str, names: list[str]) -> None:
    """Programs by name; ``--model less`` of the evaluation harness."""
    points = [p for p in importlib.metadata.distribution("less-export").entry_points if p.group == group]
    assert sorted(p.name for p in points) == names
    assert all(callable(p.load()) for p in points)
