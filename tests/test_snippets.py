"""The code blocks of README, quickstart and how-to pages run, in order, with a tiny model in place of the named one."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import Any

import pytest

from less_export.cli.main import main

from . import bundles

pytest_plugins = ["tests.bundles"]

ROOT = Path(__file__).parent.parent
#: Documents whose blocks run, each in a folder of its own.
DOCUMENTS = ("README.md", "docs/quickstart.md", "docs/howto/embed.md")
#: The model that the documents name; a folder of this name holds a tiny one here.
MODEL = "gemma3-270m"
#: Additional options of commands, so that they take seconds.
LIGHTER = {
    "train": ("--seqs", "2", "--steps", "2", "--seq-len", "64", "--hidden", "6", "--tune-steps", "2"),
    "eval": ("--seqs", "2", "--seq-len", "64", "--positions", "16"),
    "export": ("--no-validate",),
}
#: Directives before a block: it does not run, or what it prints depends on the model.
NOT_RUN, VARIES = "not run: ", "text varies"

_BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"[\d.,]*\d(?:e[+-]\d+)?(?: [kMG]?B\b)?")


@dataclass(frozen=True)
class Block:
    """A code block: ``directive`` is the comment above it, or empty."""

    directive: str
    language: str
    text: str


def blocks(document: str) -> list[Block]:
    """The code blocks of a document that have a language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Block(*(group or "" for group in match.groups())) for match in _BLOCK.finditer(text)]


def run_command(line: str) -> str:
    """Stdout of a ``less-export`` command, run with the tiny model and lighter options."""
    program, *argv = shlex.split(line)
    assert program == "less-export", f"a block with {program} needs a 'not run' directive: {line}"
    if "--random-weights" not in argv:
        argv = [f"./{MODEL}" if word == MODEL else word for word in argv]
    argv += LIGHTER.get(argv[0] if "--out" not in argv or argv[0] == "train" else "export", ())
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    assert code == 0, f"{line}\n{err.getvalue()}"
    return out.getvalue()


def run_python(text: str, names: dict[str, Any]) -> str:
    """Output of Python code, run with the tiny model in the namespace ``names``."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(text.replace(f'"{MODEL}"', f'"./{MODEL}"'), names)
    return out.getvalue()


def check(expected: str, actual: str, directive: str, where: str) -> None:
    """Compare the output in a document with the printed output, except for numbers and white space.

    Numbers in the document are of the named model, printed ones of the tiny model. A document need not show
    what is printed; ``...`` stands for anything.
    """
    if directive == VARIES:
        assert actual.strip(), where
        return
    if not expected.strip():
        return
    shown, printed = (_NUMBER.sub("#", re.sub("─+", "─", text)) for text in (expected, actual))
    flags = ELLIPSIS | NORMALIZE_WHITESPACE
    assert OutputChecker().check_output(shown.strip() + "\n", printed.strip() + "\n", flags), (
        f"{where}\nshown:\n{expected}\nprinted:\n{actual}"
    )


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """Commands of a console block and the output shown below each."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command = command[:-1] + more
        yield command, output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.checkpoint(tmp_path_factory.mktemp("model") / MODEL, chat=True)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run(document: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).symlink_to(model)
    if document != "docs/quickstart.md":  # the others start with the quickstart's files
        bundles.bundle(model, tmp_path / "bundle")
    names: dict[str, Any] = {}
    printed = None
    for block in blocks(document):
        if block.directive.startswith(NOT_RUN):
            continue
        where = f"{document}: {block.text.splitlines()[0]}"
        if block.language == "text":
            if printed is not None:
                check(block.text, printed, block.directive, where)
            printed = None
        elif block.language == "console":
            for command, output in sessions(block.text):
                check(output, run_command(command), block.directive, f"{document}: {command}")
        elif block.language == "python":
            printed = run_python(block.text, names)
        else:
            pytest.fail(f"{where}: a block in {block.language} needs a 'not run' directive")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_directives_give_a_reason(document: str) -> None:
    for block in blocks(document):
        known = block.directive in ("", VARIES) or len(block.directive.removeprefix(NOT_RUN).split()) > 1
        assert known, block.directive
    text = (ROOT / document).read_text(encoding="utf-8")
    assert not re.search(r"^```$\n\S", re.sub(_BLOCK, "", text), re.M), "a code block without a language"
