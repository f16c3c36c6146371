"""What an engine itself answers: the checks of servers compare clients' answers with it."""

from __future__ import annotations

import queue
from typing import Any

from less_export.runtime.engine import Engine
from less_export.runtime.scheduler import Event

#: Seconds until a token is given up.
SECONDS = 300


def answered(engine: Engine, prompt: str, count: int, prefix: Any = None) -> tuple[str, Any]:
    """What the engine itself says, and the state after it: one that was cut differently would evict other tokens."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sequence = engine.sequence(prompt, prefix=prefix, keep_state=True, max_new_tokens=count, ignore_eos=True)
    engine.submit([sequence], events.put)
    text = ""
    while True:
        event = events.get(timeout=SECONDS)
        assert event.token is not None, event.error
        text += event.token.text
        if event.token.finish_reason is not None:
            return text, sequence.state
