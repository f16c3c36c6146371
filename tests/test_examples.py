"""The example programs run as their first lines say."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
