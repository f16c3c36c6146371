"""Generated summaries, scored with ROUGE, for the same caches as perplexity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle.artifact import is_bundle
from ..config import ExportConfig
from ..errors import UsageError, install_hint
from ..progress import Progress
from ..runtime.generate import Generator
from ..runtime.open import open_bundle
from ..runtime.sampling import SamplingParams
from . import statistics
from .statistics import Interval
from .subject import open_subject, refuse_options
from .variants import build, chosen

_PROMPT = "{text}\n\nSummary:"
METRICS = ("rouge1", "rouge2", "rougeL")
#: Prompts per batch on torch.
_BATCH = 8


@dataclass(frozen=True)
class Summaries:
    """Results of one cache. ``scores``: ROUGE F1 against the reference summaries; ``texts``: one for each item."""

    cache: str
    backend: str
    scores: dict[str, Interval]
    texts: tuple[str, ...]


def summarize(
    target: str,
    files: Sequence[str],
    count: int | None,
    max_new_tokens: int,
    compare: Sequence[str],
    cache: ExportConfig,
    kernel_file: Path | None,
    backend: str | None,
    progress: Progress,
    trust_code: bool = False,
) -> list[Summaries]:
    """Summarise the first ``count`` texts of a .jsonl file (None: all) greedily and score them with ROUGE F1.

    Each line is an object with ``text`` and ``summary``, the reference. The first line of an answer that is not empty
    is the summary. Intervals are by bootstrap over the items.

    Args:
        compare: kinds of caches; if empty, the bundle or model as it is. cache, kernel_file: for a MODEL only.
        trust_code: see :func:`less_export.open_bundle`.

    Raises:
        UsageError: the file or its fields are missing, options are impossible, or rouge-score is not installed.
    """
    _scorer()  # before anything is loaded
    if len(files) != 1:
        raise UsageError("--task summarize takes one --data FILE.jsonl with text and summary on each line")
    if count is not None and count < 1:
        raise UsageError(f"--seqs must be at least 1, not {count}")
    SamplingParams(max_new_tokens=max_new_tokens)
    chosen(compare)
    items = _read(files[0])[:count]
    prompts = [_PROMPT.format(text=text) for text, _ in items]
    if is_bundle(target) and not compare:
        refuse_options(target, cache, kernel_file)
        runs = iter([("as exported", open_bundle(target, backend, trust_code=trust_code))])
    else:
        runs = _variants(target, prompts, max_new_tokens, compare, cache, kernel_file, backend, progress, trust_code)
    results = []
    for name, generator in runs:
        with progress.phase(name, len(prompts)) as step:
            scores, texts = rouge(generator, items, max_new_tokens)
            step("", len(prompts))
        generator.backend.close()
        means = {n: statistics.mean(values) for n, values in scores.items()}
        results.append(Summaries(name, generator.backend.name, means, texts))
    return results


def rouge(
    generator: Generator, items: Sequence[tuple[str, str]], max_new_tokens: int
) -> tuple[dict[str, npt.NDArray[np.float64]], tuple[str, ...]]:
    """Summarise (text, reference) items; F1 [N] by metric, and the summaries.

    Raises:
        UsageError: rouge-score is not installed.
    """
    scorer = _scorer()
    params = SamplingParams(max_new_tokens=max_new_tokens)
    answers = generator.generate([_PROMPT.format(text=text) for text, _ in items], params)
    texts = tuple(a.text.strip().partition("\n")[0].strip() for a in answers)  # models may begin with a line break
    scores = [scorer.score(reference, text) for (_, reference), text in zip(items, texts, strict=True)]
    return {n: np.array([s[n].fmeasure for s in scores]) for n in METRICS}, texts


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError(f"--task summarize needs rouge-score: {install_hint('eval')}") from None
    return RougeScorer(list(METRICS), use_stemmer=True)


def _variants(
    target: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    compare: Sequence[str],
    cache: ExportConfig,
    kernel_file: Path | None,
    backend: str | None,
    progress: Progress,
    trust_code: bool,
) -> Iterator[tuple[str, Generator]]:
    """The caches one by one: the exported one on its own backend, all others on torch."""
    progress.say(f"loading {target}")
    subject = open_subject(target, cache, kernel_file, True, trust_code, progress)
    subject.refuse_backend(backend)
    if subject.tokenizer is None:
        raise UsageError(f"{target} has no tokenizer.json, which summaries need")
    longest = max(len(subject.tokenizer.encode(p)) for p in prompts) + max_new_tokens
    kinds = chosen(compare or ["less" if subject.kernels.layers else "sparse"])
    variants = build(kinds, subject.plan, subject.kernels, longest, subject.cache_dtype)
    own = {v.kind for v in variants if backend != "torch" and subject.exported(v)}
    if own and subject.own:
        subject.own(backend)  # fails before anything runs if a requirement is missing
    for variant in variants:
        name = backend if variant.kind in own else "torch"
        opened = subject.backend(variant, name, min(_BATCH, len(prompts)), subject.chunk)
        yield variant.kind, Generator(opened, subject.tokenizer)


def as_json(rows: Sequence[Summaries], target: str) -> dict[str, Any]:
    """The table and the summaries, for a JSON file."""
    table = [{**vars(r), "scores": {n: vars(s) for n, s in r.scores.items()}} for r in rows]
    return {"task": "summarize", "subject": target, "items": len(rows[0].texts), "rows": table}


def _read(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            items = [json.loads(line) for line in file if line.strip()]
        pairs = [(str(x["text"]), str(x["summary"])) for x in items]
    except OSError as error:
        raise UsageError(f"cannot read --data {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"--data {path} is not a .jsonl file with text and summary on each line ({error})") from None
    if not pairs:
        raise UsageError(f"--data {path} is empty")
    return pairs
