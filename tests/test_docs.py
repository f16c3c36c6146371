"""README and docs show measured results, and name only what exists."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from less_export import open_bundle
from less_export.bundle.artifact import Artifact, Bundle, KernelFacts, TokenizerFacts, WeightFile
from less_export.cli.commands import COMMANDS
from less_export.contract import ALL_FIELDS, BATCH, CHUNK, Contract, LayerSpec, Policy
from less_export.dtypes import COMPUTE_DTYPES
from less_export.hf import recipes
from less_export.plan import AttentionLayer
from less_export.tensorrt.trust import PluginFacts

pytest_plugins = ["tests.bundles"]

ROOT = Path(__file__).parent.parent


def test_tables_of_the_documents_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


#: README, docs, and the Markdown files in other folders.
DOCUMENTS = sorted(
    p
    for folder in (".", "*", "*/*", "docs/**")
    for p in ROOT.glob(f"{folder}/*.md")
    if not {".venv", "_build"} & {x[:5] if x.startswith(".") else x for x in p.relative_to(ROOT).parts}
)


def headings(text: str) -> set[str]:
    """The anchors of a document's headings, as code hosts and MyST make them."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    local = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith("http")]
    assert local or file.name != "README.md" or file.parent != ROOT
    for link in local:
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link


def test_options_of_the_documents_exist() -> None:
    lines = [
        line
        for file in DOCUMENTS
        for line in re.findall(r"^(?:\$ |build/)?less-export .*$", file.read_text(encoding="utf-8"), re.M)
    ]
    used = {x for line in lines for x in re.findall(r"(?<![\w-])--[\w-]+", line)}
    known = "".join(command.parser().format_help() for command in COMMANDS.values())
    assert used
    assert [x for x in used if x not in known] == []


@pytest.mark.slow
def test_every_benchmark_program_starts(tmp_path: Path) -> None:
    """Their imports of the package, of the tests and of one another work."""
    programs = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py"))
    code = f"import importlib, sys; sys.path.insert(0, sys.argv[1]); [importlib.import_module(n) for n in {programs}]"
    command = [sys.executable, "-c", code, ROOT / "benchmarks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    keys = {f for f in recipes.Recipe.__dataclass_fields__ if f != "name"}
    assert {k for k in keys if f"`{k}`" not in text} == set()


def test_the_quality_results_are_what_their_benchmark_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_quality")
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    requested: dict[str, Any] = {}

    class Replay(bench.Bench):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.rows = {r["key"]: r for r in rows}
            self.layers = (AttentionLayer(4, 1, 256, 1 / 16, 0),) * 18

        def row(self, key: str, make: Any) -> Any:
            requested[key] = self.rows[key]
            return self.rows[key]

        def trained(self, setting: Any, recipes: Any) -> None:
            assert not recipes, f"{setting.name}: rows of {recipes} are missing"

    bench.measure(Replay())
    assert set(requested) == {r["key"] for r in rows if not r["key"].startswith("train")}


@pytest.mark.parametrize("facts", [Artifact, WeightFile, TokenizerFacts, KernelFacts, Contract, LayerSpec, PluginFacts])
def test_the_bundle_format_names_every_field(facts: type) -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(facts) if f"`{f.name}`" not in text] == []


Described = list[tuple[str, str, tuple[int | str, ...]]]


def described_inputs(contract: Contract) -> Described:
    """The inputs of a contract as the page on the format states them."""
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `past\.\{i\}\.(\w+)` \| (\S+) \| `([^`]+)` \| (-?\d) \|$", text, re.M)
    assert {name: int(empty) for name, _, _, empty in rows} == {f.name: f.empty for f in ALL_FIELDS}
    inputs: Described = [("input_ids", "int64", (BATCH, CHUNK))]
    inputs += [(name, "int32", (BATCH,)) for name in ("past_length", "new_length")]
    for index, layer in enumerate(contract.layers):
        int8, state16 = layer.slot_dtype == "int8", layer.state_bits == 16
        sizes = {"B": BATCH, "Hk": layer.kv_heads, "C": layer.capacity, "R": layer.rank, "D": layer.head_dim}
        sizes["W"] = (1 + state16) * layer.head_dim
        dtypes = {"T-dtype": contract.dtype, "slot-dtype": "int8" if int8 else contract.dtype}
        dtypes |= {"psi-dtype": "int8" if state16 else contract.dtype, "state-dtype": "int8" if state16 else "float32"}
        present = {"key_scale": int8, "value_scale": int8, "h_scale": state16}
        for name, dtype, shape, _ in rows:
            if present.get(name, True):
                shape = tuple(sizes[x] for x in shape.split(", "))
                inputs.append((f"past.{index}.{name}", dtypes.get(dtype, dtype), shape))
    return inputs


@pytest.mark.slow
def test_the_bundle_format_specifies_the_state(kernelled: Path) -> None:
    """Tensor names, dtypes, shapes and empty values as the page states them are those of a graph."""
    artifact = Bundle.open(kernelled).manifest.artifacts[0]
    graph = onnx.load(kernelled / artifact.file, load_external_data=False).graph

    def described(value: onnx.ValueInfoProto) -> tuple[str, str, list[int]]:
        tensor = value.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]  # 0: dynamic
        return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape

    expected = described_inputs(artifact.contract)
    static = [(n, dtype, [0 if isinstance(d, str) else d for d in shape]) for n, dtype, shape in expected]
    assert [described(value) for value in graph.input] == static
    names = [name.replace("past.", "present.") for name, _, _ in expected[3:]]
    assert [value.name for value in graph.output] == ["logits", *names]


def test_the_bundle_format_specifies_the_state_of_int8_slots() -> None:
    """Of a contract, whose graphs are compared with it wherever they are loaded."""
    plain = LayerSpec(4, 2, 8, 0.35, Policy.H2O, 3, 4, 0, True, 7, 3)
    int8 = dataclasses.replace(plain, slot_dtype="int8")
    layers = (plain, int8, plain, dataclasses.replace(int8, state_bits=16))
    for dtype in COMPUTE_DTYPES:
        contract = Contract(layers, 50, dtype, 5, 3)
        assert described_inputs(contract) == [(s.name, s.dtype, s.shape) for s in contract.inputs()]


def test_the_bundle_format_specifies_hashes_and_identity(kernelled: Path) -> None:
    manifest = json.loads((kernelled / "manifest.json").read_text())
    stated = manifest.pop("manifest_sha256")

    def hashed(data: Any) -> str:
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    assert hashed(manifest) == stated
    weights = [w["sha256"] for w in manifest["weights"]]
    facts = {"model": manifest["model"], "weights": weights, "kernels": manifest["kernels"]["sha256"]}
    assert hashed(facts) == Bundle.open(kernelled).identity()
    for weight in manifest["weights"]:
        data = (kernelled / weight["file"]).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert hashlib.sha256(header).hexdigest() == weight["header_sha256"]
        assert len(data) == weight["bytes"]


@pytest.mark.slow
def test_the_bundle_format_specifies_the_checksum_of_states(kernelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    open_bundle(kernelled).prefill("Once upon a time").save(file)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    digest = hashlib.sha256(f"{metadata['length']}\0{metadata['identity']}\0".encode())
    for name in sorted(header, key=str.encode):
        begin, end = header[name]["data_offsets"]
        digest.update(name.encode() + b"\0" + body[begin:end])
    assert metadata["format"] == "less-state"
    assert metadata["identity"] == Bundle.open(kernelled).identity()
    assert digest.hexdigest() == metadata["sha256"]
