"""TensorRT: plans built by TensorRT-RTX, and the backend's logic on a fake GPU in host memory.

No test here needs a GPU; a machine that has one runs :func:`test_on_a_gpu` instead of the driver's absence.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cudart

from less_export.contract import OP_DOMAIN, Contract, SlotDtype, StateBits
from less_export.errors import BackendError, EngineError, UsageError
from less_export.exporter import onnx_op
from less_export.progress import Spoken
from less_export.runtime import trt
from less_export.runtime.ort import OrtBackend
from less_export.runtime.trt import TrtBackend, inspect_plan, load_plan
from less_export.tensorrt import engine

from .trt_decoder import contract_of, decoder, play, serialised
from .trt_support import HEADER

pytest_plugins = ["tests.trt_decoder"]

HAS_GPU = (cudart.cudaGetDeviceCount()[1] or 0) > 0


# ------------------------------------------------------------------ building


@pytest.mark.parametrize(
    ("dtype", "chunk", "arch", "slots", "far", "bits"),
    [("float16", 4, None, "int8", 20, 16), ("bfloat16", 1, "8.9,sm_120", "model", None, 32)],
)
def test_a_plan_is_built(
    dtype: str, chunk: int, arch: str | None, slots: SlotDtype, far: int | None, bits: StateBits, weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also from int8 slots and a state of 16 bits: inputs, outputs, and what the bodies do with them in a strongly
    typed network. And with keys of which some channels rotate."""
    contract = contract_of(dtype, chunk, slots=slots, max_distance=far, state_bits=bits)
    out = weights.parent / "engine.plan"
    phases, configs = list[str](), list[Any]()
    configure = engine._configure
    monkeypatch.setattr(engine, "_configure", lambda *a: configs.append(configure(*a)) or configs[-1])
    model = onnx_op.with_own_names(decoder(contract, weights)).SerializeToString()
    info = engine.build_plan(
        model, contract, out=out, weights_dir=weights, gpu_arch=arch, progress=Spoken(phases.append)
    )
    config = configs.pop()
    assert config.num_optimization_profiles == len(phases)
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32)
    header = inspect_plan(out)
    assert (
        (info.flavour, info.version) == (header.flavour, header.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    )
    assert info.gpu_arch == (arch and "sm_89,sm_120")
    # Undocumented, seen in 1.7.1: byte 32 is the set of architectures, one bit each from sm_75 on.
    assert out.read_bytes()[32] == (0b11000 if arch else 0b1111110)
    assert info.bytes == header.bytes == out.stat().st_size > (weights / "weights.bin").stat().st_size
    assert info.layers > 20
    assert info.seconds > 0
    both = ["compiling decode (1 of 2)", "compiling prefill (2 of 2)"]
    assert phases == (["compiling decode (1 of 1)"] if chunk == 1 else both)
    assert sorted(p.name for p in weights.parent.iterdir()) == ["engine.plan", "weights"]


def test_profiles_follow_the_contract() -> None:
    contract = contract_of("float16", chunk=16, max_batch=5)
    decode, prefill = engine.profiles(contract)
    assert decode.shapes["input_ids"] == ((1, 1), (5, 1), (5, 1))
    assert prefill.shapes["input_ids"] == ((1, 1), (5, 16), (5, 16))
    assert set(decode.shapes) == set(prefill.shapes) == {s.name for s in contract.inputs()}
    assert prefill.shapes["past.0.key"] == ((1, 2, 6, 8), (5, 2, 6, 8), (5, 2, 6, 8))
    assert [p.name for p in engine.profiles(contract_of("float16", chunk=1))] == ["decode"]


def refuse(
    weights: Path, model: bytes, contract: Contract, error: type[Exception] = EngineError, **options: Any
) -> str:
    """The one-line message of a build that fails; the previous plan is kept."""
    out = weights.parent / "engine.plan"
    out.write_bytes(b"as before")
    with pytest.raises(error) as caught:
        engine.build_plan(model, contract, out=out, weights_dir=weights, **options)
    assert out.read_bytes() == b"as before"
    assert sorted(p.name for p in weights.parent.iterdir()) == ["engine.plan", "weights"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_tensorrt_refuses_is_one_line(weights: Path) -> None:
    contract = contract_of("float16")
    model = decoder(contract, weights)
    assert "Failed to parse the ONNX model" in refuse(weights, b"garbage", contract)
    assert "lacks the tensor input_ids" in refuse(weights, b"", contract)
    message = refuse(weights, serialised(model), contract_of("float16", capacity=8))
    assert "past.0.key as float16 [-1, 2, 6, 8] where the contract says float16 ['batch', 2, 8, 8]" in message
    assert "past.0.key as float16" in refuse(weights, serialised(model), contract_of("bfloat16"))
    assert "logits" in refuse(weights, serialised(model), Contract(contract.layers, 33, "float16", 4, 3))
    broken = onnx.load_from_string(serialised(model))
    next(n for n in broken.graph.node if n.op_type == "Add").op_type = "NoSuchOp"
    assert "(NoSuchOp)" in refuse(weights, broken.SerializeToString(), contract)
    (weights / "weights.bin").rename(weights / "moved.bin")
    assert "weights.bin" in refuse(weights, serialised(model), contract)
    (weights / "moved.bin").rename(weights / "weights.bin")
    onnx_op.strip_bodies(model)
    apart = multiprocessing.get_context("spawn").Pool(1)  # if no earlier test has loaded the plugin
    with apart:
        message = apart.apply(refuse, (weights, serialised(model), contract))
    assert "(LessAttention, which has no body inside)" in message


def own_handler(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("handler", [signal.default_int_handler, own_handler], ids=["default", "own"])
def test_ctrl_c_and_a_full_disk_leave_nothing(handler: Any, weights: Path) -> None:
    contract = contract_of("float16", chunk=1)
    model = serialised(decoder(contract, weights))

    def cancel(text: str) -> None:
        raise ValueError(text)

    def interrupt(text: str) -> None:  # while TensorRT compiles
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.signal(signal.SIGINT, handler)
    for progress, error in ((Spoken(cancel), ValueError), (Spoken(interrupt), KeyboardInterrupt)):
        with pytest.raises(error):
            engine.build_plan(model, contract, out=weights.parent / "x.plan", weights_dir=weights, progress=progress)
        assert [p.name for p in weights.parent.iterdir()] == ["weights"]
    assert signal.signal(signal.SIGINT, before) is handler
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "cannot write" in refuse(weights, model, contract)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_names_inside_functions_are_their_own(weights: Path) -> None:
    """TensorRT-RTX 1.7.1 gives a Constant of the graph the value of a function's Constant of the same name."""
    contract = contract_of("float16")
    contract = Contract(contract.layers[:1] * 4, 32, "float16", 4, 3)
    model = onnx.load_from_string(serialised(decoder(contract, weights)))
    outside = {o for n in model.graph.node for o in n.output}
    inside = {o for n in model.functions[0].node for o in n.output} - {*model.functions[0].output}
    assert len(inside) > 50
    assert not outside & inside
    assert all(name.startswith(model.functions[0].overload + ".") for name in inside)
    wrong = Contract(contract.layers, 33, "float16", 4, 3)
    assert "logits as float32" in refuse(weights, model.SerializeToString(), wrong)  # parsed, then refused


def test_every_layer_gets_its_own_body(weights: Path) -> None:
    """The parser takes the first body of a name for all nodes. Only that of h2o has a TopK; window is first here."""
    contract = contract_of("float16")
    contract = replace(contract, layers=contract.layers[::-1])
    model = onnx_op.with_own_names(decoder(contract, weights))
    assert {f.name for f in model.functions} == {n.op_type for n in model.graph.node if n.domain == OP_DOMAIN}
    network = tensorrt_rtx.Builder(log := tensorrt_rtx.Logger()).create_network(
        1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = tensorrt_rtx.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString(), path=str(weights / "model.onnx"))
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(tensorrt_rtx.LayerType.TOPK) == 1


def test_topk_limits_the_budget(weights: Path) -> None:
    message = refuse(weights, b"", contract_of("float16", capacity=4000))
    assert message.startswith("layer 0 keeps 4000 tokens with h2o")
    assert "3840" in message


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (None, ()),
        ("all", ()),
        ("sm_89", ("sm_89",)),
        ("89", ("sm_89",)),
        ("8.9", ("sm_89",)),
        ("SM120", ("sm_120",)),
        ("12.1, sm_86,86", ("sm_121", "sm_86")),
    ],
)
def test_architectures(text: str | None, parsed: tuple[str, ...]) -> None:
    assert engine.parse_gpu_arch(engine.flavour("tensorrt_rtx"), text) == parsed


@pytest.mark.parametrize("text", ["", "sm_90", "sm_75", "ada", "8.9.1", "89,", "current", "all,sm_89"])
def test_unsupported_architectures_are_listed(text: str) -> None:
    with pytest.raises(UsageError, match="choose from sm_80, sm_86, sm_89, sm_120, sm_121"):
        engine.parse_gpu_arch(engine.flavour("tensorrt_rtx"), text)


# ------------------------------------------------------------------ flavours


def test_full_tensorrt_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.flavour().name == "tensorrt_rtx" or "tensorrt" in sys.modules
    full = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    assert engine.flavour().name == "tensorrt_rtx"  # an empty folder called tensorrt
    full.Builder, full.__version__ = object, "10.14.1"  # type: ignore[attr-defined]
    chosen = engine.flavour()
    assert (chosen.name, chosen.label) == ("tensorrt", "TensorRT 10.14.1")
    assert engine.flavour("tensorrt_rtx").module is tensorrt_rtx
    assert engine.parse_gpu_arch(chosen, None) == ()
    with pytest.raises(UsageError, match="builds for the GPU of this machine: leave --gpu-arch out"):
        engine.parse_gpu_arch(chosen, "sm_89")


def test_missing_and_broken_installations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"less-export\[trt\].*less-export\[trt-rtx\]"):
        engine.flavour()
    with pytest.raises(EngineError, match=r"needs TensorRT-RTX, which is not available: pip install"):
        engine.flavour("tensorrt_rtx")
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"tensorrt is installed but cannot be loaded: libnvinfer.so.10"):
        engine.flavour()


