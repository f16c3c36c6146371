"""Sampling, and text to tokens and back for the two families of tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from less_export.errors import BackendError, BundleError, UsageError
from less_export.runtime.sampling import SamplingParams, sample
from less_export.runtime.tokenizer import Tokenizer

# ------------------------------------------------------------------ sampling


def draws(logits: np.ndarray, count: int, seed: int = 0, **params: object) -> np.ndarray:
    """How often each token comes out."""
    settings, rng = SamplingParams(**{"temperature": 1.0, **params}), np.random.default_rng(seed)
    values = logits.astype(np.float32)
    return np.bincount([sample(values, settings, rng) for _ in range(count)], minlength=len(logits))


def test_greedy_takes_the_lowest_of_the_highest() -> None:
    rng = np.random.default_rng(0)
    assert sample(np.array([1, 3, 2, 3], np.float32), SamplingParams(), rng) == 1
    greedy = SamplingParams(top_k=2, top_p=0.1)
    assert sample(np.array([-np.inf, -1e30], np.float32), greedy, rng) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.5, 0, 1), (2, 5, 1), (1, 0, 0.7), (1.3, 6, 0.8)]
)
def test_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(3).standard_normal(12).astype(np.float32) * 0.7
    p = np.exp(logits.astype(float) / temperature)
    order = np.argsort(-p)
    keep = order[: top_k or None]
    share = np.cumsum(p[keep]) / p[keep].sum()
    keep = keep[: int((share < top_p).sum()) + 1]  # the token that reaches top_p is included
    want = np.zeros(12)
    want[keep] = p[keep] / p[keep].sum()
    count = 20000
    got = draws(logits, count, temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(np.flatnonzero(got)) == set(keep)
    seen = want > 0
    chi2 = ((got - count * want)[seen] ** 2 / (count * want)[seen]).sum()
    assert chi2 < len(keep) + 6 * np.sqrt(2 * len(keep))
    assert len(keep) == {(1, 0, 1): 12, (0.5, 0, 1): 12, (2, 5, 1): 5}.get((temperature, top_k, top_p), len(keep))


def test_cuts_are_exact() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.25, 0.25]))
    for top_p, want in ((0.39, {1}), (0.41, {1, 2}), (0.64, {1, 2}), (0.66, {1, 2, 3}), (0.999, {0, 1, 2, 3})):
        assert set(np.flatnonzero(draws(logits, 300, top_p=top_p))) == want, top_p
    # Equal logits: exactly k, the lowest ids.
    assert set(np.flatnonzero(draws(np.zeros(9), 300, top_k=4))) == {0, 1, 2, 3}
    assert set(np.flatnonzero(draws(np.zeros(9), 300, top_k=99))) == set(range(9))
    assert set(np.flatnonzero(draws(np.zeros(10), 300, top_p=0.25))) == {0, 1, 2}
    assert set(np.flatnonzero(draws(np.arange(5.0), 50, top_p=1e-9))) == {4}


def test_extreme_logits() -> None:
    wild = np.array([3e38, -3e38, 3e38, -np.inf])
    assert set(np.flatnonzero(draws(wild, 100))) == {0, 2}
    assert set(np.flatnonzero(draws(wild, 100, temperature=1e-30, top_p=0.9, top_k=3))) == {0, 2}
    assert draws(np.array([0, 1e-3, -5.0]), 50, temperature=1e-6)[1] == 50
    assert draws(np.array([-np.inf, 2.0, -np.inf]), 50, temperature=100.0)[1] == 50
    for bad in (np.nan, np.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(BackendError, match="logits"):
                draws(np.array([0, bad, 1.0]), 1, temperature=temperature)
    with pytest.raises(BackendError, match="logits"):
        draws(np.full(3, -np.inf), 1)


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (1.0 - 2.0**-53, 2)])
def test_the_first_and_the_last_choice_weigh_something(drawn: float, token: int) -> None:
    class Drawn:
        def random(self) -> float:
            return drawn

    for peak in np.random.default_rng(0).uniform(0, 5, 200):
        logits = np.array([-1e9, 0.0, peak, -1e9, -1e9], np.float32)
        assert sample(logits, SamplingParams(temperature=1.0), Drawn()) == token


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, float("nan"), float("inf"), "hot", None, True]),
        ("top_k", [-1, 1.5, None, True]),
        ("top_p", [0, -0.1, 1.01, float("nan"), "x"]),
        ("seed", [-1, 1.5, "x"]),
        ("max_new_tokens", [0, -1, 1.5, None]),
        ("stop", [("a", ""), "", (1,)]),
    ],
)
def test_impossible_parameters(field: str, values: list) -> None:
    for value in values:
        with pytest.raises(UsageError, match=field) as caught:
            SamplingParams(**{field: value})
        assert "\n" not in str(caught.value)


def test_parameters() -> None:
    params = SamplingParams(stop="end", temperature=1, seed=np.int64(3), top_p=1)
    assert params.stop == ("end",)
    assert params.with_overrides(stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(UsageError, match="top_p"):
        params.with_overrides(top_p=2)
    with pytest.raises(AttributeError):
        params.top_k = 3


# ------------------------------------------------------------------ tokenizers

TEXT = "The café, naïve: 日本語のテキスト 😀👩‍👩‍👧 — it's  two  spaces\n\nand\ttabs; größer ☃."
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes as letters, merges learned."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [TEXT, "the theme of these things is that there is a text " * 3]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    raw.train_from_iterator(corpus, trainer)
    return raw


def sentencepiece_like(strip: bool = True) -> tokenizers.Tokenizer:
    """Llama's kind: ▁ for a space, bytes for other characters; ``strip`` drops the first space."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁"), ("▁", "i"), ("o", "r")]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzTé,.:'é") | {"語"})
    vocab = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *letters, *(a + b for a, b in merges)]
    raw = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prepend = [normalizers.Prepend("▁")] if strip else []
    raw.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    raw.add_special_tokens(SPECIAL)
    return raw


