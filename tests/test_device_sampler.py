"""Tokens chosen on the device by the TensorRT backend, on a stand-in for engine and CUDA with the emulated kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from less_export.errors import BackendError
from less_export.native import sampler as native
from less_export.runtime.device_sampler import DeviceSampler, history_of
from less_export.runtime.generate import Generator
from less_export.runtime.sampler import Choice, KeptLogits, Sampler, choose_all
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.scheduler import Event, Scheduler
from less_export.runtime.sequence import SequenceFactory

from . import sample_emulation
from .fake_cuda import FakeCuda
from .trt_decoder import contract_of, decoder, serialised
from .trt_support import Fake

pytest_plugins = ["tests.trt_decoder"]
pytestmark = pytest.mark.slow

VOCAB = 32
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.6}
#: What sequences ask for; the last four have to be chosen for by the host.
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, **PENALTIES},
    PENALTIES,
    {"temperature": 1.5, "min_p": 0.05, "frequency_penalty": 0.5},
    {"temperature": 1.0, "top_p": 0.8, "logprobs": 2},
    {"temperature": 1.0, "logit_bias": {3: 5.0}},
    {"processors": [lambda ids, logits: None]},
    {**PENALTIES, "logprobs": 0},
]


def on_fake(cuda: FakeCuda, fails: Callable[[], int] = lambda: 0) -> native.Sample:
    """The emulated kernel on the memory of the fake, in stream order; ``fails`` returns the error of a launch."""
    kernel = native.load(sample_emulation.library())

    def sample(logits: int, vocab: int, rows: int, count: int, histories: int, picks: int, stream: int) -> int:
        assert stream == 77

        def work() -> None:
            asked = cuda.at(rows, count * native.ROW.itemsize).view(native.ROW)
            assert len({h for h in asked["history"] if h >= 0}) == sum(asked["history"] >= 0)
            kept = int(asked["history"].max()) + 1
            arrays = [
                cuda.at(logits, (int(asked["logits"].max()) + 1) * vocab * 4),
                asked,
                cuda.at(histories, kept * vocab * 4) if kept else np.empty(0, np.uint8),
                cuda.at(picks, count * 4),
            ]
            at = [x.ctypes.data for x in arrays]
            assert kernel(at[0], vocab, at[1], count, at[2], at[3], 0) == 0

        cuda.stream.append(work)
        return fails()

    return sample


@pytest.fixture(params=[False, True], ids=["ranges", "rows by index"])
def fake(weights: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Fake:
    """A tiny decoder; it notes the bytes of every download in ``fake.down``."""
    contract, path = contract_of("float32"), weights / "model.onnx"
    path.write_bytes(serialised(decoder(contract, weights)))
    session = onnxruntime.InferenceSession(str(path))
    made = Fake(contract, weights, monkeypatch, lambda feed: session.run(None, feed), by_index=request.param)
    copy = made.cuda.cudaMemcpyAsync
    made.down: list[int] = []  # type: ignore[misc]

    def noted(target: int, source: int, size: int, kind: str, stream: int) -> tuple[int]:
        made.down += [size] if kind == "down" else []  # type: ignore[attr-defined]
        return copy(target, source, size, kind, stream)

    made.cuda.cudaMemcpyAsync = noted  # type: ignore[method-assign]
    return made


def scheduled(fake: Fake, count: int = 9) -> list[list[tuple[int, Any]]]:
    """Tokens and log probabilities of sequences that share three rows, each with what it asks for."""
    backend = fake.backend()
    factory, scheduler = SequenceFactory(backend), Scheduler(backend)
    sequences = []
    for i in range(count):
        params = factory.params(SamplingParams(seed=5, max_new_tokens=4 + i % 5, **ASKED[i % len(ASKED)]), {})
        sequences.append(factory.sequence([1 + i % 3, 2, 9, 4, 7][: 2 + i % 4], params, index=i))
        scheduler.submit(sequences[-1])
    tokens: dict[int, list[tuple[int, Any]]] = {i: [] for i in range(count)}
    while scheduler.busy:
        for event in scheduler.step():
            assert event.token is not None, event.error
            tokens[event.token.row].append((event.token.token_id, event.token.logprobs))
    backend.close()
    return [*tokens.values()]


def test_a_scheduler_gives_the_same_tokens(fake: Fake) -> None:
    host = scheduled(fake)
    fake.sample = on_fake(fake.cuda)
    assert scheduled(fake) == host
    assert len({t for text in host for t, _ in text}) > 10
    assert not fake.cuda.memory  # all freed


def test_a_generator_gives_the_same_tokens(fake: Fake) -> None:
    def made() -> list[Any]:
        options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.9, "seed": 2, **PENALTIES}
        prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9], [3, 1]]
        return [x.token_ids for x in Generator(fake.backend()).generate(prompts, **options)]

    host = made()
    fake.sample = on_fake(fake.cuda)
    assert made() == host


def test_four_bytes_a_row_come_back(fake: Fake) -> None:
    fake.sample = on_fake(fake.cuda)
    backend = fake.backend()
    backend.open(3)
    asked = [SamplingParams(temperature=1, seed=1), SamplingParams(logprobs=1), SamplingParams(**PENALTIES)]
    samplers = [Sampler(p, p.generator(0), [4]) for p in asked]
    logits = backend.step_last(np.array([[1, 2], [3, 0], [5, 6]]), np.array([2, 1, 2]))
    assert not isinstance(logits, np.ndarray)
    assert fake.down == []  # type: ignore[attr-defined]
    choices = choose_all(logits, samplers, [[]] * 3)
    assert fake.down == [2 * 4, VOCAB * 4]  # type: ignore[attr-defined]
    assert all(isinstance(c, Choice) for c in choices)
    assert [c.logprobs is None for c in choices if isinstance(c, Choice)] == [True, False, True]
    assert choose_all(logits[[0]], samplers[:1], [[]]) != []
    assert np.asarray(logits).shape == (3, VOCAB)
    backend.step([[1]], [1], slice(0, 1))
    with pytest.raises(BackendError, match="the logits of an earlier step are gone"):
        choose_all(logits, samplers, [[]] * 3)
    logits = backend.step_last(np.array([[1], [2], [3]]), np.ones(3, np.int64))
    backend.open(3)
    with pytest.raises(BackendError, match="the logits of an earlier step are gone"):
        np.asarray(logits)


def test_rows_of_several_tokens(fake: Fake) -> None:
    """The logits after the last token of each row are those that the host takes."""
    ids, new = np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0]]), np.array([3, 1, 2])
    backend = fake.backend()
    backend.open(3)
    host = backend.step_last(ids, new)
    fake.sample = on_fake(fake.cuda)
    device = fake.backend()
    device.open(3)
    kept = device.step_last(ids, new)
    np.testing.assert_array_equal(np.asarray(kept), host)
    np.testing.assert_array_equal(np.asarray(kept[[2, 0]]), np.asarray(host)[[2, 0]])
    np.testing.assert_array_equal(device.step([[1], [2], [3]]), backend.step([[1], [2], [3]]))


def test_parked_rows_have_no_logits_of_others(fake: Fake) -> None:
    """Where parked rows are left out of a step, the others keep their own logits."""
    ids, new = np.array([[1, 2], [3, 0], [4, 5]]), np.array([0, 1, 2])
    backend = fake.backend()
    backend.open(3)
    host = backend.step_last(ids, new)
    fake.sample = on_fake(fake.cuda)
    device = fake.backend()
    device.open(3)
    kept = device.step_last(ids, new)
    np.testing.assert_array_equal(np.asarray(kept)[new > 0], np.asarray(host)[new > 0])
    assert np.isfinite(np.asarray(kept)).all()
    assert np.isfinite(np.asarray(device.step_last(ids, np.zeros(3, np.int64)))).all()


def drawn_on(fake: Fake, logits: np.ndarray, fails: Callable[[], int] = lambda: 0) -> KeptLogits:
    """Logits on the device of the fake, with a sampler for as many rows."""
    backend = fake.backend()
    device = DeviceSampler(backend._device, on_fake(fake.cuda, fails), logits.shape[1], len(logits))
    address = backend._device.allocate(logits.nbytes)
    backend._device.upload(address, logits)
    return device.after_step(address, np.arange(len(logits)))


def test_what_is_no_number_is_said_as_the_host_says_it(fake: Fake) -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 3], logits[1] = np.nan, -np.inf
    logits[2, 9] = 1
    params = [SamplingParams(**PENALTIES), SamplingParams(temperature=1), SamplingParams()]
    got, want = (
        choose_all(x, [Sampler(p, p.generator(0)) for p in params], [[]] * 3) for x in (drawn_on(fake, logits), logits)
    )
    assert [(type(x), str(x)) for x in got] == [(type(x), str(x)) for x in want]
    assert isinstance(got[0], BackendError)
    assert got[2] == Choice(9)


def test_a_failed_launch_ends_the_sequences(fake: Fake) -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    kept = drawn_on(fake, logits, lambda: 98)
    results = choose_all(kept, [Sampler(SamplingParams(), np.random.default_rng(0)) for _ in range(2)], [[]] * 2)
    assert [str(r) for r in results] == ["the sampler cannot be launched on the GPU (CUDA error 98)"] * 2
    fake.sample = on_fake(fake.cuda, lambda: 98)
    backend = fake.backend()
    factory, scheduler = SequenceFactory(backend), Scheduler(backend)
    scheduler.submit(factory.sequence([1, 2], factory.params(None, {})))
    events: list[Event] = scheduler.step()
    assert [type(e.error) for e in events] == [BackendError]
    assert not scheduler.busy


def test_histories_follow_the_sequences(fake: Fake) -> None:
    """More sequences than histories, which take turns; the host chooses for one of them now and then."""
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=1.0, seed=1, **PENALTIES)
    ours, theirs = ([Sampler(params, params.generator(i), [i, 7]) for i in range(6)] for _ in range(2))
    backend = fake.backend()
    device = DeviceSampler(backend._device, on_fake(fake.cuda), VOCAB, 2)
    address = backend._device.allocate(2 * VOCAB * 4)
    for step in range(40):
        logits = (rng.standard_normal((2, VOCAB)) * 2).astype(np.float32)
        turn = [int(i) for i in rng.choice(6, 2, replace=False)]
        backend._device.upload(address, logits)
        kept = device.after_step(address, np.arange(2))
        got = choose_all(logits if step % 7 == 3 else kept, [ours[i] for i in turn], [[]] * 2)
        assert got == choose_all(logits, [theirs[i] for i in turn], [[]] * 2)
    assert sum(s.count for s in ours) == 80
    assert int(history_of(ours[0], VOCAB)[7]) >= native.PROMPT


def test_without_memory_for_histories_the_host_chooses(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    logits = np.random.default_rng(4).standard_normal((2, VOCAB)).astype(np.float32)
    params = SamplingParams(temperature=1.0, seed=1, **PENALTIES)
    kept = drawn_on(fake, logits)
    fake.cuda.room = 100
    ours, theirs = ([Sampler(params, params.generator(i), [4]) for i in range(2)] for _ in range(2))
    for _ in range(2):
        assert choose_all(kept, ours, [[]] * 2) == choose_all(logits, theirs, [[]] * 2)
    (message,) = caplog.messages
    assert message.startswith("no memory for penalties on the GPU, so the host applies them: cudaMalloc failed")


def test_the_row_of_python_is_that_of_c() -> None:
    header = (sample_emulation.PLUGIN / "sampler/sample.h").read_text()
    body = header[header.index("struct LessSampleRow {") :].split("};")[0]
    kinds = {"double": np.float64, "int32_t": np.int32, "float": np.float32}
    fields = []
    for line in body.splitlines()[1:]:
        kind, names = line.split(";")[0].split(None, 1) if ";" in line else ("", "")
        fields += [(n.strip(), np.dtype(kinds[kind])) for n in names.split(",") if kind]
    snake = {"topP": "top_p", "minP": "min_p", "topK": "top_k"}
    assert [(snake.get(n, n), k) for n, k in fields] == [(n, native.ROW.fields[n][0]) for n in native.ROW.names or ()]  # type: ignore[index]
    for name, value in (("kLessSampleInterface", "1"), ("kLessNoChoice", str(native.NO_CHOICE))):
        assert f"{name} = {value};" in header
    assert f"kLessPrompt = {native.PROMPT:#x}u;" in header
    assert native.MAX_VOCAB == 1 << 19
    assert "kLessMaxVocab = 1 << 19;" in header
