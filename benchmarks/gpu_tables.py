"""GPU tables of the docs, from the results of ``gpu_check`` (``benchmarks/results/gpu.json``)."""

from __future__ import annotations

from typing import Any

MISSING = "not measured yet"
Table = tuple[list[str], list[list[str]]]


def _slots(row: dict[str, Any]) -> str:
    """Number of slots, and what they and the state hold if that is not the model's dtype and float32."""
    kinds = ["int8"] * (row.get("slot_dtype") == "int8") + ["state 16"] * (row.get("state_bits") == 16)
    return " ".join([str(row["slots"]), *kinds])


def decode(data: dict[str, Any]) -> Table:
    """Decode, compared with a device-to-device copy in the same run."""
    header = ["batch", "slots", "KV heads", "query heads", "us", "MB moved", "GB/s", "of a copy"]
    copy = data.get("bandwidth", {}).get("gb_per_s")
    rows = [
        [
            str(r["batch"]),
            _slots(r),
            str(r["kv_heads"]),
            str(r["query_heads"]),
            f"{r['us']:.1f}",
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['gb_per_s']:,.0f}",
            f"{r['gb_per_s'] / copy:.0%}" if copy else MISSING,
        ]
        for r in data.get("decode", [])
    ]
    return header, rows or [["1, 16, 64", "128, 256, 1024", "8, 32", "32", *[MISSING] * 4]]


def peers(data: dict[str, Any]) -> Table:
    """A decode step compared with torch: the same step eager, and attention over a full cache."""
    header = ["batch", "against", "plugin, us", "torch, us", "ratio"]
    rows = [
        [str(r["batch"]), "the same step, eager", f"{r['plugin_us']:.1f}", f"{r['eager_us']:.1f}", f"{r['ratio']:.1f}x"]
        for r in data.get("eager", [])
    ]
    for r in data.get("eager", []):
        what = [f"{r['plugin_us']:.1f}", f"{r['eager_graph_us']:.1f}", f"{r['eager_graph_us'] / r['plugin_us']:.1f}x"]
        rows.append([str(r["batch"]), "the same step, eager, in a CUDA graph", *what])
    rows += [
        [
            str(r["batch"]),
            f"SDPA ({r['sdpa']}) over {r['context']:,} tokens",
            f"{r['plugin_us']:.1f}",
            f"{r['sdpa_us']:.1f}",
            f"{r['ratio']:.1f}x",
        ]
        for r in data.get("full_cache", [])
    ]
    contexts = "SDPA over 1,024 to 65,536 tokens"
    return header, rows or [["1, 16, 64", what, *[MISSING] * 3] for what in ("the same step, eager", contexts)]


def prefill(data: dict[str, Any]) -> Table:
    """Chunks of prefill."""
    header = ["policy", "batch", "chunk", "slots", "us", "TFLOP/s"]
    rows = [
        [r["policy"], str(r["batch"]), str(r["chunk"]), _slots(r), f"{r['us']:.1f}", f"{r['tflop_per_s']:.1f}"]
        for r in data.get("prefill", [])
    ]
    return header, rows or [["h2o, sink", "1, 8", "32, 256, 1024", "256", *[MISSING] * 2]]


def sampling(data: dict[str, Any]) -> Table:
    """Choosing tokens: the kernel, and what it saves, the download of all logits and the sampler of the host."""
    header = ["batch", "vocabulary", "options", "kernel, us", "download, us", "host sampler, us"]
    rows = [
        [
            str(r["batch"]),
            f"{r['vocab']:,}",
            r["options"],
            *(f"{r[n]:,.1f}" for n in ("kernel_us", "download_us", "host_us")),
        ]
        for r in data.get("sampling", [])
    ]
    missing = ["1, 16, 64", "32,000, 128,256", "greedy, temperature, top_p, top_k and top_p", *[MISSING] * 3]
    return header, rows or [missing]


