"""The example programs run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from less_export import open_bundle

from .bundles import PROMPT

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
