"""What the command line prints: tables of a bundle, of a check, of the recipes."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bundle.artifact import Artifact, Bundle
from ..errors import UsageError
from ..hf.recipes import Recipe
from ..runtime.generate import Generator

if TYPE_CHECKING:
    from ..evaluation.parity import Report


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        text = index == 0 or column in ("what", "dtype", "policy", "source", "shape")
        made.add_column(column, justify="left" if text else "right", overflow="fold")
    return made


def show(made: Table) -> None:
    """Print to stdout, as wide as needed where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(made)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def print_info(bundle: Bundle) -> None:
    """Files, layers and memory of a bundle."""
    m = bundle.manifest
    print(f"{m.model['name']} ({m.model['class']}, {m.model['parameters']:,} parameters)")
    files = table("files", "file", "what", "size")
    kinds = {"ort": "graph for ONNX Runtime", "trt": "graph for TensorRT", "plan": "TensorRT engine"}
    for found in m.artifacts:
        files.add_row(found.file, kinds.get(found.kind, found.kind), size(bundle.path(found.file).stat().st_size))
    kind = m.settings.get("weights")
    for weight in m.weights:
        files.add_row(weight.file, f"weights, linear layers in {kind}" if kind else "weights", size(weight.bytes))
    for name, extra in (("tokenizer", m.tokenizer), ("kernels", m.kernels)):
        if extra is not None and extra.file:
            files.add_row(extra.file, name, size(bundle.path(extra.file).stat().st_size))
    show(files)
    for found in m.artifacts:
        _print_contract(found)
        _print_memory(found, m.kernels.bytes if m.kernels else 0)


def _print_contract(found: Artifact) -> None:
    contract = found.contract
    layers = table(f"layers of {found.file}", "layers", "policy", "slots", "heavy", "recent", "window", "rank")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, s in enumerate(contract.layers):
        rank = str(s.rank) if s.absorb else "off"
        groups.setdefault((s.policy.name, s.capacity, s.heavy, s.recent, s.window or "-", rank), []).append(index)
    for facts, indices in groups.items():
        layers.add_row(_ranges(indices), *(str(x) for x in facts))
    show(layers)
    io = table(f"inputs and outputs of {found.file} ({contract.dtype})", "tensor", "dtype", "shape")
    last = len(contract.layers) - 1
    shown = [*contract.tokens(), *(s.past for s in contract.state() if s.layer in (0, last)), contract.logits_spec()]
    for spec in shown:
        io.add_row(spec.name, spec.dtype, ", ".join(map(str, spec.shape)))
    io.add_row("present.*", "", "like past.*")
    show(io)


def _print_memory(found: Artifact, kernel_bytes: int) -> None:
    contract = found.contract
    memory = table(f"memory of one sequence ({contract.dtype})", "what", "bytes", "against LESS")
    state = contract.state_bytes()
    memory.add_row("LESS state, any length", size(state), "1.0x")
    marks = {n: _mark(n, contract.trained_length) for n in (1024, 4096, 32768)}
    for length, mark in marks.items():
        full = contract.full_cache_bytes(length)
        memory.add_row(f"full cache at {length:,} tokens{mark}", size(full), f"{full / state:.1f}x")
    kernels = size(kernel_bytes) if kernel_bytes else "none (low-rank term off)"
    memory.add_row("kernels' weights, once for all sequences", kernels, "")
    show(memory)
    if any(marks.values()):
        print(BEYOND)


