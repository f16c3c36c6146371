"""Rules of the sources, checked in their syntax trees: private names, printing, renaming."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "less_export"
LIBRARIES = ("transformers", "torch")
COMPAT = PACKAGE / "hf" / "compat.py"
#: Attention as torch defines it, where F's may be replaced; and a type that argparse does not export.
ALLOWED = {"torch._C", "torch._C._nn", "argparse._ArgumentGroup"}


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its path inside it."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 60
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in files}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Names that the package defines: functions, classes, variables, attributes of ``self``."""
    names = set()
    for node in (n for tree in trees.values() for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names and submodules of transformers and torch that a module uses.

    An attribute counts unless the package defines one of that name; so does a name in getattr or setattr.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            top, *below = str(node.module).split(".")
            if top in LIBRARIES:
                if (below and top == "transformers") or any(map(is_private, below)):
                    yield str(node.module)
                yield from (f"{node.module}.{a.name}" for a in node.names if is_private(a.name))
        elif isinstance(node, ast.Import):
            for name in (a.name for a in node.names):
                top, *below = name.split(".")
                if top in LIBRARIES and ((below and top == "transformers") or any(map(is_private, below))):
                    yield name
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield ast.unparse(node)


def test_private_names_are_in_compat_only() -> None:
    trees = sources()
    own = own_names(trees)
    used = {(path, name) for path, tree in trees.items() for name in private_names(tree, own)}
    elsewhere = {(path, name) for path, name in used if PACKAGE / path != COMPAT}
    assert not {(path, name) for path, name in elsewhere if name not in ALLOWED}
    assert len(used - elsewhere) > 10


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.utils import logging",
        "import transformers.masking_utils",
        "from transformers import _x",
        "from torch._subclasses import fake_tensor",
        "model._init_weights(module)",
        "getattr(config, '_attn_implementation_internal', None)",
    ],
)
def test_private_names_are_recognised(line: str) -> None:
    assert list(private_names(ast.parse(line), {"_own"}))
    assert not list(private_names(ast.parse("from transformers import AutoConfig\nx._own\nimport torch.nn"), {"_own"}))


def printing(tree: ast.Module) -> list[int]:
    """Lines that print, or write to the standard streams."""
    return calls(tree, "print", "sys.stdout.write", "sys.stderr.write")


def test_only_the_command_line_prints() -> None:
    lines = {path: printing(tree) for path, tree in sources().items()}
    assert not {path: x for path, x in lines.items() if x and not path.startswith("cli/")}
    assert any(x for path, x in lines.items() if path.startswith("cli/"))


def calls(tree: ast.Module, *names: str) -> list[int]:
    """Lines that call one of the functions."""
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in names]


def test_one_place_renames_files() -> None:
    """It makes sure that what it renames is on the disk before."""
    renaming = {path for path, tree in sources().items() if calls(tree, "os.replace", "os.rename", "shutil.move")}
    assert renaming == {"bundle/files.py"}


def test_pickles_hold_only_tensors() -> None:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path
        assert not calls(tree, "pickle.load", "pickle.loads"), path
