"""The compiled plugin in TensorRT-RTX: symbols, registration, engines, Polygraphy, and loading of plans."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
import torch

from less_export.bundle.artifact import Artifact, Bundle, Layout, Manifest
from less_export.cli import main as cli
from less_export.contract import (
    OP_NAME,
    PLUGIN_RANK_LIMIT,
    PLUGIN_VERSION,
    TENSORRT_TOPK_LIMIT,
    Contract,
    SlotDtype,
    StateBits,
)
from less_export.errors import EngineError
from less_export.exporter import onnx_op
from less_export.native import nvcc
from less_export.runtime import trt
from less_export.runtime.open import load_backend
from less_export.runtime.trt import inspect_plan
from less_export.tensorrt import engine, plugin
from less_export.tensorrt.trust import PluginFacts

from . import families
from .conftest import PLUGIN_ARCH
from .trt_decoder import contract_of, decoder, serialised
from .trt_support import Fake

pytestmark = pytest.mark.slow


def bare(contract: Contract, folder: Path) -> bytes:
    """The decoder of trt_decoder with bare LessAttention nodes."""
    model = decoder(contract, folder)
    onnx_op.strip_bodies(model)
    return serialised(model)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


def python(code: str, *arguments: object) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------ the library


def test_symbols(plugin_library: Path) -> None:
    """Only the entry points are exported; neither TensorRT nor a driver is linked."""
    defined = subprocess.check_output(["nm", "-D", "--defined-only", plugin_library], text=True)
    entries = {"getCreators", "setLoggerFinder", "lessOnError", "lessWhyUnsupported", "lessWhyUnusable"}
    assert {x.split()[-1] for x in defined.splitlines()} == entries
    needed = re.findall(r"NEEDED.*\[(\S+)\]", subprocess.check_output(["readelf", "-d", plugin_library], text=True))
    assert "libc.so.6" in needed
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s", "ld-linux-x86-64"}
    assert {x.split(".so")[0] for x in needed} <= {*system, "ld-linux-aarch64"}


def test_loads_without_tensorrt_and_driver(plugin_library: Path) -> None:
    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); n = ctypes.c_int32(); "
        "lib.getCreators(ctypes.byref(n)); print(n.value, lib.lessWhyUnsupported is not None)"
    )
    assert python(code, plugin_library).strip() == "1 True"


REGISTER = """
import ctypes, sys, tensorrt_rtx as trt
registry = trt.get_plugin_registry()
def there():
    return [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators if c.name == "LessAttention"]
seen = []
for step in sys.argv[2]:
    if step == "d":
        ctypes.CDLL(sys.argv[1])
    if step == "l":
        handle = registry.load_library(sys.argv[1])
        assert handle is not None
    if step == "x":
        registry.deregister_library(handle)
    seen.append(len(there()))
print(seen, there()[:1])
"""


@pytest.mark.parametrize(
    ("steps", "seen"), [("d", [1]), ("dd", [1, 1]), ("l", [1]), ("dl", [1, 1]), ("lxl", [1, 0, 1]), ("dlx", [1, 1, 0])]
)
def test_registration(steps: str, seen: list[int], plugin_library: Path) -> None:
    """Opened (d) by Polygraphy, loaded (l) and unloaded (x) by TensorRT, in any order: registered once."""
    last = [(OP_NAME, PLUGIN_VERSION, "")] if seen[-1] else []
    assert python(REGISTER, plugin_library, steps).splitlines()[-1] == f"{seen} {last}"


# ------------------------------------------------------------------ engines


def layers_of(log: str) -> list[dict[str, Any]]:
    """The plugin layers of a built engine, as TensorRT's detailed log lists them."""
    layers = []
    for line in re.findall(r"^Name: .*LayerType: PluginV3.*$", log, re.M):
        names, outputs = (re.findall(r"Name: ([^,]+)", x) for x in re.split(r"Outputs: \[", line, maxsplit=1))
        layers.append({"name": names[0], "inputs": names[1:], "outputs": outputs})
    return layers


