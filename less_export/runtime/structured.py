"""Answers of a given form: JSON, one of some texts, what a regular expression or a grammar takes; by llguidance.

A grammar forbids, before every token, those that no text of its form goes on with. What is forbidden next is found in a
thread of its own, without Python's lock, while the model runs on the token before it.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from .. import panics
from ..errors import LessExportError, UsageError, install_hint, one_line
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

#: Longest schema, regular expression (or list of choices) and grammar, in characters; a schema counts as JSON.
MAX_SCHEMA, MAX_REGEX, MAX_GRAMMAR = 65_536, 8_192, 8_192
#: Bytes of stack to compile on: llguidance recurses, and a stack that ends is the end of the process. The deepest
#: forms within the bounds above take less than 8 MB.
_STACK = 64 << 20
_STACK_LOCK = threading.Lock()
#: Bounds of llguidance, in its units: the worst grammars take tenths of a second to compile, a token some milliseconds.
_LIMITS: Mapping[str, Any] = {
    "max_grammar_size": 50_000,
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
#: The same for grammars: an ambiguous one has many ways to read a text, and each token adds more.
_GRAMMAR_LIMITS: Mapping[str, Any] = {**_LIMITS, "step_max_items": 2_000}
#: How JSON is written, whatever the schema says. Whitespace has an end: a weak model would write nothing else.
_JSON: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"\n? {0,16}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_THREADS = 2

Forbidden = npt.NDArray[np.bool_]
_T = TypeVar("_T")


class StructuredUnavailableError(LessExportError):
    """llguidance is not installed, or cannot use the model's tokenizer."""


