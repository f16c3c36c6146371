"""What ONNX Runtime's CUDA provider leaves to the CPU, found by loading graphs: no GPU is needed.

ONNX Runtime itself assigns the nodes, by the registry of its kernels. Without a CUDA driver, stand-ins take the place
of CUDA's libraries (cuda_stand_in.py), so that its provider starts; nothing is run. For every graph the script shows
the nodes by provider, those that no CUDA kernel can run (the rest on the CPU are shape arithmetic, which ONNX Runtime
prefers there), the copies between host and GPU, and whether ONNX Runtime would accept its capture into a CUDA graph
(``enable_cuda_graph``). Needs ``onnxruntime-gpu``; without a driver also gcc and nm.

Without MODELs it exports small ones, of all policies and kinds of slots, and writes ``results/ort_cuda.json``, with the
operators and types of their nodes: what CUDA kernels are known for. A test compares that with the operator's bodies.
With ``--operator`` graphs are loaded with the native operator too (``less-export build-operator --cuda --out FILE``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_stand_in
import onnx
import onnx.inliner
import onnxruntime
from bench_common import RESULTS, TINYLLAMA, kernels, random_checkpoint
from ort_load import PROVIDERS

from less_export import ExportConfig, export
from less_export.native import nvcc
from tests import test_cuda_operator, test_ops

SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 2048,
}  # fmt: skip
#: Exports of a small Llama in float16, by name: options that differ from the defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "h2o": {},
    "tova": {"policy": "tova"},
    "sink": {"policy": "sink"},
    "full": {"policy": "full"},
    "h2o, slots of the model's dtype": {"slots": "model"},
    "h2o, slots and absolute positions": {"slots": "model", "max_distance": "none"},
    "h2o, state of 32 bits": {"state": 32},
    "sink, float32": {"policy": "sink", "dtype": "float32"},
    "h2o, float32": {"dtype": "float32"},
    "h2o, int8 weights": {"weights": "int8"},
    "h2o, int4 weights": {"weights": "int4"},
}


def exported(folder: Path) -> Iterator[tuple[str, Path]]:
    """The variants, exported, with a low-rank term where tokens are evicted."""
    shape = {**TINYLLAMA, **SMALL}
    random_checkpoint(folder / "model", "float16", 2, architecture=shape)
    maps = folder / "kernels.safetensors"
    kernels(2, 4, 32, shape).save(maps)
    common = {"target": "ort", "dtype": "float16", "max_batch": 4, "chunk": 16, "validate": False}
    for name, options in VARIANTS.items():
        out = folder / name.replace(", ", "-").replace(" ", "-")
        evicting = {"context": 64} if options.get("policy") == "full" else {"budget": "64", "kernels": maps}
        export(str(folder / "model"), out, ExportConfig(**{**common, **evicting, **options}))
        yield name, out / "model.onnx"
    for name, layer in test_cuda_operator.VARIANTS.items():
        for half in (False, True):
            path = folder / f"{name}-{half}.onnx"
            path.write_bytes(test_ops.model_of(layer, half))
            yield f"one layer, {name}, {'float16' if half else 'float32'}", path


def logged(
    model: Path, operator: Path | None, captures: bool, libraries: Path | None
) -> subprocess.CompletedProcess[str]:
    """Load a model in a process of its own."""
    environment = {**os.environ, **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})}
    loader = Path(__file__).with_name("ort_load.py")
    command = [sys.executable, loader, model, *(["--operator", operator] if operator else [])]
    return subprocess.run([*command, *["--captures"] * captures], capture_output=True, text=True, env=environment)


def placement(log: str) -> dict[str, Any]:
    """Nodes by provider, those that no CUDA kernel can run, and copies, from a log of loading."""
    preferred, placed, provider = set[str](), dict[str, list[tuple[str, str]]](), ""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines():
        if found := re.search(r"CPU execution for node: (\S+) because the CPU execution path is", line):
            preferred.add(found[1])
        elif found := re.search(r"All nodes placed on \[(\w+)\]. Number of nodes: (\d+)", line):  # and no list of them
            placed[found[1]] = [("", "")] * int(found[2])
        elif found := re.search(r"placed on \[(\w+)\]", line):
            provider = found[1]
        elif provider and (found := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \((.*)\)", line)):
            placed.setdefault(provider, []).append((found[1], found[2]))
    cuda, cpu = (placed.get(p, []) for p in PROVIDERS)
    if not cuda:
        raise SystemExit("ort_cuda_nodes: no nodes in ONNX Runtime's log:\n" + log[-2000:])
    copies = [op for op, _ in cuda if op.startswith("Memcpy")]
    missing = Counter(op for op, name in cpu if name not in preferred)
    return {
        "cuda": len(cuda) - len(copies),
        "cpu": len(cpu),
        "no_cuda_kernel": dict(sorted(missing.items())),
        "copies": len(copies),
    }


def examined(model: Path, operator: Path | None, libraries: Path | None) -> dict[str, Any]:
    """The placement of a model's nodes, and "" or why it cannot be captured."""
    done, capturing = (logged(model, operator, captures, libraries) for captures in (False, True))
    refusal = ""
    if capturing.returncode:
        found = re.search(r"This session cannot use the graph capture feature[^\n\x1b]*", capturing.stderr)
        if found is None:
            raise SystemExit(f"ort_cuda_nodes: {model} does not load:\n{capturing.stderr[-2000:]}")
        refusal = found[0]
    return {**placement(done.stderr + done.stdout), "refusal": refusal}


