"""Generate with a bundle and print the memory use of this process, for test_soak."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from less_export.runtime.backend import Backend
from less_export.runtime.open import open_bundle
from less_export.runtime.sampling import SamplingParams


def state_bytes(backend: Backend) -> int:
    return sum(x.nbytes for x in backend.read_row(0).tensors.values())


def main(bundle: str, prompt: int, tokens: int, warm_up: int, every: int) -> dict[str, object]:
    generator = open_bundle(bundle, "ort", threads=1)
    backend, process = generator.backend, psutil.Process(os.getpid())
    plain = backend.step
    backend.open(1)
    before, finite, seen = state_bytes(backend), True, set()

    def step(*args: Any) -> npt.NDArray[np.float32]:
        nonlocal finite
        logits = plain(*args)
        finite = finite and bool(np.isfinite(logits).all())
        return logits

    backend.step = step  # type: ignore[method-assign]
    resident: list[int] = []
    prompts, params = [list(range(3, 3 + prompt))], SamplingParams(1.0, seed=0, max_new_tokens=tokens, ignore_eos=True)
    stream = generator.stream(prompts, params)
    for count, token in enumerate(stream, 1):
        if count > tokens - 2000:
            seen.add(token.token_id)
        if count >= warm_up and count % every == 0:
            resident.append(process.memory_info().rss)
    state = backend.read_row(0)
    position, z = state.tensors["past.0.position"], state.tensors["past.0.z"]
    return {
        "tokens": count,
        "different": len(seen),
        "length": state.length,
        "finite": finite and all(bool(np.isfinite(x).all()) for x in state.tensors.values()),
        "resident": resident,
        "state": [before, state_bytes(backend), backend.contract.state_bytes()],
        "positions": position.tolist(),
        "absorbed": z.sum(-1).tolist(),
        "torch": "torch" in sys.modules,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
