"""Chats that go on from a saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..runtime.tokenizer import Tokenizer

#: An answer that no template changes, to find where it ends in a rendered conversation.
_ANSWER = "\u2063answer\u2063"


def continuation(tokenizer: Tokenizer, messages: Sequence[Any], variables: Mapping[str, Any]) -> str:
    """What a chat template writes after an answer, up to the next one: the end of the turn and ``messages``.

    Templates render whole conversations, so one is rendered in which a known answer stands before ``messages``.

    Raises:
        UsageError: the template refuses the messages, or does not write an answer as it is.
    """
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    _, mark, rest = tokenizer.chat([*before, *messages], **variables).rpartition(_ANSWER)
    if not mark:
        raise UsageError("this model's chat template does not write an answer as it is: continue by /v1/completions")
    return rest
