"""What a decode step should reach on an H100, computed from the compiled kernel; no GPU is needed.

``scripts/gpu_model.py`` compiles the decode kernels of float16 and int8 slots for several architectures, counts the
instructions of their loops in the SASS, takes registers and spills from ``ptxas -v`` and shared memory from the sizes
of its parts, and writes ``gpu_model.json``: what the compiler made of the kernels, and 12 steps on an H100.
It needs nvcc and nvdisasm (of the CUDA toolkit, or of PyPI's ``nvidia-cuda-nvdisasm``).

The model, for one layer alone, with slots that are not in the cache:

- waves: blocks per SM follow from registers, shared memory and warps; the busiest SM has the last wave's share;
- memory: the bytes of the step once, at the bandwidth of a copy, or at what the copies in flight allow (Little's law);
- issue: the instructions of the loops of all warps of the busiest SM, one per cycle and scheduler;
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
#: Types of slots, as in the kernels' names, and query heads that a kernel processes at a time.
SLOTS = {"float16": "__half", "int8": "int8_t"}
TILES = (8, 16)
#: Slots of a tile, of which each of four warps has a quarter, and ranks of the ring.
SLOT_TILE, WARPS, STAGES = 32, 4, (2, 4)


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an SM: warps, and bytes of shared memory (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int
    shared_bytes: int
    registers: int = 65536

    def blocks(self, registers: int, shared: int) -> int:
        """Blocks of 128 threads that fit, with so many registers a thread and bytes a block."""
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * WARPS)
        return min(by_registers, self.shared_bytes // (shared + 1024), self.warps // WARPS)


ARCHITECTURES = {
    "80": Multiprocessor(64, 164 * 1024),
    "86": Multiprocessor(48, 100 * 1024),
    "89": Multiprocessor(48, 100 * 1024),
    "90": Multiprocessor(64, 228 * 1024),
    "120": Multiprocessor(48, 100 * 1024),
}


@dataclass(frozen=True)
class Chip:
    """An H100 SXM as NVIDIA describes it, and what is assumed of it."""

    name: str = "H100 SXM"
    architecture: str = "90"
    sms: int = 132
    clock_ghz: float = 1.755
    schedulers: int = 4
    dram_gb_per_s: float = 3350.0
    copy_share: float = 0.9  # of that, what a copy reaches
    latency_ns: float = 650.0  # of a load from DRAM
    cache_latency_ns: float = 200.0  # of a load from the L2 cache
    launch_us: float = 2.0


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel: per thread, per block, and of its loops."""

    architecture: str
    slots: str
    heads: int  # that it processes at a time
    registers: int
    spill_bytes: int
    stage_bytes: int  # of shared memory, of a stage of the ring: the keys or the values of a tile
    scratch_bytes: int  # of the rest, but for what the number of heads, splits and features determines
    tile_instructions: int  # of the loop over tiles of slots, of a warp
    tile_local: int  # accesses to spilled registers among them
    split_instructions: int  # more of the loop around it, once a split
    instructions: int

    @property
    def per_8_slots(self) -> float:
        """A warp has eight slots of a tile."""
        return 8 * self.tile_instructions / (SLOT_TILE / WARPS)

    def shared(self, stages: int, logits: int = 0) -> int:
        """Bytes of a block, with so many logits in shared memory."""
        return stages * self.stage_bytes + self.scratch_bytes + 4 * logits


