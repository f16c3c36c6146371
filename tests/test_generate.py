"""Generation over a backend whose next token is a hash of everything its row has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from less_export.contract import Contract, LayerSpec, Policy
from less_export.errors import BackendError, LessExportError, UsageError
from less_export.runtime.backend import Array, Backend, RowState, State, empty
from less_export.runtime.generate import Generation, Generator, Timing, Token
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.tokenizer import Tokenizer

LAYER = LayerSpec(1, 1, 4, 1.0, Policy.SINK, 1, 3, 0, True, 4, 1)
VOCAB = 40
PRIME = 8191


def contract(**changes: object) -> Contract:
    return Contract(
        **{"layers": (LAYER,), "vocab_size": VOCAB, "dtype": "float32", "chunk": 4, "max_batch": 3, **changes}
    )


def after(hashed: int, token: int) -> int:
    return (hashed * 31 + token + 7) % PRIME


def scores(hashed: int) -> np.ndarray:
    """Logits [V] of a history."""
    return np.random.default_rng(hashed).standard_normal(VOCAB).astype(np.float32)


def expected(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Greedy continuation, by plain recursion over the history."""
    hashed, tokens = 0, list(prompt)
    for token in prompt:
        hashed = after(hashed, token)
    for _ in range(count):
        tokens.append(int(scores(hashed).argmax()))
        hashed = after(hashed, tokens[-1])
    return tuple(tokens[len(prompt) :])


class HashBackend(Backend):
    """The hash is the state (past.0.z), so rows, snapshots and parking are real.

    ``script`` replaces the logits: the token at position n of a sequence is script[n].
    """

    name = "hash"

    def __init__(self, contract: Contract, script: Sequence[int] | None = None) -> None:
        super().__init__(contract)
        self.script = script
        self.state: State = {}
        self.calls: list[tuple[int, list[int]]] = []
        self.opened: list[int] = []

    def _open(self, batch: int) -> None:
        self.opened.append(batch)
        self.state = {s.past.name: empty(s, batch) for s in self.contract.state()}

    def _close(self) -> None:
        self.state = {}

    def _step(self, input_ids: Array, past_length: Array, new_length: Array, rows: Array) -> np.ndarray:
        self.calls.append((input_ids.shape[1], new_length.tolist()))
        every = np.full((*input_ids.shape, VOCAB), 1e6, np.float32)  # padding and parked rows: finite garbage
        hashes = self.state["past.0.z"][rows, 0, 0]
        for row, new in enumerate(new_length):
            hashed = int(hashes[row])
            for t in range(new):
                hashed = after(hashed, int(input_ids[row, t]))
                every[row, t] = scores(hashed)
                if self.script is not None:
                    every[row, t] = np.eye(VOCAB)[self.script[past_length[row] + t + 1]]
            hashes[row] = hashed
        self.state["past.0.z"][rows, 0, 0] = hashes
        if self.contract.logits == "all":
            return every
        return every[np.arange(len(every)), np.maximum(new_length - 1, 0)][:, None]

    def _read_row(self, row: int) -> State:
        return {n: x[row].copy() for n, x in self.state.items()}

    def _write_row(self, row: int, tensors: Mapping[str, Array]) -> None:
        for name, x in self.state.items():
            x[row] = tensors[name]


def letter_tokenizer() -> Tokenizer:
    """One token per character "a".."z", then <s>, </s>, a space and pieces of longer text."""
    names = [*"abcdefghijklmnopqrstuvwxyz", "<s>", "</s>", " ", "ab", "bc", "abc", "."]
    raw = tokenizers.Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, []))
    raw.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(raw, bos_id=26, eos_ids=(27,), add_bos=True)


def ids(text: str) -> list[int]:
    return letter_tokenizer().encode(text, special=False)


PROMPTS = [[1, 2, 3], [5] * 9, [4, 3, 2, 1, 0, 9], [8], [7, 7, 7, 7]]


# ------------------------------------------------------------------ rows and chunks


