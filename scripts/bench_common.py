"""What the benchmarks share: the machine, random checkpoints of true size, results as data."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

#: TinyLlama-1.1B (TinyLlama/TinyLlama-1.1B-Chat-v1.0), the shape every benchmark here uses.
TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_checkpoint(folder: Path, dtype: str, layers: int, context: int | None = None) -> int:
    """Write a Llama of TinyLlama's shape with random weights, shard by shard; returns its bytes."""
    folder.mkdir(parents=True)
    config = {**TINYLLAMA, "num_hidden_layers": layers, "dtype": dtype}
    if context is not None:
        config["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    hidden, inner = TINYLLAMA["hidden_size"], TINYLLAMA["intermediate_size"]
    kv = hidden // TINYLLAMA["num_attention_heads"] * TINYLLAMA["num_key_value_heads"]
    vocab = TINYLLAMA["vocab_size"]
    outer = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shards = [outer, *({f"model.layers.{i}.{n}": s for n, s in layer.items()} for i in range(layers))]
    rng, weight_map, total = np.random.default_rng(0), {}, 0
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {n: _random(rng, s).astype(dtype) for n, s in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
        total += sum(t.nbytes for t in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5


def machine() -> dict[str, Any]:
    """Where a figure was measured."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("less-export", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }


def write_results(name: str, data: dict[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json`` with the machine beside the figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")
    print(f"wrote {path}")
