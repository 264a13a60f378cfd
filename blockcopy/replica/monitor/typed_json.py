"""JSON of another process, as dataclasses: a value is believed only if its type and its bounds are right.

The annotations of a dataclass say all: `int` is a count, `X | None` may be null, `tuple[X, ...]` is a list.
A field with a default may be missing. A name that is no field comes from a newer version, and is ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_LARGEST = (1 << 63) - 1
"""Largest number that is believed. Sizes, counts and seconds are below it."""

T = TypeVar("T")


def parse(kind: type[T], value: object) -> T:
    """Convert `value`, decoded JSON, into the dataclass `kind`, or into another type that a field can have.

    Returns an instance of `kind` in which each field has its annotated type.
    Raises ValueError if `value` is no such object, a field is wrong, or a field without a default is missing.
    """
    found: T = _parsed(kind, value, kind.__name__)
    return found


def _parsed(kind: Any, value: object, name: str) -> Any:
    """Return `value`, decoded JSON, as the annotated type `kind`. `name`: of the field, for a ValueError."""
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _parsed(get_args(kind)[0], value, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_parsed(get_args(kind)[0], each, name) for each in value)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _parsed(get_args(kind)[1], each, key) for key, each in value.items()}
    fields = getattr(kind, "_fields", ())  # of a NamedTuple
    if fields and isinstance(value, list) and len(value) == len(fields):
        hints = get_type_hints(kind)
        return kind(*(_parsed(hints[field], each, name) for field, each in zip(fields, value, strict=True)))
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
        return kind(value)
    if kind not in _SCALARS or not _SCALARS[kind](value):
        raise ValueError(f"{name} has an invalid value")
    return value


def _dataclass(kind: Any, found: dict[str, object]) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in found:
            values[field.name] = _parsed(hints[field.name], found[field.name], field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**values)


_SCALARS: dict[object, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    bool: lambda value: type(value) is bool,
    int: lambda value: type(value) is int and 0 <= value <= _LARGEST,
    float: lambda value: type(value) in (int, float) and 0 <= value <= _LARGEST,
}
