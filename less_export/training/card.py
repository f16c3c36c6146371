"""The model card of a kernel file: what it is for, what it was trained on, what held-back text says about it.

Everything comes from the provenance in the file, which may be a stranger's: what is missing or of another kind is left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..less.feature_maps import Kernels

#: Provenance that the section on the cache shows, and how it names it.
_CACHE = {
    "policy": "policy",
    "score_half_life": "score half-life",
    "slot_dtype": "slots",
    "state_bits": "bits of the state",
    "max_distance": "largest distance",
    "rank": "features (rank)",
    "hidden": "hidden width",
    "parametrisation": "parametrisation",
    "layer_budgets": "budgets of layers",
    "seed": "seed",
}
_ERRORS = ("sparse", "start", "less")


def file_of(kernels: Path) -> Path:
    """Where the card of a kernel file is."""
    return kernels.with_name(f"{kernels.name}.md")


def card(kernels: Kernels) -> str:
    """The card, as Markdown."""
    facts = kernels.provenance
    lines = [f"# Kernels for {facts.get('model', 'an unnamed model')}", ""]
    layers = (
        f"{len(kernels.layers)} layers have a low-rank state" if kernels.layers else "No layer has a low-rank state"
    )
    lines += [f"{layers}; the weights take {kernels.nbytes():,} bytes.", ""]
    for title, part in (
        ("Cache", _cache(facts)), ("Texts", _texts(facts)), ("Layers", _layers(facts)), ("Together", _together(facts)),
    ):  # fmt: skip
        content = list(part)
        if content:
            lines += [f"## {title}", *content, ""]
    return "\n".join(lines)


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """What held-back text says against the kernels, one line each."""
    lines = []
    unused = [int(i) for i, x in _dicts(facts.get("layers")) if x.get("used") is False]
    if unused:
        lines.append(f"layers {unused}: the low-rank term does not pay on held-back text, so they have none")
    tuned = _numbers(facts.get("end_to_end"))
    if tuned.get("divergence_after", 0.0) >= tuned.get("divergence_sparse_bytes", 1e30):
        lines.append(
            "on held-back text the low-rank term pays in no layer: KL "
            f"{tuned['divergence_sparse_bytes']:.4f} if its bytes are spent on slots"
        )
    return lines


def _cache(facts: Mapping[str, Any]) -> Iterator[str]:
    rows = [(title, facts[name]) for name, title in _CACHE.items() if facts.get(name) is not None]
    slots = sorted({sum(x) for x in _lists(facts.get("slots"))})
    if slots:
        many = f"{slots[0]} to {slots[-1]}" if len(slots) > 3 else ", ".join(map(str, slots))
        rows.insert(1, ("slots per layer and KV head", many))
    if rows:
        yield from _table(("option", "value"), rows)


def _texts(facts: Mapping[str, Any]) -> Iterator[str]:
    data = facts.get("data")
    texts = [x for x in data if isinstance(x, dict)] if isinstance(data, list) else []
    if texts:
        hashes = [(x.get("name"), x.get("characters"), str(x.get("sha256"))[:12]) for x in texts]
        yield from _table(("text", "characters", "sha256"), hashes)
    count = _numbers(facts.get("sequences"))
    if "count" in count and "length" in count:
        longest = count.get("longest", count["length"])
        yield ""
        yield f"{count['count']:.0f} sequences of {count['length']:.0f} tokens (tuned on up to {longest:.0f})."
    run = _numbers(facts.get("run"))
    if "seconds" in run:
        memory = f" and at most {run['peak_memory_bytes'] / 1e9:.2f} GB of memory" if "peak_memory_bytes" in run else ""
        yield f"The run took {run['seconds'] / 60:.0f} minutes{memory}; if it resumed another, without that one."


def _layers(facts: Mapping[str, Any]) -> Iterator[str]:
    """Relative errors of what each layer adds, and gains, on held-back text."""
    rows = []
    for layer, stated in _dicts(facts.get("layers")):
        numbers = _numbers(stated)
        errors = [f"{numbers[n]:.4f}" if n in numbers else "" for n in _ERRORS]
        gain = f"{numbers['gain']:+.4f}" if "gain" in numbers else ""
        rows.append((layer, *errors, gain, "" if stated.get("used", True) else "slots instead"))
    if rows:
        yield "Relative errors on held-back text; the gain is by how much KL is larger with the bytes in slots."
        yield ""
        yield from _table(("layer", "sparse", "untrained", "trained", "gain, nats", ""), rows)


def _together(facts: Mapping[str, Any]) -> Iterator[str]:
    """Divergences on held-back text, and what is to be doubted."""
    tuned = _numbers(facts.get("end_to_end"))
    names = {
        "divergence_before": "kernels as the layers were fitted",
        "divergence_tuned": "kernels tuned together",
        "divergence_after": "the file's kernels and slots",
        "divergence_sparse": "no low-rank state",
        "divergence_sparse_bytes": "no low-rank state, its bytes in slots",
    }
    rows = [(title, f"{tuned[name]:.4f}") for name, title in names.items() if name in tuned]
    if rows:
        yield from _table(("cache", "KL from the full cache, nats"), rows)
        yield ""
        yield "This text also decided on states, slots and steps: on other text expect a slightly larger KL."
        yield ""
    yield from (f"**Doubt:** {line}." for line in doubts(facts))
    yield f"Measure on your own text: `less-export eval {facts.get('model', 'MODEL')} --kernels FILE --data TEXT`."


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        cells = (str(x).replace("|", "\\|").replace("\n", " ") for x in row)
        yield f"| {' | '.join(cells)} |"


def _dicts(stated: Any) -> list[tuple[str, dict[str, Any]]]:
    """The items of an object by layer."""
    items = stated.items() if isinstance(stated, dict) else ()
    return [(i, x) for i, x in items if str(i).isdigit() and isinstance(x, dict)]


def _lists(stated: Any) -> list[list[int]]:
    values = stated.values() if isinstance(stated, dict) else ()
    return [x for x in values if isinstance(x, list) and all(isinstance(n, int) for n in x)]


def _numbers(stated: Any) -> dict[str, float]:
    """The numbers of an object."""
    items = stated.items() if isinstance(stated, dict) else ()
    return {n: float(x) for n, x in items if isinstance(x, int | float) and not isinstance(x, bool)}