class Grammars:
    """Compiles grammars for the tokens of one model. Thread-safe.

    Args:
        tokenizer: the model's.
        vocab_size: logits of a step.
        eos_ids: tokens that end an answer; a grammar allows them where the answer may end.

    Raises:
        StructuredUnavailableError: llguidance is missing (the extra ``structured``), or the tokenizer is of a kind that
            it does not know, or there is no token to end an answer with.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError:
            hint = install_hint("structured")
            raise StructuredUnavailableError(f"structured answers need llguidance: {hint}") from None
        ends = sorted(eos_ids)
        if not ends:
            raise StructuredUnavailableError("structured answers need a model with an end-of-sequence token")
        self._vocab_size = vocab_size
        size = max(vocab_size, tokenizer.vocab_size)
        try:
            with panics.as_exceptions():
                self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
        except Exception as error:  # the library raises plain Exception
            raise StructuredUnavailableError(
                f"structured answers are not possible with this model's tokenizer: {one_line(error)}"
            ) from error
        self._matcher = functools.partial(llguidance.LLMatcher, self._tokenizer, log_level=0)
        self._limits, self._grammar_limits = (llguidance.LLParserLimits(**x) for x in (_LIMITS, _GRAMMAR_LIMITS))
        self._from_schema = functools.partial(llguidance.LLMatcher.grammar_from_json_schema, overrides=_JSON)
        self._from_regex = llguidance.LLMatcher.grammar_from_regex
        self._from_lark = llguidance.LLMatcher.grammar_from_lark
        self._pool = ThreadPoolExecutor(_THREADS, "less-export grammar")

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that a schema takes; properties come in the schema's order.

        Raises:
            UsageError: the schema is invalid, too large, unsatisfiable, or has keywords that cannot be enforced.
        """
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is invalid: {one_line(error)}") from None
        if len(text) > MAX_SCHEMA:
            raise UsageError(f"the JSON schema has {len(text):,} characters, and at most {MAX_SCHEMA:,} are taken")
        return self._compile("JSON schema", lambda: self._from_schema(text))

    def regex(self, pattern: str) -> Grammar:
        """Text that matches ``pattern`` from its beginning to its end, in the syntax of Rust's ``regex``.

        Raises:
            UsageError: the pattern is invalid or too large, or nothing matches it.
        """
        if len(pattern) > MAX_REGEX:
            raise UsageError(f"the regular expression has {len(pattern):,} characters, at most {MAX_REGEX:,} are taken")
        return self._compile("regular expression", lambda: self._from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of ``texts``, whole.

        Raises:
            UsageError: there are none, or they are too long together.
        """
        if not texts:
            raise UsageError("the list of choices is empty: give at least one")
        length = sum(map(len, texts))
        if length > MAX_REGEX or len(texts) > MAX_REGEX:
            raise UsageError(
                f"the {len(texts):,} choices have {length:,} characters together, at most {MAX_REGEX:,} are taken"
            )
        pattern = "|".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) for text in texts)
        return self._compile("list of choices", lambda: self._from_regex(pattern))

    def lark(self, grammar: str) -> Grammar:
        """Text that a context-free grammar takes, in llguidance's variant of Lark's syntax; its rule is ``start``.

        Raises:
            UsageError: the grammar is invalid or too large, or no text satisfies it.
        """
        if len(grammar) > MAX_GRAMMAR:
            raise UsageError(f"the grammar has {len(grammar):,} characters, at most {MAX_GRAMMAR:,} are taken")
        return self._compile("grammar", lambda: self._from_lark(grammar), self._grammar_limits)

    def _compile(self, what: str, source: Callable[[], str], limits: Any = None) -> Grammar:
        def compiled() -> tuple[LLMatcher, Forbidden | None]:
            matcher = self._matcher(source(), limits=self._limits if limits is None else limits)
            return matcher, None if matcher.is_error() else _forbidden(matcher, self._vocab_size)

        try:
            matcher, first = _with_stack(compiled)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic is no Exception
            raise UsageError(f"the {what} is invalid: {one_line(error)}") from error
        if matcher.is_error():
            reason = matcher.get_error()
            if "NoExtension" in reason:
                raise UsageError(f"the {what} is invalid: no text satisfies it")
            raise UsageError(f"the {what} is invalid: {_reason(reason)}")
        assert first is not None
        return Grammar(matcher, first, self._pool)


class Grammar:
    """A compiled form of answers, one of ``SamplingParams.processors``; any number of sequences may have it."""

    def __init__(self, matcher: LLMatcher, first: Forbidden, pool: ThreadPoolExecutor) -> None:
        self._matcher, self._first, self._pool = matcher, first, pool

    def start(self) -> GrammarProcessor:
        """A processor for one sequence."""
        return GrammarProcessor(self._matcher.deep_copy(), self._first, self._pool)


class GrammarProcessor:
    """Forbids the tokens that a grammar does not go on with; of one sequence, which tells it every choice."""

    def __init__(self, matcher: LLMatcher, first: Forbidden, pool: ThreadPoolExecutor) -> None:
        self._matcher, self._vocab_size, self._pool = matcher, len(first), pool
        self._forbidden: Future[Forbidden] = Future()
        self._forbidden.set_result(first)

    def __call__(self, token_ids: Sequence[int], logits: npt.NDArray[np.float32]) -> None:
        """Forbid tokens in ``logits`` [V].

        Raises:
            UsageError: the grammar takes more time or memory than is allowed.
        """
        np.copyto(logits, -np.inf, where=self._forbidden.result())

    def chosen(self, token_id: int) -> None:
        """Find out, while the model runs, what may follow ``token_id``."""
        self._forbidden = self._pool.submit(self._after, token_id)

    def _after(self, token_id: int) -> Forbidden:
        try:
            if self._matcher.consume_token(token_id):
                forbidden = _forbidden(self._matcher, self._vocab_size)
                if not self._matcher.is_error():
                    return forbidden
            reason = _reason(self._matcher.get_error())
        except BaseException as error:  # a panic is no Exception
            reason = one_line(error)
        raise UsageError(f"the answer's grammar cannot go on: {reason}")


def _with_stack(call: Callable[[], _T]) -> _T:
    """What ``call`` returns or raises on a thread with a stack of ``_STACK`` bytes."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # a panic is no Exception
            outcome.set_exception(error)

    with _STACK_LOCK:  # the size is one of the process, for threads that start from now on
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="less-export form", daemon=True).start()
        finally:
            threading.stack_size(before)
    return outcome.result()


def _forbidden(matcher: LLMatcher, vocab_size: int) -> Forbidden:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, count=vocab_size, bitorder="little") == 0


def _reason(error: str) -> str:
    """What llguidance says, without the places in its own grammar and the state that follows."""
    return one_line(error.split("\n<")[0].rpartition("\nerror: ")[2].partition("\n")[0])
