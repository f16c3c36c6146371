"""Update the tables of README and docs, between their markers, from ``benchmarks/results``.

``python benchmarks/tables.py`` writes them, ``--check`` only reports whether they are up to date.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import decoding_tables
import gpu_tables
import kernels_tables
import long_tables
import memory_tables
import model_tables
import plan_tables
import quality_tables
import serving_tables
import slots_tables

from less_export.cli.recipes import PAPER_BUDGETS, RECIPE_LENGTHS, full_caches, recipe_figures
from less_export.cli.tables import size
from less_export.hf.recipes import all_recipes, load

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "models" / "ARCHITECTURES.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
)


def results(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return data


def where(data: dict[str, Any]) -> str:
    """The machine of a result, as text."""
    m = data["machine"]
    versions = ", ".join(f"{n} {m['versions'][n]}" for n in ("torch", "transformers", "onnxruntime"))
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; {versions}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def families() -> str:
    """Parity per family."""
    data = results("families")
    rows = [
        [
            f"`{r['class']}` ({r['family']})",
            f"{r['onnx_against_f64']:.1e}",
            f"{r['hf_f32_against_f64']:.1e}",
            f"{r['onnx_against_torch_evicting']:.1e}",
        ]
        for r in data["rows"]
    ]
    header = ["family", "ONNX vs HF f64, nothing evicted", "HF f32 vs HF f64", "ONNX vs torch, past eviction"]
    return table(header, rows) + f"\n\n({where(data)})"


def versions() -> str:
    """Releases that the core of the test suite passed with."""
    sessions = results("versions")
    packages = list(next(iter(sessions.values()))["packages"])
    header = ["session", "Python", *packages, "tests passed"]
    rows = [
        [f"`{name}`", s["python"], *(s["packages"][p].partition("+")[0] for p in packages), str(s["passed"])]
        for name, s in sessions.items()
    ]
    return table(header, rows)


def export_cost() -> str:
    """Cost of an export, compared with the ordinary one."""
    data = results("export_cost")
    ours, theirs, ratio = data["median"]["less_export"], data["median"]["ordinary"], data["ratio"]
    names = {"seconds": "wall time, s", "peak_rss_mb": "peak RSS, MB", "written_mb": "written, MB"}
    rows = [[label, f"{ours[n]:.1f}", f"{theirs[n]:.1f}", f"{ratio[n]:.2g}x"] for n, label in names.items()]
    note = f"({data['layers']} layers, {data['dtype']}, checkpoint {data['checkpoint_mb']:.0f} MB; {where(data)})"
    return table(["", "less-export", "torch.onnx.export", "ratio"], rows) + f"\n\n{note}"


def headline() -> str:
    """The figures at the top of the README, with links to their pages."""
    decode = results("decode_cost")
    by_context = {r["context"]: r for r in decode["rows"]}
    long, step, short = by_context[32768], by_context[16384], decode["rows"][0]
    state, cache = (size(long[n]) for n in ("less_state_bytes", "full_cache_bytes"))
    slower = f"at {short['context']}: {short['less_ms']:.0f} and {short['full_ms']:.0f} ms"
    cost, quality_page = "[Decoding](docs/results/decoding.md)", "[Quality](docs/results/quality.md)"
    times = (f"{step[n]:.0f} ms" for n in ("less_ms", "full_ms"))
    rows = [
        [f"cache of one sequence at {long['context']:,} tokens", state, "", cache, cost],
        [f"decode step at {step['context']:,} tokens ({slower})", next(times), "", next(times), cost],
    ]
    kernels = results("kernels")
    for model, less, sparse in kernels_tables.headline(kernels):
        rows.append([f"KL from the full cache, {model}", f"{less:.3f}", f"{sparse:.3f}", "0", quality_page])
    description = (
        f"cache and step: {decode['layers']} layers of TinyLlama's shape, {decode['slots']} slots in the compute "
        f"dtype; KL in nats: mean of thirteen texts, contexts of {kernels_tables.HEADLINE_LENGTH:,} tokens, int8 slots "
        "in the bytes of 5% of the context in 16 bits"
    )
    return table(["", "LESS", "sparse cache, same bytes", "full cache", "details"], rows) + f"\n\n({description})"


def recipes() -> str:
    """Memory of the recipes, computed from their facts."""
    rows = []
    for r in all_recipes():
        memory = recipe_figures(r)["memory"]
        slots, full = memory["state_bytes_by_slots"], full_caches(r)
        state = slots["int8"]
        figures = [*map(size, slots.values()), *(f"{size(n)} ({n / state:.1f}x){mark}" for n, mark in full)]
        rows.append([f"`{r.name}`", r.hub, f"{r.policy} {r.budget}", *figures, size(memory["kernel_bytes"])])
    lengths = [f"full cache at {n:,}" for n in RECIPE_LENGTHS]
    return table(["recipe", "hub", "cache", "LESS, 16-bit slots", "LESS, int8 slots", *lengths, "kernels"], rows)


def recipe_budgets() -> str:
    """Memory of the paper's models at the paper's budgets."""
    rows = []
    for r in filter(None, map(load, ("llama2-7b", "llama2-13b", "falcon-7b"))):
        states = recipe_figures(r)["memory"]["state_bytes_at_budget"]
        rows.append([f"`{r.name}`", f"{r.context:,}", *map(size, states.values())])
    return table(["recipe", "of a context of", *PAPER_BUDGETS], rows)


def large() -> str:
    """A full-size model: writing it, exporting it, building engines of its layers."""
    data = results("large")
    steps = [("random checkpoint", data["checkpoint"]), ("export for TensorRT, weights linked", data["export"])]
    steps += [(f"engine with the plugin, {p['gpu_arch']}", p) for p in data["plans"]]
    rows = []
    for description, run in steps:
        megabytes = run.get("written_mb", run.get("plan_mb"))
        output = f"{megabytes:,.1f}" if megabytes is not None else f"stopped: {run['why']}, at: {run['reached']}"
        rows.append([description, str(run["layers"]), f"{run['seconds']:.0f}", f"{run['peak_rss_mb']:,.0f}", output])
    header = ["step", "layers", "wall time, s", "peak RSS, MB", "written, MB"]
    recipe = load(data["model"])
    assert recipe is not None
    kernels = f"without kernels: trained ones are {size(recipe.kernel_bytes())} more"
    return table(header, rows) + f"\n\n({data['model']}, {data['dtype']}, {kernels}; {where(data)})"


def quality(part: str) -> str:
    """A table of the quality benchmark."""
    measured = quality_tables.Quality(results("quality"))
    return (
        table(*getattr(quality_tables, part)(measured))
        + f"\n\n({quality_tables.note(measured, part)}{where(measured.data)})"
    )


def gpu_results() -> Any:
    """The results of gpu_check, which may not have run yet."""
    return results("gpu") if (ROOT / "benchmarks" / "results" / "gpu.json").is_file() else {}


def ort_cuda() -> str:
    """What scripts/ort_cuda_nodes.py found."""
    data = results("ort_cuda")
    return table(*gpu_tables.provider(data)) + f"\n\n(onnxruntime-gpu {data['onnxruntime']}, graphs of two layers)"


def gpu_model() -> str:
    """Decode as scripts/gpu_model.py computes it."""
    return table(*gpu_tables.model(results("gpu_model"), gpu_results()))


def gpu(part: str) -> str:
    """A table of the results of gpu_check."""
    data = gpu_results()
    return table(*gpu_tables.PARTS[part](data)) + f"\n\n({gpu_tables.note(data)})"


def long() -> str:
    """Loss by position in long streams."""
    data = results("long")
    description = f"{data['model']}, {data['slots']} slots, {data['chunk']} tokens a step, without kernels"
    return table(*long_tables.long(data)) + f"\n\n({description}; {where(data)})"


def beyond(part: str) -> str:
    """A table about streams past the trained length."""
    data = results("beyond")
    note = f"{data['slots']} slots unless said otherwise"
    return table(*long_tables.PARTS[part](data)) + f"\n\n({note}; {where(data['streams'][-1])})"


def recall() -> str:
    """Recall of a planted sentence."""
    data = results("recall")
    note = f"{data['slots']} slots unless said otherwise, one token a step, {data['pairs']} pairs of streams"
    return table(*long_tables.recall(data)) + f"\n\n({note}; {where(data)})"


def state_kl() -> str:
    """KL with 16-bit and 32-bit states."""
    data = results("state_kl")
    note = f"contexts of {data['length']:,} tokens, one token a step, {data['rows'][0]['sequences']} sequences a text"
    return table(*slots_tables.state_kl(data)) + f"\n\n({note}; {where(data)})"


def slots(part: str) -> str:
    """A table about int8 slots."""
    data = results("slots")
    note = (
        f"contexts of {data['length']:,} tokens, one token a step, policy {data['rows'][0]['policy']}, without kernels"
    )
    return table(*slots_tables.PARTS[part](data)) + f"\n\n({note}; {where(data)})"


def slots_decode() -> str:
    """Decode steps with either kind of slots."""
    data = results("slots_decode")
    note = (
        f"random Llama of TinyLlama-1.1B's shape, {data['layers']} layers, {data['slots']} slots, float32 weights, "
        f"{data['threads']} threads, median of {data['steps']} steps"
    )
    return table(*slots_tables.slots_decode(data)) + f"\n\n({note}; {where(data)})"


def int4() -> str:
    """An experiment with slots of four bits."""
    data = results("int4")
    note = f"{data['model']}, contexts of {data['length']:,} tokens, one token a step, policy h2o, without kernels"
    return table(*slots_tables.int4(data)) + f"\n\n({note}; {where(data)})"


def kernels_kl(half_life: int | None, edition: str | None = None) -> str:
    """What kernels add to int8 slots."""
    data = results("kernels")
    begin = "where the first layer evicts" if edition in ("today", "passages") else "where all layers evict"
    note = f"one token a step, every {data['stride']}th position from {begin}"
    return table(*kernels_tables.kernels_kl(data, half_life, edition)) + f"\n\n({note}; {where(data)})"


def half_lives() -> str:
    """How the half-life of scores changes int8 slots."""
    data = results("half_life")
    note = f"contexts of {data['length']:,} tokens, one token a step, without kernels; change with 95% interval"
    return table(*kernels_tables.half_lives(data)) + f"\n\n({note}; {where(data)})"


def tasks(trained: str | None = None) -> str:
    """Tasks of lm-evaluation-harness."""
    data = results("tasks")
    note = (
        "accuracy in percent (standard error); one token a step; last columns: nats of log probability of the right "
        "answer, and of its share of all choices, and 95% bootstrap intervals over the items"
    )
    return table(*kernels_tables.tasks(data, trained)) + f"\n\n({note}; {where(data)})"


def summaries() -> str:
    """ROUGE of summaries."""
    data = results("tasks")
    note = "F1 in percent; one token a step; intervals by bootstrap over the articles"
    return table(*kernels_tables.summaries(data)) + f"\n\n({note}; {where(data)})"


def state_drift() -> str:
    """Drift of a 16-bit state."""
    data = results("state")
    note = f"relative error of the means after so many tokens, random values, R {data['rank']}, D {data['head_dim']}"
    return table(*slots_tables.state_drift(data)) + f"\n\n({note}; {where(data)})"


def noted(parts: dict[str, Any], part: str) -> str:
    """A table of a module whose tables have notes: about servers, decoding or memory."""
    name, maker, note = parts[part]
    data = results(name)
    return table(*maker(data)) + f"\n\n({'; '.join(filter(None, (note(data), where(data))))})"


def models(part: str) -> str:
    """A table about architectures."""
    name, maker = model_tables.PARTS[part]
    data = results(name)
    return table(*maker(data)) + f"\n\n({where(data)})"


def rendered(text: str) -> str:
    """A document with fresh tables between ``<!-- table NAME -->`` and ``<!-- end -->``."""
    makers: dict[str, Any] = {
        "headline": headline,
        "families": families,
        "versions": versions,
        "export_cost": export_cost,
    }
    makers |= {"recipes": recipes, "recipe_budgets": recipe_budgets}
    makers |= {"large": large, "long": long}
    makers |= {"slots_decode": slots_decode, "state_drift": state_drift, "int4": int4}
    makers |= {name: lambda maker=maker: table(*maker()) for name, maker in plan_tables.PARTS.items()}
    makers |= {
        "kernels_kl": functools.partial(kernels_kl, 128, "today"),
        "kernels_kl_divided": functools.partial(kernels_kl, 128, "divided"),
        "kernels_kl_equal": functools.partial(kernels_kl, 128, "equal"),
        "kernels_kl_512": functools.partial(kernels_kl, 512),
        "kernels_kl_passages": functools.partial(kernels_kl, 128, "passages"),
        "kernels_kl_sink": functools.partial(kernels_kl, None, "passages"),
        "kernels_kl_sink_divided": functools.partial(kernels_kl, None, "divided"),
        "kernels_kl_sink_equal": functools.partial(kernels_kl, None, "equal"),
    }
    makers |= {"half_lives": half_lives, "tasks": tasks, "summaries": summaries, "state_kl": state_kl, "recall": recall}
    makers["tasks_passages"] = functools.partial(tasks, kernels_tables.PASSAGES)
    makers |= {p: functools.partial(beyond, p) for p in long_tables.PARTS}
    makers |= {p: functools.partial(slots, p) for p in slots_tables.PARTS}
    for parts in (serving_tables.PARTS, decoding_tables.PARTS, memory_tables.PARTS):
        makers |= {p: functools.partial(noted, parts, p) for p in parts}
    makers |= {f"gpu_{p}": functools.partial(gpu, p) for p in gpu_tables.PARTS}
    makers |= {"ort_cuda": ort_cuda}
    makers |= {"gpu_model": gpu_model, "gpu_model_kernels": lambda: table(*gpu_tables.kernels(results("gpu_model")))}
    makers |= {p: functools.partial(models, p) for p in model_tables.PARTS}
    makers |= {f"quality_{p}": functools.partial(quality, p) for p in quality_tables.PARTS}

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{makers[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fresh, text, flags=re.S)


def main() -> int:
    stale = {p: fresh for p in DOCUMENTS if (fresh := rendered(text := p.read_text(encoding="utf-8"))) != text}
    names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
    if "--check" in sys.argv[1:]:
        print(f"stale: {names}; run benchmarks/tables.py" if stale else "the tables are up to date")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
