"""Constant memory is the product: twenty thousand tokens on a tiny model with rotary embeddings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from less_export.runtime.backend import Backend
from less_export.runtime.generate import Generator

from . import families

TOKENS, WARM_UP, EVERY = 20_000, 2_000, 500
#: What allocators may still move about; an f32 cache of this model that grew would take 5 MB.
ROOM = 2 << 20


def state_bytes(backend: Backend) -> int:
    return sum(x.nbytes for x in backend.read_row(0).tensors.values())


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = families.save(families.small(), tmp_path / "model")
    kernels = families.kernels(families.load(checkpoint), tmp_path / "kernels.safetensors")
    tiny = families.export(checkpoint, tmp_path / "bundle", budget="16", kernels=kernels)
    backend, process = tiny.backend("ort", rows=1), psutil.Process(os.getpid())
    allocated, plain = state_bytes(backend), backend.step
    assert allocated == backend.contract.state_bytes()

    def step(ids: npt.ArrayLike, new_length: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        logits = plain(ids, new_length)
        assert np.isfinite(logits).all(), f"after {backend.past_length[0]} tokens"
        return logits

    monkeypatch.setattr(backend, "step", step)
    resident, produced = [], []
    stream = Generator(backend).stream([list(range(3, 43))], temperature=1.0, seed=0, max_new_tokens=TOKENS)
    for token in stream:
        produced.append(token.token_id)
        if len(produced) >= WARM_UP and len(produced) % EVERY == 0:
            resident.append(process.memory_info().rss)

    assert len(produced) == TOKENS
    assert len(set(produced[-2000:])) > 20  # still a text, not one token for ever
    assert backend.past_length[0] == 40 + TOKENS - 1
    assert max(resident) - resident[0] <= ROOM, f"{resident[0]} bytes after {WARM_UP} tokens, then {max(resident)}"
    state = backend.read_row(0)
    assert state_bytes(backend) == allocated
    for name, x in state.tensors.items():
        assert np.isfinite(x).all(), name
    # Still every token in one place, and the newest eight in their slots.
    position, z = state.tensors["past.0.position"], state.tensors["past.0.z"]
    np.testing.assert_allclose((position >= 0).sum(-1) + z.sum(-1), state.length, rtol=1e-3)
    assert all(set(range(state.length - 8, state.length)) <= set(p) for p in position)
