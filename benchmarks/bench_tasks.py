"""The LESS paper's tasks (section 4.1) over bundles: full cache, int8 slots alone, and LESS in the same bytes.

Three bundles of a model are exported into ``--work``, and lm-evaluation-harness runs each task over each of them. LESS
has the slots that its kernels were trained with; layers that training left without a low-rank term are the same in
both. ``--kinds fewer`` runs one with the slots of LESS and no state: what the state does, and what its bytes would do.

Bundles that evict are fed one token a step. Items of most tasks are short, so each has as many
examples before it as fill several times the slots; the paper's five would leave some tasks without any eviction. The
examples are the first of the file, the same for all items, and the items come after them. ``--data`` holds the tasks as
JSON lines. With ``--summaries``, a file of articles, summaries are scored with ROUGE. The result is
``benchmarks/results/tasks.json``, written after every task and cache; what it holds of the same kernels is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import RESULTS, machine
from datasets import Dataset
from lm_eval import simple_evaluate

from less_export import open_bundle
from less_export.bundle.artifact import Bundle
from less_export.bundle.files import write_atomically
from less_export.cli.progress import Bars
from less_export.config import ExportConfig
from less_export.contract import LayerSpec
from less_export.evaluation import summarize
from less_export.evaluation.harness import LessLM
from less_export.exporter.build import export
from less_export.hf.model import open_model
from less_export.hf.sources import resolve
from less_export.less.feature_maps import Kernels
from less_export.less.memory import extra_tokens, layer_bytes

FILE = RESULTS / "tasks.json"
KINDS = ("full", "sparse", "less", "fewer")
#: Most tokens of an item, the context of the full cache.
LENGTH = 2048
#: Rows of a bundle; tokens per step of the full cache, whose results do not depend on it.
ROWS, CHUNK = 8, 32
#: Most tokens of a summary.
SUMMARY = 64
#: What surrounds an article in files of the paper's prompts.
BEFORE_ARTICLE, AFTER_ARTICLE = "###\nArticle: ", "\n\nSummarize the above article in 1 sentence.\n"


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
    "piqa": choices(15, "\nAnswer:"),
    "openbook_qa": choices(25),
    "winogrande": {
        "num_fewshot": 20,
        "output_type": "multiple_choice",
        "doc_to_text": lambda item: item["gold"],
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
    "arc_challenge": choices(10, "\nAnswer:"),
    "math_qa": choices(8),
    "lambada_openai": {
        "num_fewshot": 5,
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        # The harness puts no delimiter before the word that it asks for, only before those of examples.
        "doc_to_target": lambda item: " " + item["continuation"],
        "target_delimiter": "",
    },
}


# ------------------------------------------------------------------ the bundles


def budgets(plan: Sequence[LayerSpec], kernels: Kernels, dtype: str) -> dict[str, dict[int, int]]:
    """Slots of the layers that evict, by kind: without kernels, every byte of a low-rank state is slots.

    Layers that training left without a low-rank term have these slots already.
    """
    less = {int(i): sum(x) for i, x in kernels.provenance["slots"].items()}
    sparse = dict(less)
    for i, maps in kernels.layers.items():
        sparse[i] += extra_tokens(replace(plan[i], absorb=True, rank=maps.rank, capacity=less[i]), dtype)
    return {"sparse": sparse, "less": less, "fewer": dict(less)}


def configurations(model: str, file: Path, constants: Path) -> dict[str, ExportConfig]:
    """Options of the three exports; the constants of int8 slots are those of the kernels in both that evict.

    Args:
        constants: where the constants are written, as a file of kernels without a layer.
    """
    kernels = Kernels.load(file)
    if not kernels.layers:
        raise SystemExit(f"{file} has no low-rank term: the cache is the sparse one")
    facts = kernels.provenance
    replace(kernels, layers={}).save(constants)
    common = ExportConfig(target="ort", dtype="float32", context=LENGTH, max_batch=ROWS, validate=False)
    evicting = replace(
        common,
        policy=facts["policy"],
        score_half_life=facts.get("score_half_life"),
        slots=facts.get("slot_dtype"),
        state=facts.get("state_bits"),
        max_distance=facts.get("max_distance") or "none",
        compress_sliding=facts.get("compress_sliding"),
        chunk=1,
    )

    def with_slots(kind: str, slots: dict[int, int]) -> ExportConfig:
        text = ",".join(f"{i}:{count}" for i, count in slots.items())
        own = file if kind == "less" else constants
        return replace(evicting, kernels=own, budget=str(max(slots.values())), layer_budgets=text)

    trained = {int(i): sum(x) for i, x in facts["slots"].items()}
    plan = open_model(resolve(model), with_slots("less", trained)).plan
    found = {kind: with_slots(kind, slots) for kind, slots in budgets(plan, kernels, "float32").items()}
    return {"full": replace(common, policy="full", chunk=CHUNK), **found}


def bundles(model: str, file: Path, digest: str, work: Path, kinds: Sequence[str], progress: Bars) -> dict[str, Path]:
    """The exports in ``work``, by kind; those that are there already are kept."""
    work.mkdir(parents=True, exist_ok=True)
    name = resolve(model).name.replace("/", "-")
    found = {}
    made = configurations(model, file, work / f"{digest}.constants.safetensors")
    for kind, config in ((kind, made[kind]) for kind in kinds):
        path = work / (f"{name}-full" if kind == "full" else f"{name}-{digest}-{kind}")
        if not path.exists():
            progress.say(f"exporting {path.name}")
            export(model, path, config, progress=progress)
        found[kind] = path
    return found


def cache(bundle: Path) -> dict[str, Any]:
    """The slots of the layers that evict, least and most, and the bytes of a sequence's state, without placeholders."""
    artifact = Bundle.open(bundle).artifact("ort")
    assert artifact is not None
    layers, dtype = artifact.contract.layers, artifact.contract.dtype
    slots = [s.capacity for s in layers if s.policy.evicts]
    size = sum(layer_bytes(s, dtype) for s in layers)
    return {"slots": [min(slots), max(slots)] if slots else [], "bytes": size}


