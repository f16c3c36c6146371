"""Weights quantised to int8 and int4: their file, results of both targets, and refusals."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tensorrt_rtx
import torch
import transformers as tr
from onnxruntime.quantization.neural_compressor.weight_only import qdq_tensor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import less_export
from less_export.bundle.artifact import QUANTISED_WEIGHTS, Bundle
from less_export.bundle.files import sha256
from less_export.cli.main import main
from less_export.errors import BundleError, LessExportError, UnsupportedModelError, UsageError
from less_export.exporter import quantise
from less_export.exporter.bind import bind
from less_export.hf.weights import QuantisedTensor, Stored, stored_tensors
from less_export.runtime.open import load_backend
from less_export.runtime.torch import bundle_model

from . import families
from .conftest import PLUGIN_ARCH
from .families import Tiny, feed, relative, text
from .marks import exhaustive_but, slow_but

BITS = {"int8": 8, "int4": 4}
every_kind = pytest.mark.parametrize("kind", slow_but(BITS, "int4"))
usual_kind = pytest.mark.parametrize("kind", exhaustive_but(BITS, "int4"))
#: A model for each layout: [out, in] untied and tied, fused QKV, [in, out] with biases (Gemm), experts.
MODELS = ("llama", "gemma3", "phi3", "gpt2", "falcon_mqa", "mixtral")
#: Each in both kinds; an ordinary run takes a few of them.
_PAIRS = [(family, kind) for family in MODELS for kind in BITS]
every_model = pytest.mark.parametrize(
    ("family", "kind"),
    exhaustive_but(_PAIRS, ("gemma3", "int4"), ("phi3", "int8"), ("gpt2", "int4"), ("mixtral", "int4")),
)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tiny]:
    """Bundles by family and kind, one layer of each kind, policy full, all logits; exported on first use."""
    folder = tmp_path_factory.mktemp("quantised")
    exports: dict[tuple[str, str], Tiny] = {}

    def export(family: str, kind: str) -> Tiny:
        if (family, kind) not in exports:
            checkpoint = folder / f"{family}.model"
            if not checkpoint.exists():
                families.save(families.shallow(family), checkpoint, torch.bfloat16)
            options = {"policy": "full", "context": families.CONTEXT, "logits": "all", "target": "both"}
            exports[family, kind] = families.export(checkpoint, folder / f"{family}.{kind}", weights=kind, **options)
        return exports[family, kind]

    return export


def optimised(bundle: Path, out: Path) -> collections.Counter[str]:
    """Operators of the graph that ONNX Runtime runs, by type."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(out, load_external_data=False).graph.node)


def linear(bundle: Path) -> dict[str, QuantisedTensor]:
    tensors = stored_tensors(bundle / QUANTISED_WEIGHTS)
    return {n: t for n, t in tensors.items() if isinstance(t, QuantisedTensor)}


@pytest.mark.slow
@every_model
def test_weights_are_the_librarys(quantised: Callable[[str, str], Tiny], family: str, kind: str) -> None:
    tiny = quantised(family, kind)
    model = families.load(tiny.checkpoint)
    head = model.get_output_embeddings()
    matrices = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, tr.pytorch_utils.Conv1D))}
    linears = linear(tiny.bundle)
    assert linears.keys() == {f"{n}.weight" for n in matrices}
    for name, module in matrices.items():
        stored, weight = linears[f"{name}.weight"], module.weight.detach()
        rows = weight if stored.transposed else weight.T
        assert stored.transposed == isinstance(module, torch.nn.Linear)
        bits = 8 if module is head else BITS[kind]
        assert stored.packed == (bits == 4)
        block = {64: 32, 96: 32, 256: 64}[rows.shape[1]]
        assert stored.block == block
        expected = qdq_tensor(rows.numpy(), bits, block, "sym", "int").astype(np.float32)
        dequantised = stored.read()
        dequantised = dequantised if stored.transposed else dequantised.T
        np.testing.assert_allclose(dequantised.numpy(), expected, rtol=2e-7)
        scale = stored.scales.read()
        assert bool((scale > 0).all())  # TensorRT supports no others
        error = (dequantised - rows).abs().view(rows.shape[0], -1, block)
        assert bool((error <= 0.5001 * scale.T[..., None]).all())


