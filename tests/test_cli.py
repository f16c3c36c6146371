"""The command line: parsing of arguments, help, and weights that cannot be downloaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import errors as hub_errors

from less_export import __version__
from less_export.bundle.artifact import Bundle
from less_export.cli.commands import COMMANDS, overview, split
from less_export.cli.ending import INTERRUPTED
from less_export.cli.main import main
from less_export.config import ExportConfig
from less_export.exporter import build
from less_export.exporter.targets import plan_targets
from less_export.hf import recipes
from less_export.less.feature_maps import PARAMETRISATIONS
from less_export.tensorrt import engine, plugin
from less_export.tensorrt.trust import PluginFacts
from less_export.training import options

from . import bundles
from .bundles import PROMPT, Result, Run, generated, refused

pytest_plugins = ["tests.bundles"]


# ------------------------------------------------------------------ arguments


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, ExportConfig, bool]]:
    """Recorded calls of export, which is replaced: model, out, config, engine."""
    calls: list[tuple[str, str, ExportConfig, bool]] = []

    def export(model: str, out: str, config: ExportConfig, *, engine_plan: bool, progress: Any) -> Path:
        calls.append((model, out, config, engine_plan))
        return Path(out)

    monkeypatch.setattr(build, "export", export)
    return calls


@pytest.mark.parametrize("command", [(), ("export",)])
def test_the_line_users_know(
    command: tuple[str, ...], run: Run, exports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(*command, "llama2-7b", "--out", "engine.plan")
    assert (result.code, result.out, result.err) == (0, "engine.plan\n", "")
    assert exports == [("llama2-7b", "engine.plan", ExportConfig(), False)]
    monkeypatch.setattr(engine, "flavour", lambda: engine.Flavour("tensorrt", dataclasses, "10.3"))
    targets = plan_targets("engine.plan", exports[0][2], False)
    assert (targets.file("plan"), targets.layout.manifest, targets.kinds) == ("engine.plan", "engine.json", ("plan",))


@pytest.mark.slow
def test_the_line_users_know_end_to_end(
    run: Run, source: Path, plugin_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny weights instead of the hub's, and an engine builder that only records its arguments."""

    def build_plan(model: bytes, contract: Any, out: Path, library: Path, **options: Any) -> engine.PlanInfo:
        out.write_bytes(b"ftrt" + model)
        return engine.PlanInfo("tensorrt", "10.3", None, 1, 0.0, 9, 1, PluginFacts.of(library, inside=False))

    monkeypatch.setattr(recipes.Recipe, "gguf_package", None)
    monkeypatch.setattr(recipes.Recipe, "compare", lambda *_: None)
    monkeypatch.setattr("less_export.hf.sources._download", lambda hub, patterns: source)
    monkeypatch.setattr(engine, "flavour", lambda: engine.Flavour("tensorrt", dataclasses, "10.3"))
    monkeypatch.setattr(engine, "build_plan", build_plan)
    monkeypatch.setattr(plugin, "library", lambda archs, progress: plugin_library)
    monkeypatch.chdir(tmp_path)
    result = run(
        "llama2-7b", "--out", "engine.plan", "--num_hidden_layers", "1", "--no-validate", "--kernels",
        bundles.kernels(tmp_path / "k.safetensors", layers=[0]),
    )  # fmt: skip
    assert (result.code, result.out) == (0, "engine.plan\n"), result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "engine.json", "engine.plan", "engine.tokenizer.json", "k.safetensors",
    ]  # fmt: skip
    (artifact,) = Bundle.open("engine.plan").manifest.artifacts
    assert artifact.details["plugin"] == vars(PluginFacts.of(plugin_library, inside=False))
    spec, contract = artifact.contract.layers[0], artifact.contract
    assert (artifact.kind, contract.dtype, contract.chunk) == ("plan", "float16", 256)
    assert (spec.policy.name, spec.heavy, spec.recent, spec.rank) == ("h2o", 102, 102, 3)  # 5% of 4096
    shown = run("info", "engine.plan")
    assert shown.code == 0
    assert "TensorRT engine" in shown.out
    refused(run("check", "engine.plan", "--backend", "ort"), "this bundle has no model.onnx")


