"""Commands to a mount from outside: status, wait, umount, and requests to its control socket. Without pyfuse3."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import subprocess
import time
from typing import Any

from blockcopy.errors import BlockcopyError, IncompleteError, MountError
from blockcopy.progress.reporter import Progress
from blockcopy.replica.monitor import status as replica_status
from blockcopy.replica.monitor.status import MapCell, State, Status
from blockcopy_fuse import fuse_support
from blockcopy_fuse.mountinfo import Mount
from blockcopy_fuse.probe import (
    ANSWER_SECONDS,
    MountRequest,
    MountUnresponsiveError,
    dead_mount_message,
    find_mount,
    invalid_reply,
    is_dead,
)

logger = logging.getLogger(__name__)

KIND = "fuse.blockcopy"
"""File system type of a replica's mount, unless the user chose another."""

_POLL_SECONDS = 0.2

_MAP_SECONDS = 1
"""How long a mount may take to report its map."""

_OWN_END_SECONDS = 3
"""How long a mount's program may take to notice by itself that it was unmounted."""

_LAST_SYNC_SECONDS = 600
"""How long a mount's program may take to sync the destination, and to end."""

_UNTRUSTED_SYNC_SECONDS = 15
"""The same for another user's mount, which may hold up root's `umount` on purpose."""

_UNMOUNT_SECONDS = 10
"""How long fusermount3 may take, which waits for nobody."""


class StatusRequest:
    """A request for a mount's status, under way. Call `close` in the end."""

    def __init__(self, mount: Mount) -> None:
        """Ask `mount` for its status."""
        self._mount = mount
        self._request = MountRequest(mount, {"command": "status"})

    def status(self, seconds: float) -> Status | None:
        """Wait at most `seconds` for the status, and return it. Returns None if there is none yet.

        Raises MountError if the mount cannot be asked, or if its reply is no status.
        """
        reply = self._request.reply(seconds)
        if reply is None:
            return None
        try:
            status = replica_status.parse(reply.get("status"))
        except ValueError as error:
            raise invalid_reply(self._mount, error) from error
        return dataclasses.replace(status, pid=reply.get("pid", status.pid))  # the kernel reports the true one

    def close(self) -> None:
        """End the request. May be called more than once."""
        self._request.close()


def _mount_at(mountpoint: str) -> Mount:
    """Return the FUSE mount on `mountpoint`. Raises MountError if there is none."""
    mount = find_mount(mountpoint)
    if mount is None:
        raise MountError(f"no replica is mounted on {mountpoint}")
    return mount


def read_status(mountpoint: str) -> Status:
    """Return the status of the mount on `mountpoint`.

    Raises MountError if there is none, MountUnresponsiveError if it does not answer within 5 seconds.
    """
    return _status_of(_mount_at(mountpoint))


def _status_of(mount: Mount) -> Status:
    with contextlib.closing(StatusRequest(mount)) as request:
        status = request.status(ANSWER_SECONDS)
    if status is None:
        raise MountUnresponsiveError(mount.mountpoint)
    return status


def request_status(mountpoint: str) -> StatusRequest:
    """Ask the mount on `mountpoint` for its status, without waiting. Returns the request under way.

    Raises MountError if nothing is mounted there.
    """
    return StatusRequest(_mount_at(mountpoint))


def wait(mountpoint: str, progress: Progress) -> Status:
    """Wait until the copy on `mountpoint` is complete, and report to `progress`. Returns the last status.

    An unresponsive mount is waited for without end, because it may continue.
    Raises IncompleteError if the copy failed or the mount went away, MountError if nothing is mounted there.
    """
    status = _await_status(mountpoint)
    while status.state is not State.COMPLETE:
        progress.update(status.counts)
        if status.state is State.FAILED:
            raise IncompleteError(f"the copy on {mountpoint} cannot be completed: {status.error}")
        time.sleep(_POLL_SECONDS)
        try:
            status = _await_status(mountpoint)
        except MountError as error:
            raise IncompleteError(f"{mountpoint} went away before the copy was complete: {error}") from error
    progress.update(status.counts)
    progress.finish()
    return status


def _await_status(mountpoint: str) -> Status:
    """Return the status of the mount on `mountpoint`, however long it takes. Warns if the mount is unresponsive."""
    with contextlib.closing(request_status(mountpoint)) as request:
        status = request.status(ANSWER_SECONDS)
        if status is None:
            logger.warning("%s; waiting for it", MountUnresponsiveError(mountpoint))
        while status is None:
            status = request.status(ANSWER_SECONDS)
    return status


def read_map(mountpoint: str, max_cells: int) -> list[MapCell]:
    """Return the map of the mount on `mountpoint`, in at most `max_cells` cells.

    Returns an empty list if the mount does not report a map within a second.
    """
    try:
        with contextlib.closing(
            MountRequest(_mount_at(mountpoint), {"command": "map", "cells": max_cells})
        ) as request:
            reply = request.reply(_MAP_SECONDS)
    except MountError:
        return []
    return replica_status.parse_cells((reply or {}).get("cells"), max_cells)


def _seconds_for(command: str) -> float | None:
    """Return how many seconds `command` may take, by its name. Returns None if the source decides how long."""
    return {"pause": _LAST_SYNC_SECONDS, "prefetch": None}.get(command, ANSWER_SECONDS)


