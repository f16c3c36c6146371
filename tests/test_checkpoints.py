"""Checkpoints of every layout and dtype become graphs that point into their files, for both targets."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as tr
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from less_export.bundle.artifact import ARTIFACT_FILES, Artifact
from less_export.contract import OP_DOMAIN, OP_NAME
from less_export.errors import UsageError
from less_export.exporter import onnx_op
from less_export.runtime.ort import OrtBackend

from . import families
from .families import BUDGET, Tiny, feed, relative, text
from .marks import exhaustive_but

pytestmark = pytest.mark.slow

#: A constant of a graph may be this long; anything longer is a weight that should have stayed where it is.
INLINE_BYTES = 4096
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
#: A model for each checkpoint dtype: untied, fused QKV, and tied with a sliding and a full layer.
MODEL_OF: dict[str, families.Make] = {
    "float32": families.small(),
    "float16": lambda: tr.Phi3ForCausalLM(tr.Phi3Config(**families.ONE)),
    "bfloat16": families.MAIN["gemma3"],
}


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A checkpoint of the given dtype, exported for both targets with kernels."""
    folder, dtype = tmp_path_factory.mktemp(request.param), getattr(torch, request.param)
    checkpoint = families.save(MODEL_OF[request.param], folder / "model", dtype)
    kernels = families.kernels(families.load(checkpoint), folder / "kernels.safetensors")
    return families.export(checkpoint, folder / "bundle", target="both", budget=str(BUDGET), kernels=kernels)


every_dtype = pytest.mark.parametrize("tiny", exhaustive_but(MODEL_OF, "bfloat16"), indirect=True)


def graph(tiny: Tiny, kind: str) -> onnx.ModelProto:
    return onnx.load(tiny.bundle / ARTIFACT_FILES[kind], load_external_data=False)


def artifact(tiny: Tiny, kind: str) -> Artifact:
    artifact = tiny.opened.artifact(kind)
    assert artifact is not None
    return artifact


