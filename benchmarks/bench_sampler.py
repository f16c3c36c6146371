"""What choosing the tokens of a step costs at Gemma's vocabulary, by what is asked, for 8 rows and for one.

The logits are Zipf's law in random order with noise: as peaked as those of a trained model. ``--before COMMIT`` times
the sampler of a commit of this repository beside the present one, step by step in one process. Both run in one thread;
the result is the median of its CPU time, which other programs disturb less than the wall clock:
``benchmarks/results/sampler.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from bench_common import write_results

from less_export.runtime import sampler as present
from less_export.runtime.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
VOCAB, ROWS, PROMPT = 262_144, 8, 1000
#: What rows ask for, by the name of the case; the rows of a step take turns.
PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "logprobs": 5}
CASES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "temperature": [{"temperature": 0.8}],
    "top-k 50": [{"temperature": 0.8, "top_k": 50}],
    "top-p 0.95": [{"temperature": 0.8, "top_p": 0.95}],
    "min-p 0.05": [{"temperature": 0.8, "min_p": 0.05}],
    "penalties and logprobs, greedy": [PENALTIES],
    "penalties and logprobs, top-p 0.95": [{"temperature": 0.8, "top_p": 0.95, **PENALTIES}],
}
CASES["mixed: one row of each of these"] = [options for (options,) in CASES.values()]
FLAT = "top-p 0.95, logits of random weights"
CASES[FLAT] = CASES["top-p 0.95"]


def sampler_of(commit: str) -> ModuleType:
    """The module ``less_export.runtime.sampler`` of a commit, beside the present one."""
    for name in ("sampling", "sampler"):
        path = f"less_export/runtime/{name}.py"
        source = subprocess.check_output(["git", "show", f"{commit}:{path}"], cwd=ROOT, text=True)
        spec = importlib.util.spec_from_loader(f"less_export.runtime.before_{name}", loader=None)
        assert spec is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        exec(compile(source.replace("from .sampling", "from .before_sampling"), path, "exec"), module.__dict__)
    return module


def random_logits(random: np.random.Generator, flat: bool) -> np.ndarray:
    """Logits [ROWS, VOCAB] f32."""
    noise = random.standard_normal((ROWS, VOCAB))
    if flat:
        return noise.astype(np.float32)
    zipf = np.stack([random.permutation(-1.5 * np.log(np.arange(1, VOCAB + 1))) for _ in range(ROWS)])
    return (zipf + 0.3 * noise).astype(np.float32)


def steps_of(module: ModuleType, case: str, rows: int) -> Callable[[np.ndarray], list[Any]]:
    """A function that chooses the next tokens of ``rows`` sequences by logits [rows, VOCAB]."""
    options = CASES[case]
    params = [SamplingParams(**options[i % len(options)]) for i in range(rows)]
    samplers = [module.Sampler(p, np.random.default_rng(i), range(PROMPT)) for i, p in enumerate(params)]
    return lambda logits: module.choose_all(logits, samplers, [[]] * rows)


def timed(modules: dict[str, ModuleType], case: str, rows: int, steps: int) -> dict[str, float]:
    """Medians of a step in milliseconds by sampler; all of them must choose the same tokens."""
    random = np.random.default_rng(0)
    batches = [random_logits(random, case == FLAT)[:rows] for _ in range(2)]
    times: dict[str, list[float]] = {name: [] for name in modules}
    choosers = {name: steps_of(module, case, rows) for name, module in modules.items()}
    for step in range(steps):
        chosen = []
        for name, choose in choosers.items():
            start = time.process_time()
            choices = choose(batches[step % len(batches)])
            times[name].append(1e3 * (time.process_time() - start))
            chosen.append([c.token_id for c in choices])
        if any(tokens != chosen[0] for tokens in chosen):
            sys.exit(f"bench_sampler: the samplers choose different tokens ({case}): {chosen}")
    return {name: round(statistics.median(x), 3) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="time the sampler of this commit too")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    modules = {"before": sampler_of(args.before)} if args.before else {}
    modules["now"] = present
    result = []
    for case in CASES:
        for rows in (ROWS, 1):
            if rows == 1 and len(CASES[case]) > 1:
                continue
            result.append({"case": case, "rows": rows, "milliseconds": timed(modules, case, rows, args.steps)})
            print(result[-1])
    facts = {"vocab": VOCAB, "prompt": PROMPT, "steps": args.steps, "before": args.before}
    write_results("sampler", {**facts, "rows": result})


if __name__ == "__main__":
    main()
