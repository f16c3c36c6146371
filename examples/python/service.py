"""Answer many prompts at a time in a program of your own, without the server: service.py BUNDLE PROMPT PROMPT ...

Every prompt is a task of the event loop, and the engine runs all of them together. A task that is cancelled, as a web
framework does when its client leaves, frees its row before the engine's next step.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import less_export
from less_export.runtime.engine import Engine


async def pieces(engine: Engine, prompt: str, **options: object) -> AsyncIterator[str]:
    """The answer to a prompt, piece by piece; ``options`` are fields of SamplingParams."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()
    sequence = engine.sequence(prompt, **options)
    # The engine calls this on its own thread. QueueFullError here: tell the client to come again.
    engine.submit([sequence], lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
    try:
        while (event := await events.get()).token is not None:
            yield event.token.text
            if event.token.finish_reason is not None:
                return
        raise event.error or RuntimeError("the sequence ended")
    finally:
        engine.cancel([sequence])


async def main(bundle: str, prompts: list[str]) -> None:
    async def answer(prompt: str) -> None:
        print(prompt + "".join([piece async for piece in pieces(engine, prompt, max_new_tokens=40)]), end="\n\n")

    with Engine(less_export.open_bundle(bundle), max_queue=len(prompts)) as engine:
        await asyncio.gather(*map(answer, prompts))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
