"""`list`: all replicas that are mounted on this machine. An unresponsive mount is waited for only for a second."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from blockcopy.errors import MountError
from blockcopy.progress.rate import human_size, human_time
from blockcopy.replica.monitor.status import Status
from blockcopy.untrusted_text import printable
from blockcopy_fuse import mountinfo
from blockcopy_fuse.control_client import KIND, StatusRequest
from blockcopy_fuse.mountinfo import NO_FUSE, Mount

_SECONDS = 1.0
"""How long all mounts together may take to answer."""

_MIN_WIDTH = 12
"""Columns that a mountpoint and a source have at least."""

_HEADINGS = ["MOUNTPOINT", "SOURCE", "STATE", "PRESENT", "RATE", "TO GO", "SOURCE IS"]


@dataclass(frozen=True)
class ListedMount:
    """A mounted replica, and its status or the reason why there is no status."""

    mount: Mount
    status: Status | None
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: the status or, if there is none, the source, the error and the mountpoint."""
        fields = self.status.as_dict() if self.status else {"error": self.error}
        return {"source": self.mount.source, **fields, "mountpoint": self.mount.mountpoint}

    def cells(self) -> list[str]:
        """Return the list of texts in the table's row. The last text is an error if there is no status."""
        status = self.status
        if status is None:
            return [self.mount.mountpoint, self.mount.source, self.error]
        grows = status.eta_seconds is not None
        return [
            self.mount.mountpoint,
            status.source,
            status.state_word,
            f"{status.hydrated_percent:.2f} %",
            f"{human_size(status.rate_bytes_per_s)}/s" if grows else "-",
            "-" if status.eta_seconds is None else human_time(status.eta_seconds),
            "needed" if status.source_needed else "not needed",
        ]


def replicas() -> list[ListedMount]:
    """Ask all mounted replicas for their status, side by side.

    Returns a list of ListedMount, within about a second.
    """
    mounts = [mount for mount in mountinfo.mounts() if mount.kind == KIND and mount.owner != NO_FUSE]
    requests = [StatusRequest(mount) for mount in mounts]
    end = time.monotonic() + _SECONDS
    return [_listed(request, end) for request in requests]


def _listed(request: StatusRequest, end: float) -> ListedMount:
    """Wait until `end`, a time of the monotonic clock, for the status that `request` asks for.

    Returns the mount with its status, or with the reason why there is none.
    """
    with contextlib.closing(request):
        try:
            status = request.status(max(0, end - time.monotonic()))
        except MountError as error:
            return ListedMount(request.mount, None, str(error))
    return ListedMount(request.mount, status, "" if status else f"no answer within {_SECONDS:g} s")


def table(mounts: list[ListedMount], width: int | None = None) -> str:
    """Return a table of `mounts`, ListedMounts, as text for people. An error may be longer than its column.

    `width`: columns of the terminal, to which mountpoints and sources are shortened. None: as wide as needed.
    """
    rows = [_HEADINGS, *([printable(text) for text in each.cells()] for each in mounts)]
    widths = _widths(rows)
    if width is not None:
        left = width - sum(widths[2:]) - len("  ") * (len(widths) - 1)
        source = max(_MIN_WIDTH, left - min(widths[0], max(_MIN_WIDTH, left // 2)))
        point = max(_MIN_WIDTH, left - min(widths[1], source))
        rows = [[_shortened(row[0], point), _shortened(row[1], source), *row[2:]] for row in rows]
        widths = _widths(rows)
    lines = ["  ".join(text.ljust(each) for text, each in zip(row, widths, strict=False)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _shortened(text: str, width: int) -> str:
    """Return `text`, whose end tells most, in at most `width` columns."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _widths(rows: list[list[str]]) -> list[int]:
    """Return the widths of the columns of `rows`."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(_HEADINGS))]
    widths[2] = max(len(row[2]) for row in rows if len(row) == len(_HEADINGS))  # without the errors
    return widths
