"""Dataclasses made of JSON, whose values may be of any type."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def checked(value: T) -> T:
    """The dataclass instance itself; raises :class:`TypeError` unless its fields hold what their annotations say."""
    for name, hint in typing.get_type_hints(type(value)).items():
        if not _fits(getattr(value, name), hint):
            raise TypeError(f"'{name}' has the wrong type")
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:  # of any length, with elements of one type
        return isinstance(value, tuple) and all(_fits(x, arguments[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str):
        return type(value) is hint  # exactly: True is not a number here
    return isinstance(value, hint)
