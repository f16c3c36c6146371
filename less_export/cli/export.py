"""``less-export export``: a model with a LESS cache, as a bundle, an ONNX file or a TensorRT engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import BLOCKS, DEFAULT_BLOCK, DEFAULT_HEAD, TARGETS, WEIGHTS, ExportConfig
from ..dtypes import COMPUTE_DTYPES
from ..hf import recipes
from .options import MODEL_HELP, Parser, cache_options, general_options
from .progress import spinner


def parser() -> Parser:
    parser = Parser(
        "export",
        "MODEL --out PATH [options]",
        "Export a Hugging Face decoder with a LESS cache. The word export may be left out: "
        "less-export MODEL --out PATH is the same command.",
        ("less-export export gemma3-270m --out gemma", "less-export export llama2-7b --out engine.plan"),
    )
    paths = parser.add_argument_group("model and output")
    paths.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    paths.add_argument(
        "--out", required=True, metavar="PATH", help="bundle folder, x.onnx, or x.plan (TensorRT engine)"
    )
    paths.add_argument(
        "--target",
        choices=TARGETS,
        help="graph for ONNX Runtime, TensorRT or both (default: ort; for x.plan: trt)",
    )
    cache = cache_options(parser, full=True)
    cache.add_argument(
        "--heavy", type=int, metavar="N", help="slots for heavy hitters or sinks (default: set by the policy)"
    )
    cache.add_argument(
        "--recent", type=int, metavar="N", help="slots for the newest tokens (default: set by the policy)"
    )
    low_rank = parser.add_argument_group("low-rank term")
    low_rank.add_argument(
        "--kernels", type=Path, metavar="FILE", help="trained phi/psi kernels, .safetensors (default: no low-rank term)"
    )
    low_rank.add_argument("--rank", type=int, metavar="R", help="reject kernels of another rank")
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--dtype", choices=COMPUTE_DTYPES, help="compute dtype (default: float32 for ort, the model's for trt)"
    )
    graph.add_argument("--weights", choices=WEIGHTS, help="quantise the weights of linear layers (default: no)")
    graph.add_argument(
        "--block",
        type=int,
        choices=BLOCKS,
        help=f"with --weights: input features that share a scale (default: {DEFAULT_BLOCK})",
    )
    graph.add_argument(
        "--head", choices=WEIGHTS, help=f"with --weights: quantise the output embedding to (default: {DEFAULT_HEAD})"
    )
    graph.add_argument("--max-batch", type=int, default=8, metavar="N", help="most sequences per batch (default: 8)")
    graph.add_argument(
        "--chunk", type=int, metavar="N", help="most tokens per prefill step (default: recipe's, or 256)"
    )
    graph.add_argument(
        "--logits",
        choices=("last", "all"),
        default="last",
        help="logits of the last token of a step (default), or of all tokens, for evaluation",
    )
    engine = parser.add_argument_group("TensorRT engine")
    engine.add_argument("--engine", action="store_true", help="also build engine.plan into a bundle folder")
    engine.add_argument(
        "--gpu-arch", metavar="SM", help="GPU architectures to build for, e.g. sm_89 (needs TensorRT-RTX)"
    )
    engine.add_argument(
        "--no-plugin",
        dest="plugin",
        action="store_false",
        help="build the engine from standard operators, without the LESS plugin",
    )
    trials = parser.add_argument_group("trials and checks")
    trials.add_argument(
        "--random-weights",
        action="store_true",
        help="use random weights: writes a checkpoint of the model's true shape next to PATH and keeps it",
    )
    trials.add_argument("--seed", type=int, metavar="N", help="seed of --random-weights (default: 0)")
    trials.add_argument("--num-hidden-layers", type=int, metavar="N", help="keep only the first N layers")
    trials.add_argument(
        "--no-validate", dest="validate", action="store_false", help="skip the check against Hugging Face"
    )
    general_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    options = dict(vars(args))
    model, out, engine_plan = (options.pop(name) for name in ("model", "out", "engine"))
    options.pop("verbose")
    config = ExportConfig(**options)
    recipes.refuse_unknown(model)
    from ..exporter.build import export

    with spinner() as progress:
        path = export(model, out, config, engine_plan=engine_plan, progress=progress)
    print(path)
    return 0
