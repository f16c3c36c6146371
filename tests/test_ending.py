"""How commands end: interrupts at any moment, output that nobody takes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from less_export.cli import recipes as recipes_command
from less_export.cli.ending import FAILED, INTERRUPTED
from less_export.cli.main import main
from less_export.errors import UsageError

from .bundles import Run, refused
from .marks import exhaustive_but, some_of
from .training_support import OPTIONS

pytest_plugins = ["tests.bundles", "tests.training_support"]

COMMAND = [sys.executable, "-m", "less_export.cli.main"]


def interruptible() -> None:
    """Run in a new process: a shell's background job ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(argv: list[object], code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, after ``code``."""
    program = f"{code}\nimport sys\nfrom less_export.cli.main import main\nsys.exit(main())"
    call = [sys.executable, "-c", program, *map(str, argv)]
    return subprocess.run(call, text=True, preexec_fn=interruptible, **{"capture_output": True, **options})


# ------------------------------------------------------------------ interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        ImportError("numpy._core.multiarray failed to import", name="numpy"),
        UsageError("checking the export needs ONNX Runtime: pip install 'less-export[cpu]'"),
        SystemError("initialization of _x raised unreported exception"),
        RuntimeError("a library's"),
        SystemExit(3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_an_interrupt_turns_into(
    error: BaseException, number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries catch the KeyboardInterrupt, and raise something else."""

    def interrupted(_: object) -> int:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise error from None
        raise AssertionError

    before = signal.getsignal(number), sys.excepthook, sys.unraisablehook
    monkeypatch.setattr(recipes_command, "all_recipes", lambda: interrupted(None))
    result = run("recipes")
    assert (result.code, result.err, result.out) == (INTERRUPTED, "less-export: error: interrupted\n", "")
    assert (signal.getsignal(number), sys.excepthook, sys.unraisablehook) == before


def test_what_a_library_drops_is_not_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropped:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def interrupted() -> Any:
        held = Dropped()
        del held
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(recipes_command, "all_recipes", interrupted)
    assert run("recipes").err == "less-export: error: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_python_drops_is_sent_again(number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    def interrupted() -> Any:
        held = Dropping()
        del held  # the KeyboardInterrupt ends here
        threading.Event().wait(30)
        raise AssertionError

    monkeypatch.setattr(recipes_command, "all_recipes", interrupted)
    before = threading.active_count()
    result = run("recipes")
    assert (result.code, result.err) == (INTERRUPTED, "less-export: error: interrupted\n")
    assert threading.active_count() == before


def test_ignored_interrupts_stay_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes_command, "recipe_figures", lambda _: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("recipes", "--json").code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_run_commands() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["recipes"])))
    thread.start()
    thread.join()
    assert codes == [0]


#: Before a command: the import of a module sends SIGINT, as if the user pressed Ctrl-C at that moment.
_WHEN_IMPORTED = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


def _imports(kind: str) -> list[Any]:
    quick = {
        "export": ["less_export.cli.commands"],
        "generate": ["numpy.dtypes", "onnxruntime", "tokenizers", "jinja2.sandbox"],
        "check": ["torch.nn"],
        "info": ["numpy._core._exceptions"],
    }
    slow = {
        "export": ["rich.console", "torch._C", "transformers.models.llama.modeling_llama", "onnxscript", "onnxruntime"],
        "check": ["torch._C", "transformers.modeling_utils"],
        "eval": ["torch.utils.checkpoint", "transformers"],
        "train": ["torch.optim", "safetensors.torch", "transformers.modeling_utils"],
    }
    chosen = quick if kind == "quick" else slow
    return [(command, module) for command, modules in chosen.items() for module in modules]


def _interrupted_import(command: str, module: str, source: Path, plain: Path, out: Path) -> None:
    arguments: dict[str, list[object]] = {
        "export": ["export", source, "--out", out / "b"],
        "generate": ["generate", plain, "--chat" if module.startswith("jinja2") else "--prompt", "x"],
        "check": ["check", plain],
        "info": ["info", plain],
        "eval": ["eval", plain],
        "train": ["train", source, "--out", out / "k.safetensors"],
    }  # fmt: skip
    done = ended(arguments[command], _WHEN_IMPORTED.format(module=module))
    assert done.returncode == INTERRUPTED, done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("less-export: error: interrupted"), done.stderr
    assert all(line.startswith("less-export: ") for line in before), done.stderr
    assert "pip install" not in done.stderr
    assert done.stdout == ""
    assert not list(out.iterdir())


@pytest.mark.parametrize(("command", "module"), _imports("quick"))
def test_interrupted_imports(command: str, module: str, source: Path, plain: Path, tmp_path: Path) -> None:
    _interrupted_import(command, module, source, plain, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "module"), some_of(_imports("slow"), 2))
def test_interrupted_heavy_imports(command: str, module: str, source: Path, plain: Path, tmp_path: Path) -> None:
    _interrupted_import(command, module, source, plain, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"),
    exhaustive_but(
        itertools.product(["train", "check", "eval"], [signal.SIGINT, signal.SIGTERM]),
        ("train", signal.SIGINT),
        ("check", signal.SIGTERM),
        ("eval", signal.SIGINT),
    ),
)
def test_a_real_signal(
    command: str, number: signal.Signals, source: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    """It is sent when the first line of progress is shown."""
    arguments = {
        "train": [source, "--data", text, "--out", tmp_path / "k.safetensors", *OPTIONS, "--steps", "100000"],
        "check": [plain, "--tokens", "2000"],
        "eval": [plain, "--data", text, "--seq-len", "200"],
    }
    call = [*COMMAND, command, *map(str, arguments[command])]
    with subprocess.Popen(
        call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as process:
        assert process.stderr is not None
        seen = [process.stderr.readline()]
        process.send_signal(number)
        try:
            out, rest = process.communicate(timeout=120)
        finally:
            process.kill()
    *_, last = (seen[0] + rest).splitlines()
    assert (process.returncode, out) == (INTERRUPTED, ""), rest
    assert last.startswith("less-export: error: interrupted"), rest
    assert "Traceback" not in rest


# ------------------------------------------------------------------ output that nobody takes


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--json"], ["--help"], ["--version"]])
def test_a_full_device(arguments: list[object], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = ended(arguments, stdout=full, stderr=subprocess.PIPE, capture_output=False, env=environment)
        assert done.returncode == FAILED
        assert done.stderr == "less-export: error: cannot write the output: No space left on device\n"
        done = ended(arguments, stderr=full, stdout=subprocess.PIPE, capture_output=False, env=environment)
        assert done.returncode == 0
        assert done.stdout
        done = ended(["lama2-7b", "--out", "x"], stderr=full, stdout=full, capture_output=False, env=environment)
        assert done.returncode == FAILED


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["recipes", "recipes --json", "--help"])
def test_a_reader_that_has_had_enough(arguments: str, unbuffered: str) -> None:
    script = f"{sys.executable} -m less_export.cli.main {arguments} | head -c 1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 1)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, plain: Path, tmp_path: Path) -> None:
    """A file that is opened must not become a stream."""
    commands = {f"info {plain}": 0, f"generate {plain} --prompt x --max-new-tokens 2": 0, "info x": 1}
    for arguments, code in commands.items():
        script = f"{sys.executable} -m less_export.cli.main {arguments} {closed}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert (done.stdout == "") == (">&-" in closed.replace("2>&-", "") or code == 1)


def test_files_on_a_full_device(plain: Path, source: Path, run: Run, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    refused(run("check", plain, "--json", full), f"cannot write {full}: No space left on device", after=1)
    refused(run("train", source, "--out", full), "is a device or a pipe")
    refused(run(source, "--out", full), "is a file")
    assert full.is_char_device()
    result = run("check", plain, "--json", "/dev/null")
    assert result.code == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(5, "Input/output error"), "cannot write the output: Input/output error"),
        (OSError(5, "Input/output error", "/x/y"), "cannot read or write /x/y: Input/output error"),
        (MemoryError("Unable to allocate 12 GiB"), "not enough memory: Unable to allocate 12 GiB"),
        (MemoryError(), "not enough memory: "),
    ],
)
def test_the_machines_faults(error: Exception, says: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes_command, "all_recipes", lambda: (_ for _ in ()).throw(error))
    refused(run("recipes"), says)
    with pytest.raises(type(error)):
        main(["recipes", "--verbose"])


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes_command, "all_recipes", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])
