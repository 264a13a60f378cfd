"""Unmounting: `umount`, which waits until the destination is synced, and the removal of dead mounts."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import time
from pathlib import Path

from blockcopy.errors import MountError
from blockcopy.replica.monitor.status import State, Status
from blockcopy_fuse import fuse_support
from blockcopy_fuse.control_client import KIND, POLL_SECONDS, SYNC_SECONDS, mount_on, status_of
from blockcopy_fuse.mountinfo import Mount
from blockcopy_fuse.probe import (
    ANSWER_SECONDS,
    MountRequest,
    MountUnresponsiveError,
    dead_mount_message,
    find_mount,
    is_dead,
)

logger = logging.getLogger(__name__)

_OWN_END_SECONDS = 3
"""How long a mount's program may take to notice by itself that it was unmounted."""

_UNTRUSTED_SYNC_SECONDS = 15
"""As SYNC_SECONDS, for another user's mount, which may hold up root's `umount` on purpose."""

_UNMOUNT_SECONDS = 10
"""How long fusermount3 may take, which waits for nobody."""


def umount(mountpoint: str) -> Status | None:
    """Unmount `mountpoint`, and wait until its program has synced the destination and ended.

    Returns the last status, or None if the mount has none. Another user's mount is waited for only for seconds.
    Raises MountError if nothing is mounted there, if it cannot be unmounted, or if its program does not end.
    """
    mount = mount_on(mountpoint)
    options = []
    try:
        status = None
        if is_dead(mount):
            options.append("-z")  # a program that has a file open there gets nothing more
        else:
            status = _settled_status(mount)
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
        _unmount(mount.mountpoint, *options)
        if status and process is not None:
            _await_end(process, mount, status.pid)
    return status


def _sync_seconds(mount: Mount) -> float:
    """Return how many seconds the last sync of `mount` may take. Another user may delay root only shortly."""
    return SYNC_SECONDS if mount.owner in (0, os.geteuid()) else _UNTRUSTED_SYNC_SECONDS


def _settled_status(mount: Mount) -> Status:
    """Return the status of `mount` after the last sync, or when the time for the sync is over."""
    end = time.monotonic() + _sync_seconds(mount)
    status = status_of(mount)
    while status.state in (State.HYDRATING, State.VERIFYING) and status.counts.done == status.size:
        if time.monotonic() >= end:
            break  # the end of the program is waited for anyhow
        time.sleep(POLL_SECONDS)
        status = status_of(mount)
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
    for device in _loop_devices_on(mount.mountpoint):
        logger.warning(
            "%s uses the file of the mount whose program died, and gets errors only: unmount what is on it, then "
            "losetup -d %s",
            device,
            device,
        )
    _unmount(mount.mountpoint, "-z")


def _loop_devices_on(mountpoint: str) -> list[str]:
    """Return the paths of the loop devices that use a file of the mount on `mountpoint`."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it was detached a moment ago
            if path.read_bytes().startswith(os.fsencode(f"{mountpoint}/")):
                found.append(f"/dev/{path.parts[3]}")
    return found


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
            + (
                " (a program, a loop device or a container still uses it: lsof, losetup -l)"
                if "busy" in reason
                else ""
            )
        )
