"""Cost at full size: a random Llama-2-7B, its export for TensorRT, and TensorRT-RTX plans of its layers.

Every step runs in its own process; the parent measures wall time, peak RSS and bytes written. A build that takes
more memory than ``--limit-gb`` is killed, and the results record how far it got.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_common import RESULTS, Run, measure, write_results, written

MODEL = "llama2-7b"
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "less-export")


def write(folder: Path, layers: int) -> None:
    """Write the checkpoint that ``--random-weights`` then reuses; runs in its own process."""
    from less_export.config import ExportConfig
    from less_export.hf.random_checkpoint import random_source

    config = ExportConfig(random_weights=True, num_hidden_layers=layers)
    random_source(MODEL, config, folder / "out").fetch()


def command(layers: int, out: Path) -> list[str]:
    return [PROGRAM, MODEL, "--random-weights", "--num-hidden-layers", str(layers), "--no-validate", "--out", str(out)]


def rounded(run: Run, **sizes: float) -> dict[str, Any]:
    """A run and the sizes of its output, as JSON values; without its progress if it succeeded."""
    facts = asdict(run) if run.why else {"seconds": run.seconds, "peak_rss_mb": run.peak_rss_mb}
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in (facts | sizes).items()}


def checkpoint(folder: Path, layers: int) -> dict[str, Any]:
    """Write the checkpoint into ``folder``."""
    run = measure([sys.executable, __file__, "--write", str(folder), "--layers", str(layers)])
    if run.why:
        sys.exit(f"the checkpoint of {layers} layers was not written: {run.why}")
    return {"layers": layers, **rounded(run, written_mb=written(folder) / 1e6)}


def export(folder: Path, layers: int) -> dict[str, Any]:
    """Export the checkpoint in ``folder`` for TensorRT, weights linked."""
    out = folder / "bundle"
    run = measure([*command(layers, out), "--target", "trt"])
    if run.why:
        sys.exit(f"the checkpoint of {layers} layers was not exported: {run.why}")
    return {"layers": layers, **rounded(run, written_mb=written(out) / 1e6)}


def plan(folder: Path, layers: int, arch: str, limit_gb: float) -> dict[str, Any]:
    """Build an engine with the plugin from the checkpoint in ``folder``."""
    out = folder / "engine.plan"
    run = measure([*command(layers, out), "--gpu-arch", arch], limit_gb)
    size = {"plan_mb": out.stat().st_size / 1e6} if out.exists() else {}
    return {"layers": layers, "gpu_arch": arch, "limit_gb": limit_gb, **rounded(run, **size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("export", "plans"), help="measure only this part, keep the other's results")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="layers of the plans (default: 8 16 32); "
                        "the export has as many as the last")  # fmt: skip
    parser.add_argument("--gpu-arch", default="sm_89", help="GPU architecture of the plans (default: sm_89)")
    parser.add_argument("--limit-gb", type=float, default=22.0, help="most memory of a build (default: 22)")
    parser.add_argument("--results", default="large", help="name of the results file (default: large)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    layers = args.layers or [8, 16, 32]
    if args.write:
        write(args.write, layers[-1])
        return
    file = RESULTS / f"{args.results}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if args.only and file.exists() else {}
    results = {k: v for k, v in results.items() if k != "machine"} | {"model": MODEL, "dtype": "float16"}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        if args.only != "plans":
            folder = Path(scratch) / "export"
            folder.mkdir()
            results["checkpoint"] = checkpoint(folder, layers[-1])
            print("checkpoint", results["checkpoint"], flush=True)
            results["export"] = export(folder, layers[-1])
            print("export", results["export"], flush=True)
            shutil.rmtree(folder)
        if args.only != "export":
            results["plans"] = []
            built = measure([PROGRAM, "build-plugin", "--gpu-arch", args.gpu_arch])  # stays in the cache
            if built.why:
                sys.exit(f"no plugin: {built.why}")
            for count in layers:
                folder = Path(scratch) / f"plan-{count}"
                folder.mkdir()
                checkpoint(folder, count)
                results["plans"].append(plan(folder, count, args.gpu_arch, args.limit_gb))
                print("plan", results["plans"][-1], flush=True)
                shutil.rmtree(folder)
    write_results(args.results, results)


if __name__ == "__main__":
    main()
