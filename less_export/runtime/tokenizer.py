"""Text to token ids and back, from ``tokenizer.json`` and the manifest; needs no transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import BundleError, UsageError

_INCOMPLETE = "\ufffd"
#: Number of preceding tokens that can affect how the next one is decoded (leading spaces, bytes of one character).
_CONTEXT = 8


class Tokenizer:
    """A ``tokenizers.Tokenizer`` (or its file) with the facts that its file does not hold.

    Args:
        source: path of a ``tokenizer.json``, or the loaded object.
        bos_id: id of the beginning-of-sequence token, if the model has one.
        eos_ids: ids that end a generation, the tokenizer's eos token first.
        add_bos: whether texts start with the bos token.
        chat_template: Jinja source of the model's chat template, if it has one.

    Raises:
        BundleError: the file is missing or damaged, or ``add_bos`` without ``bos_id``.
    """

    def __init__(
        self,
        source: str | Path | tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if isinstance(source, tokenizers.Tokenizer):
            self._tokenizer = source
        else:
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(source))
            except Exception as error:  # the library raises plain Exception
                raise BundleError(f"cannot read the tokenizer {source}: {error}") from error
        if add_bos and bos_id is None:
            raise BundleError("the tokenizer adds a bos token, but the manifest has no id for it: export again")
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.add_bos = add_bos
        self.chat_template = chat_template
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in the text become their ids.

        ``special`` adds the tokens that a new sequence starts with: the bos token (never a second one) and
        whatever else the tokenizer file adds. Pass False for text that continues a sequence.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if special and self.bos_id is not None:
            while ids[:2] == [self.bos_id, self.bos_id]:
                del ids[0]
            if self.add_bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A decoder for the tokens that follow ``context``, one by one."""
        return TextStream(self, context)

    # ------------------------------------------------------------ chat

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation, rendered by the model's chat template (including any bos token).

        Args:
            messages: one ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end the prompt where the assistant's answer starts.
            variables: further template variables, such as ``tools`` or ``enable_thinking``.

        Raises:
            UsageError: the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise UsageError("this model has no chat template: pass a plain prompt instead")
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        tokens = {n: self._tokenizer.id_to_token(i) for n, i in ids.items() if i is not None}
        try:
            return self._template.render(
                {
                    "tools": None,
                    "documents": None,
                    **tokens,
                    **variables,
                    "messages": [dict(m) for m in messages],
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"the model's chat template refuses these messages: {reason}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of :meth:`chat`; no bos token is added to what the template writes."""
        return self.encode(self.chat(messages, **variables), special=False)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # The same environment as in transformers, so that templates render to the same text.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template or "")
        except jinja2.TemplateError as error:
            raise BundleError(f"the model's chat template does not compile: {error.message}") from error


class TextStream:
    """Decodes a growing sequence: each :meth:`push` returns the text that has become certain.

    A character spread over several tokens is returned with its last one; spaces are those of the whole
    text. All pieces and :meth:`finish` together are the decoded sequence after its context.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        window = [i for i in context if i not in tokenizer._special][-_CONTEXT:]
        # If the window starts inside a character, all of it may decode as broken: shorten it. A context
        # that ends inside a character gives no information about what follows.
        while window and tokenizer.decode(window).endswith(_INCOMPLETE):
            del window[0]
        self._continue_after(window)

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; "" inside a character and for special tokens."""
        if token_id in self._tokenizer._special:
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


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; it renders its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """``tojson`` without Jinja's HTML escaping."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