KINDS = {"byte-level": byte_level, "llama": sentencepiece_like, "gemma": lambda: sentencepiece_like(False)}


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    for text in (TEXT, " leading", "", "   ", "a"):
        ids = tokenizer.encode(text)
        stream, so_far = tokenizer.stream(), ""
        for count, token in enumerate(ids, 1):
            piece = stream.push(token)
            assert "\ufffd" not in piece
            so_far += piece
            whole = tokenizer.decode(ids[:count])
            assert whole == so_far or "\ufffd" in whole  # nothing is held back unnecessarily
        assert so_far == tokenizer.decode(ids) == text
        assert stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_continues_its_context(kind: str) -> None:
    tokenizer = Tokenizer(KINDS[kind]())
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids)):
        head = tokenizer.decode(ids[:cut])
        stream = tokenizer.stream(ids[:cut])
        tail = "".join(map(stream.push, ids[cut:])) + stream.finish()
        if "\ufffd" not in head:  # otherwise the context ends inside a character
            assert head + tail == TEXT
        # Special tokens are neither context nor text.
        marked = tokenizer.stream([*ids[:cut], *[1, 2] * 10])
        assert "".join(map(marked.push, [1, *ids[cut:], 2, 2])) + marked.finish() == tail


def test_broken_characters() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a😀")
    assert len(ids) > 2
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids[:-1]]
    assert pieces == ["a"] + [""] * (len(ids) - 2)  # held back until it is complete
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    # A byte-fallback decoder breaks the whole run of bytes; the text before it stays.
    pieces = Tokenizer(sentencepiece_like())
    ids_of_run = pieces.encode("日本")
    stream = pieces.stream()
    assert "".join(map(stream.push, ids_of_run[:-1])) + stream.finish() == "日\ufffd\ufffd"
    stream = tokenizer.stream()
    (letter,) = tokenizer.encode("b")
    assert "".join(map(stream.push, [*ids[:-1], letter])) == tokenizer.decode([*ids[:-1], letter]) == "a\ufffdb"
    assert tokenizer.stream().push(10**6) == ""  # padded vocabularies have ids without a token


