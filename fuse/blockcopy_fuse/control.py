"""A mount from outside: status, wait, umount, and what its control socket takes. Needs no pyfuse3.

A mount is asked through its own files; its status names the socket. Where the mountpoint is a file, there is
no other beside it, and the status comes from the socket, which is found by the mount's device number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from blockcopy.errors import BlockcopyError, IncompleteError, MountError
from blockcopy.progress import Progress
from blockcopy.replica.status import counts_of
from blockcopy.runfolder import is_private, run_folders
from blockcopy_fuse import STATUS_NAME, mounts

logger = logging.getLogger(__name__)

KIND = "fuse.blockcopy"
"""Of our mounts, unless the user says otherwise."""

_POLL_SECONDS = 0.2

_ANSWER_SECONDS = 5
"""How long a mount may take to tell its status, which waits for nobody."""

_MAP_SECONDS = 1
"""How long it may take to tell its map."""

_FAREWELL_SECONDS = 3
"""How long a mount's program may take to see by itself that it was unmounted."""


Answer = TypeVar("Answer")


class Asking(Generic[Answer]):
    """What a mount is being asked, by a thread that is left alone where the mount stands still: who waits for
    an answer of such a mount can neither be woken nor interrupted."""

    def __init__(self, ask: Callable[[str], Answer], mountpoint: str) -> None:
        self._ask, self._mountpoint = ask, mountpoint
        self._reply: queue.SimpleQueue[tuple[Answer | None, MountError | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="asking", daemon=True).start()

    def _run(self) -> None:
        try:
            self._reply.put((self._ask(self._mountpoint), None))
        except MountError as error:
            self._reply.put((None, error))

    def answer(self, seconds: float) -> Answer | None:
        """What was answered, once, or the MountError; None where there is neither so far."""
        try:
            answer, error = self._reply.get(timeout=seconds)
        except queue.Empty:
            return None
        if error is not None:
            raise error
        return answer


class StandsStillError(MountError):
    """A mount that gives no answer."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__(
            f"the mount on {mountpoint} gave no answer within {_ANSWER_SECONDS} s: its program stands still, or "
            "all that it can do at once is waiting for the source"
        )


def read_status(mountpoint: str) -> dict[str, Any]:
    """The mount's snapshot. MountError where there is none; StandsStillError where there is no answer in time."""
    return _in_time(_status, mountpoint)


def asked_for_status(mountpoint: str) -> Asking[dict[str, Any]]:
    """For those who have something else to do until it answers; as `read_status` does."""
    return Asking(_status, mountpoint)


def _in_time(ask: Callable[[str], Answer], mountpoint: str) -> Answer:
    answer = Asking(ask, mountpoint).answer(_ANSWER_SECONDS)
    if answer is None:
        raise StandsStillError(mountpoint)
    return answer


def _status(mountpoint: str) -> dict[str, Any]:
    try:
        snapshot = json.loads((Path(mountpoint) / STATUS_NAME).read_bytes())
    except NotADirectoryError:
        return _status_of_file(mountpoint)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(dead_mount(mountpoint)) from error
        if error.errno == errno.ENOENT:
            raise MountError(f"no replica is mounted on {mountpoint}") from error
        raise MountError(f"cannot ask the mount on {mountpoint}: {os.strerror(error.errno or 0)}") from error
    except ValueError as error:
        raise MountError(f"{mountpoint}/{STATUS_NAME} is not a replica's") from error
    if not isinstance(snapshot, dict) or "source_needed" not in snapshot:
        raise MountError(f"{mountpoint}/{STATUS_NAME} is not a replica's")
    return snapshot


def _status_of_file(mountpoint: str) -> dict[str, Any]:
    """As `_status`, of a mountpoint that is a file."""
    entry = mounts.at(os.path.realpath(mountpoint))
    if entry is None or entry.owner is None:
        raise MountError(f"no replica is mounted on {mountpoint}")
    if _no_one_serves(mountpoint):
        raise MountError(dead_mount(mountpoint))
    for path in _sockets(entry.owner, entry.device):
        with contextlib.suppress(OSError):
            reply = _asked(str(path), {"command": "status"})
            if reply is not None and "status" in reply:
                snapshot: dict[str, Any] = reply["status"]
                return snapshot
    if os.geteuid() not in (0, entry.owner):
        raise MountError(f"cannot ask the mount on {mountpoint}: only the user who mounted it may, and root")
    raise MountError(f"no replica answers for the mount on {mountpoint}, which is of the type {entry.kind}")


def socket_name(device: str, pid: int | str) -> str:
    """Of the mount whose device number is MAJOR:MINOR. One that is just ending may still have the same number."""
    return f"{device}-{pid}.sock"


def _sockets(uid: int, device: str) -> list[Path]:
    """Those of that name, the latest first: it is the one of the mount that has the number now."""
    found = []
    for folder in run_folders(uid):
        if is_private(folder, uid):
            for path in folder.glob(socket_name(device, "*")):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_ctime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _asked(path: str, request: dict[str, Any], seconds: float | None = None) -> dict[str, Any] | None:
    """The reply of the mount whose socket that is; None where it ended before. OSError, also after `seconds`."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as replies:
            line = replies.readline()
    reply: dict[str, Any] | None = json.loads(line) if line else None
    return reply


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
    asking = asked_for_status(mountpoint)
    snapshot = asking.answer(_ANSWER_SECONDS)
    if snapshot is None:
        logger.warning("%s; waiting for it", StandsStillError(mountpoint))
        while snapshot is None:
            snapshot = asking.answer(_ANSWER_SECONDS)
    return snapshot


def read_map(snapshot: dict[str, Any], cells: int) -> list[dict[str, int]]:
    """Of the mount whose snapshot that is; as `Replica.map`. Empty where it does not tell."""
    try:
        reply = _asked(str(snapshot["control_socket"]), {"command": "map", "cells": cells}, _MAP_SECONDS)
    except (OSError, ValueError):
        return []
    found: list[dict[str, int]] = (reply or {}).get("cells", [])
    return found


def command(mountpoint: str, request: dict[str, Any]) -> None:
    """Have the mount do it, and return when it is done. MountError, or what it failed with."""
    path = read_status(mountpoint).get("control_socket")
    if path is None:
        raise MountError(f"the mount on {mountpoint} has no control socket; its log says why")
    try:
        reply = _asked(path, request)
    except OSError as error:
        raise MountError(f"cannot reach the mount on {mountpoint} at {path}: {error.strerror}") from error
    if reply is None:
        raise MountError(f"the mount on {mountpoint} ended before it answered")
    if "error" in reply:
        raise BlockcopyError.told(reply["error"], reply["exit_code"])


def umount(mountpoint: str) -> dict[str, Any] | None:
    """Unmount, and return when the mount's program has synced the destination and ended.

    The last snapshot; None where it was a dead mount. MountError where it cannot be unmounted.
    """
    snapshot: dict[str, Any] | None = None
    try:
        snapshot = read_status(mountpoint)
        while snapshot["state"] in ("hydrating", "verifying") and counts_of(snapshot).done == snapshot["size"]:
            time.sleep(_POLL_SECONDS)  # the last sync, which would be waited for anyhow
            snapshot = read_status(mountpoint)
    except StandsStillError as error:
        raise MountError(f"{error}. To take it away all the same: fusermount3 -uz {mountpoint}") from error
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


def is_replica(mountpoint: str) -> bool:
    """One is mounted there, and lives."""
    entry = mounts.at(os.path.realpath(mountpoint))
    if entry is None or entry.owner is None:
        return False
    with contextlib.suppress(MountError):
        return bool(read_status(mountpoint))
    return entry.kind == KIND  # of another user, say


def is_dead(mountpoint: str) -> bool:
    """A mount is there, but nobody serves it any more. StandsStillError."""
    entry = mounts.at(os.path.realpath(mountpoint))
    if entry is None or entry.owner is None:
        return False  # and not looked at: an automount would wait for what we are about to mount
    return _in_time(_no_one_serves, mountpoint)


def _no_one_serves(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)  # not stat: the kernel answers that from what it remembers
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def make_way(mountpoint: str, *, replace: bool, kind: str = KIND) -> None:
    """Have no dead mount there. MountError where there is one, and it is not a replica's or not to be replaced."""
    if not is_dead(mountpoint):
        return
    entry = mounts.at(os.path.realpath(mountpoint))
    if not replace or entry is None or entry.kind not in (KIND, kind):
        raise MountError(dead_mount(mountpoint))
    _unmount(mountpoint, "-z")


def dead_mount(mountpoint: str) -> str:
    """What to say of one."""
    return f"{mountpoint} is a mount whose program died; clear it with: fusermount3 -uz {mountpoint}"


def _unmount(mountpoint: str, *options: str) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise MountError("fusermount3 is not installed (Debian: apt install fuse3)")
    ended = subprocess.run([program, "-u", *options, "--", mountpoint], capture_output=True, text=True, check=False)
    if ended.returncode:
        said = ended.stderr.strip().rpartition(": ")[2]
        raise MountError(
            f"cannot unmount {mountpoint}: {said}"
            + (" (a program has a file open there)" if "busy" in said else "")
        )
