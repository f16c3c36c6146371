"""Cost of an export: less-export against the ordinary exporter, on the same patched model.

A random Llama of TinyLlama-1.1B's shape, fp16, 22 layers, sharded, is written first. Each side runs in its
own process, several times in turn; the parent measures wall time, peak RSS and bytes written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from bench_common import TINYLLAMA, measure, random_checkpoint, write_results, written

BUDGET = "256"


def ordinary(checkpoint: Path, out: Path) -> None:
    """The other side: load the model, insert LESS, run torch.onnx.export with external data."""
    import torch
    from transformers import AutoModelForCausalLM

    from less_export.config import ExportConfig
    from less_export.contract import Contract
    from less_export.exporter import onnx_op
    from less_export.hf.decoder import LessDecoder, fresh_state
    from less_export.hf.surgery import discover
    from less_export.less.feature_maps import Kernels
    from less_export.plan import plan_layers

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, attn_implementation="eager").eval()
    layers = plan_layers(discover(model), ExportConfig(policy="h2o", budget=BUDGET), 2048, {})
    contract = Contract(layers, model.config.vocab_size, "float16", 256, 8)
    decoder = LessDecoder(model, contract, Kernels({}, {})).eval()
    state = fresh_state(contract, 2)
    lengths = torch.zeros(2, dtype=torch.int32), torch.full((2,), 7, dtype=torch.int32)
    batch, chunk = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("chunk", min=1, max=1 << 20)
    out.mkdir()
    with torch.no_grad():
        torch.onnx.export(
            decoder,
            (torch.zeros(2, 7, dtype=torch.long), *lengths, state),
            str(out / "model.onnx"),
            dynamo=True,
            external_data=True,
            dynamic_shapes=({0: batch, 1: chunk}, {0: batch}, {0: batch}, [{0: batch} for _ in state]),
            custom_translation_table=onnx_op.translation_table(),
            input_names=[s.name for s in contract.inputs()],
            output_names=[s.name for s in contract.outputs()],
            opset_version=onnx_op.OPSET,
        )


def side(command: list[str], out: Path) -> dict[str, float]:
    """Run one side; wall seconds, peak RSS in MB, MB written (links to the checkpoint do not count)."""
    run = measure(command)
    if run.why:
        sys.exit(f"{' '.join(command)} failed: {run.why}")
    figures = {"seconds": run.seconds, "peak_rss_mb": run.peak_rss_mb, "written_mb": written(out) / 1e6}
    shutil.rmtree(out)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=TINYLLAMA["num_hidden_layers"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ordinary", nargs=2, type=Path, metavar=("CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ordinary:
        ordinary(*args.ordinary)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = Path(scratch)
        nbytes = random_checkpoint(folder / "checkpoint", "float16", args.layers)
        program = str(Path(sysconfig.get_path("scripts")) / "less-export")
        checkpoint, out = str(folder / "checkpoint"), folder / "out"
        ours = [program, checkpoint, "--out", str(out), "--target", "trt", "--no-validate", "--budget", BUDGET]
        theirs = [sys.executable, __file__, "--ordinary", checkpoint, str(out)]
        sides: dict[str, list[dict[str, float]]] = {"less_export": [], "ordinary": []}
        for _ in range(args.runs):
            for name, command in (("less_export", ours), ("ordinary", theirs)):
                sides[name].append(side(command, out))
                print(name, {k: round(v, 1) for k, v in sides[name][-1].items()}, flush=True)
    median: dict[str, Any] = {
        name: {k: round(statistics.median(r[k] for r in runs), 2) for k in runs[0]} for name, runs in sides.items()
    }
    ratio = {k: round(median["less_export"][k] / median["ordinary"][k], 4) for k in median["ordinary"]}
    facts = {"model": "random Llama, TinyLlama-1.1B shape", "layers": args.layers, "dtype": "float16"}
    write_results(
        "export_cost",
        {**facts, "checkpoint_mb": round(nbytes / 1e6, 1), "median": median, "ratio": ratio, "runs": sides},
    )


if __name__ == "__main__":
    main()
