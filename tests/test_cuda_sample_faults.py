"""Test of the tests: kernels that choose tokens with one fault must fail the comparison with the host."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from less_export.runtime.sampling import SamplingParams

from . import sample_emulation as emulated
from .cuda_faults import Fault
from .emulation import ORDERS, PLUGIN, fails
from .marks import exhaustive_but
from .test_cuda_sample import (
    KINDS,
    check_edges,
    check_greedy,
    check_longer_than_the_list,
    check_no_choice,
    check_penalties,
    compare,
    each_once,
    row_of_kind,
)

pytestmark = pytest.mark.slow

FILE = "sample.cuh"
FAULTS = {
    "the highest id of equal ones": Fault(FILE, "static_cast<uint32_t>(row.vocab - id)", "static_cast<uint32_t>(id)"),
    "two zeros": Fault(FILE, "__fadd_rn(logit, 0.f)", "logit"),
    "a low NaN": Fault(FILE, "std::isnan(logit) ? ~0u : keyOf(logit)", "keyOf(logit)"),
    "a digit left out": Fault(FILE, "shift >= 0;", "shift >= 4;"),
    "reached late": Fault(FILE, "sums[d] >= wanted", "sums[d] > wanted"),
    "nothing ruled out": Fault(FILE, "if (ruledOut(key)) return;", ";"),
    "sums of one warp": Fault(FILE, "warpSum(lane < kSampleWarps", "(lane < kSampleWarps"),
    "sums of half a warp": Fault(FILE, "sums[0] + __shfl_xor_sync(~0u, sums[0], kDigits)", "sums[0]"),
    "highest of one warp": Fault(FILE, "for (int w = 0; w < kSampleWarps; ++w)", "for (int w = 1; w < 1; ++w)"),
    "top_k: one too many": Fault(FILE, "(count - last.above)", "(count + 1 - last.above)"),
    "top_k: no ties": Fault(FILE, "+ (count - last.above) * weights(logitOf(last.key))", ""),
    "top_k: floor too high": Fault(FILE, "count > threads", "(count /= 2) > threads"),
    "top_p: one too few": Fault(FILE, "+ each - 1) / each * each", ") / each * each"),
    "top_p: off": Fault(FILE, "if (how.topP < 1) total", "if (false) total"),
    "top_p: floor too high": Fault(FILE, "/ row.vocab - 1;", "- 1;"),
    "min_p: off": Fault(FILE, "if (how.minP > 0) total", "if (false) total"),
    "min_p: too strict": Fault(FILE, "units >= lightest", "units > lightest"),
    "drawn one late": Fault(FILE, "total - 1) + 1;", "total - 1) + 2;"),
    "one of equal tokens late": Fault(FILE, "+ 1;  // of equal logits", "+ 2;  // of equal logits"),
    "temperature in bits": Fault(FILE, "0x1.71547652b82fep+0 /", "1 /"),
    "a short series": Fault(FILE, "int n = 12", "int n = 6"),
    "units not rounded": Fault(FILE, "(Units{1} << (dropped - 1))", "0"),
    "a list too short": Fault(FILE, "shared.listed <= kListed ?", "true ?"),
    "logits of another row": Fault(FILE, "(how.logits)", "(blockIdx.x)"),
    "history of another row": Fault(FILE, "(how.history)", "(blockIdx.x + 1)"),
    "choices not counted": Fault(FILE, "++row.history[pick];", ";"),
    "the prompt counts as chosen": Fault(FILE, "entry & ~kLessPrompt", "entry"),
    "negative logits divided": Fault(FILE, "__fmul_rn(x, how.repetition)", "__fdiv_rn(x, how.repetition)"),
    "presence of the prompt": Fault(FILE, "if (times == 0.f) return x;", ";"),
    "presence once a time": Fault(FILE, "__fadd_rn(how.presence,", "__fadd_rn(how.presence * times,"),
}
#: Faults that nothing can detect, and why.
SURVIVORS = {"units not rounded": "it moves an edge by less than a unit a token, which the definition leaves open"}


def barriers() -> dict[str, Fault]:
    """Every barrier, removed."""
    text = (PLUGIN / "sampler" / FILE).read_text()
    found = [*re.finditer(re.escape("__syncthreads();"), text)]
    lines = [text.count("\n", 0, m.start()) + 1 for m in found]
    return {f"{FILE}:{line} without a barrier": Fault(FILE, "__syncthreads();", ";", i) for i, line in enumerate(lines)}


def check_all(path: Path) -> None:
    check_greedy(path)
    check_no_choice(SamplingParams(temperature=1.0), path)
    check_penalties(1.0, path)
    check_longer_than_the_list(path)
    check_edges("wide", path)
    check_edges("ties", path)
    each_once(70, 1, path)


def check_orders(path: Path) -> None:
    """What reaches every barrier, in all orders of threads."""
    cuts = ({"top_k": 5}, {"top_p": 0.9}, {})
    logits = np.stack([row_of_kind(k, 1500, 12) for k in KINDS[:2]])
    for order in ORDERS:
        emulated.set_order(order, path)
        compare(logits, [(SamplingParams(temperature=1.0, **c), 0.4, r) for c in cuts for r in (0, 1)], path)  # type: ignore[arg-type]


def caught(library: Path, in_orders: bool) -> bool:
    """Whether a library fails."""
    return fails(functools.partial(check_orders if in_orders else check_all, library), seconds=30)


def broken(folder: Path, fault: Fault) -> Path:
    """The kernel with a fault."""
    shutil.copytree(PLUGIN / "sampler", folder / "sampler")
    source = folder / "sampler" / fault.file
    source.write_text(fault.applied(source.read_text()))
    emulated.compile_to(folder / "libless_broken.so", folder / "sampler", "-w")
    return folder / "libless_broken.so"


def test_the_kernel_without_a_fault_passes() -> None:
    assert not caught(emulated.library(), in_orders=False)
    assert not caught(emulated.library(), in_orders=True)


@pytest.mark.parametrize("name", exhaustive_but(FAULTS, *[*FAULTS][::6]))
def test_a_fault_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, FAULTS[name]), in_orders=False) is (name not in SURVIVORS)


@pytest.mark.parametrize("name", exhaustive_but(barriers(), *[*barriers()][::3]))
def test_a_missing_barrier_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(broken(tmp_path, barriers()[name]), in_orders=True)


def test_survivors_are_faults() -> None:
    assert set(SURVIVORS) <= set(FAULTS)
