"""Parity of every supported family: tiny random models, exported and run on ONNX Runtime in float32.

Two errors each, relative to the largest logit: without eviction, against Hugging Face in float64
(next to Hugging Face's own float32 error); with eviction and random kernels, against the torch reference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_common import write_results

from tests import families

LENGTH = 60
STEPS = (16, 16, 16, 6, 1, 1, 1, 1, 1, 1)


def measure(name: str, folder: Path) -> dict[str, float | str | list[str]]:
    """Both errors of one family."""
    checkpoint = families.save(name, folder / "checkpoint")
    model = families.load(checkpoint)
    ids = families.text(2, LENGTH)
    exact, own = families.truth(model, ids)
    full = families.export(checkpoint, folder / "full", policy="full", context=64, logits="all")
    outputs = families.feed(full.backend("ort", 2), ids, STEPS)
    worst, at = 0.0, 0
    for logits, size in zip(outputs, STEPS, strict=True):
        worst = max(worst, families.relative(logits, exact[:, at : at + size]))
        at += size
    kernels = families.kernels(families.load(checkpoint), folder / "kernels.safetensors")
    less = families.export(checkpoint, folder / "less", budget=str(families.BUDGET), context=64, kernels=kernels)
    ours = families.feed(less.backend("ort", 2), ids, STEPS)
    reference = families.feed(less.backend("torch", 2), ids, STEPS)
    evicting = max(families.relative(a, b) for a, b in zip(ours, reference, strict=True))
    policies = sorted({s.policy.name for s in less.opened.manifest.artifacts[0].contract.layers})
    return {
        "family": name,
        "class": type(model).__name__,
        "policies": policies,
        "onnx_against_f64": worst,
        "hf_f32_against_f64": own,
        "onnx_against_torch_evicting": evicting,
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--all", action="store_true", help="measure every family and write results/families.json")
    chosen.add_argument(
        "--only", nargs="+", choices=sorted(families.FAMILIES), metavar="FAMILY", help="print these rows, write nothing"
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    rows = []
    for name in args.only or families.FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(name, Path(scratch)))
        row = rows[-1]
        print(
            f"| {row['family']} | {row['class']} | {row['onnx_against_f64']:.1e} | {row['hf_f32_against_f64']:.1e} "
            f"| {row['onnx_against_torch_evicting']:.1e} |",
            flush=True,
        )
    if args.all:
        write_results("families", {"tokens": LENGTH, "steps": list(STEPS), "rows": rows})


if __name__ == "__main__":
    main()
