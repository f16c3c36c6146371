"""Prompts, parameters and stop strings of all types: they work, or are refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from less_export.errors import UsageError
from less_export.runtime.generate import Generator
from less_export.runtime.sampling import SamplingParams

from .test_generate import HashBackend, collect, contract, expected, ids, letter_tokenizer, scripted

# ------------------------------------------------------------------ special tokens as stop strings


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "reason", "count"),
    [
        (["x", "<s>", "y"], "<s>", "x", "stop", 2),
        (["x", "<s>", "y"], ("q", "<s>y"), "x", "stop", 3),
        (["x", "<s>", "z"], ("<s>y",), "xz", "eos", 4),
        (["x", "y", "<s>", "z"], ("y<s>z",), "x", "stop", 4),
        (["x", "y", "<s>", "q"], ("y<s>z",), "xyq", "eos", 5),
        (["a", "<s>", "b"], ("ab",), "", "stop", 3),  # the text itself is searched as well
        (["a", "<s>", "b", "c"], ("bc", "ab"), "", "stop", 3),
        (["a", "b", "<s>"], ("b<s>", "ab"), "", "stop", 2),
        (["x", "<s>"], ("s>",), "x", "stop", 2),
        (["x", "<s>"], ("x<",), "", "stop", 2),
    ],
)
def test_special_tokens_in_stop_strings(tokens: list[str], stop: object, text: str, reason: str, count: int) -> None:
    vocabulary = {letter_tokenizer()._tokenizer.id_to_token(i): i for i in range(33)}
    generator = scripted([vocabulary[t] for t in tokens])
    (result,) = generator.generate([[0]], stop=stop)
    assert (result.text, result.finish_reason, len(result.token_ids)) == (text, reason, count)
    streamed = collect(list(generator.stream([[0]], stop=stop)))
    assert (streamed.text, streamed.token_ids, streamed.finish_reason) == (text, result.token_ids, reason)


def test_eos_as_a_stop_string() -> None:
    (result,) = scripted([*ids("hi"), 27, *ids("no")]).generate([[0]], stop="</s>", ignore_eos=True)
    assert (result.text, result.finish_reason, result.token_ids) == ("hi", "stop", (*ids("hi"), 27))


# ------------------------------------------------------------------ values of other types


class Index:
    """A whole number of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


WANT = [expected([1, 2, 3], 4), expected([7, 8, 9], 4)]


@pytest.mark.parametrize(
    "prompts",
    [
        lambda: (p for p in [[1, 2, 3], [7, 8, 9]]),
        lambda: ([1, 2, 3], (7, 8, 9)),
        lambda: iter([iter([1, 2, 3]), range(7, 10)]),
        lambda: np.array([[1, 2, 3], [7, 8, 9]], np.uint8),
        lambda: [np.array([1, 2, 3]), np.arange(7, 10, dtype=np.int16)],
        lambda: [list(np.array([1, 2, 3])), [Index(7), np.uint64(8), 9]],
        lambda: np.array([[1, 2, 3], [7, 8, 9]], object),
        lambda: {"a": [1, 2, 3], "b": [7, 8, 9]}.values(),
    ],
)
def test_prompts_of_other_types(prompts: object) -> None:
    generator = Generator(HashBackend(contract()))
    assert [r.token_ids for r in generator.generate(prompts(), max_new_tokens=4)] == WANT
    assert len(list(generator.stream(prompts(), max_new_tokens=4))) == 8
    for prompt in list(prompts()):
        assert generator.prefill(prompt).length == 3


def test_prompts_that_are_tensors() -> None:
    torch = pytest.importorskip("torch")
    generator = Generator(HashBackend(contract()))
    for prompts in (torch.tensor([[1, 2, 3], [7, 8, 9]]), [torch.tensor([1, 2, 3]), [torch.tensor(7), 8, 9]]):
        assert [r.token_ids for r in generator.generate(prompts, max_new_tokens=4)] == WANT
    with pytest.raises(UsageError, match="whole numbers"):
        generator.generate([torch.tensor([1.0])])


def test_texts_in_arrays() -> None:
    generator = Generator(HashBackend(contract()), letter_tokenizer())
    want = generator.generate(["ab", "cd"], max_new_tokens=3)
    assert generator.generate(np.array(["ab", "cd"]), max_new_tokens=3) == want
    assert generator.generate((p for p in ("ab", "cd")), max_new_tokens=3) == want


@pytest.mark.parametrize(
    "prompts",
    [None, 5, 1.5, b"ab", {"a": [1]}, {1}, np.array([1, 2]), np.array(3), [1, 2], [np.int64(1)], Index(1), "text"],
)
def test_what_is_no_list_of_prompts(prompts: object) -> None:
    refused(lambda g: g.generate(prompts), "prompts must be a list of prompts")


@pytest.mark.parametrize(
    "prompt", [None, 1.5, b"ab", {1: 2}, {1}, [True], [[1]], [None], np.array(3), [1.0], ["1"], Index(1)]
)
def test_what_is_no_prompt(prompt: object) -> None:
    refused(lambda g: g.generate([prompt]), "a prompt must be a string or a list of token ids")
    refused(lambda g: g.prefill(prompt), "a prompt must be a string or a list of token ids")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop": 5}, "stop must be a string or a list of strings, not int"),
        ({"stop": b"x"}, "stop must be a string or a list of strings, not bytes"),
        ({"stop": {"a": 1}}, "stop must be a string or a list of strings, not dict"),
        ({"stop": True}, "stop must be a string or a list of strings, not bool"),
        ({"stop": [5]}, "stop strings must be strings"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, not no"),
        ({"ignore_eos": None}, "ignore_eos must be True or False"),
        ({"temperature": "hot\n\x1b[31m" * 99}, "temperature must be"),
        ({"temperature": [1]}, "temperature must be"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"top_k": "3"}, "top_k must be"),
        ({"seed": 1.0}, "seed must be"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be"),
        ({"max_new_tokens": 5.0}, "max_new_tokens must be"),
        ({"x\n": 5}, "unknown sampling option"),
        ({"params": {"temperature": 1}}, "params must be SamplingParams, not dict"),
        ({"params": 3}, "params must be SamplingParams, not int"),
        ({"prefix": "state.safetensors"}, "prefix must be a RowState, not str"),
    ],
)
def test_options_of_other_types(options: dict, match: str) -> None:
    refused(lambda g: g.generate([[1]], **options), match)


def refused(call: Callable[[Generator], object], match: str) -> None:
    """One line, before anything runs."""
    backend = HashBackend(contract())
    with pytest.raises(UsageError, match=match) as caught:
        call(Generator(backend, letter_tokenizer()))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert backend.calls == backend.opened == []


def test_eos_ids_of_other_types() -> None:
    assert Generator(HashBackend(contract()), eos_ids=np.array([3, 4])).eos_ids == {3, 4}
    assert Generator(HashBackend(contract()), eos_ids=iter([3])).eos_ids == {3}
    for bad in (5, "5", [1.5], ["x"]):
        with pytest.raises(UsageError, match="eos_ids must be a list of token ids"):
            Generator(HashBackend(contract()), eos_ids=bad)
    assert SamplingParams(stop=(s for s in "ab")).stop == ("a", "b")
    assert SamplingParams(stop=None, ignore_eos=np.bool_(True)).stop == ()
