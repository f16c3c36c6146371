"""Repositories for Triton: the files, and their model between a double of Triton's Python module and the engine.

``scripts/triton_check.py`` runs the same in Triton itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import queue
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from less_export import open_bundle
from less_export.errors import UsageError
from less_export.serving.triton_repository import TritonOptions, config, write_repository

from .bundles import PROMPT, Run, refused
from .serving_support import LONG

pytest_plugins = ["tests.bundles"]
FINAL = 1


# ------------------------------------------------------------------ the files


def parameters_of(text: str) -> dict[str, str]:
    """The parameters of a config.pbtxt, whose strings are those of JSON."""
    lines = re.findall(r'^parameters \{ key: (".*?") value \{ string_value: (".*") \} \}$', text, re.M)
    return {json.loads(key): json.loads(value) for key, value in lines}


@pytest.mark.parametrize(
    "options",
    [
        TritonOptions(Path("/b")),
        TritonOptions(Path('/a "quoted" \\ path/\u00e9 } x'), "ort", 2, 3, 4, 0, 6, True),
    ],
)
def test_a_configuration_holds_the_options(options: TritonOptions) -> None:
    text = config("m", options, "1")
    assert TritonOptions.parse(parameters_of(text)) == options
    assert ("sequence_batching" in text) == bool(options.sequences)
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    for one, other in ("{}", "[]"):
        assert outside.count(one) == outside.count(other)
    if options.sequences:
        assert "max_candidate_sequences: 6 " in text
        assert "max_batch_size: 1" in text  # Triton's condition for a batch of sequences


def test_wrong_parameters() -> None:
    for parameters, says in (
        ({}, "bundle"),
        ({"bundle": "/b", "threads": "two"}, "two"),
        ({"bundle": "/b", "model": "x"}, "unknown parameter model"),
    ):
        with pytest.raises(UsageError, match=says):
            TritonOptions.parse(parameters)


def test_command(plain: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "repository"
    result = run("triton", plain, "--out", out, "--max-rows", 2, "--sequences", 3, "--threads", 1)
    assert (result.code, result.out) == (0, f"{out / plain.name}\n"), result.err
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == [f"{plain.name}/1/model.py", f"{plain.name}/config.pbtxt"]
    text = (out / plain.name / "config.pbtxt").read_text(encoding="utf-8")
    assert TritonOptions.parse(parameters_of(text)) == TritonOptions(plain, "ort", 1, 2, None, 64, 3)
    refused(run("triton", plain, "--out", out), "exists", "--name")
    assert run("triton", plain, "--out", out, "--name", "other").code == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(["other", plain.name])


def test_refused(plain: Path, run: Run, tmp_path: Path) -> None:
    for name in ("a/b", "..", "", " x"):
        with pytest.raises(UsageError, match="cannot be called"):
            write_repository(tmp_path, name, TritonOptions(plain), "1")
    with pytest.raises(UsageError, match="cannot hold"):
        write_repository(tmp_path, "m", TritonOptions(Path("/a\nb")), "1")
    refused(run("triton", plain, "--out", tmp_path, "--sequences", "-1"), "at least 0")
    refused(run("triton", tmp_path / "none", "--out", tmp_path), "none")
    (tmp_path / "file").write_text("")
    refused(run("triton", plain, "--out", tmp_path / "file"), "cannot write")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_implicit_state(plain: Path, run: Run, tmp_path: Path) -> None:
    """Requests that run as the configuration says, each from the states after the one before, give the model's text."""
    result = run("triton", plain, "--out", tmp_path, "--name", "steps", "--implicit-state")
    assert (result.code, result.out) == (0, f"{tmp_path / 'steps'}\n"), result.err
    folder, model = tmp_path / "steps", open_bundle(plain)
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert (text.count("{"), text.count("[")) == (text.count("}"), text.count("]"))
    assert "max_batch_size: 2\n" in text
    state = re.compile(
        r'input_name: "(\S+)" output_name: "(\S+)" data_type: TYPE_(\w+) dims: \[ (.*) \]\s+'
        r'initial_state \{ name: "empty" data_type: TYPE_\3 dims: \[ \4 \] (?:zero_data: true|data_file: "(.*)") \}'
    )
    pairs, values = {}, {}
    for past, present, kind, dims, file in state.findall(text):
        pairs[present] = past
        dtype = {"FP32": np.float32, "INT32": np.int32, "INT8": np.int8}[kind]
        shape = [1, *map(int, dims.split(", "))]
        data = (folder / "initial_state" / file).read_bytes() if file else bytes(int(np.prod(shape)) * dtype().itemsize)
        values[past] = np.frombuffer(data, dtype).reshape(shape)
    assert [pairs[name] for name in sorted(pairs)] == sorted(pairs.values())  # as Triton's core pairs them
    file = json.loads(re.search(r"default_model_filename: (.*)", text)[1])  # type: ignore[index]
    session = onnxruntime.InferenceSession(folder / "1" / file)
    assert {i.name for i in session.get_inputs()} == {"input_ids", "past_length", "new_length", *values}
    assert {o.name for o in session.get_outputs()} == {"logits", *pairs}
    names = [o.name for o in session.get_outputs()]

    def step(ids: list[int], length: int) -> int:
        sizes = {"past_length": np.array([length], np.int32), "new_length": np.array([len(ids)], np.int32)}
        outputs = dict(zip(names, session.run(names, {"input_ids": np.array([ids]), **sizes, **values}), strict=True))
        values.update({past: outputs[present] for present, past in pairs.items()})
        return int(outputs["logits"][0, -1].argmax())

    assert model.tokenizer is not None
    prompt, length, answer = model.tokenizer.encode(PROMPT), 0, []
    chunk = model.backend.contract.chunk
    for begin in range(0, len(prompt), chunk):
        token = step(prompt[begin : begin + chunk], length)
        length += len(prompt[begin : begin + chunk])
    for _ in range(8):
        answer.append(token)
        token = step([token], length)
        length += 1
    assert tuple(answer) == model.generate([PROMPT], max_new_tokens=8, ignore_eos=True)[0].token_ids


