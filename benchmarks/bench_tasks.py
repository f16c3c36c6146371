"""The LESS paper's multiple-choice tasks (section 4.1) with lm-evaluation-harness: full cache, slots alone, and LESS.

Items run through the simulation, one token a step. The three caches are the full one, LESS with the slots that its
kernels were trained with, and slots alone that take the same bytes. Items of most tasks are short, so each has as many
examples before it as fill several times the slots; the paper's five would leave some tasks without any eviction.
``--data`` holds the tasks as JSON lines. The result is ``benchmarks/results/tasks.json``, written after every task and
cache; what it holds of the same kernels is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_beyond import CACHES, Opened, with_kernels
from bench_common import RESULTS, machine
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel

from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.evaluation import perplexity
from less_export.evaluation.variants import Variant
from less_export.hf import data
from less_export.hf.sources import resolve

FILE = RESULTS / "tasks.json"
#: Most tokens of an item.
LENGTH = 2048
#: Items that are simulated together.
BATCH = 4


def choices(shots: int, end: str = "", answer: str = " ") -> dict[str, Any]:
    """A task with ``query``, ``choices`` and ``gold``; ``end`` follows the query, ``answer`` precedes a choice."""
    return {
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "doc_to_text": lambda item: item["query"].rstrip() + end,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": answer,
    }


TASKS: dict[str, dict[str, Any]] = {
    "copa": choices(30),
    "piqa": choices(10, "\nAnswer:"),
    "openbook_qa": choices(25),
    "winogrande": {
        "num_fewshot": 20,
        "output_type": "multiple_choice",
        "doc_to_text": lambda item: item["gold"],
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
    "arc_challenge": choices(10, "\nAnswer:"),
    "math_qa": choices(5),
    "lambada_openai": {
        "num_fewshot": 5,
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
    },
}


class Simulated(TemplateLM):
    """A model with a cache, as lm-evaluation-harness scores it."""

    def __init__(
        self, model: PreTrainedModel, cache: Opened, encode: data.Encode, bos: int | None, step: Callable[[int], Any]
    ) -> None:
        super().__init__()
        self._variant = Variant("less" if cache.kernels.layers else "sparse", cache.plan, cache.kernels)
        self._model, self._tables = model, cache.tables
        self._encode, self._bos, self._step = encode, bos, step
        self.tokens: list[int] = []

    @property
    def eot_token_id(self) -> int:
        return self._bos or 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._encode(string)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """[(log probability, whether greedy decoding gives it)]; the latter is not computed."""
        start = [] if self._bos is None else [self._bos]
        items = [(start + context, rest) for _, context, rest in requests]
        self.tokens = [len(context) + len(rest) for context, rest in items]
        if max(self.tokens) > LENGTH:
            raise SystemExit(f"an item has {max(self.tokens)} tokens, more than {LENGTH}: use fewer examples")
        order, scores = sorted(range(len(items)), key=self.tokens.__getitem__), np.zeros(len(items))
        for begin in range(0, len(order), BATCH):
            batch = order[begin : begin + BATCH]
            scores[batch] = self._score([items[i] for i in batch])
            self._step(len(batch))
        return [(float(score), False) for score in scores]

    def _score(self, items: list[tuple[list[int], list[int]]]) -> list[float]:
        """Sums over the continuations; what is behind a shorter item changes nothing in it."""
        longest = max(len(context) + len(rest) for context, rest in items)
        rows = [(context + rest + [0] * longest)[:longest] for context, rest in items]
        first = min(len(context) for context, _ in items) - 1
        positions = torch.arange(first, longest - 1)
        nll = perplexity.simulated(self._model, torch.tensor(rows), self._variant, 1, positions, rotary=self._tables)
        begins = [len(context) - 1 - first for context, _ in items]
        ends = [begin + len(rest) for begin, (_, rest) in zip(begins, items, strict=True)]
        return [-float(row[a:b].sum()) for row, a, b in zip(nll, begins, ends, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task here needs it")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("no task here needs it")


def run(lm: Simulated, name: str, folder: Path, items: int) -> dict[str, Any]:
    """Whether each item is right, the log probability of its right answer among its choices, and the mean length."""
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    task = {"task": name, **source, "test_split": "test", "fewshot_split": "test", **TASKS[name]}
    results = simple_evaluate(
        lm, tasks=[task], limit=items, bootstrap_iters=0, log_samples=True, random_seed=0, fewshot_random_seed=0
    )
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    return {"tokens": round(float(np.mean(lm.tokens))), **scores(name, samples)}


def scores(name: str, samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    if TASKS[name]["output_type"] == "loglikelihood":
        return {"right": [], "gold": [round(float(s["filtered_resps"][0][0]), 3) for s in samples]}
    right, gold = [], []
    for sample in samples:
        values = np.array([float(response[0]) for response in sample["filtered_resps"]])
        answer = sample["doc"]["gold"]
        right.append(int(values.argmax() == answer))
        gold.append(round(float(values[answer] - np.logaddexp.reduce(values)), 3))
    return {"right": right, "gold": gold}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--kernels", type=Path, required=True, metavar="FILE", help="kernels for int8 slots")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the tasks, TASK.jsonl each")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="(default: all)")
    parser.add_argument("--items", type=int, default=100, metavar="N", help="of each task (default: 100)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    source, progress = resolve(args.model), Bars()
    encode, bos = data.encoder(source.tokenizer())
    digest = hashlib.sha256(args.kernels.read_bytes()).hexdigest()[:12]
    file: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    done = {(r["kernels"], r["task"], r["kind"]) for r in file["rows"]}
    caches = [CACHES[0].open(args.model, LENGTH), *with_kernels(args.model, args.kernels, LENGTH)]
    model = source.load(torch.float32)
    for task in args.tasks:
        for cache in caches:
            kind = cache.name.partition(",")[0]
            if (digest, task, kind) in done:
                continue
            with progress.phase(f"{source.name}, {task}, {cache.name}", 0) as step:
                lm = Simulated(model, cache, encode, bos, lambda rows, step=step: step("", rows))
                facts = run(lm, task, args.data, args.items)
            row = {"model": source.name, "task": task, "kind": kind, "cache": cache.name, "kernels": digest}
            file["rows"].append({**row, "shots": TASKS[task]["num_fewshot"], **facts})
            file["machine"] = machine()
            write_atomically(FILE, (json.dumps(file, separators=(",", ":")) + "\n").encode())
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
