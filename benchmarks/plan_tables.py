"""A table for planning a service: how many sequences fit into a GB, and from which length on LESS takes less."""

from __future__ import annotations

import bisect

from less_export.cli.recipes import RECIPE_LENGTHS, full_caches
from less_export.contract import SLOT_DTYPES, Contract
from less_export.hf.recipes import all_recipes

_GB = 10**9
#: Where the search for a length ends.
_LONGEST = 2**20


def sessions() -> tuple[list[str], list[list[str]]]:
    """Sequences per GB of cache, and the length at which a full cache has the bytes of the state."""
    rows = []
    for recipe in all_recipes():
        contracts = [recipe.contract().with_slots(dtype) for dtype in SLOT_DTYPES]
        states = [f"{_GB // c.state_bytes():,}" for c in contracts]
        full = [f"{_per_gb(count)}{mark}" for count, mark in full_caches(recipe)]
        rows.append([f"`{recipe.name}`", *states, *full, *(f"{_equal_length(c):,}" for c in contracts)])
    lengths = [f"full cache at {n // 1024}k" for n in RECIPE_LENGTHS]
    equal = [f"equal at, {kind} slots" for kind in ("16-bit", "int8")]
    return ["recipe", "LESS, 16-bit slots", "LESS, int8 slots", *lengths, *equal], rows


def _per_gb(count: int) -> str:
    return f"{_GB // count:,}" if count <= _GB else f"{_GB / count:.2f}"


def _equal_length(contract: Contract) -> int:
    """The shortest text whose full cache takes as much as the state."""
    return bisect.bisect_left(range(_LONGEST), contract.state_bytes(), key=contract.full_cache_bytes)
