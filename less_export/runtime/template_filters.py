"""Jinja's filters, tests and the methods of strings, lists and dicts, as chat templates may use them.

Each pays before it runs. Those whose result can be much larger than what they are given check its size first. Filters
that no template needs and that take time without bounds (``wordwrap``, ``urlize``, ``xmlattr``, ``striptags``,
``pprint``) and methods that are not listed here do not exist.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from jinja2 import filters as builtin
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.tests import TESTS
from jinja2.utils import pass_environment, pass_eval_context
from markupsafe import Markup

from .template_budget import HTML_GROWTH, URL_GROWTH, Budget, LimitError

Function = Callable[..., Any]

#: Filters that only look at a value, or hand out what is in it.
_LOOK = ("attr", "count", "d", "default", "first", "items", "last", "length", "random")
#: Filters that hand out the items one by one.
_LAZY = ("map", "reject", "rejectattr", "select", "selectattr", "slice")
#: Filters of a text, and how many characters each of its characters may become.
_TEXT = {
    "capitalize": 3,
    "lower": 3,
    "title": 3,
    "truncate": 1,
    "upper": 3,
    "string": 1,
    "safe": 1,
    "urlencode": URL_GROWTH,
}
_TEXT |= dict.fromkeys(("e", "escape", "forceescape"), HTML_GROWTH)
#: Filters that visit all of a value, several times.
_DEEP = ("dictsort", "groupby", "max", "min", "sort", "unique")
_NUMBER = ("abs", "filesizeformat", "float", "int")
#: Tests that compare or search values; the others look at their type.
_COMPARING = {"eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"}
_COMPARING |= {"==", "in", "lower", "upper", "odd", "even", "divisibleby"}
#: Longest name of an attribute, such as "function.name".
_ATTRIBUTE = 100


# ------------------------------------------------------------------ filters


def filters(budget: Budget) -> dict[str, Function]:
    """The filters of chat templates, paying from ``budget``."""
    pays = {**dict.fromkeys(_LOOK, _pay_look), **dict.fromkeys(_LAZY, _pay_lazy), **dict.fromkeys(_DEEP, _pay_deep)}
    pays |= dict.fromkeys(_NUMBER, _pay_number) | {n: functools.partial(_pay_text, g) for n, g in _TEXT.items()}
    table = {name: _metered(FILTERS[name], budget, pay) for name, pay in pays.items()}
    measured = _Measured(budget)
    for name in (
        "batch",
        "center",
        "format",
        "indent",
        "join",
        "list",
        "replace",
        "reverse",
        "round",
        "sum",
        "tojson",
        "trim",
    ):
        table[name] = _metered(getattr(measured, name), budget, _pay_look)
    table["wordcount"] = _metered(measured.wordcount, budget, _pay_look)
    return table


def _metered(function: Function, budget: Budget, pay: Function) -> Function:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context comes before the value

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        budget.spend(2 + len(args) + len(kwargs))
        value, rest = args[first], [*args[first + 1 :], *kwargs.values()]
        value = pay(budget, value, rest)
        result = function(*args[:first], value, *args[first + 1 :], **kwargs)
        if isinstance(result, Iterator):
            return budget.counted(result)
        return budget.produced(result) if isinstance(result, int) else result

    return wrapper


def _check_attributes(arguments: list[Any]) -> None:
    if any(isinstance(a, str) and len(a) > _ATTRIBUTE for a in arguments):
        raise LimitError(f"it looks up an attribute with more than {_ATTRIBUTE} characters")


def _pay_look(budget: Budget, value: Any, rest: list[Any]) -> Any:
    return value


def _pay_lazy(budget: Budget, value: Any, rest: list[Any]) -> Any:
    _check_attributes(rest[:1])
    return budget.counted(value) if isinstance(value, list | tuple | range | Mapping | Iterator) else value


def _pay_deep(budget: Budget, value: Any, rest: list[Any]) -> Any:
    _check_attributes(rest)
    value = [*budget.counted(value)] if isinstance(value, Iterator) else value
    size = budget.measure(list(value) if isinstance(value, range) else value)
    budget.spend(3 * size.objects + size.chars // 32, 100 * size.objects + 4 * size.chars)
    return value


def _pay_number(budget: Budget, value: Any, rest: list[Any]) -> Any:
    budget.measure(value if isinstance(value, str) else [value, *rest])
    return value


def _pay_text(growth: int, budget: Budget, value: Any, rest: list[Any]) -> Any:
    length = budget.check_chars(growth * sum(map(budget.text_size, [value, *rest])))
    slow = 4 if growth == URL_GROWTH else 1
    budget.spend(slow * length // 16, 4 * length if growth == URL_GROWTH else length)
    return value


class _Measured:
    """Filters whose result is measured before it is made."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def _text(self, value: Any) -> str:
        """``value`` as a string that was paid for."""
        if isinstance(value, str):
            self._budget.spend(len(value) // 64)
            return value
        self._budget.check_chars(self._budget.text_size(value))
        return str(value)

    def _produced(self, value: Any) -> Any:
        return self._budget.produced(value)

    def batch(self, value: Any, linecount: int, fill_with: Any = None) -> Any:
        self._budget.check_items(_whole(linecount))
        return builtin.do_batch(self._budget.counted(value), linecount, fill_with)

    def center(self, value: Any, width: int = 80) -> Any:
        self._budget.check_chars(_whole(width))
        return self._produced(builtin.do_center(self._text(value), width))

    def format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        value = self._text(value)
        self._budget.printf(value, kwargs or args)
        return self._produced(builtin.do_format(value, *args, **kwargs))

    def indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        s = self._text(s)
        lines = s.count("\n") + sum(s.count(c) for c in "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029") + 2
        self._budget.check_chars(len(s) + lines * (len(width) if isinstance(width, str) else _whole(width)))
        self._budget.spend(lines, 80 * lines)
        return self._produced(builtin.do_indent(s, width, first, blank))

    @pass_eval_context
    def join(self, eval_ctx: Any, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
        _check_attributes([attribute])
        items = self._budget.listed(value)
        if attribute is not None:
            items = [*map(make_attrgetter(eval_ctx.environment, attribute), items)]
        separator = self._budget.text_size(d) * max(0, len(items) - 1)
        length = self._budget.check_chars(separator + sum(map(self._budget.text_size, items)))
        self._budget.spend(length // 64 + len(items))
        return self._produced(builtin.sync_do_join(eval_ctx, items, d))

    def list(self, value: Any) -> Any:
        if isinstance(value, str):
            self._budget.spend(len(value) // 8, 84 * len(value))
            return [*value]
        if isinstance(value, Iterator):
            return [*self._budget.counted(value)]
        length = len(value) if isinstance(value, Sized) else 0
        self._budget.check_items(length, 8 if isinstance(value, list | tuple) else 72)
        return builtin.sync_do_list(value)

    @pass_eval_context
    def replace(self, eval_ctx: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        s, old, new = map(self._text, (s, old, new))
        _check_replacement(self._budget, s, old, new, -1 if count is None else count)
        return self._produced(builtin.do_replace(eval_ctx, s, old, new, count))

    def reverse(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._produced(self._text(value)[::-1])
        if not hasattr(value, "__reversed__") and isinstance(value, Iterable):
            value = self.list(value)
        return builtin.do_reverse(value)

    def round(self, value: Any, precision: int = 0, method: Any = "common") -> Any:
        if not -400 <= _whole(precision) <= 400:
            raise LimitError("it rounds to more than 400 digits")
        _pay_number(self._budget, value, [])
        return builtin.do_round(value, precision, method)

    @pass_environment
    def sum(self, environment: Any, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        _check_attributes([attribute])
        items = self._budget.listed(iterable)
        size = self._budget.measure([items if isinstance(items, list | tuple) else 0, start])
        if not isinstance(start, int | float):  # lists are copied at every addition
            self._budget.spend(len(items) * size.objects // 64, 8 * len(items) * size.objects)
        return self._produced(builtin.sync_do_sum(environment, items, attribute, start))

    def tojson(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """``tojson`` without Jinja's HTML escaping, as in transformers."""
        size = self._budget.measure(x)
        margin = len(indent) if isinstance(indent, str) else _whole(indent)
        extra = sum(map(self._budget.text_size, separators)) if isinstance(separators, tuple | list) else 0
        growth = 12 if ensure_ascii else 6 if size.chars > 100_000 else 1
        length = size.chars * growth + size.objects * (8 + size.depth * margin + extra)
        self._budget.check_chars(length)
        self._budget.spend(length // 64 + (2 * size.objects if indent is not None else 0), length)
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(self._produced(text))

    def trim(self, value: Any, chars: str | None = None) -> Any:
        value = self._text(value)
        self._budget.spend(len(value) * len(self._text(chars or "")) // 256)
        return self._produced(builtin.do_trim(value, chars))

    def wordcount(self, s: Any) -> int:
        s = self._text(s)
        self._budget.spend(len(s) // 16, 32 * len(s))
        return builtin.do_wordcount(s)


def _whole(value: Any) -> int:
    """A number that decides the size of a result; 0 for what the filter itself refuses."""
    return value if isinstance(value, int) else 0


def _check_replacement(budget: Budget, text: str, old: str, new: str, count: int) -> None:
    if not isinstance(old, str) or not isinstance(new, str):
        return
    times = text.count(old) if count < 0 else min(count, text.count(old))
    growth = HTML_GROWTH if isinstance(text, Markup) else 1
    budget.check_chars(growth * (len(text) + times * len(new)))
    budget.spend((len(text) + times * len(new)) // 64)


# ------------------------------------------------------------------ tests


def tests(budget: Budget) -> dict[str, Function]:
    """The tests of chat templates, paying from ``budget``."""

    def metered(name: str, function: Any) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            budget.spend(1 + len(args) + len(kwargs))
            if name in _COMPARING:
                for value in args:
                    if not (name == "in" and isinstance(value, dict)):
                        budget.measure(value)
            return function(*args, **kwargs)

        return wrapper

    return {name: metered(name, function) for name, function in TESTS.items()}


# ------------------------------------------------------------------ methods

_PREDICATES = ("alnum", "alpha", "ascii", "decimal", "digit", "identifier", "lower", "numeric", "printable", "space")
_STR = {"capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map", "index"}
_STR |= {"join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"}
_STR |= {"rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title"}
_STR |= {"upper", "zfill", "istitle", "isupper", *(f"is{p}" for p in _PREDICATES)}
#: Methods that search from the right, or for any of some characters: no faster than text times pattern.
_SLOW = ("rfind", "rindex", "rpartition", "rsplit", "strip", "lstrip", "rstrip")
_METHODS: dict[type, set[str]] = {
    str: _STR,
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    dict: {"copy", "get", "items", "keys", "values"},
    int: {"bit_length", "bit_count", "is_integer", "conjugate"},
    float: {"is_integer", "hex", "conjugate"},
}


def method_arguments(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Pay for ``owner.name(*args, **kwargs)``; the arguments to call it with, None where it is not allowed."""
    kind = next((k for k in _METHODS if isinstance(owner, k)), None)
    if kind is None or name not in _METHODS[kind]:
        return None
    if kind is str:
        return _text_method(budget, owner, name, args, [*args, *kwargs.values()])
    if name in ("count", "index"):
        budget.measure([owner, *args])
    elif name == "get":
        budget.measure(args[:1])
    elif name == "copy":
        budget.check_items(len(owner) * (8 if kind is dict else 1))
    return args


def _text_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    length, growth = len(text), HTML_GROWTH if isinstance(text, Markup) else 1
    budget.spend(length // 64)
    first = values[0] if values else None
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.check_chars(max(length, _whole(first)))
    elif name == "expandtabs":
        budget.check_chars(length + text.count("\t") * max(0, 8 if first is None else _whole(first)))
    elif name == "join" and args:
        items = budget.listed(values[0])
        chars = sum(map(budget.text_size, items)) + length * max(0, len(items) - 1)
        budget.check_chars(growth * chars)
        budget.spend(len(items) + growth * chars // 64)
        return (items, *args[1:])
    elif name == "replace" and len(values) >= 2:
        _check_replacement(budget, text, values[0], values[1], _whole(values[2]) if len(values) > 2 else -1)
    elif name in ("split", "rsplit", "splitlines"):
        separator = isinstance(first, str) and first
        pieces = text.count(separator) + 1 if separator and name != "splitlines" else length // 2 + 1
        budget.spend(pieces // 4, 64 * pieces + length)
    if name in _SLOW and isinstance(first, str):
        budget.spend(length * len(first) // 256)
    budget.measure(values)
    return args