# ------------------------------------------------------------------ bos and chat


def with_bos() -> tokenizers.Tokenizer:
    raw = sentencepiece_like()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return raw


@pytest.mark.parametrize("make", [with_bos, sentencepiece_like])
def test_one_bos(make: object) -> None:
    tokenizer = Tokenizer(make(), bos_id=1, eos_ids=[2], add_bos=True)
    plain = tokenizer.encode("the a", special=False)
    assert 1 not in plain
    assert tokenizer.encode("the a") == [1, *plain]
    assert tokenizer.encode("<s>a")[:2].count(1) == 1
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", special=False) == []
    assert tokenizer.decode([1, *plain, 2]) == "the a"


def test_no_bos_where_the_model_has_none() -> None:
    tokenizer = Tokenizer(sentencepiece_like(), bos_id=1)
    assert tokenizer.encode("a") == tokenizer.encode("a", special=False)
    with pytest.raises(BundleError, match="bos"):
        Tokenizer(sentencepiece_like(), add_bos=True)


CHAT = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{ raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- if message.hidden %}{% continue %}{% endif %}
    {%- generation %}[{{ message.role }}]{{ message['content'] | trim }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{%- endif %}
{%- if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%%') }}"""


def chatty(template: str | None = CHAT) -> Tokenizer:
    return Tokenizer(with_bos(), bos_id=1, eos_ids=[2], add_bos=True, chat_template=template)


def test_chat() -> None:
    messages = [{"role": "user", "content": " hi & <b> "}, {"role": "user", "hidden": True}]
    assert chatty().chat(messages) == "<s>[user]hi & <b>[assistant]%"
    assert chatty().chat(messages, add_generation_prompt=False) == "<s>[user]hi & <b>%"
    assert chatty().chat(messages, tools=[{"é": "<"}]).endswith('[assistant][{"é": "<"}]%')
    assert chatty("{{ eos_token }}{{ missing }}").chat([]) == "</s>"


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_renders_as_transformers_does(prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for template in (
        CHAT,
        "{%- for m in messages %}\n  {% if m.x is defined %}\n {{ m.x }}\n {% endif %}\n{% endfor %}",
    ):
        for messages in ([], [{"role": "user", "content": "é <&>", "x": 1}] * 2):
            (want,), _ = utils.render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
            )
            assert chatty(template).chat(messages, add_generation_prompt=prompt) == want


def test_a_chat_has_one_bos_or_the_template_none() -> None:
    messages = [{"role": "user", "content": "the"}]
    assert chatty().encode_chat(messages).count(1) == 1
    assert chatty().encode(chatty().chat(messages)) == chatty().encode_chat(messages)
    assert chatty("{{ messages[0].content }}").encode_chat(messages).count(1) == 0


def test_another_template_takes_effect_at_once() -> None:
    tokenizer, messages = chatty(), [{"role": "user", "content": "the"}]
    assert tokenizer.chat(messages) != "the"
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.chat(messages) == "the"


@pytest.mark.parametrize(
    ("template", "messages", "error", "match"),
    [
        (None, [], UsageError, "no chat template"),
        (CHAT, [{"role": "system", "content": ""}], UsageError, "refuses these messages: no role system"),
        (CHAT, [{"role": "user"}], UsageError, ""),
        (CHAT, ["hello"], UsageError, "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", [], UsageError, "unsafe"),
        ("{{ messages.append(1) }}", [], UsageError, "refuses"),
        ("{% for %}", [], BundleError, "does not compile"),
    ],
)
def test_chat_refusals(template: str | None, messages: list, error: type, match: str) -> None:
    tokenizer = chatty(template)
    if not match:  # as lenient as transformers: missing values are empty
        assert "[user]" in tokenizer.chat(messages)
        return
    with pytest.raises(error, match=match) as caught:
        tokenizer.chat(messages)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with_bos().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json", bos_id=1, add_bos=True).encode("a") == chatty().encode("a")
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "absent.json"):
        with pytest.raises(BundleError, match=f"cannot read the tokenizer .*{name}") as caught:
            Tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
