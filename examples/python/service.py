"""Answer many prompts at a time in a program of your own, without the server.

    python examples/python/service.py BUNDLE "Once upon a time" "The moon" ...

Every prompt is a task of the event loop, and the engine runs all of them together. A task that is cancelled, as a web
framework does when its client leaves, frees its row before the engine's next step.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import less_export
from less_export.runtime.engine import Engine
from less_export.runtime.scheduler import Event


async def pieces(engine: Engine, prompt: str, **options: object) -> AsyncIterator[str]:
    """The answer to a prompt, piece by piece; ``options`` are fields of SamplingParams."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
    sequence = engine.sequence(prompt, **options)
    # The engine calls this on its own thread. QueueFullError here: tell the client to come again.
    engine.submit([sequence], lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
    try:
        while True:
            event = await events.get()
            if event.token is None:
                raise event.error or RuntimeError("the sequence ended")
            yield event.token.text
            if event.token.finish_reason is not None:
                return
    finally:
        engine.cancel([sequence])


async def answer(engine: Engine, prompt: str) -> None:
    text = "".join([piece async for piece in pieces(engine, prompt, max_new_tokens=40)])
    print(f"{prompt}{text}\n")


async def main(bundle: str, prompts: list[str]) -> None:
    with Engine(less_export.open_bundle(bundle), max_queue=len(prompts)) as engine:
        await asyncio.gather(*(answer(engine, prompt) for prompt in prompts))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
