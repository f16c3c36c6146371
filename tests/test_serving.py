"""The server, through OpenAI's own client: completions, chats, tokens and metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest

from less_export import __version__

from .serving_support import MODEL, PROMPT, Endpoint, Served, ids, serving, text_of
from .test_generate import HashBackend, contract, expected

pytest_plugins = ["tests.serving_support"]


# ------------------------------------------------------------------ completions and chats


def test_an_answer_and_its_usage(ask: Endpoint) -> None:
    reply, prompt = ask(), ask.prompt_ids()
    (choice,) = reply.choices
    assert (ask.text(choice), choice.finish_reason, choice.index) == (text_of(ask.served, prompt, 8), "length", 0)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 8)
    assert reply.usage.total_tokens == len(prompt) + 8


#: Lists of log probabilities in a completion and in a chat.
LOGPROBS = (("tokens", "token_logprobs", "top_logprobs", "text_offset"), ("content",))


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "temperature": 1.5, "seed": 3}, {"stop": "w"}, {"logprobs": 2}], ids=str
)
def test_streamed_equals_unstreamed(options: dict[str, Any], ask: Endpoint) -> None:
    if ask.chat and "logprobs" in options:
        options = {"logprobs": True, "top_logprobs": 2}
    whole = ask(max_tokens=20, **options)
    chunks = list(ask(max_tokens=20, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(map(ask.text, parts)) == ask.text(choice)
        assert [p.finish_reason for p in parts if p.finish_reason] == [choice.finish_reason]
        assert (choice.logprobs is not None) == ("logprobs" in options)
        for name in () if not choice.logprobs else LOGPROBS[ask.chat]:
            joined = [x for p in parts if p.logprobs for x in getattr(p.logprobs, name)]
            assert joined == getattr(choice.logprobs, name) != [], name
    assert len({c.id for c in chunks}) == 1
    without = list(ask(max_tokens=20, stream=True, **options))
    assert all(c.usage is None and c.choices for c in without)


def test_n(ask: Endpoint) -> None:
    """The choices of one prompt, which is counted once."""
    reply = ask(n=3, max_tokens=5)
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert {ask.text(c) for c in reply.choices} == {text_of(ask.served, ask.prompt_ids(), 5)}
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ask.prompt_ids()), 15)
    assert reply.usage.total_tokens == len(ask.prompt_ids()) + 15


def test_seed(ask: Endpoint) -> None:
    texts = [[ask.text(c) for c in ask(max_tokens=20, temperature=1.5, seed=s, n=2).choices] for s in (1, 1, 2, -5)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] != texts[3]
    assert texts[0][0] != texts[0][1]  # two choices are two samples


def test_stop(ask: Endpoint) -> None:
    text = ask.text(ask(max_tokens=20).choices[0])
    stop = text[3:5]
    (choice,) = ask(max_tokens=20, stop=["@", stop]).choices
    assert (ask.text(choice), choice.finish_reason) == (text[: text.index(stop)], "stop")
    third = expected(ask.prompt_ids(), 3)[2]
    (choice,) = ask(max_tokens=20, extra={"stop_token_ids": [third]}).choices
    assert choice.finish_reason == "stop"
    assert ask.text(choice) == text_of(ask.served, ask.prompt_ids(), 2)


# ------------------------------------------------------------------ completions


def test_completion(served: Served, complete: Endpoint) -> None:
    reply = complete()
    prompt = ids(served, PROMPT)
    assert (reply.object, reply.model) == ("text_completion", MODEL)
    assert complete(prompt).choices[0].text == reply.choices[0].text  # the same as token ids


def test_prompt_lists_and_n(served: Served, complete: Endpoint) -> None:
    reply = complete(["ab", "cde"], n=2, max_tokens=5)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    want = [text_of(served, ids(served, p), 5) for p in ("ab", "cde")]
    assert [c.text for c in reply.choices] == [want[0], want[0], want[1], want[1]]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3 + 4, 20)
    reply = complete([[1, 2], [3]], max_tokens=5)
    assert [c.text for c in reply.choices] == [text_of(served, p, 5) for p in ([1, 2], [3])]


def test_sampling_options_reach_the_sampler(served: Served, complete: Endpoint) -> None:
    first = expected(ids(served, PROMPT), 1)[0]
    plain = complete(max_tokens=1).choices[0].text
    assert complete(max_tokens=1, logit_bias={str(first): -100}).choices[0].text != plain
    assert complete(max_tokens=1, temperature=2, extra={"top_k": 1}).choices[0].text == plain
    assert complete(max_tokens=1, temperature=2, extra={"min_p": 1.0}).choices[0].text == plain
    only_texts = {str(i): -100 for i in range(33, 40)}
    tokens = (
        complete(
            max_tokens=12, frequency_penalty=2.0, logit_bias=only_texts, logprobs=0, extra={"repetition_penalty": 50.0}
        )
        .choices[0]
        .logprobs.tokens
    )
    assert len(set(tokens)) == 12  # nothing is repeated


def test_log_probabilities(served: Served, complete: Endpoint) -> None:
    report = complete(max_tokens=4, logprobs=3).choices[0].logprobs
    assert [len(top) for top in report.top_logprobs] == [3] * 4
    for text, logprob, top in zip(report.tokens, report.token_logprobs, report.top_logprobs, strict=True):
        assert max(top.values()) == top[text] == logprob  # greedy
    chat = served.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=4, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert bytes(entry.bytes).decode() == entry.token


def test_impossible_tokens_in_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no infinity."""
    backend = HashBackend(contract())
    step = backend._step

    def forbidding(*inputs: Any) -> Any:
        logits = step(*inputs)
        logits[..., 2:] = -np.inf
        return logits

    monkeypatch.setattr(backend, "_step", forbidding)
    with serving(backend) as served:
        for stream in (False, True):
            reply = served.client.completions.create(
                model=MODEL, prompt="a", max_tokens=1, logprobs=3, temperature=0, stream=stream
            )
            (choice,) = (next(iter(reply)) if stream else reply).choices
            assert sorted(choice.logprobs.top_logprobs[0].values())[0] == -9999.0


