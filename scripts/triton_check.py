"""Serve a bundle by Triton Inference Server itself, on CPUs, and compare what clients get with what the engine gives.

    python scripts/triton_check.py BUNDLE [--out benchmarks/results/triton.json]

Runs in a virtual environment of its own with ``nvidia-pytriton==0.7.0`` (whose wheel holds tritonserver),
``tritonclient[grpc]``, ``numpy<2`` and ``less-export[cpu]``; needs a C compiler. Ends at the first difference.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytriton
import step_rows
import triton_states
import tritonclient.grpc as grpc
from engine_answers import answered
from free_ports import free_ports

import less_export
from less_export._version import __version__
from less_export.runtime.engine import Engine
from less_export.serving.triton_repository import TritonOptions, write_repository

ROOT = Path(__file__).parents[1]
SECONDS = 300
PROMPTS = [
    f"The capital of {land} is" for land in ("France", "Italy", "Spain", "Japan", "Peru", "Egypt", "India", "Chad")
]
PLAIN, SEQUENCES = "plain", "sequences"
#: Added to a model of a repository: the file gets the rows of every step.
RECORD = """
os.environ["LESS_STEP_ROWS"] = {path!r}
import step_rows
"""


def backends(folder: Path) -> Path:
    """Triton's python backend with the stub of this interpreter, laid out as tritonserver looks for it."""
    source = Path(pytriton.__file__).parent / "tritonserver"
    shutil.copytree(source / "backends", folder / "backends")
    version = ".".join(map(str, sys.version_info[:2]))
    shutil.copy(
        source / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "backends" / "python"
    )
    return folder / "backends"