def test_loading_needs_no_torch() -> None:
    code = "import sys, less_export.runtime.trt; print([m for m in ('torch', 'onnx', 'cuda') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ------------------------------------------------------------------ plans on disk


def test_headers_are_read_without_tensorrt(tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    with pytest.raises(EngineError, match=r"cannot read the plan .*engine.plan: No such file"):
        inspect_plan(plan)
    for content in (b"", b"vtrt", b"onnx" + bytes(100)):
        plan.write_bytes(content)
        with pytest.raises(EngineError, match="is not a TensorRT plan: build it again"):
            inspect_plan(plan)
    plan.write_bytes(HEADER(b"vtrt", 100, 1, 7, 1, 116).ljust(99))
    with pytest.raises(EngineError, match="99 bytes instead of 100"):
        inspect_plan(plan)
    plan.write_bytes(HEADER(b"ftrt", 0, 10, 14, 1, 48).ljust(99))
    assert inspect_plan(plan) == trt.PlanHeader("tensorrt", "10.14.1.48", 99)
    with pytest.raises(EngineError, match=r"needs TensorRT, which is not available: pip install 'less-export\[trt\]'"):
        load_plan(plan, contract_of("float32"))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: test_on_a_gpu runs")
def test_without_a_driver(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract, plan = contract_of("float16", chunk=1), weights.parent / "engine.plan"
    monkeypatch.delattr(tensorrt_rtx.Builder, "build_serialized_network_to_stream")  # as in older TensorRT
    engine.build_plan(serialised(decoder(contract, weights)), contract, out=plan, weights_dir=weights)
    with pytest.raises(BackendError, match=r"^no CUDA driver: run this where nvidia-smi lists a GPU"):
        TrtBackend(contract, plan)
    with pytest.raises(EngineError, match=r"cannot load .*engine.plan: no CUDA driver, or none recent enough"):
        load_plan(plan, contract)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu(weights: Path) -> None:
    contract, plan = contract_of("float32"), weights.parent / "engine.plan"
    model = serialised(decoder(contract, weights))
    (weights / "model.onnx").write_bytes(model)
    engine.build_plan(model, contract, out=plan, weights_dir=weights)
    for (name, got), (_, wanted) in zip(
        play(TrtBackend(contract, plan)),
        play(OrtBackend(contract, weights / "model.onnx", operator="onnx")),
        strict=True,
    ):
        if not any(kind in name for kind in ("key", "value", "psi", "score")):  # empty slots may hold anything
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3, err_msg=name)
