"""Commands to a mount from outside: status, wait, map, and requests to its control socket. Without pyfuse3."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import Any

from blockcopy.errors import BlockcopyError, IncompleteError, MountError
from blockcopy.progress.reporter import Progress
from blockcopy.replica.monitor import typed_json
from blockcopy.replica.monitor.status import MapCell, State, Status
from blockcopy_fuse.mountinfo import Mount
from blockcopy_fuse.probe import (
    ANSWER_SECONDS,
    MountRequest,
    MountUnresponsiveError,
    find_mount,
    invalid_reply,
)

logger = logging.getLogger(__name__)

KIND = "fuse.blockcopy"
"""File system type of a replica's mount, unless the user chose another."""

POLL_SECONDS = 0.2
"""Seconds between two requests for the status."""

_MAP_SECONDS = 1
"""How long a mount may take to report its map."""

SYNC_SECONDS = 600
"""How long a mount's program may take to sync the destination, or to sync it and end."""


class StatusRequest(MountRequest):
    """A request for a mount's status, under way. Call `close` in the end."""

    def __init__(self, mount: Mount) -> None:
        """Ask `mount`, a Mount, for its status."""
        super().__init__(mount, {"command": "status"})

    def status(self, seconds: float) -> Status | None:
        """Wait at most `seconds` for the status, and return it. Returns None if there is none yet.

        Raises MountError if the mount cannot be asked, or if its reply is no status.
        """
        reply = self.reply(seconds)
        if reply is None:
            return None
        try:
            status = typed_json.parse(Status, reply.get("status"))
        except ValueError as error:
            raise invalid_reply(self.mount, error) from error
        return dataclasses.replace(status, pid=reply.get("pid", status.pid))  # the kernel reports the true one


def mount_on(mountpoint: str) -> Mount:
    """Return the Mount on `mountpoint`, a FUSE mount. Raises MountError if there is none."""
    mount = find_mount(mountpoint)
    if mount is None:
        raise MountError(f"no replica is mounted on {mountpoint}")
    return mount


def read_status(mountpoint: str) -> Status:
    """Return the status of the mount on `mountpoint`.

    Raises MountError if there is none, MountUnresponsiveError if it does not answer within 5 seconds.
    """
    return status_of(mount_on(mountpoint))


def status_of(mount: Mount) -> Status:
    """Return the status of `mount`, a Mount.

    Raises MountError if the mount cannot be asked, MountUnresponsiveError if it does not answer within 5 seconds.
    """
    with contextlib.closing(StatusRequest(mount)) as request:
        status = request.status(ANSWER_SECONDS)
    if status is None:
        raise MountUnresponsiveError(mount.mountpoint)
    return status


def wait(mountpoint: str, progress: Progress) -> None:
    """Wait until the copy on `mountpoint` is complete, and report to `progress`.

    An unresponsive mount is waited for without end, because it may continue.
    Raises IncompleteError if the copy failed or the mount went away, MountError if nothing is mounted there.
    """
    status = _await_status(mountpoint)
    while status.state is not State.COMPLETE:
        progress.update(status.counts)
        if status.state is State.FAILED:
            raise IncompleteError(f"the copy on {mountpoint} cannot be completed: {status.error}")
        time.sleep(POLL_SECONDS)
        try:
            status = _await_status(mountpoint)
        except MountError as error:
            raise IncompleteError(f"{mountpoint} went away before the copy was complete: {error}") from error
    progress.update(status.counts)
    progress.finish()


def _await_status(mountpoint: str) -> Status:
    """Return the status of the mount on `mountpoint`, however long it takes. Warns if the mount is unresponsive."""
    with contextlib.closing(StatusRequest(mount_on(mountpoint))) as request:
        status = request.status(ANSWER_SECONDS)
        if status is None:
            logger.warning("%s; waiting for it", MountUnresponsiveError(mountpoint))
        while status is None:
            status = request.status(ANSWER_SECONDS)
    return status


def read_map(mountpoint: str, max_cells: int) -> list[MapCell]:
    """Return the map of the mount on `mountpoint`, a list of at most `max_cells` cells.

    Returns an empty list if the mount does not report a map within a second.
    """
    request = {"command": "map", "cells": max_cells}
    try:
        with contextlib.closing(MountRequest(mount_on(mountpoint), request)) as sent:
            reply = sent.reply(_MAP_SECONDS) or {}
        cells = typed_json.parse(tuple[MapCell, ...], reply.get("cells"))
    except (MountError, ValueError):
        return []
    return [*cells] if len(cells) <= max_cells else []


def command(mountpoint: str, request: dict[str, Any]) -> None:
    """Send `request`, an object of JSON, to the mount on `mountpoint`, and return when the mount has done it.

    Raises MountError if the mount cannot be asked or takes too long.
    Raises BlockcopyError with the mount's message and exit status if the mount reports an error.
    """
    mount = mount_on(mountpoint)
    status_of(mount)
    name = str(request.get("command"))
    seconds = {"pause": SYNC_SECONDS, "prefetch": None}.get(name, ANSWER_SECONDS)  # a source decides on a prefetch
    with contextlib.closing(MountRequest(mount, request)) as sent:
        reply = sent.reply(seconds)
    if reply is None:
        raise MountError(
            f"the mount on {mountpoint} did not finish `{name}` within {seconds} s: see `blockcopy status`"
        )
    error, exit_code = reply.get("error"), reply.get("exit_code")
    if isinstance(error, str):
        raise BlockcopyError.relayed(error, exit_code if type(exit_code) is int and 0 < exit_code < 256 else 1)


def is_replica(mountpoint: str) -> bool:
    """Return whether a replica is mounted on `mountpoint`, and its program lives.

    Raises MountUnresponsiveError if `mountpoint` cannot be resolved in time.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        return False
    with contextlib.suppress(MountError):
        return bool(status_of(mount))
    return mount.kind == KIND  # another user's, for example
