"""Answers of a given form, on a tiny model with random weights: what it would say of itself has no form at all."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import openai
import pydantic
import pytest

from less_export import open_bundle
from less_export.errors import UsageError
from less_export.runtime import structured
from less_export.runtime.sampling import SamplingParams
from less_export.runtime.structured import Grammars
from less_export.runtime.tokenizer import Tokenizer

from .bundles import tokenizer
from .serving_support import MODEL, Served, letter_tokenizer, serving
from .test_generate import HashBackend, contract

pytest_plugins = ["tests.bundles"]
EOS, VOCAB = 1, 310


class Cat(pydantic.BaseModel):
    """Every field has an end, so that random weights reach it."""

    name: Annotated[str, pydantic.Field(max_length=4)]
    age: Annotated[int, pydantic.Field(ge=0, le=30)]
    colour: Literal["black", "wh\u00efte", 'sp"otted']
    friends: Annotated[list[bool | None], pydantic.Field(max_length=3)]


SCHEMA = {**Cat.model_json_schema(), "additionalProperties": False}


@pytest.fixture(scope="module")
def text() -> Tokenizer:
    return Tokenizer(tokenizer().backend_tokenizer, bos_id=0, eos_ids=(EOS,))


@pytest.fixture(scope="module")
def grammars(text: Tokenizer) -> Grammars:
    return Grammars(text, VOCAB, [EOS])


@pytest.fixture(scope="module")
def served(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = open_bundle(plain)
    folder = tmp_path_factory.mktemp("sessions")
    with serving(model.backend, tokenizer=model.tokenizer, state_dir=folder) as server:  # type: ignore[arg-type]
        yield server


@pytest.fixture
def ask(served: Served) -> Callable[..., Any]:
    """A completion; ``form`` holds what its text must be."""

    def call(form: dict[str, Any], **options: Any) -> Any:
        defaults = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 300, "seed": 5}
        return served.client.completions.create(**{**defaults, **options}, extra_body=form)

    return call


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


# ------------------------------------------------------------------ what may come next


def test_tokens_that_may_come_next_are_those_of_some_text(grammars: Grammars, text: Tokenizer) -> None:
    """Against all texts of a small language, over all tokens, along every way that a walk takes."""
    pattern = "(ab|the|a\u00efb){1,2}c?"
    parts = ["".join(p) for n in (1, 2) for p in itertools.product(("ab", "the", "a\u00efb"), repeat=n)]
    language = {(p + end).encode() for p in parts for end in ("", "c")}
    bytes_of = {text.decode([i]).encode(): i for i in range(2, text.vocab_size) if "\ufffd" not in text.decode([i])}
    rng = np.random.default_rng(0)
    for _ in range(6):
        processor, said, ids = grammars.regex(pattern).start(), b"", []
        while True:
            logits = np.zeros(VOCAB, np.float32)
            processor(ids, logits)
            allowed = set(np.flatnonzero(np.isfinite(logits)).tolist())
            assert (EOS in allowed) == (said in language)
            rests = [t[len(said) :] for t in language if t.startswith(said)]
            fitting = {i for b, i in bytes_of.items() if any(r.startswith(b) for r in rests)}
            assert allowed & set(bytes_of.values()) <= fitting, said
            if len({r[:1] for r in rests}) > 1:  # what is certain may have one token only
                assert fitting <= allowed, said
            whole = [(b, i) for b, i in bytes_of.items() if i in allowed]  # no part of a character
            if EOS in allowed and (not whole or rng.random() < 0.3):
                break
            token_bytes, token = whole[rng.integers(len(whole))]
            said += token_bytes
            ids.append(token)
            processor.chosen(token)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("unclosed group", lambda g: g.regex("(a")),
        ("look-around", lambda g: g.regex("(?=a)b")),
        ("backreferences", lambda g: g.regex(r"(a)\1")),
        ("no text satisfies", lambda g: g.regex(r"[^\x00-\x{10FFFF}]")),
        ("8,193 characters", lambda g: g.regex("a" * 8193)),
        ("choices is empty", lambda g: g.choice([])),
        ("9,000 characters together", lambda g: g.choice(["a" * 3000, "b" * 6000])),
        ("9,000 choices", lambda g: g.choice([""] * 9000)),
        ("8,193 characters", lambda g: g.lark("a" * 8193)),
        ("unknown name: .*missing", lambda g: g.lark("start: missing")),
        ("circular", lambda g: g.lark('start: A\nA: A "a"')),
        ("no text satisfies", lambda g: g.lark("start: start")),
        ("etc/passwd", lambda g: g.lark('start: %json {"$ref": "file:///etc/passwd"}')),
        ("Invalid type: strnig", lambda g: g.json_schema({"type": "strnig"})),
        ("minimum .5. is greater", lambda g: g.json_schema({"type": "integer", "minimum": 5, "maximum": 3})),
        ("not", lambda g: g.json_schema({"not": {}})),
        ("oneOf", lambda g: g.json_schema({"oneOf": [{"type": "string"}, {"maxLength": 3}]})),
        ("http://example.com", lambda g: g.json_schema({"$ref": "http://example.com/x.json"})),
        ("etc/passwd", lambda g: g.json_schema({"$ref": "file:///etc/passwd"})),
        ("65,536", lambda g: g.json_schema({"enum": ["a" * 70_000]})),
        ("invalid", lambda g: g.json_schema({"const": float("nan")})),
        (
            "too large|too many|limit",
            lambda g: g.json_schema(
                {"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}{j}"} for j in range(10)]} for i in range(9)]}
            ),
        ),
    ],
)
def test_refused(match: str, make: Callable[[Grammars], Any], grammars: Grammars) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        make(grammars)
    assert "\n" not in str(caught.value)


def test_a_schema_cannot_loosen_how_it_is_enforced(grammars: Grammars) -> None:
    schema = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(UsageError, match="not"):
        grammars.json_schema(schema)


def test_a_grammar_that_grows_without_end_ends_its_sequence(grammars: Grammars, text: Tokenizer) -> None:
    """Its automaton has a state for every place of an "a" among the last thirty characters."""
    processor, rng = grammars.regex(".*a.{30}").start(), np.random.default_rng(1)
    ids = [text.encode(c, special=False)[0] for c in "ab"]

    def go_on() -> None:
        for _ in range(5000):
            processor([], np.zeros(VOCAB, np.float32))
            processor.chosen(ids[rng.integers(2)])

    with pytest.raises(UsageError, match=r"cannot go on: .*too many states"):
        go_on()


def test_choices_are_texts_and_nothing_else(grammars: Grammars, text: Tokenizer) -> None:
    """Signs that an expression would read otherwise; each text is reached, and what may follow is that of some text."""
    texts = ["a.c", "abc", "a|b", "(", "\n", "a b", "\u00efb", "x{2}", "^", "\\d"]
    grammar = grammars.choice(texts)
    for wanted in texts:
        processor, said = grammar.start(), []
        for token in [*text.encode(wanted, special=False), EOS]:
            logits = np.zeros(VOCAB, np.float32)
            processor(said, logits)
            assert np.isfinite(logits[token]), (wanted, said)
            assert np.isfinite(logits[EOS]) == (text.decode(said) in texts)
            assert not np.isfinite(logits).all()
            processor.chosen(token)
            said.append(token)


DEEP_FORMS = """
import sys
from less_export.runtime.structured import Grammars
from less_export.runtime.tokenizer import Tokenizer
from tests.bundles import tokenizer

