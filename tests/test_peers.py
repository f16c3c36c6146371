"""The benchmark of other exporters: its GGUF file, what llama-bench is asked, whose turn it is, the tables."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from .families import ONE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IDS = torch.tensor([[5, 17, 3, 60, 44, 8, 91, 2]])
#: A program that waits, prints its arguments where llama-bench prints its rates, and writes some text to stderr.
PROGRAM = """#!{python}
import json, sys, time
print("loaded", file=sys.stderr)
time.sleep(0.5)
if {fails}:
    sys.exit("cannot load the model")
print(json.dumps({{"samples_ts": sys.argv[1:]}}))
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("bench_peers")


def program(path: Path, fails: bool = False) -> Path:
    path.write_text(PROGRAM.format(python=sys.executable, fails=fails))
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------ the GGUF file


def test_the_gguf_file_is_the_checkpoint(tmp_path: Path) -> None:
    llama_gguf = importlib.import_module("llama_gguf")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**ONE, "num_hidden_layers": 2}, rms_norm_eps=0.01, rope_parameters=rope))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.float16).save_pretrained(tmp_path / "checkpoint", max_shard_size="30KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    path = tmp_path / llama_gguf.FILE
    llama_gguf.write(tmp_path / "checkpoint", path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        expected, found = (m.eval()(IDS).logits for m in (whole, read))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"model_type": "qwen3"}, {"rope_parameters": {"rope_type": "yarn"}}])
def test_what_the_gguf_file_cannot_say_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    llama_gguf = importlib.import_module("llama_gguf")
    (tmp_path / "config.json").write_text(json.dumps({**LlamaConfig(**ONE).to_dict(), **change}))
    with pytest.raises(ValueError, match=r"not a llama|scaled positions"):
        llama_gguf.write(tmp_path, tmp_path / "model.gguf")


# ------------------------------------------------------------------ llama-bench


@pytest.mark.parametrize(
    ("context", "tokens", "arguments"),
    [
        (512, 1, "-d 511 -p 0 -n 12 -r 1"),
        (512, 512, "-d 0 -p 512 -n 0 -r 2"),
        (4096, 4096, "-d 0 -p 4096 -n 0 -r 1 --no-warmup"),
    ],
)
def test_what_llama_bench_is_asked(context: int, tokens: int, arguments: str, tmp_path: Path) -> None:
    llama_cpp, bench = (importlib.import_module(n) for n in ("llama_cpp", "bench_peers"))
    folder = tmp_path / "llama.cpp" / "bin"
    folder.mkdir(parents=True)
    program(folder / "llama-bench")
    work = bench.llama_work(context, tokens)
    figures = llama_cpp.bench(folder / "llama-bench", tmp_path / "model.gguf", **work)
    asked = shlex.join(figures.pop("rates"))
    assert asked.endswith(arguments)
    assert asked.startswith(f"-m {tmp_path / 'model.gguf'} -o jsonl -t ")
    assert figures["peak_mb"] >= figures["resident_mb"] > 1


def test_why_llama_bench_failed(tmp_path: Path, bench: ModuleType) -> None:
    llama_cpp = importlib.import_module("llama_cpp")
    failing = program(tmp_path / "llama-bench", fails=True)
    with pytest.raises(SystemExit) as end:
        llama_cpp.bench(failing, tmp_path / "model.gguf", **bench.llama_work(512, 1))
    assert bench.reason(end.value) == "cannot load the model"


# ------------------------------------------------------------------ whose turn it is