@pytest.mark.parametrize("logits", ["last", "all"])
def test_ragged_prompts(logits: str) -> None:
    backend = HashBackend(contract(logits=logits))
    results = Generator(backend).generate(PROMPTS[:3], max_new_tokens=5)
    assert [r.token_ids for r in results] == [expected(p, 5) for p in PROMPTS[:3]]
    assert [r.prompt_tokens for r in results] == [3, 9, 6]
    assert all((r.text, r.finish_reason) == ("", "length") for r in results)
    prefill = [(4, [3, 4, 4]), (4, [0, 4, 2]), (1, [0, 1, 0])]
    assert backend.calls == prefill + [(1, [1, 1, 1])] * 4


def test_fixed_chunks_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashBackend, "fixed_chunk", True)
    backend = HashBackend(contract())
    results = Generator(backend).generate([[1, 2, 3], [1, 2, 3, 4, 5]], max_new_tokens=2)
    assert [r.token_ids for r in results] == [expected(p, 2) for p in ([1, 2, 3], [1, 2, 3, 4, 5])]
    assert [width for width, _ in backend.calls] == [4, 1, 1]


def test_more_prompts_than_rows_run_in_groups() -> None:
    backend = HashBackend(contract(max_batch=2))
    generator = Generator(backend)
    results = generator.generate(PROMPTS, max_new_tokens=4)
    assert [r.token_ids for r in results] == [expected(p, 4) for p in PROMPTS]
    assert backend.opened == [2, 1]
    assert [t.row for t in generator.stream(PROMPTS, max_new_tokens=2)] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    assert generator.generate([]) == []


def test_finished_rows_are_parked() -> None:
    first = [expected(p, 6) for p in PROMPTS[:3]]
    eos = first[1][3]
    assert eos not in first[0] + first[2] + first[1][:3]
    backend = HashBackend(contract())
    generator = Generator(backend, eos_ids=[eos])
    results = generator.generate(PROMPTS[:3], max_new_tokens=6)
    assert [r.token_ids for r in results] == [first[0], first[1][:4], first[2]]
    assert [r.finish_reason for r in results] == ["length", "eos", "length"]
    assert [new for width, new in backend.calls[3:]] == [[1, 1, 1]] * 3 + [[1, 0, 1]] * 2
    assert generator.generate(PROMPTS[1:2], max_new_tokens=6, ignore_eos=True)[0].token_ids == first[1]


def test_timing_counts_tokens() -> None:
    generator = Generator(HashBackend(contract()))
    assert (generator.timing.prefill_rate, generator.timing.decode_rate) == (0, 0)
    generator.generate(PROMPTS, max_new_tokens=4)
    timing = generator.timing
    assert (timing.prefill_tokens, timing.decode_tokens) == (sum(map(len, PROMPTS)), 3 * len(PROMPTS))
    assert timing.prefill_rate > 0
    assert timing.decode_rate > 0
    assert Timing(2.0, 10, 4.0, 8).decode_rate == 2.0


# ------------------------------------------------------------------ prefixes


def test_a_prefix_is_prefilled_once(tmp_path: Path) -> None:
    backend = HashBackend(contract())
    generator, prefix = Generator(backend), [3, 1, 4, 1, 5, 9]
    state = generator.prefill(prefix)
    assert state.length == 6
    want = [expected(prefix + p, 5) for p in PROMPTS]
    backend.calls.clear()
    results = generator.generate(PROMPTS, prefix=state, max_new_tokens=5)
    assert [r.token_ids for r in results] == want
    assert [r.prompt_tokens for r in results] == [len(p) for p in PROMPTS]
    assert sum(sum(new) for _, new in backend.calls) == sum(map(len, PROMPTS)) + 4 * len(PROMPTS)
    # Again, from a file, in another process's backend, and through a second prefix.
    state.save(tmp_path / "state.safetensors")
    loaded = RowState.load(tmp_path / "state.safetensors")
    other = Generator(HashBackend(contract()))
    assert [r.token_ids for r in other.generate(PROMPTS, prefix=loaded, max_new_tokens=5)] == want
    longer = other.prefill([2, 6], prefix=loaded)
    assert longer.length == 8
    assert other.generate([[5]], prefix=longer, max_new_tokens=5)[0].token_ids == expected([*prefix, 2, 6, 5], 5)


