"""What a state of 16 bits costs: KL from the full cache with 16-bit and 32-bit states, on the same tokens.

Sequences of held-out text run through the operator in PyTorch, one token a step, with the slots that the kernels were
trained with. The result is ``benchmarks/results/state_kl.json``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import write_results
from bench_slots import LENGTH, sequences, texts
from torch import Tensor
from transformers import PreTrainedModel

from less_export.cli.progress import Bars
from less_export.config import ExportConfig
from less_export.contract import Contract, StateBits
from less_export.hf import data
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.runtime.torch import ModelBackend

STRIDE = 8


@torch.inference_mode()
def full(model: PreTrainedModel, ids: Tensor, positions: list[int]) -> Tensor:
    """[N,P,V] log probabilities of the next token at ``positions`` with full caches."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, positions]
    return torch.log_softmax(model.get_output_embeddings()(hidden).float(), -1)


def divergences(backend: ModelBackend, ids: Tensor, positions: list[int], reference: Tensor) -> np.ndarray:
    """[N,P] KL(reference || the backend) in nats."""
    column, found = {p: c for c, p in enumerate(positions)}, np.empty((len(ids), len(positions)))
    backend.open(len(ids))
    one = np.ones(len(ids), np.int64)
    for at in range(max(positions) + 1):
        logits = backend.step(ids[:, at : at + 1].numpy(), one)
        if at in column:
            predicted = torch.log_softmax(torch.from_numpy(logits[:, 0]).float(), -1)
            wanted = reference[:, column[at]]
            found[:, column[at]] = (wanted.exp() * (wanted - predicted)).sum(-1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--kernels", type=Path, required=True, metavar="FILE", help="kernels for int8 slots")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="measure its last fifth too")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="of these texts (default: all)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source, progress = resolve(args.model), Bars()
    encode, bos = data.encoder(source.tokenizer())
    model = source.load(torch.float32)
    rows: list[dict[str, Any]] = []
    opened = open_model(source, ExportConfig(kernels=args.kernels, context=LENGTH))
    slots = opened.kernels.provenance["slots"]
    budgets = ",".join(f"{i}:{sum(x)}" for i, x in slots.items())
    for text, content in texts(args.text):
        if args.only and text not in args.only:
            continue
        ids = sequences(content, encode, bos)[:2]
        positions = list(range(max(map(sum, slots.values())) + 1, LENGTH - 1, STRIDE))
        reference, kl = full(model, ids, positions), {}
        bits: StateBits
        for bits in (16, 32):
            progress.say(f"{text}, {bits} bits")
            config = ExportConfig(kernels=args.kernels, context=LENGTH, state=bits, layer_budgets=budgets)
            opened = open_model(source, config)
            contract = Contract(opened.plan, reference.shape[-1], "float32", 1, len(ids), logits="all")
            found = divergences(ModelBackend(model, contract, opened.kernels), ids, positions, reference)
            kl[str(bits)] = [[round(float(x), 5) for x in row] for row in found]
        rows.append({"model": source.name, "text": text, "sequences": len(ids), "kl": kl})
    write_results("state_kl", {"length": LENGTH, "stride": STRIDE, "rows": rows})


if __name__ == "__main__":
    main()