def nvdisasm() -> Path:
    """The disassembler: of the toolkit, on the PATH, or of a PyPI package."""
    folders = [os.environ[n] + "/bin" for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    folders += [*os.environ["PATH"].split(":"), "/usr/local/cuda/bin"]
    folders += [f"{p}/nvidia/{d}/bin" for p in sys.path for d in ("cu13", "cuda_nvdisasm")]
    found = shutil.which("nvdisasm", path=":".join(folders))
    if found is None:
        sys.exit("gpu_model: nvdisasm is missing: install the CUDA toolkit, or pip install nvidia-cuda-nvdisasm")
    return Path(found)


def compiled(architecture: str, folder: Path) -> Iterator[Kernel]:
    """The decode kernels of an architecture."""
    source = folder / f"decode{architecture}.cu"
    made = [*itertools.product(SLOTS, TILES)]
    text = '#include "decode.cuh"\nnamespace less {\n'
    for i, (slots, heads) in enumerate(made):
        name = f"{SLOTS[slots]}, {HEAD_DIM}, {heads}"
        text += f"template __global__ void decodeTilesKernel<{name}, false>(DecodeParams const);\n"
        text += f"__device__ char stage{i}[sizeof(SlotStage<{SLOTS[slots]}, {HEAD_DIM}>)];\n"
        text += f"__device__ char scratch{i}[sizeof(TileBlock<{name}, false>::Shared) + "
        text += f"TileBlock<{name}, false>::Shared::kScratch];\n"
    source.write_text(text + "}\n")
    tools, cubin = plugin.toolchain(), source.with_suffix(".cubin")
    command = [tools.nvcc, "-ccbin", tools.host, "-std=c++17", "-O3", "-w", "-Xptxas", "-v", "-cubin"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += [f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]
    said = subprocess.run([*command, source, "-o", cubin], check=True, capture_output=True, text=True).stderr
    sass = subprocess.check_output([nvdisasm(), "-c", cubin], text=True)
    code = {x.split(",")[0].split()[0]: x for x in re.split(r"\.section\s+\.text\.", sass)[1:]}
    symbols = subprocess.check_output(["readelf", "-sW", cubin], text=True)
    sizes = {m[2]: int(m[1]) for m in re.finditer(r"(\d+) OBJECT .*?((?:stage|scratch)\d)E\n", symbols)}
    for i, (slots, heads) in enumerate(made):
        mangled = f"decodeTilesKernelI{'6__half' if slots == 'float16' else 'a'}Li{HEAD_DIM}ELi{heads}E"
        about = said[said.index(mangled) :]
        numbers = [re.search(p, about) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        registers, spill = (int(m[1]) for m in numbers if m)
        tile, local, split, total = loops(next(x for n, x in code.items() if mangled in n))
        sized = (sizes[f"stage{i}"], sizes[f"scratch{i}"])
        yield Kernel(architecture, slots, heads, registers, spill, *sized, tile, local, split, total)


def loops(sass: str) -> tuple[int, int, int, int]:
    """Instructions of the loop over tiles, accesses to spilled registers in it, more once a split, and all of them.

    The loop over tiles is the shortest that multiplies on tensor cores; the next one around it goes over splits.
    """
    code, labels = list[str](), dict[str, int]()
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    found = list[tuple[int, int]]()
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            found.append((labels[jump[1]], end + 1))
    products = [x for x in found if any("HMMA" in y for y in code[slice(*x)])]
    first, last = min(products, key=lambda x: x[1] - x[0])
    around = [b - a for a, b in products if a <= first and b >= last and b - a > last - first]
    local = sum("LDL" in x or "STL" in x for x in code[first:last])
    return last - first, local, min(around) - (last - first), len(code)


def predicted(chip: Chip, kernel: Kernel, layer: LayerSpec, batch: int) -> dict[str, Any]:
    """Microseconds and share of a copy's bandwidth of one decode step."""
    splits = -(-layer.capacity // max(64, -(-layer.capacity // 1024) * 32))  # as in less_attention_decode.cu
    heads = batch * layer.kv_heads
    per_block = -(-splits // max(1, 512 // heads))
    blocks = heads * -(-splits // per_block)
    stages = STAGES[blocks < 512]
    logits = layer.group * layer.capacity if blocks == heads and layer.group * layer.capacity <= 4096 else 0
    sm = ARCHITECTURES[chip.architecture]
    resident = sm.blocks(kernel.registers, kernel.shared(stages, logits))
    waves = -(-blocks // (chip.sms * resident))
    busiest = -(-blocks // chip.sms)  # blocks of the busiest SM
    tiles = -(-layer.capacity // splits) / SLOT_TILE
    instructions = per_block * (tiles * kernel.tile_instructions + kernel.split_instructions)  # of a warp
    issue = busiest * WARPS * instructions / chip.schedulers / chip.clock_ghz / 1e3
    moved = decode_bytes(layer, DTYPE, batch)
    copy = chip.dram_gb_per_s * chip.copy_share
    ahead = (stages - 1) * kernel.stage_bytes  # bytes in flight of a block
    bandwidth = min(copy, min(busiest, resident) * min(blocks, chip.sms) * ahead / chip.latency_ns)
    balance = busiest * min(blocks, chip.sms) / blocks
    memory = moved / bandwidth / 1e3 * balance
    # Loads that wait for one another: what begins and ends the step; splits, four at a time; of two slots a thread,
    # positions and the logits of two heads at a time; features, two at a time, which are in the L2 cache by then.
    trips = 8 + -(-splits // 4) + -(-layer.capacity // 256) * (1 + -(-layer.group // 2))
    merge = (trips * chip.latency_ns + -(-layer.rank // 2) * chip.cache_latency_ns) / 1e3
    micros = chip.launch_us + max(memory, issue) + merge
    share = moved / micros / 1e3 / copy
    parts = {"issue": issue, "memory": memory, "launch and merge": chip.launch_us + merge}
    return {
        "batch": batch, "slots": layer.capacity, "kv_heads": layer.kv_heads, "query_heads": layer.query_heads,
        "splits": splits, "blocks": blocks, "stages": stages, "waves": waves,
        "occupancy": round(resident * WARPS / sm.warps, 3),
        **{f"{n.replace(' ', '_')}_us": round(x, 2) for n, x in parts.items()},
        "us": round(micros, 2), "bytes": moved, "of_a_copy": round(share, 3),
        "limit": max(parts, key=parts.__getitem__), "measured": "not yet",
    }  # fmt: skip


def row_of(kernel: Kernel) -> dict[str, Any]:
    """What the compiler made of a kernel, and what that means for an SM when there are many blocks."""
    sm = ARCHITECTURES[kernel.architecture]
    blocks = sm.blocks(kernel.registers, kernel.shared(STAGES[0]))
    return {
        **asdict(kernel), "instructions_per_8_slots": kernel.per_8_slots,
        "blocks": blocks, "occupancy": round(blocks * WARPS / sm.warps, 3),
    }  # fmt: skip


def rows(chip: Chip, kernel: Kernel) -> Iterator[dict[str, Any]]:
    for batch, slots, (kv_heads, group) in SHAPES:
        layer = kernel_layer("h2o", slots, HEAD_DIM, group, RANK, kv_heads)
        yield predicted(chip, kernel, layer, batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu_model.json")
    args = parser.parse_args()
    chip = Chip()
    with tempfile.TemporaryDirectory() as folder:
        kernels = [k for architecture in ARCHITECTURES for k in compiled(architecture, Path(folder))]
    used = next(k for k in kernels if (k.architecture, k.slots, k.heads) == (chip.architecture, DTYPE, TILES[0]))
    data = {
        "chip": asdict(chip),
        "cuda": plugin.toolchain().cuda,
        "kernels": [row_of(k) for k in kernels],
        "decode": [*rows(chip, used)],
    }
    (args.out / "gpu_model.json").write_text(json.dumps(data, indent=1) + "\n")
    for row in data["decode"]:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