@pytest.mark.parametrize(
    ("dtype", "slots", "far", "bits"),
    [("float16", "model", None, 32), ("bfloat16", "int8", None, 16), ("float32", "model", 9, 32)],
)
def test_one_plugin_per_layer_updates_the_state_in_place(
    dtype: str, slots: SlotDtype, far: int | None, bits: StateBits, plugin_library: Path, weights: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Every plugin reads the network's past and writes its present directly, without copies, in both profiles."""
    contract = contract_of(dtype, slots=slots, max_distance=far, state_bits=bits)
    out = weights.parent / "engine.plan"
    configure = engine._configure

    def detailed(*args: Any) -> Any:
        config = configure(*args)
        config.profiling_verbosity = tensorrt_rtx.ProfilingVerbosity.DETAILED
        return config

    monkeypatch.setattr(engine, "_configure", detailed)
    caplog.set_level(logging.DEBUG, "less_export.tensorrt")
    info = engine.build_plan(
        bare(contract, weights), contract, out=out, weights_dir=weights, gpu_arch=PLUGIN_ARCH,
        library=plugin_library,
    )  # fmt: skip
    assert (info.plugin_layers, info.layers < 100) == (2, True)
    built = layers_of("\n".join(caplog.messages))
    assert len(built) == 4  # two layers, two profiles
    for index, layer in enumerate(built):
        number, suffix = index % 2, "" if index < 2 else " [profile 1]"
        names = [f"{number}.{f.name}{suffix}" for f in contract.layers[number].state_fields]
        assert layer["inputs"][5 : 5 + len(names)] == [f"past.{n}" for n in names]
        assert layer["outputs"][1:] == [f"present.{n}" for n in names]
        # TensorRT copies inputs that several layers read, such as the lengths, once.
        assert layer["inputs"][-1].endswith(f"rows{suffix}")
    # The plan contains the library: it is larger by that than a plan that only refers to it.
    assert info.plugin == PluginFacts.of(plugin_library, inside=True, rows_by_index=True)
    monkeypatch.setattr(engine, "_embeds", lambda flavour: False)
    outside = engine.build_plan(
        bare(contract, weights), contract, out=out, weights_dir=weights, gpu_arch=PLUGIN_ARCH, library=plugin_library
    )
    assert outside.plugin is not None
    assert not outside.plugin.inside
    assert info.bytes - outside.bytes == pytest.approx(plugin_library.stat().st_size, abs=4096)


def test_tensorrt_asks_the_plugin_for_its_aliases(
    plugin_library: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the preview feature, TensorRT refuses the answer of getAliasedInput."""
    contract = contract_of("float16", chunk=1)
    feature = type("Off", (), {"ALIASED_PLUGIN_IO_10_03": tensorrt_rtx.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10})
    monkeypatch.setattr(tensorrt_rtx, "PreviewFeature", feature)
    with pytest.raises(EngineError, match=r"Aliased I/O used by plugin .* not enabled"):
        engine.build_plan(
            bare(contract, weights), contract, out=weights / "x.plan", weights_dir=weights, gpu_arch=PLUGIN_ARCH,
            library=plugin_library,
        )  # fmt: skip


def test_the_plugin_has_no_topk_limit(plugin_library: Path, weights: Path) -> None:
    contract = contract_of("float16", chunk=1, capacity=TENSORRT_TOPK_LIMIT + 160)
    assert nvcc.why_unsupported(plugin_library, contract.layers[0], "float16") is None
    model = bare(contract, weights)
    options: dict[str, Any] = {"out": weights / "x.plan", "weights_dir": weights, "gpu_arch": PLUGIN_ARCH}
    assert engine.build_plan(model, contract, library=plugin_library, **options).plugin_layers == 2
    with pytest.raises(EngineError, match="layer 0 keeps 4000 tokens with h2o"):
        engine.build_plan(model, contract, **options)


def test_layers_the_plugin_cannot_run(plugin_library: Path, weights: Path) -> None:
    contract = contract_of("float16", chunk=1)
    odd = Contract(tuple(dataclasses.replace(x, head_dim=10) for x in contract.layers), 32, "float16", 1, 3)
    message = r"the plugin cannot run layer 0 \(head_dim must be a multiple of 8 up to 256\): --no-plugin builds"
    with pytest.raises(EngineError, match=message):
        engine.build_plan(
            b"", odd, out=weights / "x.plan", weights_dir=weights, gpu_arch=PLUGIN_ARCH, library=plugin_library
        )
    for layer in (*contract.layers, *contract_of("float16", slots="int8", state_bits=16).layers):
        assert nvcc.why_unsupported(plugin_library, layer, "bfloat16") is None
    widest = dataclasses.replace(contract.layers[0], rank=PLUGIN_RANK_LIMIT)
    assert nvcc.why_unsupported(plugin_library, widest, "float32") is None
    wide = dataclasses.replace(contract.layers[0], rank=PLUGIN_RANK_LIMIT + 1)
    assert nvcc.why_unsupported(plugin_library, wide, "float32") == "the rank must be 1 to 64"


def test_a_wrong_node_is_refused_by_name(plugin_library: Path, weights: Path) -> None:
    contract = contract_of("float16", chunk=1)

    def refused(edit: Any) -> str:
        model = onnx.load_from_string(bare(contract, weights))
        edit(next(n for n in model.graph.node if n.op_type == OP_NAME))
        with pytest.raises(EngineError) as caught:
            engine.build_plan(
                model.SerializeToString(), contract, out=weights / "x.plan", weights_dir=weights,
                gpu_arch=PLUGIN_ARCH, library=plugin_library,
            )  # fmt: skip
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def drop(node: Any) -> None:
        node.attribute.remove(next(a for a in node.attribute if a.name == "recent"))

    def swap(node: Any) -> None:
        node.input[3], node.input[4] = node.input[4], node.input[3]

    def cut(node: Any) -> None:
        del node.input[13]

    assert "recent" in refused(drop)
    assert "log_phi_q is float16, but must be float32" in refused(swap)
    assert "takes 15 inputs and has 8 outputs, not 14 and 8" in refused(cut)


# ------------------------------------------------------------------ loading of plans


def test_plans_without_their_plugin_inside(
    plugin_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full TensorRT's plans refer to the library: found at its path or at LESS_EXPORT_PLUGIN, and checked."""
    contract = contract_of("float16")
    fake, loaded = Fake(contract, tmp_path, monkeypatch, lambda feed: []), list[Path]()
    monkeypatch.setattr(plugin, "load", lambda module, path: loaded.append(path))
    copy = tmp_path / "copy.so"
    copy.write_bytes(plugin_library.read_bytes())
    facts = PluginFacts.of(copy, inside=False)
    trt.TrtBackend(contract, fake.plan, facts)
    assert [p.read_bytes() for p in loaded] == [plugin_library.read_bytes()]
    moved = copy.rename(tmp_path / "moved.so")
    with pytest.raises(EngineError, match=r"plugin of this engine is missing \(.*copy.so\): build the engine again"):
        trt.TrtBackend(contract, fake.plan, facts)
    monkeypatch.setenv("LESS_EXPORT_PLUGIN", str(moved))
    trt.TrtBackend(contract, fake.plan, facts)
    assert len(loaded) == 2
    moved.write_bytes(moved.read_bytes() + b"\0")
    with pytest.raises(EngineError, match=r"moved.so is not the plugin that this engine was built with"):
        trt.TrtBackend(contract, fake.plan, facts)
    trt.TrtBackend(contract, fake.plan, dataclasses.replace(facts, inside=True), trust_code=True)
    assert len(loaded) == 2


def test_the_backend_is_told_of_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract, told = contract_of("float16"), list[PluginFacts | None]()

    class Backend(types.SimpleNamespace):
        def __init__(
            self, contract: Contract, plan: Path, plugin: PluginFacts | None = None, trust_code: bool = False
        ) -> None:
            assert not trust_code
            told.append(plugin)

    monkeypatch.setattr(trt, "TrtBackend", Backend)
    beside = PluginFacts("lib.so", "0" * 64, "1", inside=False)
    far = dataclasses.replace(beside, library="/elsewhere/lib.so")
    for facts in (None, beside, far, dataclasses.replace(far, inside=True)):
        plan = Artifact("plan", "x.plan", "", contract, {"plugin": facts and vars(facts)})
        load_backend(Bundle(Layout.of(tmp_path / "x.plan"), Manifest({}, {}, (plan,), (), {})), "trt")
    older = {k: v for k, v in vars(far).items() if k != "rows_by_index"}
    plan = Artifact("plan", "x.plan", "", contract, {"plugin": older})
    load_backend(Bundle(Layout.of(tmp_path / "x.plan"), Manifest({}, {}, (plan,), (), {})), "trt")
    assert told.pop() == far
    beside = dataclasses.replace(beside, library=str(tmp_path / "lib.so"))
    assert told == [None, beside, far, dataclasses.replace(far, inside=True)]


# ------------------------------------------------------------------ from the command line


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced Llama with the graph for TensorRT."""
    folder = tmp_path_factory.mktemp("plugin")
    checkpoint = families.save("llama", folder / "checkpoint", torch.float16)
    out = folder / "bundle"
    arguments = ["--out", str(out), "--target", "trt", "--budget", "12", "--context", "64", "--chunk", "16"]
    assert cli.main([str(checkpoint), *arguments, "--no-validate"]) == 0
    return out


def test_polygraphy_convert(
    bundle: Path, plugin_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in the README of plugins_trt."""
    assert cli.main(["build-plugin", "--gpu-arch", PLUGIN_ARCH]) == 0
    assert Path(capsys.readouterr().out.strip()) == plugin_library
    assert cli.main(["info", str(bundle), "--polygraphy"]) == 0
    options = capsys.readouterr().out.split()
    plan = tmp_path / "engine.plan"
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, "convert", bundle / "model.trt.onnx", "--convert-to", "trt", "-o", plan]
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    arguments += ["--plugins", plugin_library, *options]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    header = inspect_plan(plan)
    assert header.flavour == "tensorrt_rtx"
    contract = Bundle.open(bundle).manifest.artifacts[0].contract
    data = plan.read_bytes()
    for index in range(len(contract.layers)):
        assert f"present.{index}.h [profile 1]".encode() in data


def test_info_for_polygraphy_needs_the_graph(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["settings"]["plugin"] is True
    arguments = engine.polygraphy_options(Bundle.open(bundle).manifest.artifacts[0].contract)
    assert arguments.count("--trt-max-shapes") == 2
    assert np.all(
        ["past.0.key:[8,2,12,16]" in arguments, "input_ids:[8,16]" in arguments, "input_ids:[1,1]" in arguments]
    )