def test_a_run_without_prefix_forgets_the_one_before() -> None:
    generator = Generator(HashBackend(contract()))
    generator.generate([[1]], prefix=generator.prefill([9, 9]), max_new_tokens=2)
    assert generator.generate([[1]], max_new_tokens=4)[0].token_ids == expected([1], 4)
    assert generator.prefill([1, 2]).tensors["past.0.z"].item() == after(after(0, 1), 2)


def test_text_after_a_prefix_has_no_bos() -> None:
    generator = Generator(HashBackend(contract()), letter_tokenizer())
    prefix = generator.prefill("abc")  # <s> a b c
    assert prefix.length == 4
    whole = generator.generate(["abcde"], max_new_tokens=5)[0]
    continued = generator.generate(["de"], prefix=prefix, max_new_tokens=5)[0]
    assert (continued.token_ids, continued.prompt_tokens) == (whole.token_ids, 2)
    assert whole.token_ids == expected([26, 0, 1, 2, 3, 4], 5)


def test_foreign_and_damaged_states_are_refused(tmp_path: Path) -> None:
    generator = Generator(HashBackend(contract()))
    foreign = RowState(3, {"past.0.key": np.zeros((1, 4, 4), np.float32)})
    for call in (generator.stream, generator.prefill):
        with pytest.raises(BackendError, match="belongs to another export"):
            call([[1]] if call == generator.stream else [1], prefix=foreign)
    good = generator.prefill([1])
    with pytest.raises(BackendError, match="damaged"):
        generator.stream([[1]], prefix=RowState(-1, good.tensors))
    (tmp_path / "bad").write_bytes(b"no state")
    with pytest.raises(BackendError, match="cannot read the saved state"):
        RowState.load(tmp_path / "bad")


# ------------------------------------------------------------------ streaming and stop strings


def collect(tokens: list[Token]) -> Generation:
    return Generation(tuple(t.token_id for t in tokens), "".join(t.text for t in tokens), tokens[-1].finish_reason, 0)


def scripted(text_ids: Sequence[int], prompt: int = 1) -> Generator:
    return Generator(HashBackend(contract(), [0] * prompt + list(text_ids) + [27] * 99), letter_tokenizer())


def test_stream_is_generate() -> None:
    generator = Generator(HashBackend(contract(max_batch=2)), letter_tokenizer())
    tokens = list(generator.stream(PROMPTS, max_new_tokens=7, ignore_eos=True))
    for row, want in enumerate(generator.generate(PROMPTS, max_new_tokens=7, ignore_eos=True)):
        of_row = [t for t in tokens if t.row == row]
        got = collect(of_row)
        assert (got.token_ids, got.text, got.finish_reason) == (want.token_ids, want.text, want.finish_reason)
        assert [t.finish_reason for t in of_row[:-1]] == [None] * 6
        assert got.text == letter_tokenizer().decode(got.token_ids)


def test_eos_ends_the_text() -> None:
    (result,) = scripted([*ids("hi"), 27, *ids("no")]).generate([[0]])
    assert (result.text, result.finish_reason, result.token_ids) == ("hi", "eos", (*ids("hi"), 27))


