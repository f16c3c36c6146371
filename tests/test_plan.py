"""Engines of real traced models, from checkpoint to plan, as far as a machine without a GPU goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from less_export.bundle.artifact import Bundle
from less_export.cli import main as cli
from less_export.runtime.trt import inspect_plan

from . import families
from .conftest import PLUGIN_ARCH

pytestmark = pytest.mark.slow


def has_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.mark.parametrize(
    ("family", "dtype", "policy", "plugin"),
    [
        ("gemma3", torch.bfloat16, "h2o", True),
        ("llama", torch.float16, "sink", True),
        ("falcon_mqa", torch.bfloat16, "tova", False),
    ],
)
def test_checkpoint_to_plan(
    family: str, dtype: torch.dtype, policy: str, plugin: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = families.save(family, tmp_path / "checkpoint", dtype)
    out = tmp_path / "made" / "engine.plan"
    arguments = [
        "--out",
        str(out),
        "--policy",
        policy,
        "--budget",
        "12",
        "--context",
        "64",
        "--chunk",
        "16",
        "--no-validate",
        "--gpu-arch",
        PLUGIN_ARCH,
        *([] if plugin else ["--no-plugin"]),
    ]
    assert cli.main([str(checkpoint), *arguments]) == 0
    capsys.readouterr()
    # One file holds weights and operator; the manifest (and the tokenizer, if any) is in the same folder.
    assert sorted(p.name for p in out.parent.iterdir()) == ["engine.json", "engine.plan"]
    header = inspect_plan(out)
    assert header.bytes == out.stat().st_size
    bundle = Bundle.open(out)
    plan = bundle.artifact("plan")
    assert plan is not None
    assert plan.contract.dtype == str(dtype).removeprefix("torch.")
    assert plan.details["flavour"] == header.flavour
    assert plan.details["layers"] > (50 if plugin else 100)
    assert plan.details["plugin_layers"] == (len(plan.contract.layers) if plugin else 0)
    assert (plan.details["plugin"] is not None) == plugin
    assert {s.policy.name for s in plan.contract.layers} <= {policy, "window"}
    assert cli.main(["info", str(out)]) == 0
    assert "TensorRT engine" in capsys.readouterr().out
    if not has_gpu():
        assert cli.main(["generate", str(out), "--prompt", "a"]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_folder_with_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = families.save("llama", tmp_path / "checkpoint", torch.float16)
    out = tmp_path / "bundle"
    arguments = ["--out", str(out), "--target", "both", "--engine", "--budget", "12", "--context", "64"]
    arguments += ["--no-validate", "--gpu-arch", PLUGIN_ARCH]
    assert cli.main([str(checkpoint), *arguments]) == 0
    kinds = {a.kind: a.contract.dtype for a in Bundle.open(out).manifest.artifacts}
    assert kinds == {"ort": "float32", "trt": "float16", "plan": "float16"}
    assert (out / "model.safetensors").stat().st_ino == (checkpoint / "model.safetensors").stat().st_ino
