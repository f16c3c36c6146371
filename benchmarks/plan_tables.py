"""Tables for planning, computed from the recipes: sequences per GB, the length from which LESS takes less, bytes that a
decode step moves, requests that these allow, and division by KV heads."""

from __future__ import annotations

import bisect
import math

from less_export.cli.recipes import RECIPE_LENGTHS, full_caches
from less_export.contract import SLOT_DTYPES, Contract
from less_export.dtypes import item_bytes
from less_export.hf.recipes import Recipe, all_recipes

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


#: Recipes and rows of a step of the tables of traffic.
_MOVING = ("gemma3-270m", "llama2-7b", "llama3.1-8b", "qwen3-4b")
_ROWS = (1, 16, 64)


def weight_bytes(recipe: Recipe) -> int:
    """Bytes of the matrices that a decode step reads once for all rows, in the recipe's dtype.

    Those of attention and MLP of all layers, and of the logits. Of an embedding, a step reads a line for each row;
    norms and biases are less than 0.1%.
    """
    facts, width = recipe.architecture, recipe.architecture["hidden_size"]
    # queries and output; keys and values
    attention = sum(2 * width * layer.head_dim * (layer.query_heads + layer.kv_heads) for layer in recipe.layers())
    gated = "intermediate_size" in facts  # of the recipes, only Falcon's MLP has no gate
    mlp = 3 * width * facts["intermediate_size"] if gated else 2 * width * 4 * width
    elements = attention + facts["num_hidden_layers"] * mlp + facts["vocab_size"] * width
    return elements * item_bytes(recipe.dtype)


def state_traffic(contract: Contract) -> int:
    """Bytes of the state that a decoded token reads and writes in place, as the plugin does, for one row.

    Read: keys and values of all slots with their scales, positions and scores; psi of the token that is evicted; the
    low-rank state. Written: the low-rank state, the scores where the policy has any, and else one slot.
    """
    moved = 0
    for tensor in contract.state():
        layer, name, whole = contract.layers[tensor.layer], tensor.field.name, tensor.row_bytes
        in_slots, low_rank = "capacity" in tensor.field.dims, name in ("psi", "h", "z", "h_scale")
        if low_rank and not layer.absorb:
            continue
        scored = layer.policy.scoring != "none"
        one = whole // layer.capacity if in_slots else whole
        if name == "score":
            moved += 2 * whole if scored else 0
        else:
            moved += (one if name == "psi" else whole) + one
    return moved


def _caches(recipe: Recipe) -> list[tuple[int, int, str]]:
    """Bytes that a row reads and writes for a token, and that it holds: LESS, and full caches of ``RECIPE_LENGTHS``."""
    contract = recipe.contract()
    full = [(held + contract.full_cache_bytes(1), held, mark) for held, mark in full_caches(recipe)]
    return [(state_traffic(contract), contract.state_bytes(), ""), *full]


def _moving() -> list[tuple[Recipe, int, int]]:
    """Recipes of the tables of traffic, with the bytes of their weights: without and with the kernels of LESS."""
    recipes = [r for r in all_recipes() if r.name in _MOVING]
    return [(r, weight_bytes(r), weight_bytes(r) + r.kernel_bytes()) for r in recipes]


def traffic() -> tuple[list[str], list[list[str]]]:
    """Bytes that a decoded token moves, by rows of a step: its share of the weights, and its cache."""
    rows = []
    for recipe, plain, with_kernels in _moving():
        (state, _, _), *full = _caches(recipe)
        for count in _ROWS:
            less = with_kernels / count + state
            cells = [f"{with_kernels / count / 1e6:,.1f}", f"{state / 1e6:,.1f}", f"{less / 1e6:,.1f}"]
            totals = [(plain / count + moved, mark) for moved, _, mark in full]
            cells += [f"{total / 1e6:,.1f} ({total / less:.2f}x){mark}" for total, mark in totals]
            rows.append([f"`{recipe.name}`", str(count), *cells])
    lengths = [f"full cache at {n // 1024}k" for n in RECIPE_LENGTHS]
    return ["recipe", "rows", "weights / rows", "state", "LESS", *lengths], rows


#: Memory (GB) and bandwidth (GB/s) of GPUs, by NVIDIA's data sheets.
_GPUS = {"L4": (24, 300), "H100 SXM": (80, 3350), "H200 SXM": (141, 4800)}
#: Tokens of an answer.
ANSWER = 256


def requests() -> tuple[list[str], list[list[str]]]:
    """Answers a second that the bandwidth of a GPU allows at most, and in how many rows."""
    rows = []
    for recipe, plain, with_kernels in _moving():
        less, *full = _caches(recipe)
        for gpu, (memory, bandwidth) in _GPUS.items():
            cells = [_bound(with_kernels, *less[:2], memory, bandwidth)]
            cells += [_bound(plain, moved, held, memory, bandwidth) + mark for moved, held, mark in full]
            rows.append([f"`{recipe.name}`", gpu, *cells])
    lengths = [f"full cache at {n // 1024}k" for n in RECIPE_LENGTHS]
    return ["recipe", "GPU", "LESS", *lengths], rows


def _bound(weights: int, moved: int, held: int, memory: int, bandwidth: int) -> str:
    """bandwidth / bytes of a step * rows / tokens of an answer, with as many rows as fit, at most ``_ROWS[-1]``."""
    count = min(_ROWS[-1], (memory * _GB - weights) // held)
    if count < 1:
        return "does not fit"
    steps = bandwidth * _GB / (weights + count * moved)
    return f"{steps * count / ANSWER:,.2f} ({count})"


#: Tables by name.
PARTS = {"plan": sessions, "traffic": traffic, "requests": requests, "divided": divided}
