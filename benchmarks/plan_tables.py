"""Tables for planning: sequences per GB, the length from which LESS takes less, and division by KV heads."""

from __future__ import annotations

import bisect
import math

from less_export.cli.recipes import RECIPE_LENGTHS, full_caches
from less_export.contract import SLOT_DTYPES, Contract
from less_export.dtypes import item_bytes
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


#: Sums over all GPUs in a layer of a divided decoder: after attention and after the MLP.
_SUMS = 2


def divided() -> tuple[list[str], list[list[str]]]:
    """On how many GPUs a decoder divides by KV heads, and what these exchange and hold."""
    rows = []
    for recipe in all_recipes():
        contract = recipe.contract()
        most = math.gcd(*(layer.kv_heads for layer in contract.layers))
        if most == 1:
            continue
        exchanged = _SUMS * len(contract.layers) * recipe.architecture["hidden_size"] * item_bytes("float16")
        state = contract.state_bytes()
        cells = [str(len(contract.layers)), str(most), f"{exchanged / 1e3:,.0f} kB", f"{state / 1e6:.2f} MB"]
        rows.append([f"`{recipe.name}`", *cells, f"{state / most / 1e6:.2f} MB"])
    return ["recipe", "layers", "most GPUs", "summed a token", "state of a sequence", "on each of these GPUs"], rows
