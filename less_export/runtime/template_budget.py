"""What a chat template may spend, and the sizes of values before and after an operation makes them.

A template is somebody else's program. Nothing here stops it by a clock: every operation pays for its work before it
runs, out of a budget that is the same on every machine.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import Namespace
from markupsafe import Markup

#: A step is about a microsecond of the template's own work: a node of its syntax, or so much of a library's work.
MAX_STEPS = 1_500_000
#: Bytes of all strings and lists that operations make.
MAX_BYTES = 128 << 20
#: Characters of any string, and of the prompt.
MAX_CHARS = 4_000_000
#: Bits of any integer.
MAX_BITS = 4096
#: Levels of nested lists and dicts where all of them are visited.
MAX_DEPTH = 200
#: Width or precision of a formatted field.
MAX_FIELD = 10_000
#: Characters that escaping one may take: ``&quot;`` in HTML, ``\\U0001f600`` in a repr, ``%F0`` (four) in a URL.
HTML_GROWTH, REPR_GROWTH, URL_GROWTH = 6, 10, 12

_EMPTY: dict[Any, Any] = {}
_PAIRS = (dict, type(_EMPTY.items()))
_ITEMS = (list, tuple, set, frozenset, type(_EMPTY.keys()), type(_EMPTY.values()))
_DIGITS = re.compile(r"\d+")


class LimitError(jinja2.TemplateRuntimeError):
    """The template asked for more than it may have."""


class Size(NamedTuple):
    """Of a value with all that it contains: number of objects, characters of its strings, levels."""

    objects: int
    chars: int
    depth: int


class Budget:
    """Steps and bytes of one rendering."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a rendering."""
        self.steps, self.bytes, self.written = MAX_STEPS, MAX_BYTES, 4 * MAX_CHARS

    def spend(self, steps: int, nbytes: int = 0) -> None:
        """Pay; raises :class:`LimitError` where too little is left."""
        self.steps -= steps
        self.bytes -= nbytes
        if self.steps < 0:
            raise LimitError(f"it takes more than {MAX_STEPS:,} steps")
        if self.bytes < 0:
            raise LimitError(f"it takes more than {MAX_BYTES >> 20} MB")

    def write(self, chars: int) -> None:
        """Pay for characters of output."""
        self.written -= chars
        if self.written < 0:
            raise LimitError(f"it writes more than {MAX_CHARS:,} characters")

    # ------------------------------------------------------------ sizes

    def measure(self, value: Any) -> Size:
        """The size of all that comparing, hashing or printing ``value`` visits, paid for; shared parts count again."""
        if isinstance(value, str):
            self.spend(1 + len(value) // 1024)
            return Size(1, len(value), 1)
        objects, chars, depth, paid = 0, 0, 1, 0
        stack = [iter((value,))]
        while stack:
            for item in stack[-1]:
                objects += 1
                if isinstance(item, str):
                    chars += len(item)
                    continue
                if objects + chars // 1024 - paid > 1000:
                    self.spend(objects + chars // 1024 - paid)
                    paid = objects + chars // 1024
                children = _children(item)
                if children is None:
                    chars += self._scalar_chars(item)
                    continue
                stack.append(children)
                depth = max(depth, len(stack))
                if depth > MAX_DEPTH:
                    raise LimitError(f"it nests data more than {MAX_DEPTH} levels deep")
                break
            else:
                stack.pop()
        self.spend(objects + chars // 1024 - paid)
        return Size(objects, chars, depth)

    def _scalar_chars(self, value: Any) -> int:
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError(f"it computes a number of more than {MAX_BITS:,} bits")
            return value.bit_length() // 3 + 2
        return 100

    def text_size(self, value: Any) -> int:
        """At least the length of ``str(value)``, which is paid for."""
        if isinstance(value, str):
            return len(value)
        if value is None or isinstance(value, bool | float | jinja2.Undefined):
            return 32
        size = self.measure(value)
        return size.chars * REPR_GROWTH + size.objects * 8

    def check_chars(self, chars: int) -> int:
        """Refuse a string of so many characters before it is made."""
        if chars > MAX_CHARS:
            raise LimitError(f"it makes a text of more than {MAX_CHARS:,} characters")
        return chars

    def check_items(self, items: int, nbytes: int = 8) -> None:
        """Pay for a list of so many items of ``nbytes`` each before it is made."""
        self.spend(items // 64, nbytes * max(0, items))

    def produced(self, value: Any) -> Any:
        """Pay for the memory of ``value``, which an operation has just made, and return it."""
        if isinstance(value, str):
            self.check_chars(len(value))
            self.spend(len(value) // 1024, sys.getsizeof(value))
        elif isinstance(value, list | tuple):
            self.check_items(len(value))
        elif isinstance(value, int):
            self._scalar_chars(value)
        return value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each for a step."""
        for item in items:
            self.spend(1)
            yield item

    def listed(self, items: Iterable[Any]) -> Sequence[Any]:
        """The items as something with a length."""
        if isinstance(items, str | list | tuple | range):
            self.check_items(len(items))
            return items
        return [*self.counted(items)]

    # ------------------------------------------------------------ operators

    def binary(self, operator: str, left: Any, right: Any) -> None:
        """Pay for ``left operator right`` and refuse what is too large, before it is computed."""
        if operator == "%" and isinstance(left, str):
            self.printf(left, right)
            return
        for value in (left, right):
            if isinstance(value, int):
                self._scalar_chars(value)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left not in (-1, 0, 1) and left.bit_length() * right > MAX_BITS:
                raise LimitError(f"it computes a number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                    self._check_length(sequence, len(sequence) * max(0, times))
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            growth = HTML_GROWTH if isinstance(left, Markup) or isinstance(right, Markup) else 1
            self._check_length(left, growth * (len(left) + len(right)))

    def _check_length(self, kind: str | list[Any] | tuple[Any, ...], length: int) -> None:
        if isinstance(kind, str):
            self.check_chars(length)
        else:
            self.spend(length // 64, 8 * length)

    def printf(self, template: str, values: Any) -> None:
        """Pay for ``template % values``."""
        items = (
            values if isinstance(values, tuple) else tuple(values.values()) if isinstance(values, dict) else (values,)
        )
        largest = max((self.text_size(v) for v in items), default=0)
        if isinstance(template, Markup):
            largest *= HTML_GROWTH
        length, at = len(template), template.find("%")
        while at >= 0:
            self.spend(1)
            begin, (field, at) = at, _printf_field(template, at + 1)
            self.spend((at - begin) // 8)
            for number in _DIGITS.findall(field):
                length += self.check_field(number)
            if "*" in field:
                raise LimitError("it formats a field whose width is a variable")
            kind = template[at : at + 1]
            length += largest * (REPR_GROWTH if kind in ("r", "a") else 1)
            self.check_chars(length)
            at = template.find("%", at + 1)

    def check_field(self, digits: str) -> int:
        """Width or precision of a field, refused where it is too large."""
        if len(digits) > 6 or int(digits) > MAX_FIELD:
            raise LimitError(f"it formats a field of more than {MAX_FIELD:,} characters")
        return int(digits)


def _children(value: Any) -> Iterator[Any] | None:
    """What a value contains; None where it is not a container."""
    if isinstance(value, _ITEMS):
        return iter(value)
    if isinstance(value, _PAIRS):
        return itertools.chain.from_iterable(value.items() if isinstance(value, dict) else value)
    if isinstance(value, Namespace):
        attributes: dict[str, Any] = object.__getattribute__(value, "_Namespace__attrs")
        return iter(attributes.values())
    return None


def _printf_field(template: str, at: int) -> tuple[str, int]:
    """Flags, width and precision of a field that starts after its ``%``, and where its type stands."""
    if template.startswith("(", at):
        level, at = 1, at + 1
        while level and at < len(template):
            level += {"(": 1, ")": -1}.get(template[at], 0)
            at += 1
    begin = at
    while at < len(template) and template[at] in "-+ #0123456789.*hlL":
        at += 1
    return template[begin:at], at
