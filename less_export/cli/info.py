"""``less-export info``: files, layers, tensors and memory of a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..contract import STATE_BITS, limits_distances
from ..errors import UsageError, printable
from .options import Parser, general_options
from .tables import BEYOND, beyond_mark, show, size, table

if TYPE_CHECKING:
    from ..bundle.artifact import Artifact, Bundle, Manifest
    from ..contract import Contract

#: What an artifact is, by its kind.
_KINDS = {"ort": "graph for ONNX Runtime", "trt": "graph for TensorRT", "plan": "TensorRT engine"}
#: Lengths (tokens) at which the full cache is compared.
_LENGTHS = (1024, 4096, 32768)


def parser() -> Parser:
    parser = Parser(
        "info",
        "BUNDLE [options]",
        "Show what a bundle holds, its inputs and outputs, and how much memory a sequence takes.",
        ("less-export info gemma", "less-export info gemma --json"),
    )
    bundle = parser.add_argument_group("bundle")
    bundle.add_argument("bundle", metavar="BUNDLE", help="bundle folder, x.onnx or x.plan")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the manifest as JSON")
    output.add_argument(
        "--polygraphy", action="store_true", help="print the options with which polygraphy converts model.trt.onnx"
    )
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..bundle.artifact import Bundle

    bundle = Bundle.open(args.bundle)
    if args.json:
        print(bundle.manifest.dump().decode())
    elif args.polygraphy:
        from ..tensorrt.engine import polygraphy_options

        graph = bundle.artifact("trt")
        if graph is None:
            raise UsageError(f"{args.bundle} has no graph for TensorRT: export it with --target trt or both")
        print(*polygraphy_options(graph.contract))
    else:
        _print_bundle(bundle)
    return 0


def _print_bundle(bundle: Bundle) -> None:
    m = bundle.manifest
    print(printable(f"{m.model['name']} ({m.model['class']}, {m.model['parameters']:,} parameters)"))
    files = table("files", "file", "what", "size")
    for artifact in m.artifacts:
        kind = _KINDS.get(artifact.kind, artifact.kind)
        files.add_row(artifact.file, kind, size(bundle.path(artifact.file).stat().st_size))
    quantised = m.settings.get("weights")
    for weight in m.weights:
        content = f"weights, linear layers in {quantised}" if quantised else "weights"
        files.add_row(weight.file, content, size(weight.bytes))
    trained = _kernel_file(m)
    for name, extra in (("tokenizer", m.tokenizer), (trained, m.kernels)):
        if extra is not None and extra.file:
            files.add_row(extra.file, name, size(bundle.path(extra.file).stat().st_size))
    show(files)
    for artifact in m.artifacts:
        _print_contract(artifact)
        _print_memory(artifact, m.kernels.bytes if m.kernels and m.kernels.layers else 0)


def _kernel_file(manifest: Manifest) -> str:
    """What the kernel file of a bundle holds."""
    layers = [s for artifact in manifest.artifacts for s in artifact.contract.layers]
    parts = [
        (manifest.kernels is None or bool(manifest.kernels.layers), "kernels"),
        (any(s.int8 for s in layers), "constants of int8 slots"),
        (limits_distances(layers), "rotary tables"),
    ]
    return ", ".join(name for held, name in parts if held)


def _print_contract(artifact: Artifact) -> None:
    contract = artifact.contract
    layers = table(
        f"layers of {artifact.file}", "layers", "policy", "slots", "heavy", "recent", "window", "distance", "rank"
    )
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, s in enumerate(contract.layers):
        rank = f"{s.rank}, {s.state_bits} bits" if s.absorb else "off"
        policy = s.policy.name if s.score_half_life is None else f"{s.policy.name}, half-life {s.score_half_life}"
        slots = f"{s.capacity} int8" if s.int8 else str(s.capacity)
        groups.setdefault(
            (policy, slots, s.heavy, s.recent, s.window or "-", s.max_distance or "any", rank), []
        ).append(index)
    for facts, indices in groups.items():
        layers.add_row(_ranges(indices), *(str(x) for x in facts))
    show(layers)
    tensors = table(f"inputs and outputs of {artifact.file} ({contract.dtype})", "tensor", "dtype", "shape")
    last = len(contract.layers) - 1
    ends = [s.past for s in contract.state() if s.layer in (0, last)]
    for spec in (*contract.tokens(), *ends, contract.logits_spec()):
        tensors.add_row(spec.name, spec.dtype, ", ".join(map(str, spec.shape)))
    tensors.add_row("present.*", "", "like past.*")
    show(tensors)


def _print_memory(artifact: Artifact, kernel_bytes: int) -> None:
    contract = artifact.contract
    memory = table(f"memory of one sequence ({contract.dtype})", "what", "bytes", "relative to LESS")
    state = contract.state_bytes()
    memory.add_row("LESS state, any length", size(state), "1.0x")
    for what, other in _others(contract):
        memory.add_row(f"the same with {what}", size(other), f"{other / state:.1f}x")
    marks = {n: beyond_mark(n, contract.trained_length) for n in _LENGTHS}
    for length, mark in marks.items():
        full = contract.full_cache_bytes(length)
        memory.add_row(f"full cache at {length:,} tokens{mark}", size(full), f"{full / state:.1f}x")
    kernels = size(kernel_bytes) if kernel_bytes else "none (low-rank term off)"
    memory.add_row("kernels' weights, once for all sequences", kernels, "")
    show(memory)
    if any(marks.values()):
        print(BEYOND)


def _others(contract: Contract) -> list[tuple[str, int]]:
    """Other dtypes of slots and state, and the bytes of one sequence's state with them."""
    if not any(s.int8 for s in contract.layers):
        return [("slots in int8", contract.with_slots("int8").state_bytes())]
    others = [(f"slots in {contract.dtype}", contract.with_slots("model").state_bytes())]
    bits = {s.state_bits for s in contract.layers if s.absorb}
    return others + [(f"a state of {n} bits", contract.with_state(n).state_bytes()) for n in STATE_BITS if bits - {n}]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-4, 6, 8-9``"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