def _ranges(numbers: Sequence[int]) -> str:
    """``0-4, 6, 8-9``"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def print_report(report: Report) -> None:
    """Outcome of a check in one line, and its worst tensors where it failed."""
    state = "low-rank term off"
    if any(name.endswith(".h") for name in report.differences):
        state = f"H {report.largest('h'):.1e}, z {report.largest('z'):.1e}"
    print(
        f"{'passed' if report.passed else 'FAILED'}: {report.tokens} tokens in {report.steps} steps, "
        f"{report.evicted} evicted; largest error: logits {report.largest('logits'):.1e}, "
        f"positions {report.largest('position'):.1%} of slots, {state}"
    )
    if report.passed:
        return
    worst = table("worst tensors (error as a share of the largest value)", "tensor", "error", "limit", "step", "")
    for d in report.worst():
        worst.add_row(d.tensor, f"{d.error:.2e}", f"{d.limit:.0e}", str(d.step), "" if d.passed else "too large")
    show(worst)


def figures(report: Report) -> dict[str, Any]:
    """A check as JSON."""
    return {
        "passed": report.passed,
        "tokens": report.tokens,
        "steps": report.steps,
        "evicted": report.evicted,
        "differences": [vars(d) | {"passed": d.passed} for d in report.worst(len(report.differences))],
    }


#: Lengths at which a recipe's full cache is shown.
RECIPE_LENGTHS = (2048, 4096, 32768)
#: Said of figures that are marked.
BEYOND = "*: more tokens than the model has positions."
#: The paper's budgets.
PAPER_BUDGETS = ("2%", "5%", "10%")


def recipe_figures(recipe: Recipe) -> dict[str, Any]:
    """A recipe and what one sequence of it takes, as JSON values."""
    contract = recipe.contract()
    full = {str(n): contract.full_cache_bytes(n) for n in RECIPE_LENGTHS}
    budgets = {b: replace(recipe, budget=b, layer_budgets=None).contract().state_bytes() for b in PAPER_BUDGETS}
    figures = {
        "state_bytes": contract.state_bytes(),
        "state_bytes_at_budget": budgets,
        "full_cache_bytes": full,
        "kernel_bytes": recipe.kernel_bytes(),
    }
    return {**asdict(recipe), "memory": figures}


def full_caches(recipe: Recipe) -> list[tuple[int, str]]:
    """Bytes of the full cache at each of ``RECIPE_LENGTHS``, and ``*`` where the model has fewer positions."""
    longest = recipe.architecture["max_position_embeddings"]
    contract = recipe.contract()
    return [(contract.full_cache_bytes(n), _mark(n, longest)) for n in RECIPE_LENGTHS]


def _mark(length: int, longest: int | None) -> str:
    return BEYOND[0] if longest is not None and length > longest else ""


def print_recipes(found: Sequence[Recipe]) -> None:
    """The named models, what they choose and what one sequence of them takes."""
    lengths = [f"full at {n // 1024}k" for n in RECIPE_LENGTHS]
    made = table("recipes", "name", "source", "cache", "LESS, any length", *lengths, "kernels")
    for r in found:
        memory = recipe_figures(r)["memory"]
        full = [size(count) + mark for count, mark in full_caches(r)]
        figures = (size(memory["state_bytes"]), *full, size(memory["kernel_bytes"]))
        made.add_row(r.name, r.hub, f"{r.policy} {r.budget} of {r.context}", *figures)
    show(made)
    print("LESS and full cache: bytes of one sequence. Kernels: the low-rank term's weights, once for all sequences.")
    print(BEYOND)


def story() -> str:
    """The opening of a book in the public domain: what ``check`` feeds by default."""
    return (importlib.resources.files("less_export") / "data" / "alice.txt").read_text(encoding="utf-8")


def enough_tokens(generator: Generator, text: str, wanted: int | None, own_text: bool) -> list[int]:
    """Token ids for a check: enough of them that every layer evicts, by repeating the story if need be.

    A bundle without a tokenizer gets the text's bytes, folded into its vocabulary.
    """
    contract = generator.backend.contract
    if generator.tokenizer is not None:
        ids = generator.tokenizer.encode(text)
    else:
        ids = [b % contract.vocab_size for b in text.encode()]
    evicting = [s.capacity for s in contract.layers if not s.policy.keeps_all]
    count = min(max(evicting, default=contract.chunk) + 64, 2048) if wanted is None else max(wanted, 0)
    limit = contract.token_limit()
    if limit is not None and count > limit:
        count = limit
    if own_text:
        if wanted is not None and wanted > len(ids):
            raise UsageError(f"--tokens {wanted}, but the text has {len(ids)} tokens: give a longer text")
        return ids[: limit if wanted is None else count]
    return (ids * (count // len(ids) + 1))[:count]
