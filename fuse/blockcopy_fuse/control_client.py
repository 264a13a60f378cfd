"""A mount from outside: status, wait, umount, and what its control socket takes. Needs no pyfuse3."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import subprocess
import time
from typing import Any

from blockcopy.errors import BlockcopyError, IncompleteError, MountError
from blockcopy.progress.reporter import Progress
from blockcopy.replica.monitor.status import counts_of
from blockcopy_fuse import status_schema
from blockcopy_fuse.probe import (
    ANSWER_SECONDS,
    Asking,
    MountUnresponsiveError,
    Place,
    dead_mount,
    is_dead,
    locate,
    not_a_replicas,
)

logger = logging.getLogger(__name__)

KIND = "fuse.blockcopy"
"""Of our mounts, unless the user says otherwise."""

_STATUS = {"command": "status"}

_POLL_SECONDS = 0.2

_MAP_SECONDS = 1
"""How long it may take to tell its map."""

_FAREWELL_SECONDS = 3
"""How long a mount's program may take to see by itself that it was unmounted."""

_LAST_SYNC_SECONDS = 600
"""How long a mount's program may take to sync the destination and to end."""

_UNMOUNT_SECONDS = 10
"""How long fusermount3 may take, which waits for nobody."""


class AskingStatus:
    """The status of a mount, asked for by those who have something else to do until it answers."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._asking = Asking(place, _STATUS)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the snapshot, once; None if there is none so far. MountError if there will be none."""
        reply = self._asking.answer(seconds)
        if reply is None:
            return None
        try:
            snapshot = status_schema.checked(reply.get("status"))
        except ValueError as error:
            raise not_a_replicas(self._place, error) from error
        return {**snapshot, "pid": reply.get("pid", snapshot["pid"])}  # the kernel knows better

    def close(self) -> None:
        self._asking.close()


def _place(mountpoint: str) -> Place:
    place = locate(mountpoint)
    if place is None:
        raise MountError(f"no replica is mounted on {mountpoint}")
    return place


def read_status(mountpoint: str) -> dict[str, Any]:
    """Return the status of the mount at `mountpoint`.

    Raises MountError if there is none, MountUnresponsiveError if it does not answer in time.
    """
    return _status_of(_place(mountpoint))


def _status_of(place: Place) -> dict[str, Any]:
    with contextlib.closing(AskingStatus(place)) as asking:
        snapshot = asking.answer(ANSWER_SECONDS)
    if snapshot is None:
        raise MountUnresponsiveError(place.mountpoint)
    return snapshot


def asked_for_status(mountpoint: str) -> AskingStatus:
    """For those who have something else to do until it answers; as `read_status` does."""
    return AskingStatus(_place(mountpoint))


def wait(mountpoint: str, progress: Progress) -> dict[str, Any]:
    """Return the snapshot when the copy is complete. IncompleteError where it will not be.

    A mount that stands still is waited for: it may go on again.
    """
    snapshot = _status_at_last(mountpoint)
    while snapshot["state"] != "complete":
        progress.update(counts_of(snapshot))
        if snapshot["state"] == "failed":
            raise IncompleteError(f"the copy on {mountpoint} cannot be completed: {snapshot['error']}")
        time.sleep(_POLL_SECONDS)
        try:
            snapshot = _status_at_last(mountpoint)
        except MountError as error:
            raise IncompleteError(f"{mountpoint} went away before the copy was complete: {error}") from error
    progress.update(counts_of(snapshot))
    progress.finish()
    return snapshot


def _status_at_last(mountpoint: str) -> dict[str, Any]:
    """As `read_status`, whenever it is that the mount answers."""
    with contextlib.closing(asked_for_status(mountpoint)) as asking:
        snapshot = asking.answer(ANSWER_SECONDS)
        if snapshot is None:
            logger.warning("%s; waiting for it", MountUnresponsiveError(mountpoint))
        while snapshot is None:
            snapshot = asking.answer(ANSWER_SECONDS)
    return snapshot


def read_map(mountpoint: str, cells: int) -> list[dict[str, int]]:
    """Return what `Replica.map` does, of at most `cells`. Empty if the mount does not tell."""
    try:
        with contextlib.closing(Asking(_place(mountpoint), {"command": "map", "cells": cells})) as asking:
            reply = asking.answer(_MAP_SECONDS)
    except MountError:
        return []
    return status_schema.cells((reply or {}).get("cells"), cells)


def _seconds_for(command: str) -> float | None:
    """Return how long a command may take. None: as long as the source takes."""
    return {"pause": _LAST_SYNC_SECONDS, "prefetch": None}.get(command, ANSWER_SECONDS)


