"""What a decode step should reach on an H100, computed from the compiled kernel; no GPU is needed.

``scripts/gpu_model.py`` compiles the decode kernels of 12 shapes for sm_90, counts the instructions of their inner
loop in the SASS, takes registers, spills and shared memory from ``ptxas -v``, and writes ``gpu_model.json``.
It needs nvcc and nvdisasm (of the CUDA toolkit, or of PyPI's ``nvidia-cuda-nvdisasm``).

The model, for one layer alone, with slots that are not in the cache:

- waves: blocks per SM follow from registers, shared memory and warps; the busiest SM has the last wave's share;
- memory: the bytes of the step once, at the bandwidth of a copy, or at what the loads in flight allow (Little's law);
- issue: the instructions of the inner loop of all warps of the busiest SM, one per cycle and scheduler;
- merge: dependent round trips to memory of the block that finishes last, which nothing overlaps in the last wave.

A step takes the longer of memory and issue, and the launch and the merge. The constants are in :class:`Chip`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import RESULTS
from gpu_kernels import decode_bytes

from less_export.contract import LayerSpec
from less_export.tensorrt import plugin
from tests.emulation import PLUGIN, kernel_layer

DTYPE, HEAD_DIM, RANK = "float16", 128, 16
#: KV heads and query heads of each.
HEADS = ((8, 4), (32, 1))
SHAPES = [*itertools.product((1, 16, 64), (256, 1024), HEADS)]


@dataclass(frozen=True)
class Chip:
    """An H100 SXM as NVIDIA describes it, and what is assumed of it."""

    name: str = "H100 SXM"
    sms: int = 132
    clock_ghz: float = 1.755
    schedulers: int = 4
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    warps: int = 64
    dram_gb_per_s: float = 3350.0
    copy_share: float = 0.9  # of that, what a copy reaches
    latency_ns: float = 650.0  # of a load from DRAM
    launch_us: float = 2.0


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel: per thread, per block, and of the inner loop."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    loop_instructions: int
    loop_local: int  # accesses to spilled registers among them
    slots_per_loop: int  # that a warp processes in one pass
    instructions: int

    @property
    def per_8_slots(self) -> float:
        return 8 * self.loop_instructions / self.slots_per_loop


def nvdisasm() -> Path:
    """The disassembler: of the toolkit, on the PATH, or of a PyPI package."""
    folders = [os.environ[n] + "/bin" for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    folders += [*os.environ["PATH"].split(":"), "/usr/local/cuda/bin"]
    folders += [f"{p}/nvidia/{d}/bin" for p in sys.path for d in ("cu13", "cuda_nvdisasm")]
    found = shutil.which("nvdisasm", path=":".join(folders))
    if found is None:
        sys.exit("gpu_model: nvdisasm is missing: install the CUDA toolkit, or pip install nvidia-cuda-nvdisasm")
    return Path(found)


def compiled(group: int, folder: Path) -> Kernel:
    """The decode kernel of a group of query heads, for sm_90."""
    tile = group if group <= 2 else 4 if group <= 4 else 8
    source = folder / f"group{group}.cu"
    source.write_text(
        '#include "decode.cuh"\nnamespace less {\n'
        f"template __global__ void decodeKernel<__half, {HEAD_DIM // 8}, {tile}, false>(DecodeParams const);\n"
        f"__device__ char fixed[sizeof(typename DecodeBlock<__half, {HEAD_DIM // 8}, {tile}>::Shared)];\n}}\n"
    )
    tools, cubin = plugin.toolchain(), source.with_suffix(".cubin")
    command = [tools.nvcc, "-ccbin", tools.host, "-std=c++17", "-O3", "-w", "-Xptxas", "-v", "-cubin"]
    command += ["-gencode=arch=compute_90,code=sm_90", f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]
    said = subprocess.run([*command, source, "-o", cubin], check=True, capture_output=True, text=True).stderr
    sass = subprocess.check_output([nvdisasm(), "-c", cubin], text=True)
    numbers = [re.search(p, said) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes gmem")]
    registers, spill, fixed = (int(m[1]) for m in numbers if m)
    body, local, rows, total = inner_loop(sass)
    return Kernel(registers, spill, fixed, body, local, rows * 2, total)  # 32 / 16 lanes have a row each


def inner_loop(sass: str) -> tuple[int, int, int, int]:
    """Instructions of the loop over slots, those that access spilled registers, slots a lane loads, and all of them."""
    code, labels = list[str](), dict[str, int]()
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    loops = []
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = code[labels[jump[1]] : end + 1]
            wide = sum("LDG" in x and ".128" in x for x in body)
            if wide and any("SHFL.BFLY" in x for x in body):
                loops.append((len(body), sum("LDL" in x or "STL" in x for x in body), wide // 2))
    return (*min(loops), len(code))


def predicted(chip: Chip, kernel: Kernel, layer: LayerSpec, batch: int) -> dict[str, Any]:
    """Microseconds and share of a copy's bandwidth of one decode step."""
    splits = -(-layer.capacity // max(64, -(-layer.capacity // 32)))  # as in less_attention_decode.cu
    heads = batch * layer.kv_heads
    per_block = -(-splits // max(1, 512 // heads))
    blocks = heads * -(-splits // per_block)
    logits = layer.group * layer.capacity if blocks == heads else 0
    tail = layer.group * (5 + splits + layer.rank + logits // max(1, layer.group)) + layer.rank
    shared = kernel.shared_bytes + 4 * tail
    registers = -(-kernel.registers // 8) * 8 * 128
    resident = min(chip.registers // registers, chip.shared_bytes // (shared + 1024), chip.warps // 4)
    waves = -(-blocks // (chip.sms * resident))
    busiest = -(-blocks // chip.sms)  # blocks of the busiest SM
    loops = -(-layer.capacity // splits) / 4 / kernel.slots_per_loop * per_block * -(-layer.group // 8)  # of a warp
    cycles = busiest * 4 * loops * kernel.loop_instructions / chip.schedulers
    issue = cycles / chip.clock_ghz / 1e3
    moved = decode_bytes(layer, DTYPE, batch)
    copy = chip.dram_gb_per_s * chip.copy_share
    flying = min(busiest, resident) * min(blocks, chip.sms) * 128 * 16 * kernel.slots_per_loop  # bytes in flight
    bandwidth = min(copy, flying / chip.latency_ns)
    balance = busiest * min(blocks, chip.sms) / blocks
    memory = moved / bandwidth / 1e3 * balance
    trips = 7 + -(-layer.rank // 8) + -(-layer.capacity // 128)
    merge = trips * chip.latency_ns / 1e3
    micros = chip.launch_us + max(memory, issue) + merge
    share = moved / micros / 1e3 / copy
    parts = {"issue": issue, "memory": memory, "launch and merge": chip.launch_us + merge}
    return {
        "batch": batch, "slots": layer.capacity, "kv_heads": layer.kv_heads, "query_heads": layer.query_heads,
        "splits": splits, "blocks": blocks, "waves": waves, "occupancy": round(resident * 4 / chip.warps, 3),
        **{f"{n.replace(' ', '_')}_us": round(x, 2) for n, x in parts.items()},
        "us": round(micros, 2), "bytes": moved, "of_a_copy": round(share, 3),
        "limit": max(parts, key=parts.__getitem__), "measured": "not yet",
    }  # fmt: skip


def rows(chip: Chip, kernels: dict[int, Kernel]) -> Iterator[dict[str, Any]]:
    for batch, slots, (kv_heads, group) in SHAPES:
        layer = kernel_layer("h2o", slots, HEAD_DIM, group, RANK, kv_heads)
        yield predicted(chip, kernels[group], layer, batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu_model.json")
    args = parser.parse_args()
    chip = Chip()
    with tempfile.TemporaryDirectory() as folder:
        kernels = {group: compiled(group, Path(folder)) for _, group in HEADS}
    data = {
        "chip": asdict(chip),
        "cuda": plugin.toolchain().cuda,
        "kernels": [
            {"group": g, **asdict(k), "instructions_per_8_slots": k.per_8_slots} for g, k in sorted(kernels.items())
        ],
        "decode": [*rows(chip, kernels)],
    }
    (args.out / "gpu_model.json").write_text(json.dumps(data, indent=1) + "\n")
    for row in data["decode"]:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