grammars = Grammars(Tokenizer(tokenizer().backend_tokenizer, bos_id=0, eos_ids=(1,)), 310, [1])
names = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(170)]
rules = [f"{a}:{'(' * 20}{b}{')' * 20}" for a, b in zip(names, names[1:])]
grammars.lark("\\n".join(["start:aa", *rules, names[-1] + ':"a"']))
items = {str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(800)}
grammars.json_schema({"$ref": "#/$defs/0", "$defs": {**items, "800": {"type": "null"}}})
"""


def test_deep_forms_do_not_end_the_process() -> None:
    """Near the bounds of their lengths, where the stacks of threads are small."""
    command = ["bash", "-c", 'ulimit -s 1024 && exec "$0" -c "$1"', sys.executable, DEEP_FORMS]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ambiguous_grammar_ends_its_sequence(grammars: Grammars, text: Tokenizer) -> None:
    """The ways to read its texts grow with their length."""
    names = [f"r{i}" for i in range(30)]
    rules = [f"start: ({' | '.join(names)})*", *(f'{name}: "a" start | "a"' for name in names)]
    processor = grammars.lark("\n".join(rules)).start()
    (letter,) = text.encode("a", special=False)

    def go_on() -> None:
        for _ in range(2000):
            processor([], np.zeros(VOCAB, np.float32))
            processor.chosen(letter)

    with pytest.raises(UsageError, match=r"cannot go on: .*[Tt]oo many items"):
        go_on()


def test_missing_package_and_odd_tokenizers(text: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault, options in (("end-of-sequence", (text, VOCAB, [])), ("tokenizer", (letter_tokenizer(), 40, [27]))):
        with pytest.raises(structured.StructuredUnavailableError, match=fault):
            Grammars(*options)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(structured.StructuredUnavailableError, match=r"pip install 'less-export\[structured\]'"):
        Grammars(text, VOCAB, [EOS])


# ------------------------------------------------------------------ in generation


def test_every_sequence_has_a_grammar_of_its_own(plain: Path) -> None:
    """One object in the parameters of many prompts of different lengths."""
    model = open_bundle(plain)
    assert model.tokenizer is not None
    grammar = Grammars(model.tokenizer, model.backend.contract.vocab_size, model.eos_ids).regex("[0-9]{3}-[a-f]{1,4}!")
    params = SamplingParams(temperature=1.0, seed=3, processors=(grammar,))
    results = model.generate(["a cat", "Once upon a time, Alice was", "by"], params)
    assert all(re.fullmatch("[0-9]{3}-[a-f]{1,4}!", r.text) and r.finish_reason == "eos" for r in results), results
    assert len({r.text for r in results}) == 3
    greedy = model.generate(["a cat"], processors=(grammar,), logprobs=0)[0]
    assert re.fullmatch("[0-9]{3}-[a-f]{1,4}!", greedy.text)


# ------------------------------------------------------------------ in the server


def test_json_of_a_schema(ask: Callable[..., Any]) -> None:
    whole = ask(json_schema(SCHEMA), n=3)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        Cat.model_validate_json(choice.text)
        assert list(json.loads(choice.text)) == list(Cat.model_fields)
    assert len({c.text for c in whole.choices}) == 3
    chunks = [c.choices[0] for c in ask(json_schema(SCHEMA), n=3, stream=True)]
    for choice in whole.choices:
        assert "".join(c.text for c in chunks if c.index == choice.index) == choice.text


def test_openais_own_parser(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "Alice has a cat."}]
    reply = served.client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Cat, max_tokens=300, seed=1
    )
    assert isinstance(reply.choices[0].message.parsed, Cat)
    with served.client.chat.completions.stream(
        model=MODEL, messages=messages, response_format=Cat, max_tokens=300, seed=1
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed


def test_json_objects(ask: Callable[..., Any], served: Served) -> None:
    (quote,) = served.tokenizer.encode('"', special=False)
    (brace,) = served.tokenizer.encode("}", special=False)
    bias = {str(quote): 6, str(brace): 9}  # else random weights hardly ever end a string
    reply = ask({"response_format": {"type": "json_object"}}, n=4, logit_bias=bias)
    assert [c.finish_reason for c in reply.choices] == ["stop"] * 4
    assert all(isinstance(json.loads(c.text), dict) for c in reply.choices)
    assert len({c.text for c in reply.choices}) > 1


def test_regex_and_stop_strings(ask: Callable[..., Any]) -> None:
    pattern = r"[a-d]{4}: [0-9]{2,3}"
    text = ask({"guided_regex": pattern}, temperature=0).choices[0].text
    assert re.fullmatch(pattern, text)
    stopped = ask({"guided_regex": pattern}, temperature=0, stop=": ").choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[:4], "stop")
    cut = ask({"guided_regex": pattern}, temperature=0, max_tokens=1).choices[0]
    assert cut.finish_reason == "length"
    assert text.startswith(cut.text)


def test_guided_json(ask: Callable[..., Any], served: Served) -> None:
    """A schema, or its text, as vLLM's clients write it; in chats too."""
    want = ask(json_schema(SCHEMA)).choices[0].text
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        assert ask({"guided_json": schema}).choices[0].text == want
    messages: Any = [{"role": "user", "content": "Alice has a cat."}]
    chat = served.client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=300, seed=1, extra_body={"guided_json": SCHEMA}
    )
    Cat.model_validate_json(chat.choices[0].message.content or "")


