"""Summaries by generation, scored with ROUGE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .. import api
from ..errors import UsageError

_PROMPT = "{text}\n\nSummary:"
_METRICS = ("rouge1", "rouge2", "rougeL")


def summarize(
    bundle: str, files: Sequence[str], count: int | None, max_new_tokens: int, backend: str | None = None
) -> dict[str, Any]:
    """Greedy summaries of the first ``count`` lines of a jsonl (all for None) and their mean ROUGE F1 against its own.

    Each line is an object with ``text`` and ``summary``. Generation stops at the first line break.

    Raises:
        UsageError: no such file or fields, or the rouge-score library is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("--task summarize needs rouge-score: pip install 'less-export[eval]'") from None
    if len(files) != 1:
        raise UsageError("--task summarize takes one --data FILE.jsonl with text and summary on each line")
    items = _read(files[0])[:count]
    generator = api.open_bundle(bundle, backend)
    prompts = [_PROMPT.format(text=text) for text, _ in items]
    made = generator.generate(prompts, max_new_tokens=max_new_tokens, stop=("\n",))
    scorer = RougeScorer(list(_METRICS), use_stemmer=True)
    scores = [scorer.score(summary, m.text) for (_, summary), m in zip(items, made, strict=True)]
    means = {n: sum(s[n].fmeasure for s in scores) / len(scores) for n in _METRICS}
    return {"task": "summarize", "items": len(items), "scores": means, "summaries": [m.text for m in made]}


def _read(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            items = [json.loads(line) for line in file if line.strip()]
        found = [(str(x["text"]), str(x["summary"])) for x in items]
    except OSError as error:
        raise UsageError(f"cannot read --data {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--data {path} is no jsonl with text and summary on each line ({error})") from None
    if not found:
        raise UsageError(f"--data {path} is empty")
    return found