def test_models_take_turns_where_they_are_measured(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, ...]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        who, out, *cell = command[command.index("--child") + 1 :]
        turns.append((who, command[command.index("--operator") + 1], *cell))
        if out == "damaged":
            return subprocess.CompletedProcess(command, 1, "", "a trace\nit is damaged\n")
        return subprocess.CompletedProcess(command, 0, json.dumps({"tokens_per_second": len(turns)}), "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    rows: list[dict[str, Any]] = [{"who": "less-export"}, {"who": "less-export"}, {"who": "llama.cpp"}]
    places = [("whole", [512, 4096], "native"), ("whole", [512, 4096], "onnx"), ("damaged", [512], "native")]
    models = [bench.Model(row, Path(out), *rest) for row, (out, *rest) in zip(rows, places, strict=True)]
    bench.run(models, [512, 4096], [128], 2, Path("folder"))
    ours, nodes, other = ("less-export", "native"), ("less-export", "onnx"), ("llama.cpp", "native")
    once = [(*m, "512", "1") for m in (ours, nodes, other)] + [(*m, "4096", "1") for m in (ours, nodes)]
    assert turns == [*once, *once, *((*m, "128", "128") for m in (ours, nodes, other))]
    assert [c["context"] for c in rows[0]["contexts"]] == [512, 4096]
    assert rows[0]["contexts"][0] == {"context": 512, "tokens_per_second": 3.5, "rates": [1, 6]}
    assert rows[2]["contexts"] == [{"context": 512, "failed": "it is damaged"}]


@pytest.mark.parametrize("fails", [False, True])
def test_rows_of_those_that_are_asked_for(
    fails: bool, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models: list[Any] = []
    results: dict[str, Any] = {}
    exported: list[Path] = []

    def export(command: Any, who: str, out: Path) -> dict[str, Any]:
        exported.append(out)
        return {"failed": "no room"} if fails and "int4" in command else {"seconds": 1.0}

    monkeypatch.setattr(bench, "random_checkpoint", lambda *_, **__: 10**6)
    monkeypatch.setattr(bench, "tokenizer", lambda _: None)
    monkeypatch.setattr(bench, "export", export)
    monkeypatch.setattr(bench.llama_cpp, "build", lambda *_: tmp_path)
    monkeypatch.setattr(bench, "run", lambda given, *_: models.extend(given))
    monkeypatch.setattr(bench, "write_results", lambda name, data: results.update({name: data}))
    limits = ["--layers", "1", "--contexts", "512", "16384", "--environments", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--only", "less-export", "llama.cpp", *limits])
    bench.main()
    rows = results["peers"]["rows"]
    ours = ["f32", "int4", "int4, 32", "int4, nodes"]
    assert [(r["who"], r["precision"]) for r in rows] == [
        *(("less-export", precision) for precision in ours),
        *(("llama.cpp", kind) for kind in ("Q8_0", "Q4_K_M")),
    ]
    assert list(results["peers"]["peers"]) == ["llama.cpp"]
    assert len(exported) == 5
    if fails:
        assert [r.get("failed") for r in rows] == [None, "no room", "no room", "no room", None, None]
        return
    by_row = {(m.row["who"], m.row["precision"]): m for m in models}
    assert len(by_row) == 6
    assert {key for key, m in by_row.items() if m.operator == "onnx"} == {("less-export", "int4, nodes")}
    assert by_row["less-export", "int4, nodes"].out == by_row["less-export", "int4"].out
    assert by_row["llama.cpp", "Q8_0"].contexts == [512, 4096]
    assert by_row["less-export", "f32"].contexts == [512, 16384]


# ------------------------------------------------------------------ the tables


def test_tables_of_rows_that_lack_something() -> None:
    tables = importlib.import_module("decoding_tables")
    cell = {"tokens_per_second": 5.0, "resident_mb": 1000.0}
    export = {"seconds": 2.0, "peak_rss_mb": 3.0, "written_mb": 4.0}
    both = [{"context": c, **cell} for c in (512, 16384)]
    prompts = [{"tokens": 512, "tokens_per_second": 60.0}]
    data = {
        "rows": [
            {"who": "less-export", "precision": "int4", **export, "contexts": both, "prompts": prompts},
            {"who": "less-export", "precision": "int4, nodes", "contexts": both, "prompts": prompts},
            {"who": "optimum-onnx", "precision": "int4", "failed": "it has none"},
            {"who": "llama.cpp", "precision": "Q8_0", **export, "contexts": both[:1], "prompts": prompts},
        ]
    }
    header, rows = tables.peers(data)
    assert header[5::2] == ["tokens/s at 512", "tokens/s at 16,384"]
    assert [row[2:] for row in rows] == [
        ["2", "3", "4.0", "5.00", "1,000", "5.00", "1,000"],
        ["", "", "", "5.00", "1,000", "5.00", "1,000"],
        ["it has none", *[""] * 6],
        ["2", "3", "4.0", "5.00", "1,000", "not measured", ""],
    ]
    assert [row[2] for row in tables.peers_prompts(data)[1]] == ["60.0"] * 3
