"""Write a Llama checkpoint of safetensors as a GGUF file, quantised by llama.cpp's ``llama-quantize``.

    python benchmarks/llama_gguf.py CHECKPOINT LLAMA-QUANTIZE TYPE OUT

``OUT`` is a folder: ``model.gguf`` in it is all that is left there. The file has no tokenizer: it is for token ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

#: The file in the folder.
FILE = "model.gguf"
_ARCHITECTURE = gguf.MODEL_ARCH.LLAMA


def write(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint of transformers' Llama, matrices as f16 and vectors as f32; one tensor is read at a time.

    Raises:
        ValueError: the config is not that of a plain Llama, or a tensor has no name in GGUF.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"{checkpoint} is a {config['model_type']}, not a llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(_ARCHITECTURE, config["num_hidden_layers"])
    for name, tensor in _tensors(checkpoint):
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise ValueError(f"{name} has no name in GGUF")
        dtype = _dtype(tensor)
        writer.add_tensor_info(known, tensor.shape, dtype, tensor.size * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(checkpoint):
        rows = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        stored = tensor if rows is None else _interleaved(tensor, rows)
        writer.write_tensor_data(np.ascontiguousarray(stored, _dtype(tensor)))
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors of a sharded checkpoint, in the same order each time."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it has no __iter__)
                yield name, file.get_tensor(name)


def _rope_base(config: dict[str, Any]) -> float:
    facts = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if facts.get("rope_type", "default") != "default":
        raise ValueError(f"scaled positions ({facts['rope_type']}) are not written")
    return float(facts["rope_theta"])


def _dtype(tensor: npt.NDArray[Any]) -> np.dtype[Any]:
    return np.dtype(np.float16 if tensor.ndim > 1 else np.float32)


def _interleaved(tensor: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a projection [heads * width, n] in llama.cpp's order: it rotates neighbours, transformers two halves."""
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def main(checkpoint: str, quantize: str, kind: str, out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True)
    whole = folder / "f16.gguf"
    write(Path(checkpoint), whole)
    done = subprocess.run(
        [quantize, whole, folder / FILE, kind, str(os.cpu_count() or 1)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr or f"{Path(quantize).name} ended with {done.returncode}")
    whole.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
