"""Text to token ids and back, from ``tokenizer.json`` and the manifest; needs no transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .. import panics
from ..errors import BundleError, UsageError, one_line
from .chat_template import ChatTemplate

_INCOMPLETE = "\ufffd"
#: Number of preceding tokens that can affect how the next one is decoded (leading spaces, bytes of one character).
_CONTEXT = 8
#: Largest ``tokenizer.json``, in bytes: reading it takes time and memory in proportion.
MAX_FILE = 64 << 20
#: Characters from which a text is encoded without Python's lock, as a batch of one.
_LONG = 10_000
#: Most tokens that a tokenizer may add to a text, and most tokens of a text of one letter.
MAX_ADDED, MAX_LETTER = 256, 2048
#: Most characters that a normalizer or decoder may make of one.
MAX_GROWTH = 16


class Tokenizer:
    """A ``tokenizers.Tokenizer`` (or its file) with the facts that its file does not hold.

    Truncation and padding that the file states are switched off, as transformers does. A given object is changed so.

    Args:
        source: path of a ``tokenizer.json``, or the loaded object.
        bos_id: id of the beginning-of-sequence token, if the model has one.
        eos_ids: ids that end a generation, the tokenizer's eos token first.
        add_bos: whether texts start with the bos token.
        chat_template: Jinja source of the model's chat template, if it has one; or several by name.
        special_tokens: the tokens that chat templates see, by the names of their variables (``bos_token``,
            ``pad_token``, ...); default bos and eos.
        split_special_tokens: whether special tokens written in a text are split like other text.

    Raises:
        BundleError: the file is missing or damaged, ``add_bos`` without ``bos_id``, or a tokenizer that makes
            very long sequences of short texts.
    """

    def __init__(
        self,
        source: str | Path | tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        name = "the tokenizer" if isinstance(source, tokenizers.Tokenizer) else f"the tokenizer {source}"
        try:
            with panics.as_exceptions():
                self._tokenizer = source if isinstance(source, tokenizers.Tokenizer) else _read(Path(source))
                self._tokenizer.no_truncation()
                self._tokenizer.no_padding()
                if split_special_tokens:
                    self._tokenizer.encode_special_tokens = True
                _check_growth(self._tokenizer)
        except Exception as error:  # the library raises plain Exception
            reason = getattr(error, "strerror", None) or error
            raise BundleError(f"cannot read {name}: {one_line(reason)}") from error
        if add_bos and bos_id is None:
            raise BundleError("the tokenizer adds a bos token, but the manifest has no id for it: export again")
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.add_bos = add_bos
        self.chat_template = chat_template
        if special_tokens is None:
            ids = {"bos_token": bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
            texts = {n: self._tokenizer.id_to_token(i) for n, i in ids.items() if i is not None}
            special_tokens = {n: text for n, text in texts.items() if text is not None}
        self.special_tokens = dict(special_tokens)
        self._templates: dict[str, ChatTemplate] = {}  # by source
        added = self._tokenizer.get_added_tokens_decoder()
        #: Text of every special token, by id.
        self.special_texts = {i: token.content for i, token in added.items() if token.special}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in the text become their ids, unless they are split.

        ``special`` adds the tokens that a new sequence starts with: the bos token (never a second one) and
        whatever else the tokenizer file adds. Pass False for text that continues a sequence.

        Raises:
            UsageError: ``text`` is not a string of valid Unicode, or the tokenizer fails.
        """
        if not isinstance(text, str):
            raise UsageError(f"a text must be a string, not {type(text).__name__}")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UsageError("a text has half of a surrogate pair: it is not valid Unicode")
        ids = list(_run(lambda: self._encoded(text, special).ids))
        if special and self.bos_id is not None:
            begin = next((i for i, token_id in enumerate(ids) if token_id != self.bos_id), len(ids))
            if begin or self.add_bos:
                ids[:begin] = [self.bos_id]
        return ids

    def _encoded(self, text: str, special: bool) -> tokenizers.Encoding:
        if len(text) < _LONG:
            return self._tokenizer.encode(text, add_special_tokens=special)
        # `encode` keeps Python's lock, and so every other thread waits. A batch does not, but its threads make the
        # library warn at every later fork: only where the wait would be noticed.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]

    @functools.cached_property
    def longest_token(self) -> int:
        """Most characters of the text of a token."""
        return max(map(len, self._tokenizer.get_vocab()), default=0)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, of added tokens too; logits of a model may have more."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``."""
        return self._tokenizer.to_str()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""
        return str(_run(lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True)))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A decoder for the tokens that follow ``context``, one by one."""
        return TextStream(self, context)

    # ------------------------------------------------------------ chat

    def chat(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, rendered by the model's chat template (including any bos token).

        Args:
            messages: one ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end the prompt where the assistant's answer starts.
            chat_template: name of one of the model's templates; default ``tool_use`` where the model has it and
                ``tools`` are given, ``default`` otherwise.
            variables: further template variables, such as ``tools`` or ``enable_thinking``.

        Raises:
            UsageError: the model has no such template, or its template refuses the messages, fails or takes too
                much time or memory.
        """
        tools = variables.get("tools")
        if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
            raise UsageError("tools must be a list of JSON schemas (dicts)")
        if isinstance(messages, str | Mapping):
            raise UsageError("messages must be a list of dicts with role and content")
        variables = {"tools": None, "documents": None, **self.special_tokens, **variables}
        template = self._template(chat_template, tools is not None)
        return template.render(messages, **variables, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Any], **variables: Any) -> list[int]:
        """Token ids of :meth:`chat`; no bos token is added to what the template writes."""
        return self.encode(self.chat(messages, **variables), special=False)

    def _template(self, name: str | None, has_tools: bool) -> ChatTemplate:
        if self.chat_template is None:
            raise UsageError("this model has no chat template: pass a plain prompt instead")
        sources = {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in sources else "default"
        if name not in sources:
            names = ", ".join(one_line(n, 40) for n in sorted(sources))
            raise UsageError(f"this model has no chat template '{one_line(name, 40)}': choose one of {names}")
        source = sources[name]
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source)
        return self._templates[source]