def command(mountpoint: str, request: dict[str, Any]) -> None:
    """Send `request`, an object of JSON, to the mount on `mountpoint`, and return when the mount has done it.

    Raises MountError if the mount cannot be asked or takes too long.
    Raises BlockcopyError with the mount's message and exit status if the mount reports an error.
    """
    mount = _mount_at(mountpoint)
    _status_of(mount)
    name = str(request.get("command"))
    seconds = _seconds_for(name)
    with contextlib.closing(MountRequest(mount, request)) as sent:
        reply = sent.reply(seconds)
    if reply is None:
        raise MountError(
            f"the mount on {mountpoint} did not finish `{name}` within {seconds} s: see `blockcopy status`"
        )
    error, exit_code = reply.get("error"), reply.get("exit_code")
    if isinstance(error, str):
        raise BlockcopyError.relayed(error, exit_code if type(exit_code) is int and 0 < exit_code < 256 else 1)


def umount(mountpoint: str) -> Status | None:
    """Unmount `mountpoint`, and wait until its program has synced the destination and ended.

    Returns the last status, or None if the mount has none. Another user's mount is waited for only for seconds.
    Raises MountError if nothing is mounted there, if it cannot be unmounted, or if its program does not end.
    """
    mount = _mount_at(mountpoint)
    try:
        status = None if is_dead(mount) else _settled_status(mount)
    except MountUnresponsiveError as error:
        raise MountError(
            f"{error}. To remove it all the same: fusermount3 -uz {mount.mountpoint}; if programs still wait "
            f"for it, as root: echo 1 >{fuse_support.CONNECTIONS}/{mount.connection}/abort"
        ) from error
    except MountError:
        if mount.kind != KIND:
            raise
        logger.warning("%s: cannot tell when its program has synced the destination", mount.mountpoint)
        status = None
    with contextlib.ExitStack() as stack:
        process = _process_of(status, mount, stack) if status else None
        _unmount(mount.mountpoint)
        if status and process is not None:
            _await_end(process, mount, status.pid)
    return status


def _sync_seconds(mount: Mount) -> float:
    """Return how many seconds the last sync of `mount` may take. Another user may delay root only shortly."""
    return _LAST_SYNC_SECONDS if mount.owner in (0, os.geteuid()) else _UNTRUSTED_SYNC_SECONDS


def _settled_status(mount: Mount) -> Status:
    """Return the status of `mount` after the last sync, or when the time for the sync is over."""
    end = time.monotonic() + _sync_seconds(mount)
    status = _status_of(mount)
    while status.state in (State.HYDRATING, State.VERIFYING) and status.counts.done == status.size:
        if time.monotonic() >= end:
            break  # the end of the program is waited for anyhow
        time.sleep(_POLL_SECONDS)
        status = _status_of(mount)
    return status


def _process_of(status: Status, mount: Mount, stack: contextlib.ExitStack) -> int | None:
    """Return a pidfd of the process that `status` of `mount` names. `stack` closes the descriptor.

    Returns None if there is no such process, or if it is not the owner's.
    """
    try:
        process = os.pidfd_open(status.pid)
        stack.callback(os.close, process)
        owner = os.stat(f"/proc/{status.pid}").st_uid
    except (OSError, OverflowError):
        return None
    return process if owner == mount.owner else None


def _await_end(process: int, mount: Mount, pid: int) -> None:
    """Return when the program of `mount` has ended. No signal is sent: another user may have named the process.

    `process`: its pidfd. `pid`: its process id. Raises MountError if the process does not end in time.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if poll.poll(_OWN_END_SECONDS * 1000):
        return
    # The kernel may keep the mount, for another mount namespace for example. Its program must end all the same.
    with (
        contextlib.closing(MountRequest(mount, {"command": "end"}, pid)) as request,
        contextlib.suppress(MountError),
    ):
        request.reply(ANSWER_SECONDS)
    seconds = _sync_seconds(mount)
    if not poll.poll(seconds * 1000):
        raise MountError(
            f"{mount.mountpoint} is unmounted, but its program (process {pid}) has not ended within "
            f"{seconds} s: the destination may not be synced yet"
        )


def is_replica(mountpoint: str) -> bool:
    """Return whether a replica is mounted on `mountpoint`, and its program lives.

    Raises MountUnresponsiveError if `mountpoint` cannot be resolved in time.
    """
    mount = find_mount(mountpoint)
    if mount is None:
        return False
    with contextlib.suppress(MountError):
        return bool(_status_of(mount))
    return mount.kind == KIND  # another user's, for example


def clear_dead_mount(mountpoint: str, *, replace: bool, kind: str = KIND) -> None:
    """Remove a dead mount from `mountpoint` if `replace` is true. Does nothing if no dead mount is there.

    `kind`: the file system type that may be replaced, beside the usual one.
    Raises MountError if a dead mount is there that must not be replaced, or cannot be unmounted.
    """
    mount = find_mount(mountpoint)
    # No other mount is touched: an automount would wait for the mount that is about to be made.
    if mount is None or not is_dead(mount):
        return
    if not replace or mount.kind not in (KIND, kind):
        raise MountError(dead_mount_message(mountpoint))
    _unmount(mount.mountpoint, "-z")


def _unmount(mountpoint: str, *options: str) -> None:
    """Unmount `mountpoint` by fusermount3, called with `options` as well. Raises MountError if that fails."""
    program = fuse_support.fusermount()
    if program is None:
        raise MountError(fuse_support.FUSERMOUNT_MISSING)
    command_line = [program, "-u", *options, "--", mountpoint]
    try:
        ended = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=_UNMOUNT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MountError(f"cannot unmount {mountpoint}: fusermount3 does not end") from error
    if ended.returncode:
        reason = " | ".join(ended.stderr.strip().splitlines()) or f"fusermount3 ended with {ended.returncode}"
        raise MountError(
            f"cannot unmount {mountpoint}: {reason}"
            + (" (a program or a loop device has a file open there: lsof, losetup -l)" if "busy" in reason else "")
        )