def test_implicit_state_refused(plain: Path, run: Run, tmp_path: Path) -> None:
    implicit = ("triton", plain, "--out", tmp_path, "--implicit-state")
    refused(run(*implicit, "--sequences", 3), "--name and --backend only")
    refused(run("triton", plain / "model.onnx", "--out", tmp_path, "--implicit-state"), "bundle folder")
    refused(run(*implicit, "--name", "a/b"), "cannot be called")
    assert not list(tmp_path.iterdir())
    assert run(*implicit).code == 0
    refused(run(*implicit), "exists")


# ------------------------------------------------------------------ the model


@dataclasses.dataclass
class Tensor:
    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclasses.dataclass
class Response:
    outputs: Any = ()
    error: Any = None

    def value(self, name: str) -> Any:
        return next(t.values[0] for t in self.outputs if t.name == name)


class Sender:
    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[tuple[Response, int]] = queue.SimpleQueue()
        self.cancelled = False

    def send(self, response: Response, flags: int) -> None:
        self.sent.put((response, flags))

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """A request with Triton's batch axis before every input."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs, self.sender = inputs, Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def responses(self) -> list[Response]:
        """All responses; the last one, and no other, is final."""
        result = []
        while True:
            response, flags = self.sender.sent.get(timeout=LONG)
            result.append(response)
            if flags == FINAL:
                return result

    def text(self) -> str:
        responses = self.responses()
        assert responses[-1].error is None, responses[-1].error
        reasons = [r.value("finish_reason") for r in responses]
        assert all(r == b"" for r in reasons[:-1])
        assert reasons[-1] in (b"length", b"stop", b"eos")
        return b"".join(r.value("text") for r in responses).decode()

    def error(self) -> str:
        (response,) = self.responses()
        return str(response.error)


def request(prompt: str | None = None, corrid: int | None = None, start: int = 0, end: int = 0, **more: Any) -> Request:
    inputs = {n: np.array([x]) for n, x in more.items()}
    if prompt is not None:
        inputs["prompt"] = np.array([[prompt.encode()]], np.object_)
    if corrid is not None:
        values = {"CORRID": np.uint64(corrid), "START": np.int32(start), "END": np.int32(end)}
        inputs |= {n: np.array([[x]]) for n, x in values.items()}
    return Request(inputs)


def sampling(**fields: Any) -> list[bytes]:
    return [json.dumps(fields).encode()]


Load = Callable[..., Any]


@pytest.fixture
def load(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """``load(sequences=3)`` writes a repository, and starts its model as Triton does."""
    double = types.ModuleType("triton_python_backend_utils")
    double.Tensor, double.InferenceResponse, double.TritonError = Tensor, Response, str  # type: ignore[attr-defined]
    double.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    double.get_input_tensor_by_name = lambda request, name: (  # type: ignore[attr-defined]
        Tensor(name, request.inputs[name]) if name in request.inputs else None
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", double)
    monkeypatch.delitem(sys.modules, "less_export.serving.triton_model", raising=False)
    models = []

    def call(**options: Any) -> Any:
        folder = write_repository(tmp_path, f"m{len(models)}", TritonOptions(plain, threads=1, **options), "1")
        monkeypatch.setenv("PYTHONPATH", f"/a{os.pathsep}")
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.spec_from_file_location("triton_model_file", folder / "1" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert sys.path[0] == "/a"
        model = module.TritonPythonModel()
        parameters = parameters_of((folder / "config.pbtxt").read_text(encoding="utf-8"))
        wrapped = {name: {"string_value": value} for name, value in parameters.items()}
        model.initialize({"model_config": json.dumps({"parameters": wrapped})})
        models.append(model)
        return model

    yield call
    for model in models:
        model.finalize()


def test_requests_get_what_they_get_alone(load: Load, plain: Path) -> None:
    model, alone = load(), open_bundle(plain)
    assert alone.tokenizer is not None
    prompts = [PROMPT, "Once upon a time", "a cat", "by the bank", "so"]
    requests = [request(p, sampling=sampling(max_new_tokens=9)) for p in prompts]
    requests.append(request(input_ids=alone.tokenizer.encode("a cat"), sampling=sampling(max_new_tokens=9)))
    model.execute(requests)
    want = [r.text for r in alone.generate(prompts, max_new_tokens=9)]
    assert [r.text() for r in requests] == [*want, want[2]]
    seeded = [request("a", sampling=sampling(max_new_tokens=9, temperature=1.0, seed=4)) for _ in range(2)]
    model.execute(seeded)
    one, other = (r.text() for r in seeded)
    assert one == other == alone.generate(["a"], max_new_tokens=9, temperature=1.0, seed=4)[0].text


def test_sequences(load: Load, plain: Path) -> None:
    """Two at a time; each goes on from its own state, and the next one finds the row empty."""
    model, alone = load(sequences=2), open_bundle(plain)
    for corrid, begin in ((7, PROMPT), (8, "a cat")):
        first = request(begin, corrid, start=1, sampling=sampling(max_new_tokens=6))
        model.execute([first])
        text = first.text()
        second = request(" and a bank", corrid, end=1, sampling=sampling(max_new_tokens=6))
        state = alone.prefill(begin)
        (want,) = alone.generate([begin], max_new_tokens=6)
        assert text == want.text
        state = alone.prefill(list(want.token_ids), state)
        model.execute([second])
        assert second.text() == alone.generate([" and a bank"], max_new_tokens=6, prefix=state)[0].text
        late = request("x", corrid)
        model.execute([late])
        assert "was not started" in late.error()  # its END has passed


def test_states_of_sequences_are_few(load: Load) -> None:
    model = load(sequences=2)
    for corrid in (1, 2, 3):
        begin = request("a cat", corrid, start=1, sampling=sampling(max_new_tokens=1))
        model.execute([begin])
        begin.text()
    late = [request("x", corrid, sampling=sampling(max_new_tokens=1)) for corrid in (1, 2, 3)]
    model.execute(late)
    assert "dropped to make space" in late[0].error()
    assert all(r.text() for r in late[1:])


@pytest.mark.parametrize(
    ("match", "inputs"),
    [
        ("either prompt or input_ids", {}),
        ("either prompt or input_ids", {"prompt": "a", "input_ids": [5]}),
        ("token ids must lie", {"input_ids": [5000]}),
        ("not JSON", {"prompt": "a", "sampling": [b"{"]}),
        ("JSON object", {"prompt": "a", "sampling": [b"[1]"]}),
        ("without processors", {"prompt": "a", "sampling": [b'{"processors": []}']}),
        ("unknown sampling option 'heat'", {"prompt": "a", "sampling": [b'{"heat": 1}']}),
        ("temperature", {"prompt": "a", "sampling": [b'{"temperature": -1}']}),
        ("map token ids", {"prompt": "a", "sampling": [b'{"logit_bias": {"x": 1}}']}),
        ("not UTF-8", {"prompt": "a", "sampling": [b"\xff"]}),
        ("one value", {"prompt": "a", "sampling": [b"{}", b"{}"]}),
    ],
)
def test_errors_end_their_request_only(match: str, inputs: dict[str, Any], load: Load) -> None:
    model = load()
    bad, good = request(**inputs), request("a", sampling=sampling(max_new_tokens=1))
    model.execute([bad, good])
    assert match in bad.error()
    assert good.text()


def test_a_full_queue(load: Load) -> None:
    model = load(rows=1, max_queue=0)
    requests = [request("a", sampling=sampling(max_new_tokens=200, ignore_eos=True)) for _ in range(3)]
    model.execute(requests)
    assert len(requests[0].text()) > 0
    assert all("try again later" in r.error() for r in requests[1:])


def test_a_cancelled_request_frees_its_row_and_its_sequence(load: Load) -> None:
    model = load(rows=1, sequences=1)
    gone = request("a", 5, start=1, sampling=sampling(max_new_tokens=10**6, ignore_eos=True))
    model.execute([gone])
    gone.sender.sent.get(timeout=LONG)
    busy = request("b", 5)
    model.execute([busy])
    assert "has not ended" in busy.error()
    gone.sender.cancelled = True
    assert gone.responses()[-1].error is None
    again = request("b", 5, start=1, sampling=sampling(max_new_tokens=1))
    model.execute([again])
    assert again.text()
