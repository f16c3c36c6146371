"""Serve a bundle by Ray Serve on this machine, and compare what clients get with what the engine gives.

    python scripts/ray_check.py BUNDLE [--out benchmarks/results/ray.json]

Runs in a virtual environment of its own with ``less-export[ray]`` and ``openai``. Ends at the first difference.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A machine that is busy takes its time to start Ray's own processes, and to answer Ray's probes. Ray runs its workers,
# replicas among them, at a niceness of 15 by default: beside other work they would get next to nothing.
SLOW = {
    "RAY_worker_niceness": "0",
    **{f"RAY_SERVE_PROXY_{kind}_TIMEOUT_S": "120" for kind in ("READY_CHECK", "HEALTH_CHECK")},
    **{f"RAY_{kind}_seconds": "300" for kind in ("worker_register_timeout", "gcs_server_request_timeout")},
    "PYTHONUNBUFFERED": "1",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
}
ROOT = Path(__file__).parents[1]
# Ray's processes inherit it. They have a token of their own, and (as Ray does without clusters) listen on 127.0.0.1.
os.environ.update(SLOW, RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=str(ROOT), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex())

import openai
import ray
from engine_answers import answered
from free_ports import free_ports
from ray import serve

import less_export
from less_export.runtime.engine import Engine
from less_export.serving.options import ServerOptions
from less_export.serving.ray_app import REPLICA_HEADER, application

SECONDS, ATTEMPTS = 600, 10
ROWS, TOKENS = 2, 12
PROMPTS = [f"Once upon a time, number {i}" for i in range(12)]
#: Of the requests that make Ray add a replica: each holds its row for a while.
LOAD_TOKENS = 100


def until(what: str, condition: Callable[[], Any]) -> float:
    """Wait until something holds; the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > SECONDS:
            raise SystemExit(f"it does not happen: {what}")
        time.sleep(0.2)
    return round(time.monotonic() - begin, 1)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
        return True
    return False


def start_ray() -> tuple[subprocess.Popen[str], str, int]:
    """Ray on this machine, without what the check does not use, its address, and a port for the server.

    Ray gives its agent 15 s to start, which a busy machine may need more than once.
    """
    for _ in range(ATTEMPTS):
        agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
        names = (*agents, "metrics-export", "ray-client-server")
        gcs, port, *ports = free_ports(2 + len(names))
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        argv += ["--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"]
        argv += ["--node-ip-address=127.0.0.1", f"--port={gcs}"]
        argv += [f"--{name}-port={number}" for name, number in zip(names, ports, strict=True)]
        node = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert node.stdout is not None
        if any("Ray runtime started" in line for line in node.stdout):
            return node, f"127.0.0.1:{gcs}", port
        node.wait(SECONDS)
    raise SystemExit("Ray does not start: see its logs, or try again when the machine is less busy")


@contextlib.contextmanager
def cluster() -> Iterator[int]:
    """Ray, and a port for the server."""
    node, address, port = start_ray()
    try:
        ray.init(address=address, log_to_driver=False)
        yield port
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(SECONDS)


def running() -> int:
    """How many replicas take requests."""
    deployment = serve.status().applications["default"].deployments["less-export"]
    return int(deployment.replica_states.get("RUNNING", 0))