@pytest.mark.parametrize(
    ("tokens", "stop", "texts", "reason"),
    [
        ("xabcy", "abc", ["x", "", "", ""], "stop"),
        ("xabdy", "abc", ["x", "", "", "abd", "y", ""], "eos"),
        ("aab.", ("ab.",), ["", "a", "", ""], "stop"),
        ("xab", ("abc",), ["x", "", "", "ab"], "eos"),  # text that was held back comes at the end
        ("abcd", ("bcd", "c"), ["a", "", "b"], "stop"),  # the one that is complete first
        (["abc", "x"], ("bcx", "b"), ["a"], "stop"),
        (["a", "bc", "."], ("c.",), ["a", "b", ""], "stop"),
    ],
)
def test_stop_strings_span_tokens(tokens: Sequence[str], stop: object, texts: list[str], reason: str) -> None:
    vocabulary = {letter_tokenizer().decode([i]): i for i in range(33)}
    generator = scripted([vocabulary[t] for t in tokens])
    out = list(generator.stream([[0]], stop=stop))
    assert [t.text for t in out] == texts
    assert out[-1].finish_reason == reason


def test_held_text_comes_out_at_the_length_limit() -> None:
    (result,) = scripted(ids("xabab")).generate([[0]], stop=("abc", "q"), max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("xab", "length")
    (result,) = scripted(ids("xabab")).generate([[0]], stop="ab", max_new_tokens=3)
    assert (result.text, result.finish_reason) == ("x", "stop")


def test_a_second_run_ends_the_first() -> None:
    generator = Generator(HashBackend(contract(max_batch=1)))
    for taken in (2, 3):  # inside a group, and between two
        stream = generator.stream([[1], [2]], max_new_tokens=3)
        for _ in range(taken):
            next(stream)
        assert generator.generate([[3]], max_new_tokens=2)[0].token_ids == expected([3], 2)
        with pytest.raises(UsageError, match="another run"):
            next(stream)


# ------------------------------------------------------------------ sampling in a batch


def test_a_seeded_row_does_not_depend_on_its_mates() -> None:
    generator = Generator(HashBackend(contract()))
    params = SamplingParams(temperature=1.5, seed=11, max_new_tokens=20)
    batch = generator.generate([[1, 2], [1, 2], [9]], params)
    assert generator.generate([[1, 2]], params)[0] == batch[0]
    assert generator.generate([[6] * 9, [1, 2]], params)[1] == batch[1]
    assert batch[0].token_ids != batch[1].token_ids  # the same prompt twice gives two samples
    assert generator.generate([[1, 2]], params, seed=12)[0] != batch[0]
    unseeded = [generator.generate([[1, 2]], params, seed=None)[0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([[]], {}, "empty: give it at least one token"),
        ([[1], []], {"prefix": True}, "continuation is empty"),
        (["text"], {}, "need a tokenizer"),
        ("text", {}, "list of prompts"),
        ([1, 2], {}, "list of prompts"),
        ([[1, 2.5]], {}, "whole numbers"),
        ([["a"]], {}, "whole numbers"),
        ([None], {}, "whole numbers"),
        ([[1], [VOCAB]], {}, "0..39"),
        ([[-1]], {}, "0..39"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"temprature": 1}, "unknown sampling option 'temprature'"),
        ([[1] * 12], {}, "12 tokens and its new tokens do not fit into the 12"),
        ([[1] * 8], {"prefix": True}, "12 tokens and its new tokens"),
    ],
)
def test_refusals_before_anything_runs(prompts: object, options: dict, match: str) -> None:
    backend = HashBackend(contract(position_limit=12))
    generator = Generator(backend)
    if options.get("prefix"):
        options = {**options, "prefix": generator.prefill([1, 2, 3, 4])}
    backend.calls.clear()
    for call in (generator.generate, generator.stream):
        with pytest.raises(UsageError, match=match) as caught:
            call(prompts, **options)
        assert "\n" not in str(caught.value)
    assert backend.calls == []


def test_generation_ends_at_the_longest_sequence() -> None:
    backend = HashBackend(contract(position_limit=12))
    results = Generator(backend).generate([[1] * 11, [2] * 5], max_new_tokens=50)
    assert [r.token_ids for r in results] == [expected([1] * 11, 1), expected([2] * 5, 7)]
    assert [r.finish_reason for r in results] == ["length", "length"]


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(LessExportError, match="empty"):
        Generator(HashBackend(contract()), letter_tokenizer()).generate([""])