def test_every_option_in_both_spellings(run: Run, exports: list[Any]) -> None:
    kebab = ["org/a_b", "--out", "o_u-t", "--target", "both", "--engine", "--policy", "sink", "--budget", "7%"]
    kebab += [
        "--layer-budgets",
        "1:9,2:3%",
        "--score-half-life",
        "300",
        "--slots",
        "int8",
        "--state=32",
        "--max-distance",
        "3000",
        "--context",
        "99",
        "--heavy",
        "1",
        "--recent",
        "6",
        "--compress-sliding",
        "--kernels",
        "k_1.st",
    ]
    kebab += ["--rank", "3", "--dtype", "bfloat16", "--max-batch", "5", "--chunk=17", "--logits", "all"]
    kebab += ["--num-hidden-layers=2", "--gpu-arch", "sm_89", "--no-plugin", "--no-validate"]
    kebab += ["--random-weights", "--seed", "7", "--weights", "int4", "--block", "128", "--head", "int4"]
    snake = [w.replace("-", "_").replace("__", "--", 1) if w.startswith("--") else w for w in kebab]
    assert snake != kebab
    want = ExportConfig(
        target="both", policy="sink", budget="7%", layer_budgets="1:9,2:3%", score_half_life=300, slots="int8",
        state=32, max_distance=3000, context=99, heavy=1, recent=6, compress_sliding=True, rank=3,
        kernels=Path("k_1.st"),
        dtype="bfloat16", max_batch=5, chunk=17, logits="all", num_hidden_layers=2, gpu_arch="sm_89",
        plugin=False, validate=False, random_weights=True, seed=7, weights="int4", block=128, head="int4",
    )  # fmt: skip
    assert run(*kebab).code == run(*snake).code == 0
    assert exports == [("org/a_b", "o_u-t", want, True)] * 2
    assert {f.name for f in dataclasses.fields(ExportConfig)} == {
        n for n in vars(want) if getattr(want, n) != getattr(ExportConfig(), n)
    }, "an option is not covered here"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: MODEL, --out"),
        (["llama2-7b"], "the following arguments are required: --out"),
        (["m", "--out", "x", "--polcy", "h2o"], "unrecognized arguments: --polcy"),
        (["m", "--out", "x", "--policy", "lru"], "invalid choice: 'lru'"),
        (["m", "--out", "x", "--chunk", "many"], "--chunk: invalid int value: 'many'"),
        (["m", "--out", "x", "--chunk", "0"], "--chunk must be at least 1"),
        (["m", "--out", "x", "--budget", "-5%"], "--budget"),
        (["m", "--out", "x", "--seed", "1"], "--seed is for --random-weights"),
        (["m", "--out", "x", "--block", "32"], "--block is for quantised weights: add --weights, or drop --block"),
        (["m", "--out", "x", "--head", "int4"], "--head is for quantised weights: add --weights, or drop --head"),
        (["m", "--out", "x", "--random-weights", "--seed", "-1"], "--seed must be at least 0"),
        (["lama2-7b", "--out", "x"], "unknown model 'lama2-7b': did you mean llama2-7b?"),
        (["generate", "b"], "one of the arguments --prompt --prompt-file --chat --token-ids is required"),
        (["generate", "b", "--prompt", "x", "--chat", "y"], "not allowed with"),
        (["generate", "b", "--prompt", "x", "--token-ids", "1"], "not allowed with"),
        (["generate", "b", "--token-ids", "1,x"], "--token-ids: invalid token_ids value: '1,x'"),
        (["generate", "--prompt", "x"], "required: BUNDLE"),
        (["generate", "b", "--prompt", "x", "--backend", "gpu"], "invalid choice: 'gpu'"),
        (["generate", "b", "--prompt", "x", "--top-p", "2"], "top_p must lie in (0, 1]"),
        (["generate", "b", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "b", "--prompt", "x", "--temperature", "-1"], "temperature must be 0"),
        (["check"], "required: BUNDLE"),
        (["info"], "required: BUNDLE"),
        (["recipes", "x"], "unrecognized arguments: x"),
        (["build-plugin", "--gpu-arch", "sm_75"], "give architectures from sm_80 on"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, run: Run, exports: list[Any]) -> None:
    refused(run(*arguments), says)
    assert not exports


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_and_version(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    argv = command.split()
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as caught:
            main([*argv, option])
        assert caught.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        if option == "--version":
            assert out == f"less-export {__version__}\n"
        else:
            assert out.startswith(f"usage: {' '.join(['less-export', *argv])}")
            assert "--verbose" in out
            assert max(map(len, out.splitlines())) <= 80
    if not command:
        assert "less-export llama2-7b --out engine.plan" in run_help()


def run_help() -> str:
    """The help as the installed command prints it."""
    argv = [str(Path(sys.executable).with_name("less-export")), "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def examples(text: str) -> list[list[str]]:
    """The command lines at the end of a help text, split into arguments."""
    title, *lines = text.rpartition("\n\n")[2].splitlines()
    assert title == "examples:"
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_and_options_of_every_command(name: str) -> None:
    parser = COMMANDS[name].parser()
    lines = examples(parser.format_help())
    assert len(lines) == 2
    for program, *argv in lines:
        assert program == "less-export"
        command, arguments = split(argv)
        assert command.name == name
        parser.parse_args(arguments)
    assert [a.dest for a in parser._actions if not a.help] == []
    grouped = {a.dest for g in parser._action_groups if g.title not in _DEFAULT_GROUPS for a in g._group_actions}
    assert {a.dest for a in parser._actions} == grouped


#: Titles of argparse's own groups, which do not describe their options.
_DEFAULT_GROUPS = ("positional arguments", "options")


def test_the_overview_lists_every_command() -> None:
    text = overview().format_help()
    for command in COMMANDS.values():
        assert re.search(rf"^  {command.name} +{command.summary}$", text, re.M)
    for _, *argv in examples(text):
        command, arguments = split(argv)
        command.parser().parse_args(arguments)


def test_without_arguments_the_overview_is_shown(run: Run) -> None:
    result = run()
    assert (result.code, result.out) == (1, overview().format_help())


def test_parsers_need_no_torch() -> None:
    code = (
        "import sys; from less_export.cli.commands import COMMANDS; "
        "print(*(c.parser().format_help() for c in COMMANDS.values())); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_of_train_states_the_defaults_of_training() -> None:
    actions = {a.dest: a for a in COMMANDS["train"].parser()._actions}
    assert actions["parametrisation"].choices == tuple(PARAMETRISATIONS)
    assert actions["quality"].choices == tuple(options.QUALITIES)
    fast, high = (options.QUALITIES[n] for n in ("fast", "high"))
    for figures in (
        "fast: {1} sequences, {0} steps a layer, {2} end to end (default)".format(*fast),
        "high: {1}, {0} and {2}".format(*high),
    ):
        assert figures in str(actions["quality"].help)
    defaults = {"rank": options.DEFAULT_RANK, "hidden": options.DEFAULT_HIDDEN, "seq_len": options.DEFAULT_LENGTH}
    for name, default in defaults.items():
        assert f" {default})" in str(actions[name].help)


def test_a_folder_named_like_a_command(
    run: Run, exports: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("export", "check"):
        (tmp_path / name).mkdir()
        for argv in ((f"./{name}",), ("export", f"./{name}"), ("export", name)):
            assert run(*argv, "--out", "b").code == 0
    models = [model for model, *_ in exports]
    assert models == ["./export", "./export", "export", "./check", "./check", "check"]
    refused(run("export", "--out", "b"), "required: MODEL")


def test_interrupted_training_resumes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("less_export.training.job.train", train)
    result = run("train", "gemma3-270m", "--out", tmp_path / "k.safetensors")
    assert result.code == INTERRUPTED
    assert result.err == "less-export: error: interrupted; rerun the same command to resume\n"


def test_the_package_runs_as_a_module() -> None:
    argv = [sys.executable, "-m", "less_export", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"less-export {__version__}\n"


# ------------------------------------------------------------------ weights that cannot be downloaded


def _answer(code: int) -> httpx2.Response:
    return httpx2.Response(code, request=httpx2.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_errors.GatedRepoError("no", response=_answer(403)), "is gated: accept its licence at https://"),
        (hub_errors.GatedRepoError("no", response=_answer(401)), "run `hf auth login`"),
        (hub_errors.RepositoryNotFoundError("no", response=_answer(404)), "is not on the hub, or private"),
        (hub_errors.LocalEntryNotFoundError("no\nno"), "is not in the cache, and the hub cannot be reached"),
        (hub_errors.HfHubHTTPError("500\nOops", response=_answer(500)), "downloaded (HfHubHTTPError: 500 Oops)"),
        (hub_errors.HFValidationError("odd id"), "cannot be downloaded (HFValidationError: odd id)"),
        (httpx2.ReadTimeout("slow"), "cannot be downloaded (ReadTimeout: slow)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)  # fmt: skip
def test_weights_cannot_be_had(
    error: Exception, says: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for out in ("engine.plan", "bundle"):
        for model in ("llama2-7b", "meta-llama/Llama-2-7b-hf"):
            refused(run(model, "--out", tmp_path / out), "meta-llama/Llama-2-7b-hf", "local", says)
    assert not list(tmp_path.iterdir())


def test_gated_model_names_the_recipe_that_needs_no_access(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise hub_errors.GatedRepoError("no", response=_answer(403))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hint = "to measure without weights: less-export llama2-7b --random-weights"
    recipe, hub_id = "llama2-7b", "meta-llama/Llama-2-7b-hf"
    for arguments in ([recipe], [hub_id], [hub_id, "--random-weights"]):
        refused(run(*arguments, "--out", tmp_path / "b"), "is gated", hint)
    (tmp_path / "text.txt").write_text("Once upon a time")
    train = run("train", hub_id, "--data", tmp_path / "text.txt", "--out", tmp_path / "k.safetensors")
    for result in (run("org/other", "--out", tmp_path / "b"), train):
        refused(result, "is gated")
        assert "--random-weights" not in result.err


@pytest.mark.slow
def test_offline_as_a_user_sees_it(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    arguments = [str(Path(sys.executable).with_name("less-export")), "llama2-7b", "--out", "b"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment)
    refused(Result(done.returncode, done.stdout, done.stderr), "meta-llama/Llama-2-7b-hf is not in the cache")
    assert done.stdout == ""
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------ other


def test_recipes(run: Run) -> None:
    result = run("recipes")
    assert (result.code, result.err) == (0, "")
    for recipe in recipes.all_recipes():
        row = next(line for line in result.out.splitlines() if line.split()[:1] == [recipe.name])
        assert recipe.hub in row
    shown = {x["name"]: x for x in json.loads(run("recipes", "--json").out)}
    assert list(shown) == recipes.names()
    assert shown["llama2-7b"]["memory"]["full_cache_bytes"] == {"2048": 1 << 30, "4096": 2 << 30, "32768": 16 << 30}
    assert shown["llama2-7b"]["architecture"]["hidden_size"] == 4096


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "--json"], ["lama2-7b", "--out", "x"], ["eval", "lama2-7b"]]
)
def test_commands_that_need_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from less_export.cli.main import main; main({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("lama2-7b" in arguments) == ("did you mean llama2-7b?" in done.stderr)


def test_export_says_what_it_does(run: Run, source: Path, plain: Path, quick: None, tmp_path: Path) -> None:
    result = run(source, "--out", tmp_path / "b", *bundles.QUICK_OPTIONS)
    assert (result.code, result.out) == (0, f"{tmp_path / 'b'}\n")
    lines = result.err.splitlines()
    assert lines[0].startswith("less-export: warning: no --kernels given")
    assert "less-export: tracing for ONNX Runtime" in lines
    assert all(line.startswith("less-export: ") for line in lines)
    assert generated(run, tmp_path / "b", "--prompt", PROMPT) == generated(run, plain, "--prompt", PROMPT)


def test_verbose_shows_where(plain: Path) -> None:
    from less_export.errors import UsageError

    with pytest.raises(UsageError):
        main(["generate", str(plain), "--prompt", "", "--verbose"])