def test_guided_choice(ask: Callable[..., Any]) -> None:
    texts = ["yes", "no (really)", "may be", "yes!"]
    choices = ask({"guided_choice": texts}, n=16).choices
    assert {c.finish_reason for c in choices} == {"stop"}
    assert {c.text for c in choices} <= set(texts)
    assert len({c.text for c in choices}) > 1


def test_guided_grammar(ask: Callable[..., Any]) -> None:
    """A language that no regular expression has."""
    grammar = 'start: "(" inner ")" | "[" inner "]"\ninner: start | /[01]/'
    choices = ask({"guided_grammar": grammar}, n=8, temperature=2).choices
    for choice in choices:
        text = choice.text
        assert len(text) > 1
        while len(text) > 1:
            assert text[0] + text[-1] in ("()", "[]"), choice
            text = text[1:-1]
        assert text in ("0", "1")
    assert len({c.text for c in choices}) > 1


def test_sessions(ask: Callable[..., Any]) -> None:
    """The form is that of one answer; the next one has its own, or none."""
    first = ask({"guided_regex": "[xy]{5}", "session_id": "new"})
    assert re.fullmatch("[xy]{5}", first.choices[0].text)
    second = ask({**json_schema(SCHEMA), "session_id": first.session_id}, prompt=" and")
    Cat.model_validate_json(second.choices[0].text)
    third = ask({"session_id": first.session_id}, prompt=".", max_tokens=4)
    assert (third.usage.prompt_tokens, third.usage.completion_tokens) == (1, 4)