def checks(data: dict[str, Any]) -> Table:
    """Results of the checks on the GPU."""
    rows = []
    counted = {"primitives": "tensor-core primitives", "parity": "parity through the plugin's interface"}
    counted |= {
        "rows": "rows at B = 1, 7, 64, bit for bit",
        "picks": "tokens chosen on the device and by the host",
        "stress": "2 to 32 splits, two streams, 25,000 launches each",
    }
    for name, label in counted.items():
        result = data.get(name)
        rows.append([label, f"{result['cases'] - len(result['failed'])} of {result['cases']}" if result else MISSING])
    tools = ("memcheck", "racecheck", "synccheck")
    sanitizers = {t: data.get("sanitizers", {}).get(t, MISSING) for t in tools}
    rows += [[f"compute-sanitizer {tool}", result] for tool, result in sanitizers.items()]
    engines = data.get("engine", {})
    for name in ("plugin", "no plugin"):
        steps, label = engines.get(f"{name}, steps", {}), f"engine on TensorRT-RTX, {name}"
        rows.append([f"{label}: logits and state, step by step", steps.get("steps", MISSING)])
        rows.append([f"{label}: layers that copy", str(steps.get("layers that copy", MISSING))])
        rows.append([label, engines.get(name, MISSING)])
    results = data.get("onnxruntime", {})
    for name in ("operator and graphs", "operator", "nodes"):
        label = f"ONNX Runtime on CUDA, {name}"
        rows.append([f"{label}: logits and state, step by step", results.get(f"{name}, steps", MISSING)])
        rows.append([label, results.get(name, MISSING)])
    return ["check", "result"], rows


def note(data: dict[str, Any]) -> str:
    """The machine, as text."""
    if "machine" not in data:
        return "no GPU yet: `scripts/gpu_check` measures it"
    m = data["machine"]
    return f"{m['gpu']}, driver {m['driver']}; {m['nvcc']}; torch {m['torch']}"


def model(data: dict[str, Any], measured: dict[str, Any]) -> Table:
    """Decode as gpu_model computes it, beside what gpu_check measured."""
    header = ["batch", "slots", "KV heads", "query heads", "limit", "us", "of a copy", "of a copy, measured"]
    copy = measured.get("bandwidth", {}).get("gb_per_s")
    place = ("batch", "slots", "kv_heads", "query_heads")
    shares = {
        tuple(r[n] for n in place): f"{r['gb_per_s'] / copy:.0%}"
        for r in (measured.get("decode", []) if copy else [])
        if (r.get("slot_dtype", "model"), r.get("state_bits", 32)) == ("model", 32)
    }
    rows = [
        [
            *(str(r[n]) for n in place),
            r["limit"],
            f"{r['us']:.1f}",
            f"{r['of_a_copy']:.0%}",
            shares.get(tuple(r[n] for n in place), MISSING),
        ]
        for r in data["decode"]
    ]
    return header, rows


def kernels(data: dict[str, Any]) -> Table:
    """What the compiler made of the decode kernels, for every architecture."""
    header = [
        *("GPU", "slots", "query heads per KV head", "registers", "bytes spilled", "KB shared", "blocks per SM"),
        *("occupancy", "instructions per 8 slots", "more per 64 slots"),
    ]
    heads = {8: "1 to 8", 16: "9 to 16"}
    return header, [
        [
            f"sm_{k['architecture']}",
            k["slots"],
            heads[k["heads"]],
            *(str(k[n]) for n in ("registers", "spill_bytes")),
            f"{(2 * k['stage_bytes'] + k['scratch_bytes']) / 1024:.1f}",
            str(k["blocks"]),
            f"{k['occupancy']:.0%}",
            f"{k['instructions_per_8_slots']:,.0f}",
            f"{k['split_instructions']:,}",
        ]
        for k in data["kernels"]
    ]


def provider(data: dict[str, Any]) -> Table:
    """What ONNX Runtime's CUDA provider makes of whole graphs, from ``ort_cuda.json``."""
    header = ["graph", "LessAttention", "nodes on CUDA", "shape arithmetic on the CPU"]
    header += ["without a CUDA kernel", "copies", "accepted for capture"]
    return header, [
        [
            name,
            kind,
            f"{x['cuda']:,}",
            str(x["cpu"] - sum(x["no_cuda_kernel"].values())),
            str(sum(x["no_cuda_kernel"].values())),
            str(x["copies"]),
            "no" if x["refusal"] else "yes",
        ]
        for name, kinds in data["graphs"].items()
        if not name.startswith("one layer")
        for kind, x in kinds.items()
    ]


PARTS = {"decode": decode, "peers": peers, "prefill": prefill, "sampling": sampling, "checks": checks}