# ------------------------------------------------------------------ tokenizers that are not trusted


def _read(path: Path) -> tokenizers.Tokenizer:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ValueError(f"it has {size / 1e6:.0f} MB, more than {MAX_FILE / 1e6:.0f}")
    return tokenizers.Tokenizer.from_file(str(path))


def _check_growth(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer that makes millions of tokens or characters of a short text."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"it replaces a character by more than {MAX_GROWTH}")
    added = tokenizer.num_special_tokens_to_add(False)
    if added <= MAX_ADDED:
        added = len(tokenizer.encode("").ids)
    if added > MAX_ADDED:
        raise ValueError(f"it adds {added:,} tokens to every text, more than {MAX_ADDED}")
    tokens = len(tokenizer.encode("a").ids)
    if tokens > MAX_LETTER:
        raise ValueError(f"it makes {tokens:,} tokens of one letter")


def _growth(part: dict[str, Any]) -> int:
    """How many characters a normalizer or decoder may make of one, at most."""
    growth = 1
    for inner in part.get("normalizers") or part.get("decoders") or ():
        growth *= _growth(inner)
        if growth > MAX_GROWTH:
            break
    text = {"Replace": "content", "Prepend": "prepend"}.get(part["type"])
    return growth * max(1, len(part[text])) if text else growth


def _run(call: Callable[[], Any]) -> Any:
    """What ``call`` returns; its exceptions, panics of the tokenizers library included, as :class:`UsageError`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise UsageError(f"the tokenizer fails on this text: {one_line(error)}") from error


class TextStream:
    """Decodes a growing sequence: each :meth:`push` returns the text that has become certain.

    A character spread over several tokens is returned with its last one; spaces are those of the whole
    text. All pieces and :meth:`finish` together are the decoded sequence after its context.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        window = [i for i in context if i not in tokenizer.special_texts][-_CONTEXT:]
        # If the window starts inside a character, all of it may decode as broken: shorten it. A context
        # that ends inside a character gives no information about what follows.
        while window and tokenizer.decode(window).endswith(_INCOMPLETE):
            del window[0]
        self._continue_after(window)

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; "" inside a character and for special tokens."""
        if token_id in self._tokenizer.special_texts:
            return ""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The remaining text when no token follows: usually "", or the replacement character."""
        return self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> str:
        new_ids = self._ids[self._context_length :]
        # An invalid byte invalidates the whole run of bytes before it in some decoders.
        known = self._context_text
        piece = text[len(known) :] if text.startswith(known) else self._tokenizer.decode(new_ids)
        if piece:
            self._continue_after(new_ids)
        return piece

    def _continue_after(self, context: list[int]) -> None:
        """Start the next piece; it depends only on the tokens of the piece before it."""
        self._ids, self._context_length = context, len(context)
        self._context_text = self._tokenizer.decode(context)
