"""The plugin's kernels on a GPU, driven through TensorRT's plugin interface from torch tensors.

The harness of the tests is linked with the plugin library as it ships, which needs no TensorRT.
On a machine without a GPU the same code drives the emulated kernels on host memory (``gpu_check --dry-run``).
"""

from __future__ import annotations

import copy
import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from less_export.contract import LayerSpec
from less_export.tensorrt import plugin
from tests import plugin_host
from tests.emulation import DTYPES, PLUGIN
from tests.oracle import table_of


def build(folder: Path, shipped: Path) -> Path:
    """The harness over the plugin library ``shipped``, and the primitives; returns the library."""
    out = folder / "libless_gpu_check.so"
    sources = [PLUGIN / "tests/plugin_harness.cpp", PLUGIN / "tests/primitives.cu"]
    command = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-w"]
    command += ["-DLESS_HARNESS_ON_DEVICE", f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]
    command += [f"-I{plugin.tensorrt_include()}", *map(str, sources), str(shipped.absolute()), "-ldl", "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def use(library: Path | None) -> ctypes.CDLL:
    """Use this library from now on (None: the emulated kernels); returns the library with the primitives."""
    if library is None:
        plugin_host.harness()
        from tests.test_cuda_primitives import primitives

        return primitives()
    lib = plugin_host.prepared(ctypes.CDLL(str(library)))
    plugin_host.harness = lambda: lib
    return lib


class Step:
    """One layer on the device with its own state: each :meth:`launch` runs a step in place."""

    def __init__(self, layer: LayerSpec, dtype: str, batch: int, chunk: int, device: str, seed: int = 0) -> None:
        kind, generator = DTYPES[dtype], torch.Generator(device).manual_seed(seed)
        d, c, r = layer.head_dim, layer.capacity, layer.rank

        def normal(*shape: int, to: torch.dtype = kind) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator, device=device, dtype=torch.float32).to(to)

        def uniform(*shape: int, to: torch.dtype = kind) -> torch.Tensor:
            return torch.rand(batch, *shape, generator=generator, device=device, dtype=torch.float32).to(to)

        queries, keys = (layer.query_heads, chunk), (layer.kv_heads, chunk)
        tokens = [normal(*queries, d), normal(*keys, d), normal(*keys, d), normal(*queries, r, to=torch.float32)]
        tokens += [uniform(*keys, r)]
        slots = (layer.kv_heads, c)
        position = torch.arange(c, dtype=torch.int32, device=device).expand(batch, *slots).contiguous()
        held = [normal(*slots, d), normal(*slots, d)]
        if layer.int8:
            held = [(40 * x.float()).clamp(-127, 127).to(torch.int8) for x in held]
        psi, h = uniform(*slots, r), normal(layer.kv_heads, r, layer.state_width, to=torch.float32)
        if layer.state16:
            psi, h = (127 * psi.float()).to(torch.int8), (40 * h).clamp(-127, 127).to(torch.int8)
        state = [*held, psi, uniform(*slots, to=torch.float32), position]
        state += [h, 1 + uniform(layer.kv_heads, r, to=torch.float32)]
        past, constants = torch.full((batch,), c, dtype=torch.int32, device=device), list[torch.Tensor]()
        if layer.int8:
            state += [uniform(*slots, to=torch.float32) / 40 for _ in range(2)]
            state += [uniform(layer.kv_heads, r, to=torch.float32) / 10_000] * layer.state16
            constants = [torch.full((layer.kv_heads, d), x, device=device) for x in (0.1, 0.7)]  # mean and std
        if layer.max_distance:
            constants.append(torch.from_numpy(table_of(layer)).to(device))
        self.layer, self.dtype, self.device = layer, dtype, device
        self._attach([*tokens, *state, past, torch.full_like(past, chunk)], constants)

    def part(self, count: int) -> Step:
        """The first ``count`` rows as they are now, in memory of their own."""
        rows = len(self.inputs) - self._constants
        part = copy.copy(self)
        part._attach([x[:count].clone() for x in self.inputs[:rows]], self.inputs[rows:])
        return part

    def _attach(self, tensors: list[torch.Tensor], constants: list[torch.Tensor]) -> None:
        """Take these inputs, the state among them, and a plugin with counters of its own."""
        batch, _, chunk, _ = tensors[0].shape
        self.inputs, self._constants = [*tensors, *constants], len(constants)
        self.results = [torch.empty_like(tensors[0]), *tensors[5:-2]]
        self._described = plugin_host.described(self.layer, DTYPES[self.dtype], batch, chunk)
        self._plugin = plugin_host.Plugin.of(self.layer).attach()
        assert self._plugin.tensors("shape_change", self._described) == 0, plugin_host.log()
        size = self._plugin.tensors("workspace", self._described)
        self._workspace = torch.empty(size + 256, dtype=torch.uint8, device=self.device)

    def launch(self, stream: int = 0) -> None:
        """Enqueue on a stream (a cudaStream_t; 0 is the default one)."""
        start = self._workspace.data_ptr()
        start += -start % 256
        status = plugin_host.enqueue(self._plugin, self._described, self.inputs, self.results, start, stream)
        assert status == 0, plugin_host.log()


def total_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def decode_bytes(layer: LayerSpec, dtype: str, batch: int) -> int:
    """Bytes that a decode step must move, by formula: everything once.

    Per row and KV head: K and V of all slots (int8 slots: with their scales), positions, scores (read and written
    where there are any), psi of the evicted token and of the new one, the new token's K and V (read and written),
    H and z (read and written where the layer absorbs; H in 16 bits with its scales); per query head: q, out, log phi.
    """
    item = torch.finfo(DTYPES[dtype]).bits // 8
    d, c, r = layer.head_dim, layer.capacity, layer.rank
    scored = layer.policy.scoring != "none"
    slot = 2 * d + 8 if layer.int8 else 2 * d * item
    slots = c * (slot + 4 + (8 if scored else 0))
    new = 2 * d * item + slot + r * (item + 2 * (1 if layer.state16 else item))
    feature = 2 * d + 8 if layer.state16 else 4 * d + 4
    low = 2 * r * feature if layer.absorb else 0
    queries = layer.group * (2 * d * item + (r * 4 if layer.absorb else 0))
    return batch * layer.kv_heads * (slots + new + low + queries)