def test_others_beside_them_get_what_they_get_alone(ask: Callable[..., Any], served: Served) -> None:
    """Rows of one step, of which one has a grammar."""
    alone = [ask({}, prompt=p, temperature=0, max_tokens=20).choices[0].text for p in ("a cat", "by the bank")]
    mixed = [
        ask({}, prompt=["a cat"], temperature=0, max_tokens=20, stream=True),
        ask(json_schema(SCHEMA), stream=True),
        ask({}, prompt=["by the bank"], temperature=0, max_tokens=20, stream=True),
    ]
    texts = ["".join(c.choices[0].text for c in stream) for stream in mixed]
    assert [texts[0], texts[2]] == alone
    Cat.model_validate_json(texts[1])


@pytest.mark.parametrize(
    ("match", "form"),
    [
        ("unclosed group", {"guided_regex": "(a"}),
        ("Invalid type", json_schema({"type": "strnig"})),
        ("response_format.type", {"response_format": {"type": "grammar"}}),
        ("json_schema belongs", {"response_format": {"type": "json_schema"}}),
        ("json_schema belongs", {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}),
        ("schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("either", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
        ("ignore_eos", {"guided_regex": "a", "ignore_eos": True}),
        ("ignore_eos", {"guided_choice": ["a"], "ignore_eos": True}),
        ("either guided_regex or guided_choice", {"guided_regex": "a", "guided_choice": ["a"]}),
        ("guided_choice", {"guided_choice": []}),
        ("guided_choice", {"guided_choice": "a"}),
        ("guided_json is not JSON", {"guided_json": "{"}),
        ("an object", {"guided_json": "[1]"}),
        ("Invalid type", {"guided_json": {"type": "strnig"}}),
        ("grammar is invalid", {"guided_grammar": "start: x"}),
    ],
)
def test_errors(match: str, form: dict[str, Any], ask: Callable[..., Any]) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=match):
            ask(form, stream=stream)


def test_text_is_no_form(ask: Callable[..., Any]) -> None:
    options = {"temperature": 0, "max_tokens": 12}
    assert ask({"response_format": {"type": "text"}}, **options).choices[0].text == ask({}, **options).choices[0].text


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(HashBackend(contract())) as served:
        status, reply = served.http("POST", "/v1/completions", {"prompt": "a", "guided_regex": "a"})
        assert (status, reply["error"]["code"]) == (501, "structured_output_unavailable")
        assert "pip install 'less-export[structured]'" in reply["error"]["message"]
        assert served.http("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
