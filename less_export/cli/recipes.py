"""``less-export recipes``: the named models, what they choose and what one sequence of them takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..contract import SLOT_DTYPES
from ..hf.recipes import Recipe, all_recipes
from .options import Parser, general_options
from .tables import BEYOND, beyond_mark, show, size, table

#: Lengths (tokens) at which a recipe's full cache is shown.
RECIPE_LENGTHS = (2048, 4096, 32768)
#: The paper's budgets.
PAPER_BUDGETS = ("2%", "5%", "10%")


def parser() -> Parser:
    parser = Parser(
        "recipes",
        "[options]",
        "List the named models, with the bytes that one sequence takes.",
        ("less-export recipes", "less-export recipes --json"),
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print every fact of the recipes as JSON")
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps([recipe_figures(r) for r in all_recipes()], indent=1))
    else:
        _print_recipes(all_recipes())
    return 0


def recipe_figures(recipe: Recipe) -> dict[str, Any]:
    """A recipe and what one sequence of it takes, as JSON values."""
    contract = recipe.contract()
    full = {str(n): contract.full_cache_bytes(n) for n in RECIPE_LENGTHS}
    budgets = {b: replace(recipe, budget=b, layer_budgets=None).contract().state_bytes() for b in PAPER_BUDGETS}
    slots = {s: contract.with_slots(s).state_bytes() for s in SLOT_DTYPES}
    figures = {
        "state_bytes": contract.state_bytes(),
        "state_bytes_by_slots": slots,
        "state_bytes_at_budget": budgets,
        "full_cache_bytes": full,
        "kernel_bytes": recipe.kernel_bytes(),
    }
    return {**asdict(recipe), "memory": figures, "max_distance": recipe.max_distance_tokens()}


def full_caches(recipe: Recipe) -> list[tuple[int, str]]:
    """Bytes of the full cache at each of ``RECIPE_LENGTHS``, and ``*`` where the model has fewer positions."""
    positions = recipe.architecture["max_position_embeddings"]
    contract = recipe.contract()
    return [(contract.full_cache_bytes(n), beyond_mark(n, positions)) for n in RECIPE_LENGTHS]


def _print_recipes(recipes: Sequence[Recipe]) -> None:
    lengths = [f"full at {n // 1024}k" for n in RECIPE_LENGTHS]
    rows = table("recipes", "name", "source", "cache", "16-bit slots", "int8 slots", *lengths, "kernels")
    for r in recipes:
        memory = recipe_figures(r)["memory"]
        full = [size(count) + mark for count, mark in full_caches(r)]
        slots = map(size, memory["state_bytes_by_slots"].values())
        figures = (*slots, *full, size(memory["kernel_bytes"]))
        rows.add_row(r.name, r.hub, f"{r.policy} {r.budget} of {r.context}", *figures)
    show(rows)
    print("Slots: bytes of one sequence of any length, by what its slots hold. Full: those of a full cache in 16 bits.")
    print("Kernels: the low-rank term's weights, once for all sequences.")
    print(BEYOND)
