"""Many clients of a bundle's server at a time: answers as if each were alone, and a long run with random cancels."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from less_export import open_bundle

from .bundles import PROMPT, bundle
from .server_process import LONG, Process, process
from .serving_support import MODEL, serving

pytest_plugins = ["tests.bundles"]
ROWS, QUEUE, MOST = 4, 24, 24
#: The clients of the soak, those before memory is measured, and those at a time: more than rows and queue take.
CLIENTS, WARM_UP, AT_A_TIME = 2000, 500, 32
#: Mean seconds between two of them.
GAP = 0.004
#: Prompts of one token to several pieces, and the most new tokens of an answer.
PROMPTS = [PROMPT[i : i + n] for i, n in enumerate((1, 3, 6, 9, 14, 20, 28, 40, 55, 70, 75, 80))]


@pytest.fixture(scope="module")
def four(source: Path, kernel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with kernels and four rows."""
    return bundle(source, tmp_path_factory.mktemp("load") / "four", kernels=kernel_file, max_batch=ROWS)


@pytest.fixture(scope="module")
def alone(four: Path) -> list[list[str]]:
    """The greedy answer of each prompt alone, by its number of tokens."""
    generator = open_bundle(four, threads=1)
    assert generator.tokenizer is not None
    answers = [a.token_ids for p in PROMPTS for a in generator.generate([p], max_new_tokens=MOST)]
    return [[generator.tokenizer.decode(ids[:count]) for count in range(MOST + 1)] for ids in answers]


def test_staggered_requests_get_what_they_get_alone(four: Path, alone: list[list[str]]) -> None:
    """Eight of them over four rows, each three steps after the one before."""
    model = open_bundle(four, threads=1)
    plain, widths, answers = model.backend.step, list[int](), list[Future[str]]()

    def step(ids: Any, new: Any, rows: Any = None) -> Any:
        if len(widths) % 3 == 0 and len(answers) < 8:
            accepted = served.engine.counts["accepted"]
            answers.append(pool.submit(ask, len(answers)))
            served.until(lambda: served.engine.counts["accepted"] > accepted)
        widths.append(len(new))
        return plain(ids, new, rows)

    def ask(which: int) -> str:
        options: dict[str, Any] = {"prompt": PROMPTS[which], "max_tokens": MOST, "temperature": 0}
        chunks = served.client.completions.create(model=MODEL, stream=True, **options)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with serving(model.backend, tokenizer=model.tokenizer) as served, ThreadPoolExecutor(8) as pool:
        model.backend.step = step  # type: ignore[method-assign]
        first = ask(8)
        assert [answer.result(LONG) for answer in answers] == [alone[which][MOST] for which in range(8)]
        assert first == alone[8][MOST]
        assert max(widths) == ROWS


# ------------------------------------------------------------------ a long run


async def visit(
    client: openai.AsyncOpenAI, server: Process, want: list[list[str]], rng: np.random.Generator
) -> Counter[str]:
    """One client of the soak: it reads its answer, which must be the one it gets alone, or leaves at some moment."""
    which, count = int(rng.integers(len(PROMPTS))), int(rng.integers(1, 5) if rng.random() < 0.9 else MOST)
    stream = bool(rng.random() < 0.6)
    patience = float(rng.exponential(0.02)) if rng.random() < 0.15 else LONG  # seconds for the begin of the answer
    pieces = int(rng.integers(1, count + 1)) if rng.random() < 0.25 else -1  # of a stream, after which it leaves
    outcomes: Counter[str] = Counter()
    options = {"model": server.name, "prompt": PROMPTS[which], "max_tokens": count, "temperature": 0}
    while True:
        try:
            async with asyncio.timeout(patience):
                reply: Any = await client.completions.create(stream=stream, **options)
            break
        except openai.RateLimitError:  # it comes again
            outcomes["refused"] += 1
            await asyncio.sleep(rng.exponential(0.05))
        except TimeoutError:
            assert patience < LONG
            return outcomes + Counter(left=1)
    if stream:
        text = ""
        async with reply:
            async for chunk in reply:
                text += chunk.choices[0].text
                pieces -= 1
                if pieces == 0 and chunk.choices[0].finish_reason is None:
                    return outcomes + Counter(left=1)
    else:
        text = reply.choices[0].text
    assert text == want[which][count]
    return outcomes + Counter(whole=1)


async def visits(server: Process, want: list[list[str]], count: int, seed: int) -> Counter[str]:
    """What became of ``count`` clients that came at random moments."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    space = asyncio.Semaphore(AT_A_TIME)

    async def one(client: openai.AsyncOpenAI, own: np.random.Generator) -> None:
        try:
            outcomes.update(await visit(client, server, want, own))
        finally:
            space.release()

    options: dict[str, Any] = {"base_url": server.url, "api_key": "none", "max_retries": 0, "timeout": LONG}
    async with openai.AsyncOpenAI(**options) as client, asyncio.TaskGroup() as group:
        for own in rng.spawn(count):
            await asyncio.sleep(rng.exponential(GAP))
            await space.acquire()
            group.create_task(one(client, own))
    return outcomes


def figures(url: str) -> dict[str, float]:
    """What /metrics says, by names and labels, once nothing runs or waits."""
    for _ in range(10 * LONG):
        text = httpx2.get(f"{url.removesuffix('/v1')}/metrics", timeout=LONG).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        found = {" ".join((s.name, *s.labels.values())): s.value for s in samples}
        if found["less_rows_running"] == found["less_queue_waiting"] == 0:
            return found
        time.sleep(0.1)
    raise AssertionError(f"a row or a place in the queue is still taken: {found}")


@pytest.mark.slow
def test_soak(four: Path, alone: list[list[str]]) -> None:
    """Two thousand clients: right answers, no row that stays taken, counters that add up, memory that stays flat."""
    with process(four, "--max-queue", QUEUE, seconds=10 * LONG) as server:
        outcomes = asyncio.run(visits(server, alone, WARM_UP, seed=0))
        figures(server.url)
        memory = psutil.Process(server.child.pid).memory_info
        before = memory().rss
        outcomes += asyncio.run(visits(server, alone, CLIENTS - WARM_UP, seed=1))
        found = figures(server.url)
        grown = memory().rss - before
    # Half of what a row's state kept for each client would take. A fifth of it was seen, and more with kept sequences.
    assert grown <= (CLIENTS - WARM_UP) * open_bundle(four).backend.contract.state_bytes() / 2
    sequences = Counter({n.split()[1]: x for n, x in found.items() if n.startswith("less_sequences_total ")})
    finished = sum(x for outcome, x in sequences.items() if outcome.startswith("finished_"))
    assert outcomes["whole"] + outcomes["left"] == CLIENTS
    assert sequences["failed"] == 0
    assert finished + sequences["cancelled"] == sequences["accepted"] <= CLIENTS
    # Who leaves may do so before the request, or the end of the answer, has arrived.
    assert sequences["cancelled"] <= outcomes["left"]
    assert outcomes["whole"] <= finished
    refused = found.get("less_requests_total /v1/completions 429", 0)
    assert outcomes["refused"] <= refused <= outcomes["refused"] + outcomes["left"]
