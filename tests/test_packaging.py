"""An installation without torch and transformers: only the base dependencies and onnxruntime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from less_export import __version__, open_bundle
from less_export.hf import recipes

from .bundles import PROMPT

pytest_plugins = ["tests.bundles"]
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy", "gguf", "tensorrt", "tensorrt_rtx")
GENERATE = """
import importlib.util, json, sys
import less_export
bundle, prompt, heavy = json.loads(sys.argv[1])
generator = less_export.open_bundle(bundle)
(made,) = generator.generate([prompt], max_new_tokens=12)
state = generator.prefill(prompt)
print(json.dumps({
    "tokens": made.token_ids, "text": made.text, "length": state.length,
    "streamed": "".join(t.text for t in generator.stream([prompt], max_new_tokens=12)),
    "there": [n for n in heavy if importlib.util.find_spec(n)],
    "imported": [n for n in heavy if n in sys.modules],
    "from": less_export.__file__,
}))
"""


def clean() -> dict[str, str]:
    """The environment without this interpreter's paths."""
    return {n: v for n, v in os.environ.items() if not n.startswith("PYTHON") and n != "VIRTUAL_ENV"}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a fresh virtual environment with ``less-export[cpu]`` from this checkout."""
    folder = tmp_path_factory.mktemp("runtime")
    for name in ("less_export", "models", "ops_ort", "plugins_trt"):
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "src" / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    binaries = folder / "venv" / "bin"
    command = [binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["-c", ROOT / "scripts" / "constraints.txt", f"{folder / 'src'}[cpu]"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "src")
    return binaries


def call(runtime: Path, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """``less-export`` of that environment."""
    line = [runtime / "less-export", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, env=clean(), cwd=folder)


def test_the_licences_of_the_texts_are_there(runtime: Path) -> None:
    (facts,) = runtime.parent.glob("lib/python*/site-packages/less_export-*.dist-info")
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0" in (facts / "METADATA").read_text().splitlines()
    texts = (facts / "licenses" / "less_export" / "data" / "README.md").read_text()
    assert {f.name for f in (ROOT / "less_export" / "data").rglob("*.txt") if f"`{f.name}`" not in texts} == set()


def test_only_the_runtime_is_there(runtime: Path) -> None:
    command = [runtime / "python", "-m", "pip", "list", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), check=True)
    names = {p["name"].lower().replace("_", "-") for p in json.loads(done.stdout)}
    assert {"less-export", "numpy", "onnxruntime", "safetensors", "tokenizers", "jinja2", "rich"} <= names
    assert not names & {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "polygraphy", "accelerate"}


def test_the_sources_of_the_plugin_are_shipped(runtime: Path, tmp_path: Path) -> None:
    """The plugin can be compiled from the installed package: it holds every file that the compilers need."""
    code = "from less_export.native import nvcc; print(nvcc.kernels())"
    done = subprocess.run([runtime / "python", "-c", code], capture_output=True, text=True, env=clean(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shipped = Path(done.stdout.strip())
    assert shipped.is_relative_to(runtime.parent)
    source = ROOT / "plugins_trt"
    for pattern in ("src/*", "include/*", "sampler/*", "*.txt", "*.map", "README.md"):
        names = {str(p.relative_to(source)) for p in source.glob(pattern)}
        assert names
        assert names <= {str(p.relative_to(shipped)) for p in shipped.glob(pattern)}
    for folder in ("src", "cuda"):
        assert not {p.name for p in (ROOT / "ops_ort" / folder).iterdir()} ^ {
            p.name for p in (shipped.parent / "ops_ort" / folder).iterdir()
        }
    done = call(runtime, tmp_path, "build-plugin", "--gpu-arch", "sm_75")
    assert done.stderr == (
        "less-export: error: the plugin cannot be built for 'sm_75': give architectures from sm_80 on\n"
    )


def test_generate_from_python(runtime: Path, plain: Path, tmp_path: Path) -> None:
    command = [runtime / "python", "-c", GENERATE, json.dumps([str(plain), PROMPT, HEAVY])]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["there"], report["imported"]) == ([], [])
    assert str(runtime.parent) in report["from"]
    (want,) = open_bundle(plain).generate([PROMPT], max_new_tokens=12)
    assert (tuple(report["tokens"]), report["text"], report["streamed"]) == (want.token_ids, want.text, want.text)
    assert report["length"] == want.prompt_tokens


def test_command_line(runtime: Path, kernelled: Path, tmp_path: Path) -> None:
    (want,) = open_bundle(kernelled).generate([PROMPT], max_new_tokens=12)
    done = call(runtime, tmp_path, "generate", kernelled, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert (done.returncode, done.stdout) == (0, want.text + "\n"), done.stderr
    done = call(runtime, tmp_path, "generate", kernelled, "--chat", "Hi", "--temperature", 1, "--seed", 3)
    assert done.returncode == 0, done.stderr
    done = call(runtime, tmp_path, "info", kernelled)
    assert done.returncode == 0, done.stderr
    assert "kernels.safetensors" in done.stdout
    assert call(runtime, tmp_path, "--version").stdout == f"less-export {__version__}\n"
    assert "MODEL" in call(runtime, tmp_path, "--help").stdout
    listed = call(runtime, tmp_path, "recipes").stdout
    assert all(name in listed for name in recipes.names())


def test_what_is_missing_is_said(runtime: Path, kernelled: Path, source: Path, tmp_path: Path) -> None:
    for command, says in {
        (source, "--out", "b"): "pip install 'less-export[export,cpu]'",
        ("llama2-7b", "--out", "engine.plan"): "pip install 'less-export[export,cpu]'",
        ("check", kernelled): "pip install 'less-export[export]'",
        ("generate", kernelled, "--prompt", "x", "--backend", "torch"): "pip install 'less-export[export]'",
        ("generate", kernelled, "--prompt", "x", "--backend", "trt"): "no engine.plan",
    }.items():
        done = call(runtime, tmp_path, *command)
        assert (done.returncode, done.stdout) == (1, ""), command
        assert done.stderr.startswith("less-export: error: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert says in done.stderr
    assert not list(tmp_path.iterdir())
