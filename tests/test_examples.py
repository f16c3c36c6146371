"""The example programs run as their first lines say."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from less_export import open_bundle
from less_export.runtime.engine import Engine
from less_export.runtime.generate import Generator
from less_export.runtime.scheduler import Event

from .bundles import PROMPT
from .test_generate import HashBackend, contract, letter_tokenizer

pytest_plugins = ["tests.bundles"]
EXAMPLES = Path(__file__).parents[1] / "examples" / "python"


def test_service(plain: Path) -> None:
    prompts = [PROMPT, "Once upon a time", "a cat"]
    argv = [sys.executable, str(EXAMPLES / "service.py"), str(plain), *prompts]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    generator = open_bundle(plain)
    for prompt in prompts:
        (alone,) = generator.generate([prompt], max_new_tokens=40)
        assert f"{prompt}{alone.text}\n" in done.stdout


def test_a_slow_reader_of_the_service_gets_every_piece() -> None:
    """The engine may have ended a sequence before its last event reaches the loop."""
    spec = importlib.util.spec_from_file_location("service_example", EXAMPLES / "service.py")
    assert spec is not None
    assert spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)

    class LateEngine(Engine):
        def submit(self, sequences: Sequence[Any], sink: Callable[[Event], None]) -> None:
            def late(event: Event) -> None:
                time.sleep(0.002)
                sink(event)

            super().submit(sequences, late)

    async def counts(engine: Engine) -> list[int]:
        result = []
        for _ in range(30):
            result.append(0)
            async for _ in service.pieces(engine, "abc", max_new_tokens=3, ignore_eos=True):
                result[-1] += 1
                await asyncio.sleep(0.0005)
        return result

    with LateEngine(Generator(HashBackend(contract()), letter_tokenizer())) as engine:
        assert asyncio.run(counts(engine)) == [3] * 30


def test_pytriton_model(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyTriton, as it calls the model; ``scripts/triton_check.py`` runs the same in Triton itself."""
    for name in ("pytriton", "pytriton.model_config", "pytriton.proxy", "pytriton.proxy.types", "pytriton.triton"):
        double = types.ModuleType(name)
        double.__getattr__ = lambda _: types.SimpleNamespace  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, name, double)
    spec = importlib.util.spec_from_file_location("pytriton_example", EXAMPLES.parent / "pytriton_serve.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def request(*prompts: str) -> Any:
        sampling = json.dumps({"max_new_tokens": 9, "ignore_eos": True})
        texts = {"prompt": prompts, "sampling": [sampling] * len(prompts)}
        return types.SimpleNamespace(
            data={n: np.array([[t.encode()] for t in v], np.object_) for n, v in texts.items()}
        )

    batches = [["a cat", PROMPT], ["Once upon a time"]]

    async def answers(engine: Engine) -> list[list[str]]:
        texts, ended = [["", ""], [""]], 0
        async for responses in example.Model(engine)([request(*batch) for batch in batches]):
            assert [r["text"].shape for r in responses] == [(2, 1), (1, 1)]
            texts = [
                [a + b.decode() for a, b in zip(old, new["text"][:, 0], strict=True)]
                for old, new in zip(texts, responses, strict=True)
            ]
            ended += sum(int((r["finish_reason"] == b"length").sum()) for r in responses)
        assert ended == 3
        return texts

    with Engine(open_bundle(plain)) as engine:
        texts = asyncio.run(answers(engine))
    for batch, got in zip(batches, texts, strict=True):
        assert got == [r.text for r in open_bundle(plain).generate(batch, max_new_tokens=9, ignore_eos=True)]
