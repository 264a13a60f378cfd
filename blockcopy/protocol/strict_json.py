"""JSON of another process → plain values of bounded depth, numbers and text.

The caller bounds the bytes. Accepted values can be compared, printed, encoded and stored without an error.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_MAX_DEPTH = 16

_NUMBER_BOUND = 1 << 64
"""Numbers lie between this bound and its negative. Sizes, times and inode numbers fit."""


def parse_object(data: bytes, *, errors: str = "strict") -> dict[str, Any]:
    """Parse `data`, the bytes of one JSON object, and return it as a dict.

    `errors`: how `str.encode()` treats lone surrogates in text. Use "surrogateescape" if text may be any path.

    Raises ValueError if `data` is no object in UTF-8 JSON. Refuses duplicate names, NaN and
    infinities. Refuses nesting deeper than 16, numbers beyond 64 bits, and text that UTF-8 cannot encode.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004  (of data, not of an argument)
    _check(value, _MAX_DEPTH, errors)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate name in an object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _check(value: object, depth: int, errors: str) -> None:
    """Raise ValueError if `value` is nested deeper than `depth`, or holds a bad number or text.

    `errors`: as for `parse_object()`.
    """
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError("nested too deep")
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(each, depth - 1, errors)
    elif isinstance(value, str):
        value.encode(errors=errors)  # UnicodeEncodeError, a ValueError, if it has a lone surrogate
    elif isinstance(value, (int, float)) and not abs(value) < _NUMBER_BOUND:
        raise ValueError("a number beyond 64 bits")
