"""Chat templates: those that models ship render as transformers renders them, hostile ones are stopped."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from less_export.errors import BundleError, LessExportError, UsageError
from less_export.runtime import template_budget, template_syntax
from less_export.runtime.chat_template import ChatTemplate

from .chat_templates import CONVERSATIONS, SNIPPETS, TEMPLATES, TOOLS
from .hostile_templates import HOSTILE

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Sequence[Any] = HI, **variables: Any) -> str:
    return ChatTemplate(source).render(messages, **variables)


# ------------------------------------------------------------------ as transformers


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' tokenizer, whose template is given at the call."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def outcome(call: Any) -> str:
    """What a rendering gives: its text, or that it is refused."""
    try:
        return str(call())
    except Exception as error:
        return f"refused: {str(error).rpartition(': ')[2]}"


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(
    name: str, conversation: str, prompt: bool, tools: list[Any] | None, theirs: Any
) -> None:
    messages, source = CONVERSATIONS[conversation], TEMPLATES[name]
    options = {"tools": tools, "add_generation_prompt": prompt, "date_string": "1 Jan 2026", "enable_thinking": False}
    want = outcome(lambda: theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options))
    got = outcome(lambda: render(source, messages, documents=None, **theirs.special_tokens_map, **options))
    assert got == want
    assert tools is None or "refused" in want or len(want) > 40


@pytest.mark.parametrize("source", SNIPPETS)
def test_constructs_render_as_in_transformers(source: str, theirs: Any) -> None:
    want = theirs.apply_chat_template(HI, chat_template=source, tokenize=False)
    assert render(source, documents=None, tools=None, **theirs.special_tokens_map) == want


def test_messages_of_other_types(theirs: Any) -> None:
    @dataclasses.dataclass
    class Message:
        role: str
        content: Any

    source = "{{ messages }}{{ extra }}{{ extra.x is defined }}"
    messages: list[Any] = [Message("user", "a"), {"role": "x", "content": None, "n": np.int64(3), "b": np.bool_(False)}]
    want = "[{'role': 'user', 'content': 'a'}, {'role': 'x', 'n': 3, 'b': False}]"
    assert render(source, messages, extra=threading.Lock()) == want + "<lock>False"
    assert render(source, (m for m in messages), extra=("a", [1.5])) == want + "('a', [1.5])False"
    reasoning = [{"role": "assistant", "content": "a", "thinking": "b"}]
    source = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"
    assert (
        render(source, reasoning) == "bb" == theirs.apply_chat_template(reasoning, None, None, source, tokenize=False)
    )


def test_a_conversation_of_a_million_characters() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} word " * 100} for i in range(1000)]
    for name in ("llama", "qwen", "gemma"):
        text = render(TEMPLATES[name], messages, bos_token="<s>", add_generation_prompt=True)
        assert text.count("999 word") == 100


# ------------------------------------------------------------------ hostile ones


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "MAX_STEPS", 150_000)  # for the test to be quick
    source, why = HOSTILE[name]
    with pytest.raises(UsageError, match="the model's chat template") as caught:
        render(source)
    message = str(caught.value)
    assert why in message or "150,000 steps" in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.exhaustive
def test_each_limit_is_reached_in_little_memory() -> None:
    """With all the steps that there are, in a process of its own."""
    code = (
        "import resource\n"
        "from tests.hostile_templates import HOSTILE\n"
        "from less_export.errors import UsageError\n"
        "from less_export.runtime.chat_template import ChatTemplate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name, (source, why) in HOSTILE.items():\n"
        "    try: print(name, ChatTemplate(source).render([])[:20])\n"
        "    except UsageError as error: assert why in str(error), (name, error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * template_budget.MAX_BYTES


RAISES: dict[str, str] = {
    "{{ messages | length // 0 }}": "integer division or modulo by zero",
    "{{ 2.0 ** 100000 }}": "Numerical result out of range",
    "{{ range(10**9) }}": "Range too big",
    "{{ cycler() }}": "at least one item",
    "{{ none.x.y }}": "None",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ [].__len__() }}": "unsafe",
    "{{ namespace(__html__=1) }}": "cannot begin with an underscore",
    "{% set ns = namespace() %}{% set ns._x = 1 %}": "cannot begin with an underscore",
    "{{ (1).to_bytes(10**9, 'big') }}": "to_bytes cannot be called",
    "{{ 'a'.translate({97: 'b'}) }}": "translate cannot be called",
    "{{ 'a'.encode() }}": "encode cannot be called",
    "{{ {}.fromkeys([1]) }}": "fromkeys cannot be called",
    "{{ cycler.next(1) }}": "cannot be called",
    "{{ open('/etc/passwd') }}": "'open' is undefined",
    "{{ messages() }}": "list cannot be called",
    "{{ 'a' + 1 }}": "can only concatenate str",
    "{{ 'a' < 1 }}": "not supported between",
    "{{ messages | tojson(indent='x', bad=1) }}": "unexpected keyword",
    "{{ raise_exception() }}": "message",
    "{{ raise_exception('a\\nb\\x1b[31mc') }}": "refuses these messages: a b",
    "{{ '\\ud800' | urlencode }}": "surrogates not allowed",
    "{{ '%d' % 'a' }}": "a real number is required",
    "{{ '{' .format() }}": "Single '{'",
    "{% for a, b in [1] %}{% endfor %}": "cannot unpack",
    "{{ loop.index }}": "'loop' is undefined",
    "{{ strftime_now(3) }}": "has no len",
    "{{ f(**{1: 2}) }}": "keywords must be strings",
}


@pytest.mark.parametrize("source", RAISES)
def test_whatever_a_template_raises_is_one_line(source: str) -> None:
    with pytest.raises(UsageError, match="refuses these messages: ") as caught:
        render(source)
    assert RAISES[source] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 1 | no_filter }}", "{{ 'a' | wordwrap }}", "{{", "{% block a %}{% endblock %}",
     "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ \x1b }}",
     "{% autoescape true %}{% endautoescape %}"],
)  # fmt: skip
def test_what_does_not_compile(source: str) -> None:
    with pytest.raises(BundleError, match="the model's chat template does not compile: ") as caught:
        ChatTemplate(source)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("messages", [["hello"], [None], [["role", "user"]], [3], None, 5])
def test_messages_that_are_none(messages: Any) -> None:
    with pytest.raises(LessExportError, match="refuses these messages") as caught:
        render("{{ messages }}", messages)
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_a_budget_is_for_one_rendering() -> None:
    """What one rendering spends, or the failure of one, is not missing in the next; threads take turns."""
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}x{% endfor %}{% endfor %}")
    with pytest.raises(UsageError, match="stopped"):
        template.render(HI, n=5000)
    for _ in range(5):
        assert len(template.render(HI, n=500)) == 250_000
    lengths: list[int] = []
    threads = [threading.Thread(target=lambda: lengths.append(len(template.render(HI, n=300)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert lengths == [90_000] * 6


def test_every_filter_and_test_of_jinja_is_known() -> None:
    """A new one of a later Jinja is missing, not unbounded."""
    from jinja2.filters import FILTERS

    environment = ChatTemplate("")._environment
    assert set(FILTERS) - set(environment.filters) == {"wordwrap", "urlize", "xmlattr", "striptags", "pprint"}
    assert all(hasattr(f, "__wrapped__") for f in environment.filters.values())
    assert all(hasattr(t, "__wrapped__") for t in environment.tests.values())
    assert template_syntax.MAX_SOURCE == 1_000_000