def typed_operators(model: onnx.ModelProto) -> set[str]:
    """The operators of a model's nodes, those in functions and branches too, like ``Where(bool,int64,int64)``."""
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    return set(_typed(inlined.graph, {}))


def _typed(graph: onnx.GraphProto, outer: dict[str, int]) -> Iterator[str]:
    types = outer | {x.name: x.type.tensor_type.elem_type for x in (*graph.input, *graph.value_info, *graph.output)}
    types |= {x.name: x.data_type for x in graph.initializer}
    name = onnx.TensorProto.DataType.Name
    for node in graph.node:
        yield f"{node.op_type}({','.join(name(types.get(x, 0)).lower() for x in node.input if x)})"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _typed(attribute.g, types)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="a model.onnx (default: small exports)")
    parser.add_argument("--operator", type=Path, metavar="FILE", help="the native operator for CUDA")
    args = parser.parse_args()
    if PROVIDERS[0] not in onnxruntime.get_available_providers():
        sys.exit("ort_cuda_nodes: this ONNX Runtime was built without CUDA: pip install onnxruntime-gpu")
    with tempfile.TemporaryDirectory() as name:
        folder, libraries = Path(name), None
        if nvcc.gpu_arch() is None:  # no driver, or no GPU
            libraries = folder
            capi = Path(onnxruntime.__file__).parent / "capi"
            cuda_stand_in.build(capi / "libonnxruntime_providers_cuda.so", folder)
        graphs, known = {}, set[str]()
        for label, model in [(str(m), m) for m in args.models] or exported(folder):
            graphs[label] = {"nodes": examined(model, None, libraries)}
            if not graphs[label]["nodes"]["no_cuda_kernel"]:
                known |= typed_operators(onnx.load(model, load_external_data=False))
            if args.operator:
                graphs[label]["operator"] = examined(model, args.operator, libraries)
            print(label, json.dumps(graphs[label]), flush=True)
    if not args.models:
        data = {"onnxruntime": onnxruntime.__version__, "graphs": graphs, "known": sorted(known)}
        (RESULTS / "ort_cuda.json").write_text(json.dumps(data, indent=1) + "\n")
    return int(any(x["no_cuda_kernel"] for kinds in graphs.values() for x in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
