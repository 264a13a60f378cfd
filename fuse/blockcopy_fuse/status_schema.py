"""The status that a mount tells, believed by type and bounds alone: another user may be the one who tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blockcopy.protocol.strict_json import parse_object

MOST_BYTES = 1 << 20
"""Of the text of a status."""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and value >= 0  # type: ignore[operator]  # all are finite


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _are_ranges(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and all(map(_is_count, each)) for each in value
    )


Check = Callable[[object], bool]

REQUIRED: dict[str, Check] = {"state": _is_text, "size": _is_count, "source_needed": _is_flag}

FIELDS: dict[str, tuple[Check, Any]] = {
    "source": (_is_text, "?"),
    "destination": (_is_text, "?"),
    "pid": (_is_count, 0),
    "hydrated_bytes": (_is_count, 0),
    "hydrated_percent": (_is_number, 0),
    "resumed_bytes": (_is_count, 0),
    "same_bytes": (_is_count, 0),
    "fetched_bytes": (_is_count, 0),
    "zero_bytes": (_is_count, 0),
    "hole_bytes": (_is_count, 0),
    "unreadable_bytes": (_is_count, 0),
    "unreadable_ranges": (_are_ranges, []),
    "verified_bytes": (_is_count, 0),
    "verified_percent": (_is_number, None),
    "sent_bytes": (_is_count, 0),
    "received_bytes": (_is_count, 0),
    "rate_bytes_per_s": (_is_count, 0),
    "limit_bytes_per_s": (_is_count, None),
    "eta_seconds": (_is_count, None),
    "elapsed_seconds": (_is_number, 0),
    "state_file": (_is_text, None),
    "error": (_is_text, None),
    "mountpoint": (_is_text, None),
    "control_socket": (_is_text, None),
}
"""What each is, and what it is if a mount of another version does not tell it; null where that is null."""

NESTED: dict[str, dict[str, tuple[Check, Any]]] = {
    "demand": {
        "reads": (_is_count, 0),
        "bytes": (_is_count, 0),
        "waiting": (_is_count, 0),
        "latency_p50_seconds": (_is_number, None),
        "latency_p99_seconds": (_is_number, None),
        "latency_max_seconds": (_is_number, None),
    },
    "link": {"state": (_is_text, "?"), "reconnects": (_is_count, 0), "last_error": (_is_text, None)},
}


def parse(text: bytes) -> dict[str, Any]:
    """Return the status that `text` is, with every field. Raises ValueError if it is none."""
    return checked(parse_object(text, errors="surrogateescape"))


def checked(found: object) -> dict[str, Any]:
    """Return the status with every field. Raises ValueError if one is not what it should be."""
    if not isinstance(found, dict):
        raise ValueError("no status")  # noqa: TRY004  (of data, not of an argument)
    for name, check in REQUIRED.items():
        if not check(found.get(name)):
            raise ValueError(f"{name} is missing, or wrong")
    nested = {name: _fields(found.get(name, {}), fields) for name, fields in NESTED.items()}
    return {**_fields(found, FIELDS), **nested}


def _fields(found: object, fields: dict[str, tuple[Check, Any]]) -> dict[str, Any]:
    """All that is found, and the defaults of what is not."""
    if not isinstance(found, dict):
        raise ValueError("a group of fields is none")  # noqa: TRY004  (as above)
    made = {name: default for name, (_, default) in fields.items()} | found
    for name, (check, default) in fields.items():
        if not (check(made[name]) or (default is None and made[name] is None)):
            raise ValueError(f"{name} is wrong")
    return made


def cells(found: object, most: int) -> list[dict[str, int]]:
    """Return the cells of a map, as `Replica.map` has them; none if these are no cells."""
    if not isinstance(found, list) or len(found) > most:
        return []
    return found if all(map(_is_cell, found)) else []


def _is_cell(value: object) -> bool:
    names = {"blocks", "present", "zero", "in_flight", "reading"}
    return isinstance(value, dict) and value.keys() == names and all(map(_is_count, value.values()))
