"""A mount from outside: status, wait, umount, and what its control socket takes. Needs no pyfuse3.

A mount is asked through its own files; its status names the socket.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from blockcopy.errors import BlockcopyError, IncompleteError, MountError
from blockcopy.progress import Progress
from blockcopy.replica.status import counts_of
from blockcopy_fuse import STATUS_NAME

_POLL_SECONDS = 0.2

_FAREWELL_SECONDS = 3
"""How long a mount's program may take to see by itself that it was unmounted."""


def read_status(mountpoint: str) -> dict[str, Any]:
    """The mount's snapshot. MountError where there is none, or none that answers."""
    try:
        snapshot = json.loads((Path(mountpoint) / STATUS_NAME).read_bytes())
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(dead_mount(mountpoint)) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise MountError(f"no replica is mounted on {mountpoint}") from error
        raise MountError(f"cannot ask the mount on {mountpoint}: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:
        raise MountError(f"{mountpoint}/{STATUS_NAME} is not a replica's") from error
    if not isinstance(snapshot, dict) or "source_needed" not in snapshot:
        raise MountError(f"{mountpoint}/{STATUS_NAME} is not a replica's")
    return snapshot


def wait(mountpoint: str, progress: Progress) -> dict[str, Any]:
    """Return the snapshot when the copy is complete. IncompleteError where it will not be."""
    snapshot = read_status(mountpoint)
    while snapshot["state"] != "complete":
        progress.update(counts_of(snapshot))
        if snapshot["state"] == "failed":
            raise IncompleteError(f"the copy on {mountpoint} cannot be completed: {snapshot['error']}")
        time.sleep(_POLL_SECONDS)
        try:
            snapshot = read_status(mountpoint)
        except MountError as error:
            raise IncompleteError(f"{mountpoint} went away before the copy was complete: {error}") from error
    progress.update(counts_of(snapshot))
    progress.finish()
    return snapshot


def command(mountpoint: str, request: dict[str, Any]) -> None:
    """Have the mount do it, and return when it is done. MountError, or what it failed with."""
    path = read_status(mountpoint).get("control_socket")
    if path is None:
        raise MountError(f"the mount on {mountpoint} has no control socket; its log says why")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as replies:
                line = replies.readline()
    except OSError as error:
        raise MountError(f"cannot reach the mount on {mountpoint} at {path}: {error.strerror}") from error
    if not line:
        raise MountError(f"the mount on {mountpoint} ended before it answered")
    reply = json.loads(line)
    if "error" in reply:
        raise BlockcopyError.told(reply["error"], reply["exit_code"])


def umount(mountpoint: str) -> dict[str, Any] | None:
    """Unmount, and return when the mount's program has synced the destination and ended.

    The last snapshot; None where it was a dead mount. MountError where it cannot be unmounted.
    """
    snapshot: dict[str, Any] | None = None
    try:
        snapshot = read_status(mountpoint)
        while snapshot["state"] == "hydrating" and snapshot["hydrated_bytes"] == snapshot["size"]:
            time.sleep(_POLL_SECONDS)  # the last sync, which would be waited for anyhow
            snapshot = read_status(mountpoint)
    except MountError:
        if not is_dead(mountpoint):
            raise
    with contextlib.ExitStack() as stack:
        process = None
        if snapshot is not None:
            with contextlib.suppress(ProcessLookupError):
                process = os.pidfd_open(snapshot["pid"])
                stack.callback(os.close, process)
        _unmount(mountpoint)
        if process is not None:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            if not poll.poll(_FAREWELL_SECONDS * 1000):
                # The kernel keeps it for another mount namespace, say; it is to end all the same.
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGTERM)
                poll.poll()
    return snapshot


def is_dead(mountpoint: str) -> bool:
    """A mount is there, but nobody serves it any more."""
    try:
        os.statvfs(mountpoint)  # not stat: the kernel answers that from what it remembers
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def dead_mount(mountpoint: str) -> str:
    """What to say of one."""
    return f"{mountpoint} is a mount whose program died; clear it with: fusermount3 -uz {mountpoint}"


def _unmount(mountpoint: str) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountError("fusermount3 is not installed (Debian: apt install fuse3)")
    ended = subprocess.run([program, "-u", "--", mountpoint], capture_output=True, text=True, check=False)
    if ended.returncode:
        said = ended.stderr.strip().rpartition(": ")[2]
        raise MountError(
            f"cannot unmount {mountpoint}: {said}"
            + (" (a program has a file open there)" if "busy" in said else "")
        )
