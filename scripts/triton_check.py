"""Serve a bundle by Triton Inference Server itself, on CPUs, and compare what clients get with what the engine gives.

    python scripts/triton_check.py BUNDLE [--out benchmarks/results/triton.json]

Runs in a virtual environment of its own with ``nvidia-pytriton==0.7.0`` (whose wheel holds tritonserver),
``tritonclient[grpc]`` and ``less-export[cpu]``. Ends at the first difference.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import queue
import shutil
import socket
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
import tritonclient.grpc as grpc
from engine_answers import answered

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


def backends(folder: Path) -> Path:
    """Triton's python backend with the stub of this interpreter, laid out as tritonserver looks for it."""
    source = Path(pytriton.__file__).parent / "tritonserver"
    shutil.copytree(source / "backends", folder / "backends")
    version = ".".join(map(str, sys.version_info[:2]))
    shutil.copy(
        source / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "backends" / "python"
    )
    return folder / "backends"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@contextlib.contextmanager
def triton(repository: Path, folder: Path) -> Iterator[str]:
    """A running server; yields the address of its gRPC endpoint."""
    package = Path(pytriton.__file__).parent
    http, rpc, metrics = free_ports(3)
    argv = [str(package / "tritonserver" / "bin" / "tritonserver"), f"--model-repository={repository}"]
    argv += [f"--backend-directory={backends(folder)}", "--exit-timeout-secs=70", "--strict-readiness=true"]
    argv += [f"--http-port={http}", f"--grpc-port={rpc}", f"--metrics-port={metrics}"]
    argv += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    # The stub embeds the interpreter: its library, and the packages of this environment.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(package.parent / "nvidia_pytriton.libs")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": ":".join([str(ROOT), *(p for p in sys.path if p)]),
    }
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"127.0.0.1:{rpc}"
        client = grpc.InferenceServerClient(address)
        for _ in range(SECONDS):
            with contextlib.suppress(grpc.InferenceServerException):
                if client.is_server_ready():
                    break
            if server.poll() is not None:
                raise SystemExit(f"tritonserver ended with {server.returncode}:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        else:
            raise SystemExit(f"tritonserver does not become ready:\n{log.read_text()[-4000:]}")
        yield address
        server.terminate()
        code = server.wait(SECONDS)
    finally:
        server.kill()
    assert code == 0, f"tritonserver ended with {code}:\n{log.read_text()[-4000:]}"


class Stream:
    """One client's connection, and the responses to its latest request."""

    def __init__(self, address: str) -> None:
        self._client = grpc.InferenceServerClient(address)
        self._results: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._results.put((time.perf_counter(), result, error)))

    def ask(self, model: str, prompt: str, count: int, **options: Any) -> None:
        batch = [1] if model == PLAIN else [1, 1]
        inputs = []
        for name, value in (
            ("prompt", prompt),
            ("sampling", json.dumps({"max_new_tokens": count, "ignore_eos": True})),
        ):
            tensor = grpc.InferInput(name, batch, "BYTES")
            tensor.set_data_from_numpy(np.array([value.encode()], np.object_).reshape(batch))
            inputs.append(tensor)
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)

    def answer(self) -> tuple[str, list[float]]:
        """The text of the latest request, and the times of its responses.

        Raises:
            RuntimeError: the model refused it.
        """
        text, times = "", []
        while True:
            moment, result, error = self._results.get(timeout=SECONDS)
            if error is not None:
                raise RuntimeError(str(error))
            piece = result.as_numpy("text")
            if piece is not None:
                text += piece.ravel()[0].decode()
                times.append(moment)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return text, times

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def check_streams(address: str, wanted: list[str], count: int) -> dict[str, Any]:
    """Eight requests at a time get what they get alone, one response for each token, the first before the last ends."""
    streams = [Stream(address) for _ in PROMPTS]
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        stream.ask(PLAIN, prompt, count)
    answers = [stream.answer() for stream in streams]
    for stream in streams:
        stream.close()
    assert [text for text, _ in answers] == wanted
    assert all(len(times) == count for _, times in answers)
    assert max(times[0] for _, times in answers) < max(times[-1] for _, times in answers)
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


def check_cancel(address: str, rows: int, wanted: str, count: int) -> None:
    """Clients that leave free their rows: as many others as there are rows are answered at once."""
    gone = [Stream(address) for _ in range(rows)]
    for stream in gone:
        stream.ask(PLAIN, "Once", 1_000_000)
    time.sleep(1)
    for stream in gone:
        stream.close(cancel=True)
    stream = Stream(address)
    stream.ask(PLAIN, PROMPTS[0], count)
    assert stream.answer()[0] == wanted
    stream.close()
    print("ok: requests that are cancelled free their rows", flush=True)


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
        repository = folder / "repository"
        bundle = args.bundle.resolve()
        write_repository(repository, PLAIN, TritonOptions(bundle, **options), __version__)
        write_repository(repository, SEQUENCES, TritonOptions(bundle, **options, sequences=16), __version__)
        with triton(repository, folder) as address:
            server_version = grpc.InferenceServerClient(address).get_server_metadata().version
            streams = check_streams(address, wanted, args.tokens)
            sequences = check_sequences(address, engine, args.tokens)
            check_refusals(address)
            check_cancel(address, rows, wanted[0], args.tokens)
    print("ok: the server ends by itself")
    report = {
        "model": bundle.name,
        "tritonserver": server_version,
        "versions": {n: importlib.metadata.version(n) for n in ("nvidia-pytriton", "tritonclient", "onnxruntime")},
        "rows": rows,
        "streams": streams,
        "sequences": sequences,
        "also": [
            "errors reach the client",
            "cancelled requests free their rows",
            "SIGTERM ends the server with code 0",
        ],
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