# ------------------------------------------------------------------ the tasks


class Counting(LessLM):
    """``tokens``: those of each pair of the latest call, the context's and the continuation's."""

    tokens: Sequence[int] = ()

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        self.tokens = [len(context) + len(rest) for _, context, rest in requests]
        if max(self.tokens) > LENGTH:
            raise SystemExit(f"an item has {max(self.tokens)} tokens, more than {LENGTH}: use fewer examples")
        return super()._loglikelihood_tokens(requests, **options)


def run(lm: Counting, name: str, folder: Path, items: int) -> dict[str, Any]:
    """Scores of the first items after the examples, and the mean length with them."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    docs, shots = [json.loads(line) for line in lines if line.strip()], int(TASKS[name]["num_fewshot"])
    splits = {"examples": Dataset.from_list(docs[:shots]), "items": Dataset.from_list(docs[shots : shots + items])}
    task = {
        "task": name,
        "custom_dataset": lambda **_: splits,
        "test_split": "items",
        "fewshot_split": "examples",
        "fewshot_config": {"sampler": "first_n"},
        **TASKS[name],
    }
    results = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"][name], key=lambda s: s["doc_id"])
    return {"tokens": round(float(np.mean(lm.tokens))), **scores(name, samples)}


def scores(name: str, samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """By item: whether it is right, and the log probability of its right answer; with choices, also its share of theirs
    (``among``, a log probability too)."""
    right, gold, among = [], [], []
    for sample in samples:
        values = np.array([float(response[0]) for response in sample["filtered_resps"]])
        if TASKS[name]["output_type"] == "loglikelihood":
            right.append(int(sample["filtered_resps"][0][1]))
            gold.append(round(float(values[0]), 4))
            continue
        answer = sample["doc"]["gold"]
        right.append(int(values.argmax() == answer))
        gold.append(round(float(values[answer]), 4))
        among.append(round(float(values[answer] - np.logaddexp.reduce(values)), 4))
    return {"right": right, "gold": gold, **({"among": among} if among else {})}


def articles(file: Path, count: int) -> list[tuple[str, str]]:
    """(text, summary) of the first articles; the instruction of the paper's prompts is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines()[:count]:
        item = json.loads(line)
        text = item["text"] if "text" in item else item["article"]
        text = text.removeprefix(BEFORE_ARTICLE).removesuffix(AFTER_ARTICLE)
        found.append((text, item["summary"] if "summary" in item else item["summary_gt"]))
    return found


