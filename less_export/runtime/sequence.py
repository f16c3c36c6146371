"""One sequence on its way: its prompt, how it is continued, what was fed, its text and what ends it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Ordered
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import UsageError
from .backend import Backend, RowState
from .sampler import Choice, Sampler, TokenLogprobs
from .sampling import SamplingParams
from .stop_strings import StoppableText
from .tokenizer import Tokenizer

#: Looks at a row of a backend between two steps.
Observer = Callable[[Backend, int], None]
FinishReason = Literal["eos", "stop", "length"]
Prompt = str | Iterable[int]


@dataclass(frozen=True)
class Token:
    """One new token of prompt ``row``.

    ``text`` is the text that became certain with it: "" inside a character or a possible stop string. The
    last token of a row has a ``finish_reason`` and brings all text that was held back. ``logprobs`` is None unless
    the parameters ask for it.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


@dataclass(eq=False)
class Sequence:
    """A prompt that is being continued; made by :meth:`SequenceFactory.sequence`.

    Args:
        index: its place among the prompts of its caller.
        prompt: token ids after ``prefix``.
        max_new_tokens: of the parameters, or fewer where the artifact takes no longer sequence.
        eos_ids: tokens that end it with the reason "eos".
        prefix: the state that the prompt continues; None once the prompt was fed.
        keep_state: whether ``state`` is wanted.

    ``token_ids`` are the new tokens so far; ``fed`` counts the tokens of the prompt that the model has seen; ``row`` is
    the row of the backend that it has now; ``submitted`` says that an engine has taken it. ``state``, of a finished
    sequence, has seen the prompt and the new tokens except an eos token and the last token of a stop: what a
    continuation goes on from. ``observer`` is called with the backend and the row after every piece of the prompt and
    every token, the last one included, on the thread that steps: it must be quick, and change nothing.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    sampler: Sampler
    max_new_tokens: int
    eos_ids: frozenset[int]
    text: StoppableText | None
    prefix: RowState | None = None
    keep_state: bool = False
    token_ids: list[int] = field(default_factory=list)
    fed: int = 0
    row: int | None = None
    finish_reason: FinishReason | None = None
    state: RowState | None = None
    submitted: bool = False
    observer: Observer | None = None

    @property
    def active(self) -> bool:
        """Whether it wants another token."""
        return self.finish_reason is None

    def accept(self, choice: Choice) -> Token:
        """Add a token and what it does to the text."""
        token_id = choice.token_id
        self.token_ids.append(token_id)
        text, stopped = "", False
        if token_id in self.eos_ids:
            self.finish_reason = "eos"
        elif token_id in self.params.stop_token_ids:
            self.finish_reason = "stop"
        elif self.text:
            text, stopped = self.text.push(token_id)
        if stopped:
            self.finish_reason = "stop"
        elif self.active and len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text and not stopped:
            text += self.text.finish()
        return Token(self.index, token_id, text, self.finish_reason, choice.logprobs)


class SequenceFactory:
    """Makes sequences for one backend, and checks all that can be checked before they run.

    Args:
        backend: its contract and identity count.
        tokenizer: needed for text prompts, stop strings and text in the results.
        eos_ids: tokens that end a generation; default the tokenizer's.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer | None = None, eos_ids: Iterable[int] | None = None
    ) -> None:
        self._backend = backend
        self.tokenizer = tokenizer
        if eos_ids is None:
            eos_ids = tokenizer.eos_ids if tokenizer else ()
        self.eos_ids = frozenset(token_ids(eos_ids, "eos_ids must be a list of token ids (whole numbers)"))

    def params(self, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        """``params``, by default greedy, with overrides, checked as far as they depend on the model."""
        if params is not None and not isinstance(params, SamplingParams):
            raise UsageError(f"params must be SamplingParams, not {type(params).__name__}")
        params = (params or SamplingParams()).with_overrides(**overrides)
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer: stop by eos_ids instead")
        highest = self._backend.contract.vocab_size - 1
        if any(not 0 <= i <= highest for i in (*(params.logit_bias or ()), *params.stop_token_ids)):
            raise UsageError(f"token ids of logit_bias and stop_token_ids must lie in 0..{highest}")
        return params

    def sequence(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        index: int = 0,
        prefix: RowState | None = None,
        keep_state: bool = False,
    ) -> Sequence:
        """A sequence that continues ``prompt`` with parameters from :meth:`params`.

        Raises:
            UsageError: an empty or too long prompt, or text without a tokenizer.
        """
        ids = self.encode(prompt, prefix, new_tokens=1)
        limit, length = self._backend.contract.token_limit(), len(ids) + (prefix.length if prefix else 0)
        return Sequence(
            index,
            ids,
            params,
            Sampler(params, params.generator(index), ids),
            params.max_new_tokens if limit is None else min(params.max_new_tokens, limit - length),
            frozenset() if params.ignore_eos else self.eos_ids,
            StoppableText(self.tokenizer, ids, params.stop) if self.tokenizer else None,
            prefix,
            keep_state,
        )

    def check_prefix(self, prefix: RowState | None) -> None:
        """Raise unless ``prefix`` is a state of this export."""
        if prefix is None:
            return
        if not isinstance(prefix, RowState):
            raise UsageError(f"prefix must be a RowState, not {type(prefix).__name__}: RowState.load reads a file")
        prefix.check(self._backend.contract, self._backend.identity)

    def encode(self, prompt: Prompt, prefix: RowState | None, new_tokens: int) -> list[int]:
        """Token ids of a prompt, checked to leave space for ``new_tokens`` more."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("text prompts need a tokenizer: pass token ids instead (--token-ids)")
            ids = self.tokenizer.encode(prompt, special=prefix is None) if prompt else []
        else:
            ids = token_ids(prompt, "a prompt must be a string or a list of token ids (whole numbers)")
        if not ids:
            raise UsageError(
                "a prompt is empty: give it at least one token"
                if prefix is None
                else "a continuation is empty: it needs at least one token after its prefix"
            )
        contract = self._backend.contract
        if min(ids) < 0 or max(ids) >= contract.vocab_size:
            raise UsageError(f"token ids must lie in 0..{contract.vocab_size - 1}: is this the model's tokenizer?")
        limit, length = contract.token_limit(), len(ids) + (prefix.length if prefix else 0)
        if limit is not None and length + new_tokens > limit:
            does = " and its new tokens do" if new_tokens else " does"
            raise UsageError(
                f"a prompt of {length} tokens{does} not fit into the {limit} that this artifact takes: "
                "shorten it, or export with a larger --context or an evicting --policy"
            )
        return ids


def items(values: Any, message: str) -> list[Any]:
    """What an ordered collection holds: a list, an iterator, an array or tensor; refused with ``message`` if none."""
    if callable(getattr(values, "tolist", None)):  # numpy, torch
        values = values.tolist()
    ordered = isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping | AbstractSet)
    if not ordered:
        raise UsageError(message)
    return list(values)


def prompt_list(prompts: Ordered[Prompt]) -> list[Prompt]:
    """The prompts; a single one in the place of a list is refused."""
    message = "prompts must be a list of prompts: put a single one into a list"
    listed = items(prompts, message)
    if any(isinstance(p, int | np.integer) for p in listed):
        raise UsageError(message)
    return listed


def token_ids(values: Any, message: str) -> list[int]:
    """Whole numbers of any type as a list of int; refused with ``message`` if they are none."""
    ids = items(values, message)
    try:
        if any(isinstance(i, bool) for i in ids):
            raise TypeError
        return [operator.index(i) for i in ids]
    except TypeError:
        raise UsageError(message) from None
