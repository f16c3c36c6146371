"""Serve a bundle by PyTriton: a decoupled model over the engine, in a Python process of your own.

    pip install 'less-export[cpu]' nvidia-pytriton==0.7.0 'numpy<2'
    python examples/pytriton_serve.py BUNDLE

A request holds a batch of prompts. Requests and prompts run beside one another, and every response has what came since
the one before: for each prompt its next piece of text, and why it ended, once it has. Requests that Triton merges end
together, also with the error of one of them. PyTriton does not say when a client leaves: its request runs to its end.
"""

import argparse
import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.proxy.types import Request
from pytriton.triton import Triton, TritonConfig

import less_export
from less_export.runtime.engine import Engine
from less_export.runtime.scheduler import Event


class Model:
    """What PyTriton calls, for several requests at a time in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, requests: Sequence[Request]) -> AsyncIterator[list[dict[str, np.ndarray]]]:
        """Yield the next responses, one a request: ``text`` and ``finish_reason``, bytes [B, 1] as its prompts."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        prompts = np.concatenate([r.data["prompt"][:, 0] for r in requests])
        options = np.concatenate([r.data["sampling"][:, 0] for r in requests])
        ends = np.cumsum([len(r.data["prompt"]) for r in requests])[:-1]
        sequences = [
            self._engine.sequence(prompt.decode(), **json.loads(fields))
            for prompt, fields in zip(prompts, options, strict=True)
        ]
        self._engine.submit(sequences, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        try:
            running = len(sequences)
            while running:
                new = [await events.get()]
                while not events.empty():
                    new.append(events.get_nowait())
                texts, reasons = dict.fromkeys(sequences, ""), dict.fromkeys(sequences, "")
                for event in new:
                    if event.token is None:
                        raise event.error or RuntimeError("a sequence ended")
                    texts[event.sequence] += event.token.text
                    reasons[event.sequence] = event.token.finish_reason or ""
                    running -= event.token.finish_reason is not None
                columns = (np.split(column(c.values()), ends) for c in (texts, reasons))
                yield [{"text": text, "finish_reason": reason} for text, reason in zip(*columns, strict=True)]
        finally:
            self._engine.cancel(sequences)


def column(texts: object) -> np.ndarray:
    """[B, 1] bytes."""
    return np.array([[text.encode()] for text in texts], np.object_)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a bundle by PyTriton")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--rows", type=int, help="sequences that run at a time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, at which PyTriton stops its server
    addresses = dict.fromkeys(("http_address", "grpc_address", "metrics_address"), "127.0.0.1")
    ports = {name: getattr(args, name) for name in ("http_port", "grpc_port", "metrics_port")}
    opened = less_export.open_bundle(args.bundle, threads=args.threads)
    strings = {"dtype": bytes, "shape": (1,)}
    with Engine(opened, rows=args.rows) as engine, Triton(config=TritonConfig(**addresses, **ports)) as triton:
        triton.bind(
            args.bundle.resolve().name,
            Model(engine),
            inputs=[Tensor(name="prompt", **strings), Tensor(name="sampling", **strings)],
            outputs=[Tensor(name="text", **strings), Tensor(name="finish_reason", **strings)],
            config=ModelConfig(
                decoupled=True, max_batch_size=engine.rows, batcher=DynamicBatcher(max_queue_delay_microseconds=0)
            ),
        )
        triton.serve()