def command(mountpoint: str, request: dict[str, Any]) -> None:
    """Have the mount do it, and return when it is done. MountError, or what it failed with."""
    place = _place(mountpoint)
    _status_of(place)
    with contextlib.closing(Asking(place, request)) as asking:
        seconds = _seconds_for(str(request.get("command")))
        reply = asking.answer(seconds)
    if reply is None:
        raise MountError(f"the mount on {mountpoint} did not do that within {seconds} s: see `blockcopy status`")
    error, exit_code = reply.get("error"), reply.get("exit_code")
    if isinstance(error, str):
        raise BlockcopyError.relayed(error, exit_code if type(exit_code) is int and 0 < exit_code < 256 else 1)


def umount(mountpoint: str) -> dict[str, Any] | None:
    """Unmount, and return when the mount's program has synced the destination and ended.

    The last snapshot; None where there is none to be had. MountError where it cannot be unmounted.
    """
    place = _place(mountpoint)
    try:
        snapshot = None if is_dead(place) else _settled_status(place)
    except MountUnresponsiveError as error:
        number = place.entry.device.partition(":")[2]
        raise MountError(
            f"{error}. To take it away all the same: fusermount3 -uz {place.mountpoint}; where programs still wait "
            f"for it, as root: echo 1 >/sys/fs/fuse/connections/{number}/abort"
        ) from error
    except MountError:
        if place.entry.kind != KIND:
            raise
        logger.warning("%s: nobody tells when its program has synced the destination", place.mountpoint)
        snapshot = None
    with contextlib.ExitStack() as stack:
        process = _process_of(snapshot, place, stack) if snapshot else None
        _unmount(place.mountpoint)
        if snapshot and process is not None:
            _await_end(process, place, snapshot["pid"])
    return snapshot


def _settled_status(place: Place) -> dict[str, Any]:
    """Return the status after the last sync, or after _LAST_SYNC_SECONDS: its end is waited for anyhow."""
    end = time.monotonic() + _LAST_SYNC_SECONDS
    snapshot = _status_of(place)
    while snapshot["state"] in ("hydrating", "verifying") and counts_of(snapshot).done == snapshot["size"]:
        if time.monotonic() >= end:
            break
        time.sleep(_POLL_SECONDS)
        snapshot = _status_of(place)
    return snapshot


def _process_of(snapshot: dict[str, Any], place: Place, stack: contextlib.ExitStack) -> int | None:
    """Return a descriptor of the mount's process; None if there is none of its owner with that number."""
    try:
        process = os.pidfd_open(snapshot["pid"])
        stack.callback(os.close, process)
        owner = os.stat(f"/proc/{snapshot['pid']}").st_uid
    except (OSError, OverflowError):
        return None
    return process if owner == place.owner else None


def _await_end(process: int, place: Place, pid: int) -> None:
    """Return when the process has ended. No signal is sent: it is another user's word that names it."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if poll.poll(_FAREWELL_SECONDS * 1000):
        return
    # The kernel keeps the mount for another mount namespace, say; it is to end all the same.
    with contextlib.closing(Asking(place, {"command": "end"}, pid)) as asking, contextlib.suppress(MountError):
        asking.answer(ANSWER_SECONDS)
    if not poll.poll(_LAST_SYNC_SECONDS * 1000):
        raise MountError(
            f"{place.mountpoint} is unmounted, but its program (process {pid}) has not ended within "
            f"{_LAST_SYNC_SECONDS} s: the destination may not be synced yet"
        )


def is_replica(mountpoint: str) -> bool:
    """Return whether a replica is mounted there, and lives."""
    place = locate(mountpoint)
    if place is None:
        return False
    with contextlib.suppress(MountError):
        return bool(_status_of(place))
    return place.entry.kind == KIND  # of another user, say


def make_way(mountpoint: str, *, replace: bool, kind: str = KIND) -> None:
    """Have no dead mount there. MountError where there is one, and it is not a replica's or not to be replaced."""
    place = locate(mountpoint)
    if place is None or not is_dead(place):
        return  # and not looked at: an automount would wait for what we are about to mount
    if not replace or place.entry.kind not in (KIND, kind):
        raise MountError(dead_mount(mountpoint))
    _unmount(place.mountpoint, "-z")


def _unmount(mountpoint: str, *options: str) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountError("fusermount3 is not installed (Debian: apt install fuse3)")
    words = [program, "-u", *options, "--", mountpoint]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_UNMOUNT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MountError(f"cannot unmount {mountpoint}: fusermount3 does not end") from error
    if ended.returncode:
        said = " | ".join(ended.stderr.strip().splitlines()) or f"fusermount3 ended with {ended.returncode}"
        raise MountError(
            f"cannot unmount {mountpoint}: {said}"
            + (" (a program or a loop device has a file open there: lsof, losetup -l)" if "busy" in said else "")
        )