@pytest.mark.slow
@every_model
def test_onnx_runtime_computes_with_the_dequantised_weights(
    quantised: Callable[[str, str], Tiny], family: str, kind: str
) -> None:
    tiny, ids, sizes = quantised(family, kind), text(2, 24), [16, 1, 7]
    model = bundle_model(tiny.opened)
    model.set_experts_implementation("eager")  # grouped products do not support f64
    if model.config.get_text_config().tie_word_embeddings:
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    expected, own_error = families.truth(model, ids)
    exact = load_backend(tiny.opened, "ort", threads=1, accuracy_level=1)
    exact.open(2)
    assert relative(np.concatenate(feed(exact, ids, sizes), 1), expected) <= max(2 * own_error, 2e-6)
    rounded = np.concatenate(feed(tiny.backend("ort", 2), ids, sizes), 1)
    assert 1e-4 < relative(rounded, expected) < 0.1  # 8-bit activations
    original, _ = families.truth(families.load(tiny.checkpoint), ids)
    assert relative(expected, original) > 1e-3


@pytest.mark.slow
@every_model
def test_onnx_runtime_multiplies_by_the_codes(
    quantised: Callable[[str, str], Tiny], family: str, kind: str, tmp_path: Path
) -> None:
    tiny = quantised(family, kind)
    operators = optimised(tiny.bundle, tmp_path / "optimised.onnx")
    assert operators["MatMulNBits"] == len(linear(tiny.bundle))
    assert operators["DequantizeLinear"] == 0


@pytest.mark.slow
@usual_kind
def test_file_is_all_that_the_bundle_needs(quantised: Callable[[str, str], Tiny], kind: str) -> None:
    tiny = quantised("gemma3", kind)
    assert {p.name for p in tiny.bundle.iterdir()} == {
        "manifest.json", "model.onnx", "model.trt.onnx", QUANTISED_WEIGHTS,
    }  # fmt: skip
    path = tiny.bundle / QUANTISED_WEIGHTS
    assert (path.stat().st_nlink, path.stat().st_mode & 0o777) == (1, 0o644)
    kept, original = load_file(path), load_file(tiny.checkpoint / "model.safetensors")
    for name, tensor in original.items():
        if f"{name}.codes.T" not in kept:
            assert torch.equal(kept[name].view(torch.uint8), tensor.view(torch.uint8))
    assert "model.embed_tokens.weight" in kept
    with safe_open(path, "pt") as file:
        codes = [n for n in file.keys() if ".codes" in n]  # noqa: SIM118
        assert {str(file.get_tensor(n).dtype) for n in codes} == (
            {"torch.int8"} if kind == "int8" else {"torch.int8", "torch.uint8"}
        )
    manifest = tiny.opened.manifest
    assert manifest.settings["weights"] == kind
    assert [w.file for w in manifest.weights] == [QUANTISED_WEIGHTS]
    for graph in ("model.onnx", "model.trt.onnx"):
        onnx.checker.check_model(str(tiny.bundle / graph), full_check=True)