def summaries(bundle: Path, items: Sequence[tuple[str, str]], threads: int) -> dict[str, Any]:
    """ROUGE of every item, by metric, and the mean tokens of the articles."""
    generator = open_bundle(bundle, "ort", threads=threads)
    found, _ = summarize.rouge(generator, items, SUMMARY)
    generator.backend.close()
    assert generator.tokenizer is not None
    tokens = round(float(np.mean([len(generator.tokenizer.encode(text)) for text, _ in items])))
    return {"tokens": tokens, "rouge": {n: [round(float(x), 4) for x in values] for n, values in found.items()}}


# ------------------------------------------------------------------ the run


def measured(out: Path, file: dict[str, Any], facts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Add a row with these facts and what ``measure`` gives, unless there is one, and write the file.

    A row of the same kernels, task and kind, of another number of items, is replaced.
    """
    keys = ("model", "kernels", "task", "kind")
    same = [r for r in file["rows"] if all(r[k] == facts[k] for k in keys)]
    if any(r["limit"] == facts["limit"] for r in same):
        return
    begin = time.perf_counter()
    row = {**facts, **measure()}
    row["seconds"] = round(time.perf_counter() - begin)
    file["rows"] = [r for r in file["rows"] if r not in same] + [row]
    file["machine"] = machine()
    write_atomically(out, (json.dumps(file, separators=(",", ":")) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--kernels", type=Path, required=True, metavar="FILE", help="kernels for int8 slots")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of the bundles, which are kept")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the tasks, TASK.jsonl each")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="TASK", help="(default: all)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS[:3],
        metavar="KIND",
        help="of caches (default: the first three)",
    )
    parser.add_argument("--items", type=int, default=100, metavar="N", help="of each task (default: 100)")
    parser.add_argument("--summaries", type=Path, metavar="FILE", help="articles with summaries, JSON lines")
    parser.add_argument("--articles", type=int, default=50, metavar="N", help="with --summaries (default: 50)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of ONNX Runtime (default: 1)")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: results/tasks.json)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    progress, model = Bars(), resolve(args.model).name
    digest = hashlib.sha256(args.kernels.read_bytes()).hexdigest()[:12]
    policy = Kernels.load(args.kernels).provenance["policy"]
    file: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    exported = bundles(args.model, args.kernels, digest, args.work, args.kinds, progress)

    def measure(task: str, limit: int, facts: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> None:
        for kind, bundle in exported.items():
            whole = kind == "full"
            key = {"model": model, "policy": "full" if whole else policy, "kernels": None if whole else digest}
            all_facts = {**key, "task": task, "kind": kind, "limit": limit, **cache(bundle), **facts}
            with progress.phase(f"{model}, {task}, {kind}", 0):
                measured(args.out, file, all_facts, lambda bundle=bundle: work(bundle))

    for task in args.tasks:
        measure(
            task,
            args.items,
            {"shots": TASKS[task]["num_fewshot"]},
            lambda bundle, task=task: run(
                Counting(str(bundle), "ort", threads=args.threads), task, args.data, args.items
            ),
        )
    if args.summaries:
        items = articles(args.summaries, args.articles)
        measure("summarize", args.articles, {}, lambda bundle: summaries(bundle, items, args.threads))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
