"""Progress reports of long work, and how the command line shows them."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import less_export
from less_export.cli.progress import Bars, library_log, spinner
from less_export.progress import Progress, Silent, Step, as_progress, prefixed

from .training_support import model_folder, trained

pytest_plugins = ["tests.bundles", "tests.training_support"]


class Recorder:
    """Records all reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.pieces: dict[str, tuple[int, int]] = {}

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Step]:
        def step(text: str = "", pieces: int = 1) -> None:
            self.pieces[name] = (self.pieces[name][0] + pieces, total)

        self.pieces[name] = (0, total)
        yield step


def test_what_is_accepted() -> None:
    assert isinstance(as_progress(None), Silent)
    recorder = Recorder()
    assert as_progress(recorder) is recorder
    lines: list[str] = []
    progress: Progress = as_progress(lines.append)
    progress.say("one")
    with progress.phase("two", 3) as step:
        step("not said", 2)
    prefixed(progress, "three: ").say("four")
    assert lines == ["one", "two", "three: four"]


@pytest.mark.slow
def test_an_export_takes_a_progress_or_a_function(source: Path, tmp_path: Path, quick: None) -> None:
    recorder, lines = Recorder(), list[str]()
    for name, progress in (("a", recorder), ("b", lines.append)):
        less_export.export(str(source), tmp_path / name, validate=False, budget="8", slots="model", progress=progress)
    assert recorder.lines == lines
    assert lines[0] == "tracing for ONNX Runtime"
    assert lines[-1] == "renaming"


def test_a_training_takes_a_progress_or_a_function(text: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    recorder, lines = Recorder(), list[str]()
    for seed, progress in enumerate((recorder, lines.append)):
        trained(folder, text, steps=1, seed=seed, progress=progress)
    assert recorder.pieces["layer 0"] == (2, 2)
    assert {"collecting what layer 0 gets", "layer 0", "layer 1"} <= set(recorder.pieces) <= set(lines)
    assert [x for x in lines if x not in recorder.pieces] == recorder.lines


def test_elsewhere_than_at_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.say("loading")
    with bars.phase("layer 3", 2) as step:
        step("error 0.5")
        assert capsys.readouterr().err == "less-export: loading\n"
    assert capsys.readouterr().err == "less-export: layer 3: 0 s, error 0.5\n"
    with spinner() as progress, progress.phase("checking", 1):
        assert capsys.readouterr().err == "less-export: checking\n"


def test_the_log_is_shown_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("less_export.tensorrt")
    for verbose in (False, True, False):
        with library_log(verbose):
            logger.debug("50% of a detail")
            logger.error("a complaint")
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err == ("[DEBUG] 50% of a detail\n[ERROR] a complaint\n" if verbose else "")


def test_the_library_is_silent_by_itself() -> None:
    """Without the application's handlers, logged errors are dropped (logging's last resort would print them)."""
    code = "import logging, less_export; logging.getLogger('less_export.x').error('a complaint')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
