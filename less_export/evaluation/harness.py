"""Bundles as the model ``less`` of EleutherAI's lm-evaluation-harness.

Versions after 0.4.13 find it through its entry point. For older ones, ``less-lm-eval`` is the harness's command line
with the model registered; alternatively, a task file can import this module with a ``!function`` in its ``metadata``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..bundle.artifact import Bundle, is_bundle
from ..errors import UsageError, install_hint
from ..runtime.open import backend_name, load_backend, load_tokenizer
from .scorer import Scorer

try:
    import lm_eval.models  # noqa: F401  (registers the harness's own models)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UsageError(f"lm-evaluation-harness is not installed: {install_hint('eval')}") from None

#: New tokens of a generation whose task sets no limit, and the names of that limit, the first that is set.
_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class LessLM(TemplateLM):
    """``bundle``: path of an exported bundle. ``backend``: ort, trt or torch; default by what the bundle holds.

    ``trust_code``: see :func:`less_export.open_bundle`. ``threads``: of ONNX Runtime; default one per core.
    """

    def __init__(
        self,
        bundle: str | None = None,
        backend: str | None = None,
        trust_code: bool = False,
        threads: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if bundle is None:
            raise UsageError("the model less needs --model_args bundle=DIR")
        if not isinstance(trust_code, bool):  # words that the harness does not read as a boolean
            raise UsageError(f"trust_code must be true or false, not {trust_code!r}")
        if threads is not None and type(threads) is not int:
            raise UsageError(f"threads must be a whole number, not {threads!r}")
        opened = Bundle.open(bundle)
        if threads is not None and backend_name(opened, backend) != "ort":
            raise UsageError("threads is for ONNX Runtime: leave it out")
        tokenizer = load_tokenizer(opened)
        if tokenizer is None:
            raise UsageError(f"{bundle} has no tokenizer, which tasks on text need")
        self._tokenizer = tokenizer
        options = {} if threads is None else {"threads": threads}
        self._scorer = Scorer(load_backend(opened, backend, trust_code=trust_code, **options), tokenizer)
        self._bundle = bundle

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_ids[0] if self._tokenizer.eos_ids else 0

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._bundle

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, special=add_special_tokens is not False)

    @property
    def max_length(self) -> int | None:
        """The most tokens that the bundle takes; None without a limit."""
        return self._scorer.backend.contract.token_limit()

    @property
    def max_gen_toks(self) -> int:
        return _NEW_TOKENS

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The last token is not run: an item may have one token more than the bundle takes."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        limit = self.max_length
        if limit is not None:
            longest = max((len(continuation) for _, continuation in pairs), default=0)
            if longest > limit:
                raise UsageError(
                    f"an item has {longest} tokens to score, and this bundle takes {limit}: export with a larger "
                    "--context or an evicting --policy"
                )
            _warn_of_cuts([len(context) + len(rest) - 1 for context, rest in pairs], limit)
            pairs = [(context[-(limit + 1 - len(rest)) :], rest) for context, rest in pairs]
        return self._scorer.score(pairs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """A text longer than the bundle takes is scored in windows, as the harness divides it."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            size = len(ids) if self.max_length is None else self.max_length
            if ids:
                windows += map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, size, 1))
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._scorer.score(windows), strict=True):
            totals[index] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Of a context that leaves too little space for the new tokens, the last tokens that fit are used."""
        limit = self.max_length
        contexts = [self.tok_encode(r.args[0]) or [self.prefix_token_id] for r in requests]
        counts = [_new_tokens(r.args[1]) for r in requests]
        if limit is not None:
            most = max(counts, default=0)
            if most >= limit:
                raise UsageError(
                    f"a task generates up to {most} tokens, and this bundle takes {limit} with the prompt: set a "
                    "smaller max_gen_toks (--gen_kwargs), or export with a larger --context or an evicting --policy"
                )
            _warn_of_cuts([len(c) + n for c, n in zip(contexts, counts, strict=True)], limit)
            contexts = [c[-(limit - n) :] for c, n in zip(contexts, counts, strict=True)]
        texts = []
        for context, count, options in zip(contexts, counts, (r.args[1] for r in requests), strict=True):
            until = options.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(u for u in until if u)
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            (completion,) = self._scorer.generate([context], max_new_tokens=count, stop=stop, temperature=temperature)
            texts.append(completion.text)
        return texts


def _new_tokens(options: Mapping[str, Any]) -> int:
    """The limit that a task sets to a generation."""
    return int(next((options[n] for n in _LIMITS if options.get(n) is not None), _NEW_TOKENS))


def _warn_of_cuts(lengths: Sequence[int], limit: int) -> None:
    """Warn of items that are longer than the bundle takes, in tokens that it would run."""
    long = sum(length > limit for length in lengths)
    if long:
        warnings.warn(
            f"{long} of {len(lengths)} items are longer than the {limit} tokens that this bundle takes: their "
            "beginnings are left out, as with the harness's own models",
            stacklevel=3,
        )


if "less" not in model_registry:  # if it is, the harness resolves the entry point itself
    register_model("less")(LessLM)


def run_task(
    bundle: str, task: str, folder: str | None, backend: str | None, limit: int | None, trust_code: bool = False
) -> dict[str, Any]:
    """Run a task, group or tag; ``folder`` holds the user's own task files, ``limit`` caps the items of each task.

    Returns:
        ``task`` and ``scores``, the metrics of every task and group that has any.

    Raises:
        UsageError: there is no such task, its data cannot be loaded, or ``bundle`` is not a bundle.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if limit is not None and limit < 1:
        raise UsageError(f"--seqs must be at least 1, not {limit}")
    if not is_bundle(bundle):
        raise UsageError(f"--task lm-eval runs bundles, and {bundle} is not one: export the model first")
    manager = TaskManager(include_path=folder)
    if task not in manager.all_tasks:
        raise UsageError(f"lm-evaluation-harness has no task '{task}': give the folder of its task file after it")
    try:
        loaded = manager.load([task])
    except Exception as error:  # errors of task files, datasets, the hub and the network share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"task {task} cannot be loaded ({reason}): check its file and data") from error
    chosen = [loaded["groups"][task]] if task in loaded["groups"] else list(loaded["tasks"].values())
    model = LessLM(bundle, backend, trust_code)
    results = simple_evaluate(model, tasks=chosen, task_manager=manager, limit=limit, bootstrap_iters=0)
    scores = {
        name: {n: v for n, v in figures.items() if isinstance(v, int | float)}
        for name, figures in results["results"].items()
        if any("," in n for n in figures)  # keys are metric,filter; a group that does not aggregate has none
    }
    return {"task": task, "scores": scores}


def main() -> None:
    """``lm_eval`` with the model ``less``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