def places(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every external initializer."""
    locations = {}
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            locations[tensor.name] = (entries["location"], int(entries["offset"]), int(entries["length"]))
    return locations


def byte_ranges(path: Path) -> set[tuple[int, int]]:
    """Offset and length of every tensor of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    spans = [x["data_offsets"] for n, x in header.items() if n != "__metadata__"]
    return {(start + begin, end - begin) for begin, end in spans}


def casts(model: onnx.ModelProto) -> set[str]:
    """Weights stored in another dtype than the graph computes in (a model casts some itself).

    Weights that are looked up or transposed are cast afterwards.
    """
    external = places(model)
    moved = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Gather", "Transpose")}
    cast = {moved.get(n.input[0], n.input[0]) for n in model.graph.node if n.op_type == "Cast"}
    stored = {name for name in cast if name.endswith(".stored")}
    assert stored <= external.keys()
    return stored


def assert_is_the_model(tiny: Tiny) -> None:
    """While nothing is evicted, ONNX Runtime computes what Hugging Face computes in f32 from the checkpoint."""
    ids = text(2, BUDGET)
    expected, own_error = families.truth(families.load(tiny.checkpoint), ids)
    logits = feed(tiny.backend("ort", 2), ids, [10, 6, *[1] * 8])
    at = np.cumsum([10, 6, *[1] * 8]) - 1
    assert relative(np.concatenate(logits, 1), expected[:, at]) <= max(2 * own_error, 1e-6)


def no_link(*_: object) -> None:
    """``os.link`` as if to another file system."""
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def assert_linked(tiny: Tiny, weights: list[Path]) -> None:
    """The weight files of the bundle are those of the checkpoint, and everything else is small."""
    inodes = {p.resolve().stat().st_ino for p in weights}
    manifest = tiny.opened.manifest
    linked = {tiny.bundle / w.file for w in manifest.weights}
    assert {p.lstat().st_ino for p in linked} == inodes
    assert not any(p.is_symlink() for p in tiny.bundle.iterdir())
    written = [p for p in tiny.bundle.iterdir() if p not in linked]
    assert all(p.stat().st_nlink == 1 for p in written)
    graphs = sum(p.stat().st_size for p in written if p.suffix == ".onnx")
    assert graphs < 120_000 * len(manifest.artifacts), f"{graphs} bytes of graphs"


# ------------------------------------------------------------------ dtypes and targets


@every_dtype
def test_weights_are_not_copied(tiny: Tiny) -> None:
    assert_linked(tiny, [tiny.checkpoint / "model.safetensors"])
    for kind in ("ort", "trt"):
        model = graph(tiny, kind)
        for tensor in model.graph.initializer:
            assert tensor.external_data or tensor.ByteSize() <= INLINE_BYTES, tensor.name
        externals = set(places(model).values())
        for file in ("model.safetensors", "kernels.safetensors"):  # every tensor in full, and nothing else
            assert {x[1:] for x in externals if x[0] == file} == byte_ranges(tiny.bundle / file)
        assert {x[0] for x in externals} == {"model.safetensors", "kernels.safetensors"}


@every_dtype
def test_compute_dtype_is_the_targets(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    stored = request.node.callspec.params["tiny"]
    computes = {"ort": "float32", "trt": stored}
    for kind, dtype in computes.items():
        model = graph(tiny, kind)
        assert artifact(tiny, kind).contract.dtype == dtype
        types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
        assert {types[n] for n in types if n.endswith((".key", ".value", ".psi"))} == {DTYPES[dtype]}
        assert {types[n] for n in types if n.endswith((".h", ".z", ".score"))} == {TensorProto.FLOAT}
        assert types["logits"] == TensorProto.FLOAT
        weights = {n for n, (file, _, _) in places(model).items() if file == "model.safetensors"}
        assert weights
        assert casts(model) & weights == (set() if dtype == stored else weights)
        elements = {t.data_type for t in model.graph.initializer if t.name in weights}
        assert elements == {DTYPES[stored]}


@every_dtype
def test_onnx_runtime_computes_the_checkpoint(tiny: Tiny) -> None:
    assert_is_the_model(tiny)


@every_dtype
def test_graph_for_tensorrt_has_bare_nodes(tiny: Tiny) -> None:
    model, contract = graph(tiny, "trt"), artifact(tiny, "trt").contract
    assert not model.functions
    nodes = [n for n in model.graph.node if n.domain == OP_DOMAIN]
    assert len(nodes) == len(contract.layers) == len(artifact(tiny, "ort").contract.layers)
    for node, layer in zip(nodes, contract.layers, strict=True):
        assert (node.op_type, node.overload) == (OP_NAME, "")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == pytest.approx(layer.attributes())
        assert len(node.input) == 14
        assert len(node.output) == 8
    assert {s.domain for s in model.opset_import} == {"", OP_DOMAIN}


@every_dtype
def test_graph_for_onnx_runtime_carries_its_bodies(tiny: Tiny) -> None:
    model = graph(tiny, "ort")
    nodes = [n for n in model.graph.node if n.domain == OP_DOMAIN]
    assert len(nodes) == len(artifact(tiny, "ort").contract.layers)
    assert {n.overload for n in nodes} == {f.overload for f in model.functions}
    assert all((f.domain, f.name) == (OP_DOMAIN, OP_NAME) for f in model.functions)


@every_dtype
def test_graphs_pass_the_checker_and_name_no_path(tiny: Tiny, tmp_path: Path) -> None:
    # The checker refuses hard links as an attack, so it gets a copy, as on another machine.
    shutil.copytree(tiny.bundle, tmp_path / "copy")
    for kind in ("ort", "trt"):
        path = tmp_path / "copy" / ARTIFACT_FILES[kind]
        onnx.checker.check_model(str(path), full_check=True)
        names = (str(Path.home()), tempfile.gettempdir(), str(Path.cwd()), str(tiny.bundle.parent), "site-packages")
        data = path.read_bytes()
        assert not [n for n in names if n.encode() in data and len(n) > 1]
        assert not re.search(rb"[\w/]+\.py\b", data)
        model = onnx.load(path, load_external_data=False)
        assert not model.metadata_props
        assert not model.graph.doc_string


@pytest.mark.parametrize("tiny", ["float16"], indirect=True)
def test_tensorrt_graph_computes_in_half_precision(tiny: Tiny, tmp_path: Path) -> None:
    # The same graph with its bodies, on ONNX Runtime: only the compute dtype differs.
    shutil.copytree(tiny.bundle, tmp_path / "copy")
    model = ir.load(tmp_path / "copy" / "model.trt.onnx")
    onnx_op.add_bodies(model)
    ir.save(model, tmp_path / "copy" / "bodies.onnx")
    backend = OrtBackend(artifact(tiny, "trt").contract, tmp_path / "copy" / "bodies.onnx", threads=1)
    backend.open(2)
    ids, sizes = text(2, BUDGET), [10, 6, *[1] * 8]
    expected, _ = families.truth(families.load(tiny.checkpoint), ids)
    with torch.no_grad():
        half = families.load(tiny.checkpoint, torch.float16)(input_ids=torch.from_numpy(ids), use_cache=False).logits
    at = np.cumsum(sizes) - 1
    logits = np.concatenate(feed(backend, ids, sizes), 1)
    own_error = relative(half.float().numpy(), expected)
    assert 1e-5 < relative(logits, expected[:, at]) <= 2 * own_error


# ------------------------------------------------------------------ --dtype


def test_dtype_overrides_the_target(tmp_path: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model", torch.bfloat16)
    tiny = families.export(checkpoint, tmp_path / "half", dtype="float16", budget=str(BUDGET))
    assert artifact(tiny, "ort").contract.dtype == "float16"
    assert casts(graph(tiny, "ort")) == places(graph(tiny, "ort")).keys()
    ids = text(2, BUDGET)
    expected, _ = families.truth(families.load(checkpoint), ids)
    assert relative(feed(tiny.backend("ort", 2), ids, [16, 8])[-1][:, 0], expected[:, -1]) < 0.02
    with pytest.raises(UsageError, match="no bfloat16"):
        families.export(checkpoint, tmp_path / "no", dtype="bfloat16")
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------ layouts


def test_tied_embeddings_share_their_bytes(tmp_path: Path) -> None:
    checkpoint = families.save(families.small(tie_word_embeddings=True), tmp_path / "model", torch.float16)
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    tiny = families.export(checkpoint, tmp_path / "bundle", budget=str(BUDGET))
    rows = [p for p in places(graph(tiny, "ort")).values() if p[2] == families.VOCAB * 64 * 2]
    assert len(set(rows)) == 1
    assert_linked(tiny, [checkpoint / "model.safetensors"])
    assert_is_the_model(tiny)


def test_sharded_hub_snapshot_whose_files_are_links(tmp_path: Path) -> None:
    plain = families.save(families.small(), tmp_path / "plain", max_shard_size="40KB")
    hub = tmp_path / "hub" / "models--someone--tiny"
    snapshot = hub / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for index, path in enumerate(sorted(plain.iterdir())):
        blob = hub / "blobs" / f"{index:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    shards = sorted(snapshot.glob("model-*.safetensors"))
    assert len(shards) >= 3
    tiny = families.export(snapshot, tmp_path / "bundle", budget=str(BUDGET))
    assert_linked(tiny, shards)
    assert {file for file, _, _ in places(graph(tiny, "ort")).values()} == {s.name for s in shards}
    assert_is_the_model(tiny)

    ids = text(2, 16)
    before = feed(tiny.backend("ort", 2), ids, [16])[0]
    shutil.rmtree(hub)  # hard links survive deletion of the cache
    tiny.bundle.rename(tmp_path / "moved")
    moved = Tiny(snapshot, tmp_path / "moved")
    assert np.array_equal(feed(moved.backend("ort", 2), ids, [16])[0], before)


def test_mixed_dtypes(tmp_path: Path) -> None:
    # Norms in f32, matrices in bf16: each is cast only where the graph computes in the other dtype.
    checkpoint = families.save(families.small(), tmp_path / "model", torch.bfloat16)
    path = checkpoint / "model.safetensors"
    mixed = {n: t.float() * 1.001 if t.ndim == 1 else t for n, t in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    tiny = families.export(checkpoint, tmp_path / "bundle", target="both", budget=str(BUDGET))
    norms = {f"model.{n}.stored" for n, t in mixed.items() if t.ndim == 1}
    matrices = {f"model.{n}.stored" for n, t in mixed.items() if t.ndim > 1}
    assert (len(norms), len(matrices)) == (3, 9)
    assert casts(graph(tiny, "ort")) == matrices
    assert casts(graph(tiny, "trt")) == norms
    assert_linked(tiny, [path])
    assert_is_the_model(tiny)


@pytest.mark.parametrize("tied", exhaustive_but([False, True], True))
def test_weights_are_cast_after_they_are_moved(tied: bool, tmp_path: Path) -> None:
    # ONNX Runtime folds the casts, so it would hold embedding tables in f32 in addition to the transposed ones.
    checkpoint = families.save(families.small(tie_word_embeddings=tied), tmp_path / "model", torch.bfloat16)
    tiny = families.export(checkpoint, tmp_path / "bundle", budget=str(BUDGET))
    model = graph(tiny, "ort")
    matrices = {t.name for t in model.graph.initializer if t.name.endswith(".stored") and len(t.dims) > 1}
    moves = [n for n in model.graph.node if matrices & {*n.input}]
    assert sorted(n.op_type for n in moves) == ["Gather", *["Transpose"] * 8]
    assert len(matrices) == 9 - tied
    moved = {n.output[0] for n in moves}
    assert [n.op_type for n in model.graph.node if moved & {*n.input}] == ["Cast"] * 9

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    onnxruntime.InferenceSession(str(tiny.bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(options.optimized_model_filepath, load_external_data=False)
    held = {t.name: (t.data_type, *t.dims) for t in folded.graph.initializer if len(t.dims) > 1}
    table = [shape for shape in held.values() if families.VOCAB in shape]
    assert sorted(table) == [(TensorProto.FLOAT, 64, families.VOCAB), (TensorProto.BFLOAT16, families.VOCAB, 64)]
    assert sum(n.op_type == "MatMul" and n.input[1] in held for n in folded.graph.node) == 8
    assert_is_the_model(tiny)


def test_tied_embeddings_are_cast_once_where_nothing_is_gained(tmp_path: Path) -> None:
    # Between 16-bit dtypes: TensorRT would keep the embedding table in addition to the output matrix.
    checkpoint = families.save(families.small(tie_word_embeddings=True), tmp_path / "model", torch.bfloat16)
    tiny = families.export(checkpoint, tmp_path / "bundle", target="trt", dtype="float16", budget=str(BUDGET))
    model = graph(tiny, "trt")
    users = [[n.op_type for n in model.graph.node if t.name in n.input] for t in model.graph.initializer]
    assert len(casts(model)) == 11
    assert all(kinds == ["Cast"] for t, kinds in zip(model.graph.initializer, users, strict=True) if t.external_data)


def test_folder_that_may_only_be_read(tmp_path: Path) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model", max_shard_size="40KB")
    for path in checkpoint.iterdir():
        path.chmod(0o444)
    checkpoint.chmod(0o555)
    try:
        before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
        tiny = families.export(checkpoint, tmp_path / "bundle", budget=str(BUDGET))
        assert_is_the_model(tiny)
        assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
        assert all(p.stat().st_mode & 0o777 == 0o444 for p in checkpoint.iterdir())
    finally:
        checkpoint.chmod(0o755)
    shutil.rmtree(tiny.bundle)  # deleting a bundle of links leaves the checkpoint intact
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before


def test_checkpoint_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        elsewhere = tmp_path
        monkeypatch.setattr("less_export.bundle.files.os.link", no_link)
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        checkpoint = families.save(families.small(), Path(folder) / "model", torch.float16, max_shard_size="40KB")
        shards = sorted(p.name for p in checkpoint.glob("*.safetensors"))
        assert len(shards) > 1
        with pytest.warns(UserWarning, match=f"hard links are not possible here: copied {', '.join(shards)}"):
            tiny = families.export(checkpoint, tmp_path / "bundle", budget=str(BUDGET))
        copies = {p.name: p for p in tiny.bundle.glob("*.safetensors")}
        assert sorted(copies) == shards
        assert all(copies[n].read_bytes() == (checkpoint / n).read_bytes() for n in shards)
        assert_is_the_model(tiny)
    ids = text(1, 8)  # without the checkpoint, the bundle is still complete
    feed(tiny.backend("ort", 1), ids, [8])


def test_weights_beyond_four_gigabytes(tmp_path: Path) -> None:
    # A hole in a sparse file: takes no space where supported, but puts the weights after it beyond 32-bit offsets.
    gap = (1 << 32) + 4096
    checkpoint = families.save(families.small(), tmp_path / "model", torch.float16)
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [x + gap for x in entry["data_offsets"]]
    header["a.hole"] = {"dtype": "U8", "shape": [gap], "data_offsets": [0, gap]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.seek(8 + len(encoded) + gap)
        file.write(data[start:])
    original = families.save(families.small(), tmp_path / "original", torch.float16)
    plain = families.export(original, tmp_path / "plain", budget=str(BUDGET))
    tiny = families.export(checkpoint, tmp_path / "bundle", budget=str(BUDGET), target="both")
    assert min(offset for _, offset, _ in places(graph(tiny, "trt")).values()) > gap
    assert (tiny.bundle / "model.onnx").stat().st_size < 1 << 20
    ids, sizes = text(1, 12), [8, 1, 3]
    for name in ("ort", "torch"):
        actual, expected = (feed(t.backend(name, 1), ids, sizes) for t in (tiny, plain))
        assert all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_single_artifact_of_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    monkeypatch.setattr("less_export.bundle.files.os.link", no_link)
    with pytest.warns(UserWarning, match=r"copied model\.safetensors"):
        tiny = families.export(checkpoint, tmp_path / "out" / "x.onnx", budget=str(BUDGET))
    assert {p.name for p in tiny.bundle.parent.iterdir()} == {"x.onnx", "x.json", "x.model.safetensors"}
    original, copy = checkpoint / "model.safetensors", tmp_path / "out" / "x.model.safetensors"
    assert original.stat().st_ino != copy.stat().st_ino
    assert original.read_bytes() == copy.read_bytes()
    assert_is_the_model(tiny)
