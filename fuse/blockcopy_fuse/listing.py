"""`list`: all replicas that are mounted on this machine. None of them is waited for for long."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from blockcopy.errors import MountError
from blockcopy.progress.rate import human_size, human_time
from blockcopy.untrusted_text import printable
from blockcopy_fuse import control_client, mountinfo
from blockcopy_fuse.probe import Place

_SECONDS = 1.0
"""How long all mounts together may take to answer."""

_HEAD = ["MOUNTPOINT", "SOURCE", "STATE", "HERE", "RATE", "TO GO", "SOURCE IS"]


def replicas() -> list[dict[str, Any]]:
    """The snapshots of all, with `mountpoint`; where there is none, `mountpoint`, `source` and `error`."""
    found = [
        Place(mountpoint, entry, entry.owner)
        for mountpoint, entry in mountinfo.everywhere()
        if entry.kind == control_client.KIND and entry.owner is not None
    ]
    asked = [(place, control_client.AskingStatus(place)) for place in found]
    end = time.monotonic() + _SECONDS
    return [
        {"source": place.entry.source, **_answer(asking, end), "mountpoint": place.mountpoint}
        for place, asking in asked
    ]


def _answer(asking: control_client.AskingStatus, end: float) -> dict[str, Any]:
    with contextlib.closing(asking):
        try:
            answer = asking.answer(max(0, end - time.monotonic()))
        except MountError as error:
            return {"error": str(error)}
    return answer or {"error": f"no answer within {_SECONDS:g} s"}


def table(found: list[dict[str, Any]]) -> str:
    """In columns, for people; what cannot be told of a mount, at the end of its line."""
    rows = [_HEAD, *([printable(text) for text in _row(each)] for each in found)]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(_HEAD))]
    widths[2] = max(len(row[2]) for row in rows if len(row) == len(_HEAD))  # not of an error, which is the last
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(snapshot: dict[str, Any]) -> list[str]:
    if "state" not in snapshot:
        return [snapshot["mountpoint"], snapshot["source"], snapshot["error"]]
    moves = snapshot["eta_seconds"] is not None
    return [
        snapshot["mountpoint"],
        snapshot["source"],
        snapshot["state"],
        f"{snapshot['hydrated_percent']:.2f} %",
        f"{human_size(snapshot['rate_bytes_per_s'])}/s" if moves else "-",
        human_time(snapshot["eta_seconds"]) if moves else "-",
        "needed" if snapshot["source_needed"] else "not needed",
    ]