# ------------------------------------------------------------------ chats


def test_chat(served: Served) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "yz"}]}]
    options = {"model": MODEL, "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    reply = served.client.chat.completions.create(max_completion_tokens=6, **options)
    prompt = served.tokenizer.encode("<s>sx.uyz.a", special=False)
    assert reply.choices[0].message.content == text_of(served, prompt, 6)
    assert (reply.choices[0].message.role, reply.object) == ("assistant", "chat.completion")
    assert reply.usage.prompt_tokens == len(prompt)
    chunks = list(served.client.chat.completions.create(max_completion_tokens=6, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert served.client.chat.completions.create(**options).usage.completion_tokens == 60  # --max-new-tokens


def test_tools_reach_the_template(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    options = {"model": MODEL, "messages": [{"role": "user", "content": "b"}], "temperature": 0, "max_tokens": 3}
    for choice, prompt in (("auto", "<s>ub.za"), ("none", "<s>ub.a")):
        reply = served.client.chat.completions.create(
            tools=[tool], tool_choice=choice, extra_body={"ignore_eos": True}, **options
        )
        want = text_of(served, served.tokenizer.encode(prompt, special=False), 3)
        assert reply.choices[0].message.content == want


# ------------------------------------------------------------------ tokens and facts


def test_tokens_and_facts(served: Served) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return served.http("POST", path, body)[1]

    assert post("/tokenize", {"prompt": "abc"})["tokens"] == [26, 0, 1, 2]
    assert post("/tokenize", {"prompt": "abc", "add_special_tokens": False})["count"] == 3
    chat = post("/tokenize", {"messages": [{"role": "user", "content": "b"}]})
    assert chat["tokens"] == served.tokenizer.encode("<s>ub.a", special=False)
    assert post("/detokenize", {"tokens": [0, 1, 2]}) == {"prompt": "abc"}
    assert [m.id for m in served.client.models.list()] == [MODEL]
    assert served.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'a/b' does not exist"):
        served.client.models.retrieve("a/b")
    assert post("/tokenize", {"messages": []})["error"]["param"] == "messages"
    assert served.http("GET", "/version") == (200, {"version": __version__})


def test_metrics(complete: Endpoint, served: Served) -> None:
    def read() -> dict[str, float]:
        answer = served.raw(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").decode()
        lines = [line.rpartition(" ") for line in answer.splitlines() if line.startswith("less_")]
        return {name: float(value) for name, _, value in lines}

    before = read()
    complete(max_tokens=7, n=2)
    after = read()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["less_prompt_tokens_total"] == 6  # fed once, for both choices
    assert change["less_generated_tokens_total"] == 14
    assert change["less_time_to_first_token_seconds_count"] == 2
    assert change["less_time_between_tokens_seconds_count"] == 12
    assert change['less_requests_total{path="/v1/completions",status="200"}'] == 1
    assert change['less_sequences_total{outcome="finished_length"}'] == 2
    assert (after["less_rows"], after["less_rows_running"], after["less_queue_waiting"]) == (3, 0, 0)
    assert after["less_state_bytes"] == 3 * contract().state_bytes()
