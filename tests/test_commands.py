"""generate, check and info on real bundles, as the command line prints them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from less_export import open_bundle
from less_export.bundle.artifact import FORMAT_VERSION, MANIFEST, Bundle

from . import bundles
from .bundles import PROMPT, Run, generated, refused, resign

pytest_plugins = ["tests.bundles"]


# ------------------------------------------------------------------ generate


def test_greedy_is_the_api(run: Run, plain: Path) -> None:
    (want,) = open_bundle(plain).generate([PROMPT], max_new_tokens=12)
    assert len(want.token_ids) == 12
    streamed = generated(run, plain, "--prompt", PROMPT)
    assert streamed == want.text + "\n"
    assert generated(run, plain, "--prompt", PROMPT, "--no-stream") == streamed
    assert generated(run, plain, "--prompt", PROMPT, "--temperature", 0, "--seed", 5) == streamed
    assert generated(run, plain, "--prompt", PROMPT, "--backend", "torch") == streamed
    assert generated(run, plain / "model.onnx", "--prompt", PROMPT) == streamed


def test_seeds(run: Run, plain: Path) -> None:
    def sampled(seed: int, *more: object) -> str:
        return generated(run, plain, "--prompt", PROMPT, "--temperature", 1.5, "--seed", seed, *more)

    assert sampled(1) == sampled(1)
    assert len({sampled(n) for n in range(4)}) > 1
    greedy = generated(run, plain, "--prompt", PROMPT)
    assert sampled(1, "--top_k", 1) == greedy
    assert sampled(1, "--top-p", 1e-9) == greedy


def test_prompts_from_files(run: Run, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    want = generated(run, plain, "--prompt", PROMPT)
    assert generated(run, plain, "--prompt-file", file) == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generated(run, plain, "--prompt_file", "-") == want
    file.write_bytes(b"\xff\xfe")
    refused(run("generate", plain, "--prompt-file", file), "cannot read", "not UTF-8")
    refused(run("generate", plain, "--prompt-file", tmp_path / "none"), "No such file")
    refused(run("generate", plain, "--prompt", "\udcff"), "not UTF-8")  # Python's decoding of such an argument


def test_chat(run: Run, plain: Path, tmp_path: Path) -> None:
    want = generated(run, plain, "--prompt", f"<user>{PROMPT}")
    assert generated(run, plain, "--chat", PROMPT) == want
    bare = bundles.copy(plain, tmp_path / "bare")
    resign(bare, lambda m: dataclasses.replace(m, tokenizer=dataclasses.replace(m.tokenizer, chat_template=None)))
    refused(run("generate", bare, "--chat", "Hi"), "no chat template")
    resign(bare, lambda m: dataclasses.replace(m, tokenizer=None))
    refused(run("generate", bare, "--chat", "Hi"), "no tokenizer")
    refused(run("generate", bare, "--prompt", "Hi"), "need a tokenizer", "--token-ids")


def test_token_ids(run: Run, plain: Path, tmp_path: Path) -> None:
    generator = open_bundle(plain)
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode(PROMPT)
    (want,) = generator.generate([ids], max_new_tokens=12)
    arguments = ("--token-ids", ",".join(map(str, ids)))
    assert generated(run, plain, *arguments) == want.text + "\n"
    bare = bundles.copy(plain, tmp_path / "bare")
    resign(bare, lambda m: dataclasses.replace(m, tokenizer=None))
    assert generated(run, bare, *arguments) == ",".join(map(str, want.token_ids)) + "\n"
    refused(run("generate", bare, "--token-ids", "1,100000"), "token ids must lie in")


def test_prompts_that_cannot_be(run: Run, plain: Path, single: Path) -> None:
    refused(run("generate", plain, "--prompt", ""), "a prompt is empty")
    refused(run("generate", single, "--prompt", PROMPT), "not fit into the 32", "--context")
    result = run("generate", single, "--prompt", "Once upon", "--max-new-tokens", 100)
    assert result.code == 0
    tokens = len(open_bundle(single).tokenizer.encode("Once upon"))
    assert f"prompt {tokens} tokens" in result.err
    assert f"{32 - tokens - 1} tokens at" in result.err  # stops at the end of the cache


def test_output_survives_a_terminal_without_utf8(plain: Path) -> None:
    arguments = [sys.executable, "-m", "less_export.cli.main", "generate", str(plain), "--prompt", PROMPT]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, capture_output=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")


# ------------------------------------------------------------------ check


def test_check_passes(run: Run, kernelled: Path, single: Path, tmp_path: Path) -> None:
    result = run("check", kernelled, "--full", "--json", tmp_path / "report.json")
    assert result.code == 0, result.out
    assert result.out.startswith("passed: 76 tokens in 13 steps, 64 evicted;")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["evicted"], report["steps"]) == (True, 64, 13)
    names = {d["tensor"] for d in report["differences"]}
    assert names == {"logits"} | {f"past.{i}.{n}" for i in (0, 1) for n in ("position", "h", "z")}
    assert all(0 <= d["error"] <= d["limit"] for d in report["differences"])
    result = run("check", single)
    assert result.code == 0
    assert result.out.startswith("passed: 32 tokens")


@pytest.mark.slow
def test_check_of_own_text(run: Run, plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(PROMPT * 3)
    count = len(open_bundle(plain).tokenizer.encode(PROMPT * 3))
    assert run("check", plain, "--text-file", file).out.startswith(f"passed: {count} tokens")
    assert run("check", plain, "--text-file", file, "--tokens", 40).out.startswith("passed: 40 tokens")
    assert run("check", plain / "model.onnx", "--tokens", 300).out.startswith("passed: 300 tokens")
    refused(run("check", plain, "--text-file", file, "--tokens", 4000), f"the text has {count} tokens")
    for tokens in (0, 5, -3):
        refused(run("check", plain, "--tokens", tokens), "at least 10 tokens", after=1)
    refused(run("check", plain, "--text-file", tmp_path / "none"), "No such file")
    refused(run("check", plain, "--json", tmp_path / "none" / "x.json"), "cannot write", after=1)


@pytest.mark.parametrize(
    ("attributes", "worst"),
    [({"scale": 0.7}, "logits"), ({"heavy": 11, "recent": 1}, "past.1.position"), ({"window": 6}, "logits")],
    ids=["scale", "heavy and recent", "window"],
)
def test_check_fails(attributes: dict[str, float], worst: str, run: Run, kernelled: Path, tmp_path: Path) -> None:
    bundle = bundles.copy(kernelled, tmp_path / "wrong")
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    node = [n for n in graph.graph.node if n.op_type == "LessAttention"][1]
    for attribute in node.attribute:
        if attribute.name in attributes:
            value = attributes[attribute.name]
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, value))
    onnx.save(graph, bundle / "model.onnx")
    refused(run("check", bundle), "model.onnx is damaged")
    resign(bundle, lambda m: m)
    result = run("check", bundle, "--json", tmp_path / "report.json")
    assert result.code == 1
    assert result.err.startswith("less-export: comparing ort with torch")
    assert "Traceback" not in result.err
    assert result.out.startswith("FAILED: 76 tokens")
    assert "worst tensors" in result.out
    rows = [line.split() for line in result.out.splitlines() if "too large" in line]
    assert worst in [r[0] for r in rows]
    assert "past.0.h" not in [r[0] for r in rows]  # the previous layer is correct
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert {d["tensor"] for d in report["differences"] if not d["passed"]} == {r[0] for r in rows}


# ------------------------------------------------------------------ info, recipes, forms


def test_info(run: Run, kernelled: Path, plain: Path) -> None:
    result = run("info", kernelled)
    assert (result.code, result.err) == (0, "")
    for part in (
        "LlamaForCausalLM", "model.onnx", "model.trt.onnx", "model.safetensors", "kernels.safetensors",
        "tokenizer.json", "h2o", "past.0.key", "batch, 2, 12, 8", "logits", "LESS state, any length",
        "full cache at 4,096 tokens* ", "*: more tokens than the model has positions",
        "kernels' weights, once for all sequences",
    ):  # fmt: skip
        assert part in result.out, part
    state = Bundle.open(kernelled).manifest.artifacts[0].contract.state_bytes()
    assert f"{state / 1000:.2f} kB" in result.out
    assert f"{2 * 2 * 2 * 8 * 4096 * 4 / state:.1f}x" in result.out
    assert "none (low-rank term off)" not in result.out
    assert "none (low-rank term off)" in run("info", plain).out


def test_info_as_json(run: Run, plain: Path, single: Path) -> None:
    result = run("info", plain, "--json")
    assert (result.code, result.err) == (0, "")
    data = json.loads(result.out)
    assert data == json.loads((plain / MANIFEST).read_text())
    assert (data["format_version"], data["settings"]["chunk"]) == (FORMAT_VERSION, 16)
    assert json.loads(run("info", single, "--json").out)["settings"]["policy"] == "full"


def test_single_file_form(run: Run, single: Path) -> None:
    assert sorted(p.name for p in single.parent.iterdir()) == [
        "x.json", "x.model.safetensors", "x.onnx", "x.tokenizer.json",
    ]  # fmt: skip
    assert run("info", single).code == run("check", single).code == 0
    assert generated(run, single, "--prompt", "Once")
    refused(run("info", single.parent), "has no manifest.json")
    refused(run("info", single.with_name("y.onnx")), "y.onnx does not exist")


@pytest.mark.slow
def test_gguf_is_the_same_model(run: Run, source: Path, plain: Path, quick: None, tmp_path: Path) -> None:
    file = bundles.gguf_file(tmp_path / "m.gguf", source)
    result = run(file, "--out", tmp_path / "b", "--dtype", "float32", *bundles.QUICK_OPTIONS)
    assert result.code == 0, result.err
    assert generated(run, tmp_path / "b", "--prompt", PROMPT) == generated(run, plain, "--prompt", PROMPT)
    (weights,) = Bundle.open(tmp_path / "b", full=True).manifest.weights
    assert (tmp_path / "b" / weights.file).stat().st_mode & 0o777 == 0o644


def test_both_targets(kernelled: Path) -> None:
    artifacts = {a.kind: a for a in Bundle.open(kernelled).manifest.artifacts}
    assert {k: (a.file, a.contract.dtype) for k, a in artifacts.items()} == {
        "ort": ("model.onnx", "float32"),
        "trt": ("model.trt.onnx", "float32"),
    }
    graphs = [onnx.load(kernelled / a.file, load_external_data=False) for a in artifacts.values()]
    assert [bool(g.functions) for g in graphs] == [True, False]
    assert [sum(n.op_type == "LessAttention" for n in g.graph.node) for g in graphs] == [2, 2]