class Client:
    def __init__(self, model: str, port: int) -> None:
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS, max_retries=0
        )
        self._model, self.port = model, port

    def ask(self, prompt: Any, count: int = TOKENS, session: str | None = None) -> tuple[str, str, str | None]:
        """Text, replica and session of a completion."""
        extra = {"ignore_eos": True, **({} if session is None else {"session_id": session})}
        raw = self._client.completions.with_raw_response.create(
            model=self._model, prompt=prompt, max_tokens=count, temperature=0, extra_body=extra
        )
        reply = raw.parse()
        return reply.choices[0].text, raw.headers[REPLICA_HEADER], getattr(reply, "session_id", None)

    def stream(self, prompt: str, count: int) -> Any:
        return self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=count,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def check_requests(client: Client, wanted: list[str]) -> dict[str, int]:
    """Twelve requests at a time over two replicas get what they get alone."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(client.ask, PROMPTS))
    assert [text for text, _, _ in answers] == wanted
    replicas = collections.Counter(replica for _, replica, _ in answers)
    assert len(replicas) == 2, replicas
    print(f"ok: {len(PROMPTS)} requests over {len(replicas)} replicas", flush=True)
    return {"requests": len(PROMPTS), "replicas": len(replicas)}


def check_stream(client: Client, wanted: str) -> None:
    """Tokens come one by one."""
    times, text = [], ""
    for chunk in client.stream(PROMPTS[0], TOKENS):
        times.append(time.perf_counter())
        text += chunk.choices[0].text
    assert text == wanted
    assert len(times) > 1
    print(f"ok: a stream of {len(times)} chunks", flush=True)


def check_session(client: Client, engine: Engine) -> dict[str, int]:
    """A session goes on in the other replica."""
    used: list[str] = []
    _, replica, session = client.ask(PROMPTS[0], session="new")
    used.append(replica)
    prompts = [PROMPTS[0]]
    while len(set(used)) < 2 and len(used) < 60:
        prompts.append(" and then")
        text, replica, _ = client.ask(prompts[-1], session=session)
        used.append(replica)
    assert len(set(used)) == 2, "every request of the session went to the same replica"
    state = None
    for prompt in prompts:
        want, state = answered(engine, prompt, TOKENS, state)
    assert text == want
    print(f"ok: a session moved at its request {len(used)}", flush=True)
    return {"requests": len(used), "replicas": 2}


def check_killed(client: Client, engine: Engine) -> float:
    """A replica whose process is killed is replaced; a session that it had goes on."""
    want, state = answered(engine, PROMPTS[1], TOKENS)
    text, victim, session = client.ask(PROMPTS[1], session="new")
    assert text == want
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if victim in a["name"]]
    assert len(actors) == 1, actors
    ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]), no_restart=True)

    def replaced() -> bool:
        try:
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                replicas = {replica for _, replica, _ in pool.map(client.ask, PROMPTS)}
        except openai.APIError:  # Ray had not noticed
            return False
        return len(replicas) == 2 and victim not in replicas

    seconds = until("a killed replica is replaced", replaced)
    assert client.ask(" and then", session=session)[0] == answered(engine, " and then", TOKENS, state)[0]
    print(f"ok: a killed replica was replaced after {seconds} s, and its session went on", flush=True)
    return seconds


def check_scaling(client: Client) -> list[int]:
    """With more requests than one replica has rows there is a second one; without, it goes again."""
    seen = [running()]
    assert seen == [1]
    enough = threading.Event()

    def load(prompt: str) -> None:
        while not enough.is_set():
            client.ask(prompt, LOAD_TOKENS)

    with ThreadPoolExecutor(2 * ROWS) as pool:
        loads = [pool.submit(load, prompt) for prompt in PROMPTS[: 2 * ROWS]]
        try:
            until("a second replica", lambda: running() == 2 or any(done.done() for done in loads))
            seen.append(running())
        finally:
            enough.set()
        for done in loads:
            done.result(SECONDS)
    until("one replica again", lambda: running() == 1)
    seen.append(1)
    assert seen == [1, 2, 1], seen
    assert client.ask(PROMPTS[0], 1)
    print(f"ok: replicas {' -> '.join(map(str, seen))}", flush=True)
    return seen


def check_example(bundle: Path, client: Client, wanted: str) -> None:
    """The example serves the bundle in the cluster that runs, and ends when it is told to."""
    argv = [sys.executable, str(ROOT / "examples" / "ray_serve.py"), str(bundle)]
    argv += ["--port", str(client.port), "--cpus", "0.5"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    example = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    assert example.stdout is not None
    try:
        assert any(line.startswith("serving ") for line in example.stdout), "the example does not serve"
        assert client.ask(PROMPTS[0])[0] == wanted
        example.terminate()
        assert example.wait(SECONDS) == 0
    finally:
        example.kill()
    print("ok: examples/ray_serve.py answers", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a bundle by Ray Serve on this machine")
    parser.add_argument("bundle", type=Path, help="a bundle for ONNX Runtime with a tokenizer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ray.json")
    args = parser.parse_args()
    bundle = args.bundle.resolve()
    engine = Engine(less_export.open_bundle(bundle, "ort", threads=1))
    wanted = [answered(engine, p, TOKENS)[0] for p in PROMPTS]
    with tempfile.TemporaryDirectory() as folder, cluster() as port:
        with contextlib.suppress(TimeoutError):  # of a minute, for a proxy that may take longer
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        until("Ray's proxy listens", lambda: listens(port))
        options = ServerOptions(bundle.name, state_dir=Path(folder) / "sessions")
        client = Client(bundle.name, port)
        common: dict[str, Any] = {
            "rows": ROWS,
            "max_replicas": 2,
            "model": {"backend": "ort", "threads": 1},
            "actor": {"num_cpus": 0.5},
        }
        fixed = {"downscale_delay_s": 600}
        serve.run(application(bundle, options, min_replicas=2, autoscaling=fixed, **common))
        try:
            requests = check_requests(client, wanted)
            check_stream(client, wanted[0])
            session = check_session(client, engine)
            replaced = check_killed(client, engine)
            quick = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 1, "look_back_period_s": 2}
            serve.run(application(bundle, options, min_replicas=1, autoscaling=quick, **common))
            until("one replica", lambda: running() == 1)
            scaling = check_scaling(client)
            serve.shutdown()
            check_example(bundle, client, wanted[0])
        finally:
            serve.shutdown()
    report = {
        "model": bundle.name,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {n: importlib.metadata.version(n) for n in ("ray", "openai", "onnxruntime")},
        "rows_of_a_replica": ROWS,
        "requests": requests,
        "session": session,
        "seconds_until_a_killed_replica_is_replaced": replaced,
        "replicas_under_load": scaling,
        "also": [
            "streams come by chunks",
            "a session of the killed replica went on",
            "examples/ray_serve.py answers",
        ],
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
