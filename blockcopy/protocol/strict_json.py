"""JSON that another process wrote → plain values, whose depth, numbers and text are bounded.

The caller bounds the bytes. Whatever passes can be compared, shown, encoded again and stored without an error.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_MOST_DEPTH = 16

_LARGEST = 1 << 64
"""Numbers lie between this and its negative: sizes, times and inode numbers do."""


def parse_object(data: bytes, *, errors: str = "strict") -> dict[str, Any]:
    """Return the object that `data` is. Raises ValueError if it is no object of plain JSON.

    `errors`: `surrogateescape` if text may be a path of any bytes.

    Refused are names that stand twice, nesting deeper than 16, NaN, infinities, numbers beyond 64 bits, and text
    that UTF-8 cannot have.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004  (of data, not of an argument)
    _check(value, _MOST_DEPTH, errors)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _check(value: object, depth: int, errors: str) -> None:
    if isinstance(value, (dict, list)):
        if not depth:
            raise ValueError("nested too deep")
        for each in value:
            _check(each, depth - 1, errors)
        if isinstance(value, dict):
            for each in value.values():
                _check(each, depth - 1, errors)
    elif isinstance(value, str):
        value.encode(errors=errors)  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    elif isinstance(value, (int, float)) and not abs(value) < _LARGEST:
        raise ValueError("a number beyond 64 bits")
