"""Text to token ids and back: a ``tokenizer.json`` and the facts of the manifest, without transformers."""

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
#: Tokens of context that decide how the next one is written (leading spaces, bytes of one character).
_CONTEXT = 8


class Tokenizer:
    """A ``tokenizers.Tokenizer`` (or its file) with what its file does not say.

    Args:
        source: path of a ``tokenizer.json``, or the loaded object.
        bos_id: id of the beginning-of-sequence token, if there is one.
        eos_ids: ids that end a generation, the tokenizer's own first.
        add_bos: whether texts start with the bos token.
        chat_template: Jinja source of the model's chat template, if it has one.

    Raises:
        BundleError: the file is missing or damaged.
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
            raise BundleError("the tokenizer adds a bos token but the manifest names none: export again")
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.add_bos = add_bos
        self.chat_template = chat_template
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``, markers written in it included.

        ``special`` adds what a new sequence starts with: the bos token (never a second one) and whatever
        else the tokenizer file puts there; pass False for the continuation of a sequence.
        """
        ids = list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if special and self.bos_id is not None:
            while ids[:2] == [self.bos_id, self.bos_id]:
                del ids[0]
            if self.add_bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Incremental decoder of the tokens that follow ``context``."""
        return TextStream(self, context)

    # ------------------------------------------------------------ chat

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation, as the model's template writes it (its bos token included).

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end where the assistant's answer starts.
            variables: more of what the template knows, such as ``tools`` or ``enable_thinking``.

        Raises:
            UsageError: the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise UsageError("this model has no chat template: pass a plain prompt instead")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        tokens = {n: self._tokenizer.id_to_token(i) for n, i in names.items() if i is not None}
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
        """Token ids of :meth:`chat`; the template alone decides about the bos token."""
        return self.encode(self.chat(messages, **variables), special=False)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # The environment transformers gives templates, so that they render to the same text.
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
    """Text of a growing sequence: every :meth:`push` yields what has become certain.

    A character spread over several tokens comes out with its last one; spaces are those the whole text
    has. The pieces and :meth:`finish` together are the decoded sequence (after its context).
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._owner = tokenizer
        known = [i for i in context if i not in tokenizer._special][-_CONTEXT:]
        # A window that cuts a character at its start may read as broken throughout: take a shorter one. A
        # context that ends inside a character says nothing about the rest.
        while known and tokenizer.decode(known).endswith(_INCOMPLETE):
            del known[0]
        self._follow(known)

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes, often one word, "" inside a character or for special tokens."""
        if token_id in self._owner._special:
            return ""
        self._ids.append(token_id)
        text = self._owner.decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is left when no token follows: the replacement character for a broken one, usually ""."""
        return self._emit(self._owner.decode(self._ids))

    def _emit(self, text: str) -> str:
        new = self._ids[self._known :]
        # Bytes that turn out to be broken take the whole run of bytes before them along in some decoders.
        piece = text[len(self._done) :] if text.startswith(self._done) else self._owner.decode(new)
        if piece:
            self._follow(new)
        return piece

    def _follow(self, ids: list[int]) -> None:
        """The tokens of the latest piece are all that the next one depends on."""
        self._ids, self._known, self._done = ids, len(ids), self._owner.decode(ids)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is just its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """``tojson`` without jinja's escaping for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
