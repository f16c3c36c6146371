"""Where modules may import from: only from floors below, and within their own entry of a floor."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "less_export"
#: Modules and packages, the lowest floor first; those of one floor are siblings and do not import one another.
FLOORS = (
    ("errors", "interrupts", "_version"),
    ("dtypes", "progress", "panics", "versions", "bundle.temporary"),
    ("less.policies",),
    ("contract",),
    ("config", "less.kernel_shapes", "bundle.files"),
    ("plan",),
    ("less", "bundle", "native"),
    ("hf", "tensorrt"),
    ("exporter", "training", "runtime"),
    ("view",),
    ("evaluation", "serving", "testing"),
    ("cli", ""),
    ("__main__",),
)
#: Modules that an installation without the extra "export" must be able to import.
LIGHT = ("errors", "dtypes", "less.policies", "contract", "config", "plan", "bundle.artifact", "hf.recipes", "cli.main")


def modules() -> dict[str, Path]:
    """Every module below the package by its name without the package's; the package itself is ""."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = (p.relative_to(ROOT / PACKAGE).with_suffix("").parts for p in paths)
    return {".".join(n[:-1] if n[-1] == "__init__" else n): p for n, p in zip(names, paths, strict=True)}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Full names of what a module imports anywhere: at the top, in functions, for type checkers."""
    path = MODULES[name]
    package = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def targets(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    below = (i.removeprefix(PACKAGE).removeprefix(".") for i in imports(name) if i.split(".")[0] == PACKAGE)
    return {i if i in MODULES else i.rpartition(".")[0] for i in below}


def place(name: str) -> tuple[int, str]:
    """Floor and entry of a module: the longest entry that it is or lies in."""
    entries = ((len(e), floor, e) for floor, row in enumerate(FLOORS) for e in row)
    fitting = [x for x in entries if name == x[2] or (x[2] and name.startswith(f"{x[2]}."))]
    assert fitting, f"{name} stands on no floor: add it to FLOORS"
    _, floor, entry = max(fitting)
    return floor, entry


GRAPH = {name: targets(name) for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name: str) -> None:
    here, own = place(name)
    for target in GRAPH[name]:
        floor, entry = place(target)
        assert floor < here or entry == own, f"{name} (floor {here}) imports {target} (floor {floor})"


def test_every_entry_is_a_module() -> None:
    assert set(itertools.chain(*FLOORS)) <= set(MODULES)
    assert set(LIGHT) <= set(MODULES)


def test_no_cycles() -> None:
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_one_runtime_needs_torch() -> None:
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", f"{PACKAGE}.hf"}
    needing = {n for n in MODULES for i in imports(n) if any(f"{i}.".startswith(f"{h}.") for h in heavy)}
    assert {n for n in needing if place(n)[1] == "runtime"} == {"runtime.torch"}


def test_light_modules_import_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx"}
    lines = ["import sys", *(f"import {PACKAGE}.{n}" for n in LIGHT), f"print(*sorted({heavy} & set(sys.modules)))"]
    argv = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_hints_name_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        assert "pip install 'less-export" not in text or path.name == "errors.py", f"{path}: use errors.install_hint"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_hint":
                named |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    assert named >= {"cpu", "gpu", "export", "eval", "plugin"}
    assert named <= set(project["optional-dependencies"])