@pytest.mark.slow
def test_damage_is_seen(quantised: Callable[[str, str], Tiny], tmp_path: Path) -> None:
    from .bundles import copy

    broken = copy(quantised("llama", "int4").bundle, tmp_path / "copy")
    data = bytearray((broken / QUANTISED_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (broken / QUANTISED_WEIGHTS).write_bytes(data)
    Bundle.open(broken)
    with pytest.raises(BundleError, match=QUANTISED_WEIGHTS):
        Bundle.open(broken, full=True)


@pytest.mark.slow
@usual_kind
def test_tensorrt_takes_the_graph(kind: str, tmp_path: Path) -> None:
    wide = families.small(hidden_size=512, intermediate_size=1024)
    checkpoint = families.save(wide, tmp_path / "model", torch.float16)
    sizes = {}
    for weights in (None, kind):
        bundle = tmp_path / str(weights)
        less_export.export(
            str(checkpoint), bundle, target="trt", engine_plan=True, weights=weights, plugin=False, policy="sink",
            budget="16", chunk=4, max_batch=1, gpu_arch="sm_89", validate=False,
        )  # fmt: skip
        plan = Bundle.open(bundle).artifact("plan")
        assert plan is not None
        assert plan.details["version"] == tensorrt_rtx.__version__
        sizes[weights] = plan.details["bytes"]
    stored = linear(tmp_path / kind).values()
    halves = sum(2 * t.codes.shape[0] * t.codes.shape[1] * (2 if t.packed else 1) for t in stored)
    kept = sum(t.codes.length + t.scales.length // 2 for t in stored)  # scales are float16 there
    assert sizes[kind] - sizes[None] < -0.5 * (halves - kept)


@pytest.mark.slow
@every_kind
def test_tensorrt_takes_the_graph_with_the_plugin(kind: str, plugin_library: Path, tmp_path: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model", torch.float16)
    options = {"target": "trt", "engine_plan": True, "weights": kind, "budget": "16", "gpu_arch": PLUGIN_ARCH}
    bundle = families.export(checkpoint, tmp_path / "bundle", max_batch=1, **options).opened
    plan = bundle.artifact("plan")
    assert plan is not None
    assert plan.details["plugin_layers"] == 1
    assert plan.details["plugin"]["sha256"] == sha256(plugin_library)
    assert bundle.manifest.settings["weights"] == kind
    assert {w.file for w in bundle.manifest.weights} == {QUANTISED_WEIGHTS}


@pytest.mark.slow
@usual_kind
def test_check_and_info_know(
    quantised: Callable[[str, str], Tiny], kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny = quantised("falcon_mqa", kind)
    assert main(["check", str(tiny.bundle), "--tokens", "40", "--full", "--json", str(tmp_path / "x.json")]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())["differences"]
    assert next(d for d in figures if d["tensor"] == "logits")["limit"] == 8e-2
    assert main(["info", str(tiny.bundle)]) == 0
    assert f"linear layers in {kind}" in capsys.readouterr().out


@pytest.mark.slow
def test_single_artifact_from_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    out = tmp_path / "x.onnx"
    assert main([str(checkpoint), "--out", str(out), "--weights", "int4", "--budget", "16", "--no-validate"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "model",
        "x.onnx",
        "x.json",
        f"x.{QUANTISED_WEIGHTS}",
        "x.kernels.safetensors",
    }
    assert "quantising the weights to int4" in capsys.readouterr().err
    assert Bundle.open(out).manifest.settings["weights"] == "int4"


@pytest.mark.slow
def test_matrices_that_cannot_be_quantised_are_named(tmp_path: Path) -> None:
    odd = families.small(intermediate_size=72)
    checkpoint = families.save(odd, tmp_path / "model")
    says = r"not quantised: model\.layers\.0\.mlp\.down_proj\.weight \(and 0 more\); experts .* no block divides, stay"
    with pytest.warns(UserWarning, match=says):
        tiny = families.export(checkpoint, tmp_path / "bundle", weights="int4", budget="16")
    assert "model.layers.0.mlp.down_proj.weight" not in linear(tiny.bundle)
    assert len(linear(tiny.bundle)) == 7
    feed(tiny.backend("ort", 1), text(1, 8), [8])


@pytest.mark.parametrize(
    ("matrix", "bits", "block"),
    [
        ((128, 8), 4, 64),
        ((64, 8), 4, 32),
        ((96, 8), 4, 32),
        ((48, 8), 8, 16),
        ((16, 8), 8, None),
        ((40, 8), 8, None),
        ((128, 7), 4, None),
        ((128, 7), 8, 64),
    ],
)
def test_block_divides_the_inputs(matrix: tuple[int, int], bits: int, block: int | None) -> None:
    assert quantise.block_of(matrix, bits) == block


@pytest.mark.parametrize(("largest", "block"), [(32, 32), (64, 64), (128, 128)])
def test_block_is_the_option_where_it_divides(largest: int, block: int) -> None:
    assert quantise.block_of((256, 8), 4, largest) == block
    assert quantise.block_of((96, 8), 4, largest) == 32
    assert quantise.block_of((48, 8), 4, largest) == 16


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "block", "head"), [("int4", 32, "int4"), ("int4", 128, "int8")])
def test_block_and_head_are_the_options(weights: str, block: int, head: str, tmp_path: Path) -> None:
    checkpoint = families.save(
        families.small(hidden_size=256, intermediate_size=384, vocab_size=98), tmp_path / "model"
    )
    options = {"weights": weights, "block": block, "head": head, "policy": "full", "context": 32, "logits": "all"}
    tiny = families.export(checkpoint, tmp_path / "bundle", **options)
    stored = linear(tiny.bundle)
    assert {t.block for t in stored.values()} == {block}
    assert stored.pop("lm_head.weight").packed == (head == "int4")
    assert all(t.packed for t in stored.values())
    assert optimised(tiny.bundle, tmp_path / "optimised.onnx")["MatMulNBits"] == 8
    ids = text(1, 12)
    expected, own_error = families.truth(bundle_model(tiny.opened), ids)
    exact = load_backend(tiny.opened, "ort", threads=1, accuracy_level=1)
    exact.open(1)
    assert relative(np.concatenate(feed(exact, ids, [11, 1]), 1), expected) <= 4 * own_error


@pytest.mark.slow
def test_matrices_are_quantised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    whole = families.export(checkpoint, tmp_path / "whole", weights="int4", budget="16")
    monkeypatch.setattr(quantise, "_PIECE", 640)  # 10 of 64 inputs, 6 of 96
    pieces = families.export(checkpoint, tmp_path / "pieces", weights="int4", budget="16")
    assert (whole.bundle / QUANTISED_WEIGHTS).read_bytes() == (pieces.bundle / QUANTISED_WEIGHTS).read_bytes()


@pytest.mark.slow
def test_zeros_stay_zeros(tmp_path: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    tiny = families.export(checkpoint, tmp_path / "bundle", weights="int4", budget="16")
    assert not linear(tiny.bundle)["model.layers.0.self_attn.q_proj.weight"].read().any()
    assert np.isfinite(feed(tiny.backend("ort", 1), text(1, 8), [8])[0]).all()


@pytest.mark.slow
def test_lost_weights_are_named(tmp_path: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    write = quantise.write

    def loses(path: Path, model: tr.PreTrainedModel, graph: ir.Graph, stored: dict[str, Stored], kind: str) -> object:
        return write(path, model, graph, {n: t for n, t in stored.items() if n != "model.norm.weight"}, kind)

    monkeypatch.setattr(quantise, "write", loses)
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight \(and 0 more\) cannot be found"):
        families.export(checkpoint, nothing_left / "x", weights="int4", budget="16")


def test_another_use_than_the_transpose_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    codes, scales = torch.ones(32, 8, dtype=torch.int8), torch.ones(2, 8)
    save_file({"w.codes.T": codes, "w.scales": scales}, path)
    floats = ir.TensorType(ir.DataType.FLOAT)
    weight = ir.Value(name="w", shape=ir.Shape([8, 32]), type=floats, const_value=ir.tensor(np.ones((8, 32), "f4")))
    nodes = [ir.node("Transpose", [weight], attributes={"perm": [1, 0]}), ir.node("Relu", [weight])]
    outputs = [n.outputs[0] for n in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=[weight], opset_imports={"": 21})
    with pytest.raises(RuntimeError, match="w was quantised for its Transpose, but Relu takes it too"):
        bind(ir.Model(graph, ir_version=10), stored_tensors(path), {path: path.name}, tmp_path)


def test_refusals(tmp_path: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    with pytest.raises(UsageError, match="unknown weights 'int2': choose one of int8, int4"):
        families.export(checkpoint, nothing_left / "x", weights="int2")
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization.neural_compressor.weight_only", None)
    with pytest.raises(LessExportError, match="--weights needs ONNX Runtime"):
        families.export(checkpoint, nothing_left / "x", weights="int4", budget="16")
