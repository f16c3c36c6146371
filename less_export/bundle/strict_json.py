"""JSON from strangers: bounded in size, depth and numbers before anything reads it.

The C++ runtime follows the same rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

#: Largest text in bytes, and the most objects and lists that may be nested in one another.
MAX_BYTES = 16 << 20
MAX_DEPTH = 64
_MAX_DIGITS = 100

#: How transformers writes numbers that JSON lacks, and this package too: as an object with one of these names.
_FLOAT_TAG = "__float__"
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class SchemaError(ValueError):
    """A text that is not of the right form; the message says where."""


def read_json(text: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        SchemaError: not JSON in UTF-8, too large, nested too deeply, a key twice in an object, or a number that is not
            finite.
    """
    if len(text) > MAX_BYTES:
        raise SchemaError(f"it has more than {MAX_BYTES >> 20} MB")
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_bounded,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
        if _depth_exceeds(value, MAX_DEPTH):
            raise RecursionError
    except RecursionError:
        raise SchemaError(f"it is nested too deeply: {MAX_DEPTH} levels are allowed") from None
    except UnicodeDecodeError:
        raise SchemaError("it is not UTF-8") from None
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError(f"it is not JSON: {error}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SchemaError(f"duplicate key {shown(next(k for k in keys if keys.count(k) > 1))}")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise SchemaError(f"{shown(text)} has more than {_MAX_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise SchemaError(f"{shown(text)} is not a finite number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise SchemaError(f"{name} is not a finite number")


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return False
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    return True


def tag_floats(value: Any) -> Any:
    """A JSON value in which NaN and infinities are objects, as transformers writes them into config.json."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {k: tag_floats(v) for k, v in value.items()}
    return [tag_floats(v) for v in value] if isinstance(value, list | tuple) else value


def untag_floats(value: Any) -> Any:
    """The value that :func:`tag_floats` was given."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_TAG}:
            return _SPECIAL_FLOATS.get(str(value[_FLOAT_TAG]), value)
        return {k: untag_floats(v) for k, v in value.items()}
    return [untag_floats(v) for v in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value for a message: ASCII on one line, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
