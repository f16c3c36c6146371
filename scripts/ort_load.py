"""Load a model with ONNX Runtime's CUDA provider; its log says where every node goes (``ort_cuda_nodes.py`` reads it).

``ort_load.py MODEL [--operator FILE] [--captures]``: in a process of its own, as the provider reads libraries from
``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import argparse
import sys

import onnxruntime

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--operator", metavar="FILE", help="the native operator for CUDA")
    parser.add_argument("--captures", action="store_true", help="ask for CUDA graphs")
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.log_verbosity_level = 0, 1
    if args.operator:
        options.register_custom_ops_library(args.operator)
    cuda = (PROVIDERS[0], {"enable_cuda_graph": "1" if args.captures else "0"})
    session = onnxruntime.InferenceSession(args.model, options, providers=[cuda, PROVIDERS[1]])
    return 0 if PROVIDERS[0] in session.get_providers() else 1


if __name__ == "__main__":
    sys.exit(main())
