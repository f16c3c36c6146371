"""The C++ runtime against the Python package, as far as a machine without a GPU goes.

Parts that need no bundle (sessions, sampling, JSON, files) are tested in plugins_trt/runtime/tests, under sanitizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export.bundle.artifact import FORMAT_VERSION, Bundle, Layout, Manifest
from less_export.contract import Contract, LayerSpec, Policy
from less_export.runtime.generate import Generator
from less_export.runtime.sampling import SamplingParams, sample
from less_export.tensorrt.engine import build_plan

from .cpp_support import PLAN, ROOT, TOKENIZER, MixingBackend, bundle, call, edit, lines
from .trt_decoder import contract_of, decoder, serialised

pytest_plugins = ["tests.cpp_support", "tests.bundles"]
pytestmark = pytest.mark.slow

FULL = LayerSpec(8, 1, 16, 0.25, Policy.FULL, 0, 40, 0, False, 40, 1)
SINK = LayerSpec(6, 3, 5, 1e-05, Policy.SINK, 4, 9, 0, True, 13, 32)
SLIDING = LayerSpec(4, 4, 8, 1.0, Policy.TOVA, 6, 1, 12, True, 7, 8)
INT8 = dataclasses.replace(SINK, slot_dtype="int8")
STATE16 = dataclasses.replace(INT8, state_bits=16)
CONTRACTS = {
    "float16": contract_of("float16"),
    "bfloat16, all logits": dataclasses.replace(contract_of("bfloat16"), logits="all", trained_length=4096),
    "int8": contract_of("bfloat16").with_slots("int8"),
    "int8 in one layer": Contract((SINK, INT8, SLIDING), 300, "float16", 16, 8),
    "a state of 16 bits": Contract((SINK, STATE16, INT8, SLIDING), 300, "bfloat16", 16, 8),
    "positions": Contract((SINK, SLIDING), 1000, "float32", 1, 1, position_limit=77),
    "full": Contract((SINK, FULL, SLIDING), 300, "bfloat16", 16, 8, position_limit=77),
    "large": Contract(
        (LayerSpec(64, 8, 128, 0.088, Policy.H2O, 4096, 4096, 0, True, 8192, 32),) * 80, 262144, "bfloat16", 512, 256
    ),
}


@pytest.mark.parametrize(("program", "least"), [("less_runtime_tests", 20), ("less_runtime_mock_tests", 6)])
def test_what_needs_no_python(program: str, least: int, tools: Path) -> None:
    done = call(tools / program)
    assert done.code == 0, done.out + done.err
    assert done.out.count("ok ") >= least


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract(name: str, tools: Path, tmp_path: Path) -> None:
    contract = CONTRACTS[name]
    path = bundle(tmp_path / "x.plan", contract)
    done = call(tools / "less_runtime_probe", "describe", path)
    assert done.code == 0, done.err
    axes = {"batch": -1, "chunk": -2}

    def specs(all: Any) -> list[Any]:
        return [[s.name, s.dtype, [axes[d] if isinstance(d, str) else d for d in s.shape]] for s in all]

    manifest = Manifest.parse((tmp_path / "x.json").read_bytes(), "")
    expected = {
        "inputs": specs(contract.inputs()),
        "outputs": specs(contract.outputs()),
        "row_bytes": [s.row_bytes for s in contract.state()],
        "empty": [s.field.empty for s in contract.state()],
        "state_bytes": contract.state_bytes(),
        "token_limit": contract.token_limit(),
        "trained_length": contract.trained_length,
        "chunk": contract.chunk,
        "max_batch": contract.max_batch,
        "identity": Bundle(Layout.of(path), manifest).identity(),
        "eos_ids": [1, 7],
        "bos_id": 2,
        "add_bos": True,
        "plan": str(path),
        "version": "1.7.1.116",
        "rtx": True,
        "plugin": None,
        "rows_by_index": False,
    }
    described = json.loads(done.out)
    described.pop("name")
    assert described == expected


def test_bundle_layouts(tools: Path, tmp_path: Path) -> None:
    probe = tools / "less_runtime_probe"
    folder = bundle(tmp_path / "folder", CONTRACTS["full"], tokenizer=None, kernels=None)
    named = bundle(tmp_path / "named" / "engine.plan", CONTRACTS["full"])
    engine = bundle(tmp_path / "x.engine", CONTRACTS["full"])
    for path, plan in ((folder, folder / "engine.plan"), (folder / "engine.plan",) * 2, (named,) * 2, (engine,) * 2):
        done = call(probe, "describe", path)
        assert done.code == 0, done.err
        assert json.loads(done.out)["plan"] == str(plan)
    bare = json.loads(call(probe, "describe", folder).out)
    assert (bare["eos_ids"], bare["bos_id"], bare["add_bos"]) == ([], None, False)
    manifest = Manifest.parse((folder / "manifest.json").read_bytes(), "")
    assert bare["identity"] == Bundle(Layout.of(folder), manifest).identity()


def test_manifest_of_a_real_export(kernelled: Path, tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = folder / "manifest.json"
    manifest.write_bytes((kernelled / "manifest.json").read_bytes())
    done = call(tools / "less_runtime_probe", "describe", folder)
    assert "has no plan: export with" in done.err  # the manifest itself is accepted
    facts = {"kind": "plan", "file": "engine.plan", "sha256": hashlib.sha256(PLAN).hexdigest()}
    (folder / "engine.plan").write_bytes(PLAN)
    edit(manifest, lambda m: m["artifacts"].append({**m["artifacts"][-1], **facts}))
    description = json.loads(call(tools / "less_runtime_probe", "describe", folder).out)
    bundle = Bundle.open(kernelled)
    trt = bundle.artifact("trt")
    assert trt is not None
    assert bundle.manifest.tokenizer is not None
    assert description["identity"] == bundle.identity()
    assert description["name"] == bundle.manifest.model["name"]
    assert description["state_bytes"] == trt.contract.state_bytes()
    assert description["eos_ids"] == list(bundle.manifest.tokenizer.eos_ids)


Change = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def contract_fault(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda folder: edit(
        folder / "manifest.json", lambda m: [change(a["contract"]) for a in m["artifacts"] if a["kind"] == "plan"]
    )


FAULTS: dict[str, Change] = {
    "was changed after the export": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"max_batch": 3', '"max_batch": 4')
    ),
    "written by a newer less-export": lambda f: edit(
        f / "manifest.json", lambda m: m.update(format_version=FORMAT_VERSION + 1)
    ),
    "is not a usable manifest": lambda f: truncate(f / "manifest.json"),
    "artifacts is missing": lambda f: edit(f / "manifest.json", lambda m: m.pop("artifacts")),
    "has no plan: export with": lambda f: edit(f / "manifest.json", lambda m: m["artifacts"].pop()),
    "is damaged (its hash differs": lambda f: (f / "engine.plan").write_bytes(PLAN.replace(b" ", b"x")),
    "engine.plan is missing from the bundle": lambda f: (f / "engine.plan").unlink(),
    "has no manifest.json": lambda f: (f / "manifest.json").unlink(),
    "contract.chunk is missing": contract_fault(lambda c: c.pop("chunk")),
    "vocab_size must be a whole number from 1 to 2147483647, not -3": contract_fault(lambda c: c.update(vocab_size=-3)),
    "not 99999999999)": contract_fault(lambda c: c["layers"][0].update(capacity=99999999999)),
    "its tensors are too large": contract_fault(
        lambda c: c["layers"][1].update(dict.fromkeys(("kv_heads", "query_heads", "head_dim"), 2**31 - 1))
    ),
    "dtype must be one of float32, float16, bfloat16": contract_fault(lambda c: c.update(dtype="int32")),
    "unknown policy 'lru'": contract_fault(lambda c: c["layers"][1].update(policy="lru")),
    "heavy + recent must equal": contract_fault(lambda c: c["layers"][0].update(heavy=1)),
    "query heads must be a multiple": contract_fault(lambda c: c["layers"][0].update(query_heads=3)),
    "logits must be one of last, all": contract_fault(lambda c: c.update(logits="some")),
}


@pytest.mark.parametrize("says", FAULTS)
def test_damaged_bundles(says: str, tools: Path, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", CONTRACTS["float16"])
    FAULTS[says](folder)
    done = call(tools / "less_runtime_probe", "describe", folder)
    assert done.code == 1, done.out
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert says.strip() in done.err


def test_what_is_no_bundle(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").touch()
    for path, says in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "nothing.plan", "does not exist"),
        (tmp_path / "x.onnx", "is not a bundle"),
        (tmp_path, "has no manifest.json"),
    ):
        done = call(tools / "less_runtime_probe", "describe", path)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert says in done.err
    # Skipping the plan's hash still reads its header.
    folder = bundle(tmp_path / "bundle", CONTRACTS["float16"])
    (folder / "engine.plan").write_bytes(PLAN.replace(b" ", b"x"))
    assert call(tools / "less_runtime_probe", "describe", folder, "unverified").code == 0
    (folder / "engine.plan").write_bytes(b"x" * 99)
    assert "is not a TensorRT plan" in call(tools / "less_runtime_probe", "describe", folder, "unverified").err


def test_canonical_json(tools: Path) -> None:
    random = np.random.default_rng(0)
    floats = np.frombuffer(random.bytes(8 * 200), np.float64)
    floats = floats[np.isfinite(floats)]
    text = "".join(map(chr, random.integers(0, 0xD800, 300))) + "".join(
        map(chr, random.integers(0xE000, 0x110000, 300))
    )
    for data in (
        [float(x) for x in floats],
        {chr(c) * 2: c for c in range(0, 0x300, 7)} | {"\ud800": 1, "\udfff\ud800": 2, "😀": 3, "\uffff": 4},
        {"text": text, text: [text, {}]},
        [[], {}, "", [[{"b": [], "a": None}]], -1, 10**30, True, False],
    ):
        for ascii_only in (True, False):
            if not ascii_only and "\ud800" in data:
                continue  # no UTF-8
            given = json.dumps(data, ensure_ascii=ascii_only, indent=1)
            done = call(tools / "less_runtime_probe", "canonical", feed=given)
            assert done.code == 0, done.err
            assert done.out == json.dumps(data, sort_keys=True)


def test_sha256(tools: Path, tmp_path: Path) -> None:
    for size in (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, (1 << 20) + 3):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "data").write_bytes(data)
        assert call(tools / "less_runtime_probe", "sha256", tmp_path / "data").out == hashlib.sha256(data).hexdigest()


class Fixed:
    """A generator that returns one number."""

    def __init__(self, value: float) -> None:
        self.random = lambda: value


def test_sampling(tools: Path) -> None:
    random = np.random.default_rng(0)
    cases, expected = "", []
    for index in range(600):
        size = int(random.integers(1, 60))
        logits = (random.standard_normal(size) * random.choice([0.1, 3, 40])).astype(np.float32)
        if index % 3 == 0:
            logits = np.round(logits)  # ties
        if index % 4 == 0:
            logits[random.random(size) < 0.3] = -np.inf
            logits[0] = 0
        temperature = float(random.choice([0, 0.3, 1, 2.5]))
        params = SamplingParams(
            temperature,
            int(random.integers(0, 8)),
            float(random.choice([1, 0.9, 0.5, 0.01])),
            min_p=float(random.choice([0, 0, 0.1, 0.5, 1])),
        )
        uniform = float(random.choice([0, random.random(), 1 - 2.0**-53]))
        expected.append(sample(logits, params, Fixed(uniform)))  # type: ignore[arg-type]
        numbers = [params.temperature, params.top_k, params.top_p, params.min_p, uniform, *map(float, logits)]
        cases += " ".join(map(repr, numbers)) + "\n"
    done = call(tools / "less_runtime_probe", "sample", feed=cases)
    assert done.code == 0, done.err
    assert list(map(int, done.out.split())) == expected


@pytest.mark.parametrize("memory", ["in-place", "two-blocks"])
@pytest.mark.parametrize("name", ["float16", "bfloat16, all logits", "int8 in one layer", "full"])
def test_generation(name: str, memory: str, tools: Path, tmp_path: Path) -> None:
    contract = CONTRACTS[name]
    random = np.random.default_rng(1)
    prompts = [random.integers(0, contract.vocab_size, n).tolist() for n in (9, 1, 4, 5, 8)]
    eos = tuple(random.integers(0, contract.vocab_size, contract.vocab_size // 20).tolist())
    tokenizer = None if name == "full" else dataclasses.replace(TOKENIZER, eos_ids=eos)
    path = bundle(tmp_path / "x.plan", contract, tokenizer=tokenizer, settings={"eos_ids": eos})
    generator = Generator(MixingBackend(contract), eos_ids=eos)
    reasons = set()
    for start in ([], [3, 1, 4, 1, 5, 9, 2]):
        prefix = generator.prefill(start) if start else None
        generations = generator.generate(prompts, max_new_tokens=12, prefix=prefix)
        reasons |= {g.finish_reason for g in generations}
        arguments = [path, memory, 12, " ".join(map(str, start))]
        done = call(tools / "less_runtime_probe", "generate", *arguments, feed=lines(prompts))
        assert done.code == 0, done.err
        assert done.out == "".join(f"{list(g.token_ids)} {g.finish_reason}\n" for g in generations)
    assert reasons == {"eos", "length"}


# ------------------------------------------------------------------ linked against TensorRT


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a real plan."""
    folder, contract = tmp_path_factory.mktemp("engine"), contract_of("float16")
    plan = folder / "made.plan"
    build_plan(serialised(decoder(contract, folder)), contract, out=plan, weights_dir=folder, gpu_arch="sm_86")
    return bundle(folder / "x.plan", contract, plan.read_bytes())


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def test_example(less_generate: Path, engine: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("1 2 3\n\n4\n")
    done = call(less_generate, engine, tokens, "--max-new-tokens", 4, "--temperature", 0.7, "--seed", 1)
    # Only the GPU is missing: the bundle opens, the plan is verified, both libraries are linked and loaded.
    reason = "was compiled with the headers of" if has_driver() else "no CUDA driver: run this where nvidia-smi lists"
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("less_generate: error: ")
    assert reason in done.err
    assert done.err.count("\n") == 1
    assert call(less_generate, "--help").out.startswith("usage: less_generate BUNDLE TOKENS")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["BUNDLE"], "give a bundle and a file of token ids"),
        (["nothing", "TOKENS"], "does not exist"),
        (["BUNDLE", "nothing"], "cannot read nothing: No such file"),
        (["BUNDLE", "EMPTY"], "contains no token ids"),
        (["BUNDLE", "LETTERS"], "is not a number: 'a'"),
        (["BUNDLE", "TOKENS", "--temperature", "-1"], "temperature must be 0"),
        (["BUNDLE", "TOKENS", "--top-p", "x"], "--top-p is not a number: 'x'"),
        (["BUNDLE", "TOKENS", "--seed", "-1"], "--seed is not a number: '-1'"),
        (["BUNDLE", "TOKENS", "--seed"], "--seed needs a value"),
        (["BUNDLE", "TOKENS", "--sed", "1"], "unknown option --sed"),
        (["BUNDLE", "TOKENS", "--prefix", "nothing"], "cannot read nothing"),
        (["BUNDLE", "TOKENS", "--save-state", "x"], "takes exactly one prompt"),
    ],
)
def test_example_refuses(arguments: list[str], says: str, less_generate: Path, engine: Path, tmp_path: Path) -> None:
    for name, text in (("TOKENS", "1 2\n3\n"), ("EMPTY", "\n \n"), ("LETTERS", "1 a 2")):
        (tmp_path / name).write_text(text)
    command = [engine if w == "BUNDLE" else tmp_path / w if w.isupper() else w for w in arguments]
    done = call(less_generate, *command)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert says in done.err


def test_example_needs_no_cuda_library(less_generate: Path) -> None:
    needed = subprocess.run(["readelf", "-d", less_generate], capture_output=True, text=True, check=True).stdout
    assert "libtensorrt_rtx.so.1" in needed or "libnvinfer.so" in needed
    assert "libcuda" not in needed


def test_program_of_the_readme_compiles(tmp_path: Path) -> None:
    text = (ROOT / "plugins_trt" / "runtime" / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```cpp\n(.*?)```", text, re.S)
    (tmp_path / "main.cpp").write_text(program)
    include = ROOT / "plugins_trt" / "include"
    done = call(
        "c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", include, tmp_path / "main.cpp"
    )
    assert done.code == 0, done.err


def test_options_of_the_documents_exist(less_generate: Path) -> None:
    usage = call(less_generate, "--help").out
    for file in (ROOT / "plugins_trt" / "runtime" / "README.md", ROOT / "examples" / "cpp" / "README.md"):
        text = file.read_text(encoding="utf-8")
        used = {w for line in text.splitlines() if "less_generate " in line for w in re.findall(r"--[\w-]+", line)}
        assert used - {"--help"} - set(re.findall(r"--[\w-]+", usage)) == set()