def environment() -> dict[str, str]:
    """Triton's stub embeds the interpreter: it needs its library, and the packages of this environment."""
    libraries = [sysconfig.get_config_var("LIBDIR"), str(Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": ":".join([str(ROOT), *(p for p in sys.path if p)]),
    }


@contextlib.contextmanager
def running(argv: list[str], address: str, model: str, log: Path, **more: str) -> Iterator[None]:
    """A server that has this model at this address of its gRPC endpoint, until the end."""
    with log.open("wb") as output:
        server = subprocess.Popen(argv, env={**environment(), **more}, stdout=output, stderr=subprocess.STDOUT)
    try:
        client = grpc.InferenceServerClient(address)
        for _ in range(SECONDS):
            with contextlib.suppress(grpc.InferenceServerException):
                if client.is_server_ready() and client.is_model_ready(model):
                    break
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        else:
            raise SystemExit(f"the server does not become ready:\n{log.read_text()[-4000:]}")
        client.close()
        yield
        server.terminate()
        code = server.wait(SECONDS)
    finally:
        server.kill()
    assert code == 0, f"the server ended with {code}:\n{log.read_text()[-4000:]}"


@contextlib.contextmanager
def triton(repository: Path, backends: Path, log: Path) -> Iterator[str]:
    """Triton itself; yields the address of its gRPC endpoint."""
    http, rpc, metrics = free_ports(3)
    argv = [str(Path(pytriton.__file__).parent / "tritonserver" / "bin" / "tritonserver")]
    argv += [f"--model-repository={repository}", f"--backend-directory={backends}"]
    argv += ["--exit-timeout-secs=70", "--strict-readiness=true"]
    argv += [f"--http-port={http}", f"--grpc-port={rpc}", f"--metrics-port={metrics}"]
    argv += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    with running(argv, f"127.0.0.1:{rpc}", PLAIN, log):
        yield f"127.0.0.1:{rpc}"


class Stream:
    """One client's connection, and the responses to its latest request."""

    def __init__(self, address: str) -> None:
        self._client = grpc.InferenceServerClient(address)
        self._results: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._results.put((time.perf_counter(), result, error)))

    def ask(self, model: str, prompts: str | list[str], count: int, **options: Any) -> None:
        """Send a prompt, or a batch of them."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        shape = [1] if model == PLAIN else [len(texts), 1]
        sampling = json.dumps({"max_new_tokens": count, "ignore_eos": True})
        inputs = []
        for name, values in (("prompt", texts), ("sampling", [sampling] * len(texts))):
            tensor = grpc.InferInput(name, shape, "BYTES")
            tensor.set_data_from_numpy(np.array([v.encode() for v in values], np.object_).reshape(shape))
            inputs.append(tensor)
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)

    def answer(self) -> tuple[str, list[float]]:
        """The text of the latest request, and the times of its responses; see :meth:`answers`."""
        (text,), times = self.answers()
        return text, times

    def answers(self) -> tuple[list[str], list[float]]:
        """The texts of the latest request, one for each prompt, and the times of its responses.

        Raises:
            RuntimeError: the model refused it.
        """
        texts: list[str] = []
        times: list[float] = []
        while True:
            moment, result, error = self._results.get(timeout=SECONDS)
            if error is not None:
                raise RuntimeError(str(error))
            pieces = result.as_numpy("text")
            if pieces is not None:
                texts = [a + b.decode() for a, b in zip(texts or [""] * pieces.size, pieces.ravel(), strict=True)]
                times.append(moment)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return texts, times

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def check_streams(address: str, wanted: list[str], count: int) -> dict[str, Any]:
    """Eight requests at a time get what they get alone, one response for each token; two begin before any ends."""
    streams = [Stream(address) for _ in PROMPTS]
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        stream.ask(PLAIN, prompt, count)
    answers = [stream.answer() for stream in streams]
    for stream in streams:
        stream.close()
    assert [text for text, _ in answers] == wanted
    assert all(len(times) == count for _, times in answers)
    assert sorted(times[0] for _, times in answers)[1] < min(times[-1] for _, times in answers)
    print(f"ok: {len(PROMPTS)} streams of {count} tokens", flush=True)
    return {"requests": len(PROMPTS), "tokens": count * len(PROMPTS)}


def check_sequences(address: str, engine: Engine, count: int) -> dict[str, Any]:
    """Sequences that run beside one another go on from their own states."""
    streams = [Stream(address) for _ in PROMPTS]
    rounds = ("", " The river there", " In summer")
    states: list[Any] = [None] * len(PROMPTS)
    for turn, more in enumerate(rounds):
        prompts = [more or p for p in PROMPTS]
        marks = {"sequence_start": turn == 0, "sequence_end": turn == len(rounds) - 1}
        for i, stream in enumerate(streams):
            stream.ask(SEQUENCES, prompts[i], count, sequence_id=100 + i, **marks)
        texts = [stream.answer()[0] for stream in streams]
        for i, text in enumerate(texts):
            want, states[i] = answered(engine, prompts[i], count, states[i])
            assert text == want, (turn, i, text, want)
    for stream in streams:
        stream.close()
    print(f"ok: {len(PROMPTS)} sequences of {len(rounds)} requests", flush=True)
    return {"sequences": len(PROMPTS), "requests": len(PROMPTS) * len(rounds)}


def check_refusals(address: str) -> None:
    stream = Stream(address)
    stream.ask(PLAIN, "", 1)
    reason = None
    try:
        stream.answer()
    except RuntimeError as error:
        reason = str(error)
    assert reason is not None, "an empty prompt was taken"
    assert "empty" in reason, reason
    stream.close()
    print("ok: errors reach the client", flush=True)


def check_cancel(address: str, rows: int, wanted: list[str], count: int, steps: Path) -> None:
    """Clients that leave free their rows: as many others as there are rows share a step after that."""
    gone = [Stream(address) for _ in range(rows)]
    for stream in gone:
        stream.ask(PLAIN, "Once", 1_000_000)
    time.sleep(1)
    for stream in gone:
        stream.close(cancel=True)
    steps.write_text("", encoding="utf-8")
    others = [Stream(address) for _ in range(rows)]
    for stream, prompt in zip(others, PROMPTS, strict=False):
        stream.ask(PLAIN, prompt, count)
    assert [stream.answer()[0] for stream in others] == wanted[:rows]
    for stream in others:
        stream.close()
    assert step_rows.largest(steps) == rows
    print("ok: requests that are cancelled free their rows", flush=True)


def check_pytriton(bundle: Path, rows: int, wanted: list[str], count: int, folder: Path) -> dict[str, int]:
    """The example: single prompts, which share steps, and then a batch of them, all in pieces."""
    names, ports = ("http", "grpc", "metrics"), free_ports(3)
    example = [str(ROOT / "examples" / "pytriton_serve.py"), str(bundle), f"--rows={rows}"]
    example += [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]
    code = "import sys, runpy, step_rows; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    address, steps = f"127.0.0.1:{ports[1]}", folder / "pytriton.steps"
    argv = [sys.executable, "-c", code, *example]
    with running(argv, address, bundle.name, folder / "pytriton.log", LESS_STEP_ROWS=str(steps)):
        single = [Stream(address) for _ in PROMPTS[rows:]]
        for stream, prompt in zip(single, PROMPTS[rows:], strict=True):
            stream.ask(bundle.name, [prompt], count)
        for stream, want in zip(single, wanted[rows:], strict=True):
            text, times = stream.answer()
            assert text == want
            assert len(times) > 1
        most = step_rows.largest(steps)
        assert most > 1
        batch = Stream(address)
        batch.ask(bundle.name, PROMPTS[:rows], count)
        texts, times = batch.answers()
        assert texts == wanted[:rows]
        assert len(times) > 1
        for stream in (*single, batch):
            stream.close()
    print(f"ok: PyTriton, a batch of {rows} and {len(single)} requests; {most} rows in one step", flush=True)
    return {"batch": rows, "single_requests": len(single), "most_rows_in_one_step": most}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a bundle by Triton Inference Server itself")
    parser.add_argument("bundle", type=Path, help="a bundle for ONNX Runtime with a tokenizer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "triton.json")
    parser.add_argument("--tokens", type=int, default=12)
    args = parser.parse_args()
    engine = Engine(less_export.open_bundle(args.bundle, "ort", threads=1))
    rows = min(4, engine.rows)
    wanted = [answered(engine, p, args.tokens)[0] for p in PROMPTS]
    with tempfile.TemporaryDirectory() as name:
        folder, options = Path(name), {"backend": "ort", "threads": 1, "rows": rows}
        repository, bundle = folder / "repository", args.bundle.resolve()
        models = {PLAIN: 0, SEQUENCES: 16}
        for model, sequences in models.items():
            written = write_repository(
                repository, model, TritonOptions(bundle, **options, sequences=sequences), __version__
            )
            with (written / "1" / "model.py").open("a", encoding="utf-8") as code:
                code.write(RECORD.format(path=str(folder / f"{model}.steps")))
        triton_states.write_model(repository, bundle)
        places = backends(folder)
        triton_states.build_backend(places)
        with triton(repository, places, folder / "log") as address:
            server_version = grpc.InferenceServerClient(address).get_server_metadata().version
            streams = check_streams(address, wanted, args.tokens)
            most = {PLAIN: step_rows.largest(folder / f"{PLAIN}.steps")}
            sequences_done = check_sequences(address, engine, args.tokens)
            check_refusals(address)
            most[SEQUENCES] = step_rows.largest(folder / f"{SEQUENCES}.steps")
            check_cancel(address, rows, wanted, args.tokens, folder / f"{PLAIN}.steps")
            states = triton_states.check(address, engine.backend.contract)
        print("ok: the server ends by itself", flush=True)
        assert min(most.values()) > 1, most
        print(f"ok: rows in one step: {most}", flush=True)
        example = check_pytriton(bundle, rows, wanted, args.tokens, folder)
    report = {
        "model": bundle.name,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "tritonserver": server_version,
        "versions": {
            n: importlib.metadata.version(n) for n in ("nvidia-pytriton", "tritonclient", "onnxruntime", "numpy")
        },
        "rows": rows,
        "streams": {**streams, "most_rows_in_one_step": most[PLAIN]},
        "sequences": {**sequences_done, "most_rows_in_one_step": most[SEQUENCES]},
        "pytriton": example,
        "implicit_state": states,
        "also": [
            "errors reach the client",
            "cancelled requests free their rows",
            "SIGTERM ends the server with code 0",
        ],
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
