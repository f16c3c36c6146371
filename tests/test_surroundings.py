"""What commands find around them: no home folder, JSON that is nested deeply, tokenizers that panic."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from less_export.cli import recipes as recipes_command
from less_export.cli.ending import FAILED
from less_export.cli.main import main
from less_export.errors import EngineError, KernelError, LessExportError, UsageError
from less_export.hf import data
from less_export.hf.recipes import user_path
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.native import cache

from . import bundles
from .bundles import QUICK_OPTIONS, Run, refused
from .marks import exhaustive_but
from .test_ending import ended
from .test_tokenizer_facts import UNKNOWN, damaged, template

pytest_plugins = ["tests.bundles"]

# ------------------------------------------------------------------ no home folder


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the list of users."""
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "LESS_EXPORT_CACHE", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_no_home_folder(homeless: None, plain: Path, run: Run) -> None:
    assert run("generate", plain, "--prompt", "x", "--max-new-tokens", "2").code == 0
    with pytest.raises(EngineError, match="there is no home folder for the cache: set LESS_EXPORT_CACHE to a folder"):
        cache.cache_folder()
    with pytest.raises(EngineError, match="no home folder"):
        cache.is_known("0" * 64)
    assert str(user_path("~/x")) == "~/x"
    refused(run("~/x", "--out", "b"), "unknown model '~/x'")
    with pytest.raises(UsageError, match="~nobody-of-this-name"):
        data.read(["~nobody-of-this-name/x.txt"])


_UNKNOWN_USER = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""


@pytest.mark.slow
@pytest.mark.parametrize("home", exhaustive_but([{}, {"HOME": "/proc/nowhere"}], {}))
def test_an_export_without_a_home_folder(home: dict[str, str], source: Path, tmp_path: Path) -> None:
    """Nor can one be created."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **home}
    done = ended([source, "--out", tmp_path / "b", *QUICK_OPTIONS], _UNKNOWN_USER, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'b'}\n"), done.stderr
    assert all(line.startswith("less-export: ") for line in done.stderr.splitlines())
    recipe = ended(["llama2-7b", "--out", tmp_path / "c"], _UNKNOWN_USER, env=environment)
    refused(bundles.Result(recipe.returncode, recipe.stdout, recipe.stderr), "meta-llama/Llama-2-7b-hf")


# ------------------------------------------------------------------ deep JSON, and panics


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [70, 500, 100_000])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        pytest.param("tokenizer_config.json", marks=pytest.mark.slow),
    ],
)
def test_deep_files_of_a_checkpoint(name: str, depth: int, source: Path, tmp_path: Path, run: Run) -> None:
    folder = bundles.copy(source, tmp_path / "model")
    file = folder / name
    if name == "model.safetensors.index.json":  # which nobody reads beside a single file
        (folder / "model.safetensors").unlink()
    content = file.read_text().rstrip() if file.exists() else '{"weight_map": {}}'
    file.write_text(f'{content[:-1]}, "deep": {nested(depth)}}}')
    result = run(folder, "--out", tmp_path / "b", *QUICK_OPTIONS, "--no-validate")
    if result.code == 0:
        assert run("info", tmp_path / "b").code == 0, "what was written can be opened"
        assert name == "tokenizer_config.json"
    else:
        refused(result)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_deep_metadata_of_kernels(kernel_file: Path, tmp_path: Path) -> None:
    content = kernel_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = header["__metadata__"][key][:-1] + f', "deep": {nested(100_000)}}}'
    text = json.dumps(header).encode()
    (tmp_path / "k").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(KernelError, match=r"is not a usable kernel file \(maximum recursion depth exceeded"):
        Kernels.load(tmp_path / "k")


@pytest.mark.parametrize("fault", ["file", "text"])
def test_tokenizers_that_panic(fault: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, without the report that Rust writes."""
    folder = bundles.copy(source, tmp_path / "model")
    changes = {"file": {"model": {"merges": [["a", "b"]]}}, "text": {"post_processor": template([UNKNOWN])}}
    content = damaged(**changes[fault])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert main([str(folder), "--out", str(tmp_path / "b")]) == FAILED
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"less-export: error: cannot read the tokenizer of {folder}: it is damaged (")
    assert len(err.splitlines()) == 1
    with pytest.raises(LessExportError, match="damaged"):
        resolve(str(folder)).tokenizer()


def test_a_panic_at_a_training_text(capfd: pytest.CaptureFixture[str]) -> None:
    import tokenizers

    raw = tokenizers.Tokenizer.from_str(json.dumps(damaged(post_processor=template([UNKNOWN]))))

    class Panicking:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> Any:
            return raw.encode(text, add_special_tokens=True)

    encode, _ = data.encoder(Panicking())
    with pytest.raises(UsageError, match="the model's tokenizer fails on the text: it is damaged"):
        encode("Hello")
    assert capfd.readouterr().err == ""


def test_other_panics_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic() -> Any:
        raise PanicException("index out of\nrange")

    monkeypatch.setattr(recipes_command, "all_recipes", panic)
    refused(run("recipes"), "a library failed: index out of range")
