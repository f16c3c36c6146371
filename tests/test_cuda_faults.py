"""Test of the tests: kernels with one fault must fail the comparison with the oracle.

A small build (float16, head_dim up to 64) is compiled for each fault. Barriers and waits are removed one at a time,
all of them; a fault that nothing here can see stands in SURVIVORS with the reason, and the test fails as well when
such a fault begins to be caught, so that the list stays true. Ordinary runs take every fourth fault; the others run
with ``-m exhaustive``, as they should when the kernels change.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from less_export.contract import LayerSpec

from . import emulation
from .emulation import ORDERS, PLUGIN, emulated, kernel_layer, normal
from .marks import exhaustive_but
from .oracle import Arrays, OneHot, Step, follow, scenario
from .test_cuda import FLOOR, compare_on_scattered_states
from .test_int8 import far
from .test_ops import DECODE, MIXED, empty, tied, torch_run

pytestmark = pytest.mark.slow

SMALL = ("-DLESS_TRIAL", "-O1")


@dataclass(frozen=True)
class Fault:
    """The ``nth`` occurrence (from 0) of ``old`` in a file becomes ``new``."""

    file: str
    old: str
    new: str
    nth: int = 0

    def applied(self, text: str) -> str:
        at = -1
        for _ in range(self.nth + 1):
            at = text.index(self.old, at + 1)
        return text[:at] + self.new + text[at + len(self.old) :]


def waits() -> dict[str, Fault]:
    """Every barrier and every wait for a copy, removed."""
    faults = {}
    for file in ("decode_block.cuh", "decode.cuh", "attend.cuh", "score.cuh", "settle.cuh", "slots.cuh"):
        text = (PLUGIN / "src" / file).read_text()
        for old in ("__syncthreads();", "awaitCopies<0>();", "awaitCopies<1>();"):
            for nth, match in enumerate(re.finditer(re.escape(old), text)):
                line = text.count("\n", 0, match.start()) + 1
                faults[f"{file}:{line} without {old[:-3]}"] = Fault(file, old, ";", nth)
    return faults


FAULTS = {
    "decode: maximum not rescaled": Fault("decode.cuh", "mass[g] *= shrink;", ";"),
    "decode: accumulator not rescaled": Fault("decode.cuh", "acc[g][i] *= shrink;", ";"),
    "decode: low-rank term without its maximum": Fault(
        "decode.cuh", "float const all = fmaxf(exact, low);", "float const all = exact;"
    ),
    "decode: victim not absorbed": Fault(
        "decode.cuh", "if (update) h[r * D + d] = mean + leaverPsi[r] * leaverValue;", ";"
    ),
    "decode: z forgets the victim": Fault("decode.cuh", "z[r] += leaverPsi[r];", ";"),
    "decode: new token one slot off": Fault(
        "decode.cuh", "min(choice.free, victim);", "min(choice.free, victim) == 0 ? 1 : min(choice.free, victim) - 1;"
    ),
    "decode: ties evict the lower index": Fault(
        "decode.cuh", "(0xffffffffu - static_cast<unsigned>(c)));", "static_cast<unsigned>(c));"
    ),
    "decode: a warp left out of the merge": Fault(
        "decode.cuh",
        "for (int w = 0; w < kWarps; ++w) top = fmaxf(top",
        "for (int w = 1; w < kWarps; ++w) top = fmaxf(top",
    ),
    "decode: counter not reset": Fault("decode.cuh", "if (tid == 0) p.counters[head] = 0;", ";"),
    "decode: parked row goes on": Fault(
        "decode.cuh", "if (p.t.newLength[batch] <= 0) {", "if (p.t.newLength[batch] < 0) {"
    ),
    "decode: unseen values not dropped": Fault("decode.cuh", "if (!seen) zero(value[u]);", ";"),
    "rules: causal bound one too far": Fault("rules.cuh", "position <= now &&", "position <= now + 1 &&"),
    "rules: causal bound one too near": Fault("rules.cuh", "position <= now &&", "position < now &&"),
    "rules: window one too wide": Fault("rules.cuh", "position > now - rules.window", "position >= now - rules.window"),
    "rules: compressed window without grace": Fault("rules.cuh", "kWindow ? 0 : 1", "kWindow ? 0 : 0"),
    "rules: recent one too many": Fault(
        "rules.cuh", "position >= end - rules.recent ? kNewest", "position >= end - rules.recent - 1 ? kNewest"
    ),
    "rules: recent one too few": Fault(
        "rules.cuh", "position >= end - rules.recent ? kNewest", "position > end - rules.recent ? kNewest"
    ),
    "rules: a sink too few": Fault("rules.cuh", "position < rules.heavy", "position < rules.heavy - 1"),
    "prefill: maximum not rescaled": Fault("attend.cuh", "mass[r] *= shrink;", ";"),
    "prefill: maximum of one lane": Fault(
        "attend.cuh", "top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));", ";"
    ),
    "prefill: low-rank term without its maximum": Fault(
        "attend.cuh", "all = fmaxf(all, logPhi[f] + __logf(z[f]));", ";"
    ),
    "prefill: scores of one head of the group": Fault(
        "settle.cuh", "for (int g = 1; g < G; ++g) scores", "for (int g = 1; g < 0; ++g) scores"
    ),
    "prefill: a tile too many hidden by the window": Fault(
        "attend.cuh", "max(0, first - rules.window + 1) / N", "max(0, first - rules.window + N) / N"
    ),
    "prefill: slots hidden a row early": Fault(
        "attend.cuh", "first >= rules.window;", "first + kTileRows > rules.window;"
    ),
    "prefill: tova counts all queries": Fault(
        "score.cuh", "== Policy::kTova ? count - 1 : 0", "== Policy::kTova ? 0 : 0"
    ),
    "prefill: padding is a key": Fault(
        "attend.cuh", "if (index < count) position = past + index;", "position = past + index;"
    ),
    "prefill: ties keep the higher index": Fault(
        "settle.cuh", "ties + equal.before < threshold.ties", "ties + equal.before >= threshold.ties"
    ),
    "prefill: ties not carried to the next tile": Fault("settle.cuh", "ties += equal.total;", ";"),
    "prefill: all ties stay": Fault("settle.cuh", "rank > threshold.rank ||", "rank >= threshold.rank ||"),
    "prefill: a dropped byte of the rank": Fault("settle.cuh", "shift >= 0; shift -= 8", "shift >= 8; shift -= 8"),
    "prefill: swapped slots": Fault("settle.cuh", "freed[turn] : kRests", "freed[turn ^ 1] : kRests"),
    "prefill: nothing absorbed": Fault("settle.cuh", "p.t.presentH[(head * R + first + r) * D + d] += sum;", ";"),
    "prefill: z not updated": Fault("settle.cuh", "p.t.presentZ[head * R + first + r] += sum;", ";"),
    "prefill: old scores forgotten": Fault("settle.cuh", "scores[n] += slotScores[n] * left;", ";"),
    "prefill: old scores do not fade": Fault("settle.cuh", "slotScores[n] * left;", "slotScores[n];"),
    "prefill: old scores fade once a step": Fault("settle.cuh", "fadedBy(p.rules, count)", "fadedBy(p.rules, 1)"),
    "prefill: scores of the chunk do not fade": Fault("score.cuh", "fadedBy(rules, count - 1 - query)", "1.f"),
    "prefill: scores of the chunk fade a token too long": Fault("score.cuh", "count - 1 - query", "count - query"),
    "decode: scores do not fade": Fault("decode.cuh", "slotScores[c] * rules.decay", "slotScores[c]"),
    "prefill: psi stays behind": Fault("settle.cuh", "static_cast<T*>(p.t.presentPsi)[to * R + r] =", "(void)"),
}

#: Faults in the rules of int8 slots.
INT8_FAULTS = {
    "keys without their scale": Fault("slots.cuh", "fmaf(key[i] * piece.scale,", "fmaf(key[i],"),
    "keys without std": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, 1.f, means[i])"),
    "keys without mean": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, stds[i], 0.f)"),
    "keys that are scored without mean": Fault("slots.cuh", "fmaf(stored, std[d], mean[d])", "stored * std[d]"),
    "keys that are scored without std": Fault("slots.cuh", "fmaf(stored, std[d], mean[d])", "stored + mean[d]"),
    "keys of one part": Fault("attend.cuh", "int part = 1; converted &&", "int part = 1; !converted &&"),
    "keys that are scored of one part": Fault("score.cuh", "if (converted) shared.keys", "if (!coded(p)) shared.keys"),
    "decode: values without their scale": Fault("slots.cuh", "kCoded<S> ? weight * scale : weight", "weight"),
    "prefill: values without their scale": Fault("slots.cuh", "element[i] *= piece.scale;", ";"),
    "decode: scales of empty slots are read": Fault("slots.cuh", "piece.scale = 0.f;", ";"),
    "prefill: empty slots are read": Fault("slots.cuh", "&& positions[slot] >= 0", "&& positions[slot] >= -1"),
    "a leaver's scale forgotten": Fault("slots.cuh", "kCoded<S> ? element * scales[slot] : element", "element"),
    "prefill: a leaver's scale forgotten": Fault("settle.cuh", "out[i] *= value.scale;", ";"),
    "tokens of the chunk absorbed as they are": Fault("settle.cuh", "out[i] = codeOf(out[i], scale) * scale;", ";"),
    "scales of the chunk not measured": Fault("settle.cuh", "p.rounding[head * chunk + i] = scale;", ";"),
    "scale of a new token not stored": Fault("slots.cuh", "if (kCoded<S> && lane == 0) scales[slot] = scale;", ";"),
    "scale of one lane": Fault("slots.cuh", "scaleOf(warpMax(largest))", "scaleOf(largest)"),
    "scale of 128 codes": Fault("slots.cuh", "__fdiv_rn(largest, kLargestCode)", "__fdiv_rn(largest, 128.f)"),
    "keys stored without mean": Fault("slots.cuh", "__fsub_rn(key, mean[d])", "key"),
    "keys stored without std": Fault(
        "slots.cuh", "__fdiv_rn(__fsub_rn(key, mean[d]), std[d])", "__fsub_rn(key, mean[d])"
    ),
    "codes truncated": Fault("slots.cuh", "rintf(", "truncf("),
    "halves away from zero": Fault("slots.cuh", "rintf(", "roundf("),
    "zeros divided by zero": Fault("slots.cuh", "if (scale == 0.f) return 0.f;", ";"),
    "rounded twice": Fault("slots.cuh", "codeOf(token(d), scale)", "codeOf(toFloat(__float2half_rn(token(d))), scale)"),
    "decode: the new key attended rounded": Fault(
        "decode.cuh", "q[g * D + d] * newKey[d];", "q[g * D + d] * rintf(newKey[d] * 50.f) / 50.f;"
    ),
    "decode: the new value attended rounded": Fault(
        "decode.cuh", "newElement = newValue[d];", "newElement = rintf(newValue[d] * 50.f) / 50.f;"
    ),
    "prefill: values of the chunk attended rounded": Fault(
        "attend.cuh",
        "        accumulate<T, W, N>(o, s,",
        """        for (int x = tid; !converted && x < N * Tiles::kStride; x += kThreads)
            shared.values[stage].x[x] = fromFloat<T>(rintf(toFloat(shared.values[stage].x[x]) * 50.f) / 50.f);
        __syncthreads();
        accumulate<T, W, N>(o, s,""",
    ),
}

#: Faults that cannot be detected here, and why.
SURVIVORS: dict[str, str] = {}


def _halves(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Tokens whose scores tie, in float16."""
    drawn = OneHot(layer.recent, 0.5 if layer.policy.name == "tova" else 0.0)(rng, layer, positions)
    return {n: x if n == "log_phi_q" else emulation.rounded("float16")(x) for n, x in drawn.items()}


@dataclass(frozen=True)
class Case:
    """A layer, its steps, how decode is cut, fresh rows, and the errors of the torch reference."""

    layer: LayerSpec
    steps: list[Step]
    blocks: int
    fresh: list[np.ndarray]
    reference: dict[str, float]


def case(layer: LayerSpec, steps: list[Step], blocks: int = 512) -> Case:
    fresh = empty(layer, torch.float16, len(steps[0].inputs["new_length"]))
    return Case(layer, steps, blocks, fresh, follow(torch_run(layer, dtype=torch.float16), steps, fresh))


@functools.cache
def racing() -> list[Case]:
    """Cases that reach every barrier; run in all thread orders."""
    chunks = [(70, 9), *[(1, 1)] * 6, (20, 66), *[(1, 1)] * 3]
    layers = [kernel_layer("h2o", 90, 40, group, 9, kv_heads=1) for group in (2, 3)]
    sliding = replace(kernel_layer("h2o", 12, 16, 2, 8, kv_heads=1), window=20)
    crowd = scenario(sliding, [(30, 9), (1, 1), (17, 25), (1, 1)], 2, normal("float16"))
    long = kernel_layer("h2o", 24, 16, 1, 8, kv_heads=1)  # enough tiles of queries to reuse a buffer
    return [
        *(case(la, scenario(la, chunks, 6, normal("float16")), blocks) for la in layers for blocks in (512, 1)),
        case(sliding, crowd),
        case(long, scenario(long, [(200, 9), (1, 1)], 6, normal("float16"))),
    ]


@functools.cache
def cases() -> list[Case]:
    """Cases that reach every rule."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    layers = [kernel_layer(p, 70, 40, 2, 8, kv_heads=1) for p in ("tova", "sink", "window")]
    layers.append(replace(kernel_layer("h2o", 70, 40, 2, 8, kv_heads=1), score_half_life=20))
    narrow = kernel_layer("window", 20, 40, 2, 1, kv_heads=1)
    ties = [tied(kernel_layer(p, 7, 64, 2, 8)) for p in ("h2o", "tova")]
    loud, heavy = normal("float16", logit=80, log_phi=(-60, 60)), normal("float16", log_phi=(-60, 120))
    return [
        *racing(),
        *(case(la, scenario(la, chunks, 6, normal("float16"))) for la in layers),
        case(narrow, scenario(narrow, [(150, 70), (1, 1), (100, 131)], 6, normal("float16"))),
        *(case(la, scenario(la, [*MIXED, *DECODE], 0, _halves)) for la in ties),
        case(layers[1], scenario(layers[1], chunks, 1, loud), blocks=1),
        case(layers[1], scenario(layers[1], chunks, 1, heavy)),
    ]


def _between_codes(rng: np.random.Generator, layer: LayerSpec, positions: np.ndarray) -> Arrays:
    """Tokens as in float16, with values of scale 1 between two codes and a zero token now and then."""
    drawn = far(rng, layer, positions)
    drawn["v"] = (rng.integers(-30, 30, drawn["v"].shape) + 0.5).astype(np.float32)
    drawn["v"][..., 5] = 127
    drawn["v"][:, :, ::5] = 0
    return {n: x if n == "log_phi_q" else emulation.rounded("float16")(x) for n, x in drawn.items()}


@functools.cache
def int8_cases() -> list[Case]:
    """Cases that reach every rule of int8 slots."""
    chunks = [(70, 9), (1, 1), (1, 0), (20, 66), (1, 1), (1, 1)]
    h2o, sink = (replace(kernel_layer(p, 70, 40, 2, 9, kv_heads=1), slot_dtype="int8") for p in ("h2o", "sink"))
    return [
        *(case(h2o, scenario(h2o, chunks, 6, normal("float16")), blocks) for blocks in (512, 1)),
        case(sink, scenario(sink, chunks, 6, _between_codes)),
    ]


def passes(path: Path, orders: Sequence[int], int8: bool = False) -> bool:
    """Whether a library agrees with the oracle, in every case once and in the racing cases in all thread orders.

    With ``int8``, the cases are those of int8 slots alone.
    """
    for order in orders:
        emulation.set_order(order, path)
        try:
            for c in int8_cases() if int8 else cases() if order == orders[0] else racing():
                emulation.set_blocks(c.blocks, path)
                errors = follow(emulated(c.layer, "float16", path=path), c.steps, c.fresh)
                if any(e > 2 * c.reference[n] + FLOOR for n, e in errors.items()):
                    return False
            compare_on_scattered_states("float16", path, "int8" if int8 else "model")
        except AssertionError:
            return False
    return True


def sound() -> Path:
    """The unchanged kernels."""
    return emulation.cached_build("libless_sound.so", *SMALL)


def includes(source: Path) -> set[str]:
    """Names of the files that a source includes, directly or not."""
    direct = set(re.findall(r'#include "(\w+\.cuh)"', source.read_text()))
    return direct.union(*(includes(source.with_name(n)) for n in direct))


def broken(folder: Path, fault: Fault) -> Path:
    """The kernels with a fault; files that do not include the changed one are not recompiled."""
    sources = folder / "src"
    shutil.copytree(PLUGIN / "src", sources)
    text = (sources / fault.file).read_text()
    (sources / fault.file).write_text(fault.applied(text))
    for part in emulation.SOURCES:
        if fault.file not in includes(sources / part):
            (sources / part).unlink()
    emulation.build(folder / "libless_broken.so", *SMALL, "-w", sources=sources, reuse=sound())
    return folder / "libless_broken.so"


def caught(library: Path, orders: Sequence[int], int8: bool = False) -> bool:
    """Compare a library with the oracle in its own process, as broken ones hang or crash."""
    _ = int8_cases() if int8 else cases()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(library, orders, int8))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        return True
    return process.exitcode != 0


def _work(library: Path, orders: Sequence[int], int8: bool) -> None:
    faulthandler.disable()  # a deadlock aborts, as expected; the exit code shows it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(0 if passes(library, orders, int8) else 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def test_kernels_without_a_fault_pass() -> None:
    assert not caught(sound(), ORDERS)
    assert not caught(sound(), ORDERS[:2], int8=True)


def chosen() -> list[object]:
    """Every fault and barrier; in ordinary runs every fourth, as each takes a compilation."""
    names = (*FAULTS, *waits())
    return [pytest.param(n, marks=pytest.mark.exhaustive if i % 4 else ()) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", chosen())
def test_fault_is_caught(name: str, tmp_path: Path) -> None:
    library = broken(tmp_path, {**FAULTS, **waits()}[name])
    orders = ORDERS if name in waits() else ORDERS[:1]
    int8 = name.startswith("slots.cuh")
    assert caught(library, orders, int8) is (name not in SURVIVORS), SURVIVORS.get(name, "survived")


@pytest.mark.parametrize("name", exhaustive_but(INT8_FAULTS, *[*INT8_FAULTS][5::9]))
def test_fault_of_int8_slots_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, INT8_FAULTS[name]), ORDERS[:1], int8=True)


def test_survivors_are_faults() -> None:
    assert set(SURVIVORS) <= {*FAULTS, *waits()}
