"""Chat templates: transformers' environment, so that a model's template renders to the same text, within limits.

The template comes with the model and is not trusted: it runs in Jinja's sandbox, sees nothing but plain data, and
pays for all that it does, by the size of its values (:mod:`.template_budget`).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from markupsafe import Markup

from ..errors import BundleError, UsageError, one_line
from . import template_filters
from .template_budget import HTML_GROWTH, REPR_GROWTH, Budget, LimitError
from .template_syntax import Generation, MeteredCodeGenerator, metered

#: Names under which a message may carry the model's reasoning; templates read the first, or "thinking".
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Raises:
        BundleError: the source is not a template. UsageError: it is too large.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(metered(self._environment, source))
        except jinja2.TemplateSyntaxError as error:
            reason = one_line(error.message or "syntax error")
            raise BundleError(f"the model's chat template does not compile: {reason}") from error
        except Exception as error:  # recursion, Python's own limits
            raise _stopped(error, "does not compile") from error

    def render(self, messages: Sequence[Any], **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each. Entries that are None are left out.
            variables: what else the template sees.

        Raises:
            UsageError: the template refuses the messages, fails, or takes too long or too much memory.
        """
        with self._lock:
            self._environment.budget.reset()
            try:
                data = {n: _plain(v) for n, v in variables.items()}
                text = self._template.render({**data, "messages": [_message(m) for m in messages]})
                self._environment.budget.check_chars(len(text))
                return text
            except Exception as error:
                raise _stopped(error, "refuses these messages") from error


def _stopped(error: Exception, failure: str) -> UsageError:
    if isinstance(error, LimitError):
        return UsageError(f"the model's chat template was stopped: {error}; pass a plain prompt instead")
    reason = "it recurses too deeply" if isinstance(error, RecursionError) else one_line(error) or type(error).__name__
    return UsageError(f"the model's chat template {failure}: {reason}")


# ------------------------------------------------------------------ what a template sees


def _message(message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise TypeError(f"a message must be a dict with role and content, not {type(message).__name__}")
    plain = {k: v for k, v in plain.items() if v is not None}
    reasoning = next((plain[n] for n in _REASONING if n in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """``value`` as JSON types; templates get no objects with methods. What cannot be converted becomes ``<type>``."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):  # a scalar of numpy or torch
        return _plain(value.item())
    return f"<{type(value).__name__}>"


class _Dict:
    """``dict`` of the template: no class, so that nothing else of it can be reached."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` of the template; refuses names with an underscore, which libraries give a meaning."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        attributes = dict(*args, **attributes)
        for name in attributes:
            _Namespace._check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError("names of a namespace cannot begin with an underscore")


# ------------------------------------------------------------------ the environment


@pass_context
def _finalize(context: Any, value: Any) -> Any:
    """Pay for a value that is written."""
    budget: Budget = context.environment.budget
    budget.write(budget.text_size(value))
    return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of transformers' templates, with a budget."""

    code_generator_class = MeteredCodeGenerator
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            optimized=False,  # nothing is computed while the template compiles
            finalize=_finalize,
            cache_size=0,
        )
        self.budget = Budget()
        self.filters.clear()
        self.filters.update(template_filters.filters(self.budget))
        self.tests.update(template_filters.tests(self.budget))
        del self.globals["lipsum"]
        self.globals["raise_exception"] = self._raise_exception
        self.globals["strftime_now"] = self._strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def _raise_exception(self, message: Any) -> None:
        self.budget.check_chars(self.budget.text_size(message))
        raise jinja2.TemplateError(str(message))

    def _strftime_now(self, form: str) -> str:
        if len(form) > 1000 or re.search(r"\d{3}", form):  # the C library takes widths
            raise LimitError("it formats the date with more than 1,000 characters")
        return datetime.datetime.now().strftime(form)

    # ------------------------------------------------------------ called by the compiled template

    def charge(self, steps: int, chars: int) -> bool:
        """Pay for a block of statements; true, so that it can stand in a condition."""
        self.budget.spend(steps)
        if chars:
            self.budget.write(chars)
        return True

    def compared(self, value: Any) -> Any:
        """A value that is compared or hashed."""
        self.budget.measure(value)
        return value

    def searched(self, value: Any) -> Any:
        """The right-hand side of ``in``."""
        if isinstance(value, str):
            self.budget.spend(len(value) // 512)
        return value if isinstance(value, dict) else self.compared(value)

    def copied(self, value: Any) -> Any:
        """A slice."""
        return self.budget.produced(value)

    def joined(self, *values: Any) -> str:
        """The operator ``~``."""
        self.budget.check_chars(sum(map(self.budget.text_size, values)))
        return str(self.budget.produced("".join(map(str, values))))

    # ------------------------------------------------------------ called by Jinja

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.binary(operator, left, right)
        return self.budget.produced(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            self.budget.measure(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else _Format(self, value.__self__, value.__name__ == "format_map")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.spend(1 + len(args) + len(kwargs))
        call = functools.partial(super().call, __context, __obj)
        if isinstance(__obj, Macro | LoopContext | Joiner | _Format | jinja2.Undefined):
            return call(*args, **kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.MethodType | types.BuiltinMethodType):
            if isinstance(owner, Cycler | LoopContext | Generation | _Environment):
                if __obj.__name__ not in ("reset", "next", "contents"):
                    budget.measure([args, kwargs])  # compared or written
                return budget.produced(call(*args, **kwargs))
            if isinstance(owner, _Dict):
                return call(*__self._entries(args), **kwargs)
            arguments = template_filters.method_arguments(budget, owner, __obj.__name__, args, kwargs)
            if arguments is not None:
                result = call(*arguments, **kwargs)
                return result if isinstance(owner, dict) else budget.produced(result)
        if any(__obj is __self.globals[n] for n in ("range", "dict", "namespace", "cycler", "joiner")):
            if __obj in (__self.globals["dict"], __self.globals["namespace"]):
                args = __self._entries(args)
            return call(*args, **kwargs)
        name = getattr(__obj, "__name__", type(__obj).__name__)
        raise jinja2.sandbox.SecurityError(f"{name} cannot be called from a chat template")

    def _entries(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of which a dict is made, paid for."""
        args = tuple([*self.budget.counted(a)] if isinstance(a, Iterator) else a for a in args)
        for value in args:
            self.budget.measure(value)  # the keys are hashed
            if isinstance(value, Sized):
                self.budget.check_items(4 * len(value), 32)
        return args


class _Format(jinja2.sandbox.SandboxedFormatter):
    """``text.format`` and ``text.format_map``."""

    def __init__(self, environment: _Environment, text: str, is_map: bool) -> None:
        super().__init__(environment)
        self._budget, self._text, self._is_map, self._length = environment.budget, text, is_map, 0

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._is_map:
            (kwargs,), args = args, ()
        self._budget.spend(2 * self._text.count("{") + self._text.count("}"))
        self._length = len(self._text)
        text = self.vformat(self._text, args, kwargs)
        return str(self._budget.produced(Markup(text) if isinstance(self._text, Markup) else text))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion:
            self._budget.check_chars(self._budget.text_size(value) * REPR_GROWTH)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        length = self._budget.text_size(value)
        for digits in re.findall(r"\d+", format_spec):
            length += self._budget.check_field(digits)
        if isinstance(self._text, Markup):
            length *= HTML_GROWTH
            value = value if isinstance(value, int | float) else Markup.escape(value)
        self._length = self._budget.check_chars(self._length + length)
        self._budget.spend(length // 64)
        return super().format_field(value, format_spec)
