"""Requests to a mount from outside, made by a child process that can be left behind.

    Mount ── child: control socket of the mount's owner … else MOUNTPOINT/status.json ──► bytes, bounded

Whoever touches an unresponsive mount may wait in the kernel, where not even SIGKILL ends the wait.
So the parent touches nothing but mountinfo. The owner of a mount may be another user, who is not trusted.
A socket is believed only if the kernel says that its process belongs to that owner.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shlex
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from blockcopy.cli import console
from blockcopy.errors import MountError
from blockcopy.paths.runtime_dir import is_private, runtime_dir_candidates
from blockcopy.protocol.strict_json import parse_object
from blockcopy_fuse import STATUS_NAME, mountinfo
from blockcopy_fuse.mountinfo import NO_FUSE, Mount

ANSWER_SECONDS = 5
"""How long a mount may take to report its status, for which it waits for nobody."""

_MAX_REPLY = 1 << 20
"""Bytes of a reply."""

_MAX_SOCKETS = 8
"""Sockets of one mount that are tried."""

_END_SECONDS = 0.2
"""How long a killed process may take to end before it is left. If it waits for a dead disk, it may never end."""

_DEAD = b"%d" % errno.ENOTCONN
"""The answer to statvfs(2) on a mount whose program has died. The kernel may answer stat(2) from its cache."""

_left: set[int] = set()
"""Processes that were left, or whose exit status was not collected yet."""


class MountUnresponsiveError(MountError):
    """A mount does not answer."""

    def __init__(self, mountpoint: str) -> None:
        """Make the error for the mount on `mountpoint`."""
        super().__init__(
            f"the mount on {mountpoint} gave no answer within {ANSWER_SECONDS} s: its program is stopped, or "
            "all of its requests wait for the source"
        )


class ForkedCall:
    """A function that runs in a child process. Call `close` in the end."""

    def __init__(self, work: Callable[[], bytes]) -> None:
        """Fork a child that calls `work` without arguments and sends back its result: bytes, at most 1 MiB."""
        self._received = bytearray()
        self._pipe, child_end = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                _leave_all_but(child_end)
                with open(child_end, "wb") as pipe:
                    pipe.write(work()[: _MAX_REPLY + 1])
            finally:
                os._exit(0)
        os.close(child_end)

    def result(self, seconds: float | None) -> bytes | None:
        """Wait at most `seconds` for the result, which is bytes; without end if `seconds` is None.

        Returns None if there is no result yet. Raises ValueError if the result is longer than 1 MiB.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while len(self._received) <= _MAX_REPLY:
            left = None if end is None else max(0, end - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return bytes(self._received)
            self._received += data
        raise ValueError(f"it is more than {_MAX_REPLY} bytes")

    def close(self) -> None:
        """Kill the child. A child that does not end within 0.2 s is left behind."""
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):  # if SIGCHLD is ignored, an ended child is gone at once
            os.kill(self._pid, signal.SIGKILL)
            process = os.pidfd_open(self._pid)
            select.select([process], [], [], _END_SECONDS)
            os.close(process)
        _left.add(self._pid)
        for pid in list(_left):  # earlier ones too: repeated calls must not gather processes
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            _left.discard(pid)


def _leave_all_but(kept: int) -> None:
    """Release everything of the parent's that others may wait for: streams, session, folder, descriptors.

    `kept`: the descriptor that stays open.
    """
    os.setsid()
    os.chdir("/")
    console.redirect_to_null(0, 1, 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):  # the descriptor that lists the folder
                os.close(int(name))


def find_mount(path: str) -> Mount | None:
    """Return the Mount at `path` without touching it. Returns None if no FUSE mount is there.

    Raises MountUnresponsiveError if `path` itself cannot be resolved in time.
    """
    absolute = os.path.abspath(path)
    mount = mountinfo.mount_at(absolute)
    if mount is None:
        resolved = _call_in_child(lambda: os.fsencode(os.path.realpath(absolute)), path)
        mount = mountinfo.mount_at(os.fsdecode(resolved))
    return None if mount is None or mount.owner == NO_FUSE else mount


def await_file(path: str, mountpoint: str) -> None:
    """Return when the file `path` of the mount on `mountpoint` exists.

    Raises MountError if the file cannot be found, MountUnresponsiveError if the mount does not answer.
    """
    found = int(
        _call_in_child(partial(_errno_of, os.stat, path), mountpoint) or errno.EIO
    )  # nothing, if it was killed
    if found:
        raise MountError(f"the mount on {mountpoint} does not answer: {os.strerror(found)}")


def _errno_of(call: Callable[[str], object], path: str) -> bytes:
    """Call `call` with `path`. Returns the number of the error as text, or b"0"."""
    try:
        call(path)
    except OSError as error:
        return b"%d" % (error.errno or errno.EIO)
    return b"0"


def is_dead(mount: Mount) -> bool:
    """Return whether the program of `mount`, a Mount, has died.

    Raises MountUnresponsiveError if the mount does not answer.
    """
    return _call_in_child(partial(_errno_of, os.statvfs, mount.mountpoint), mount.mountpoint) == _DEAD


def _call_in_child(work: Callable[[], bytes], mountpoint: str) -> bytes:
    with contextlib.closing(ForkedCall(work)) as call:
        result = call.result(ANSWER_SECONDS)
    if result is None:
        raise MountUnresponsiveError(mountpoint)
    return result


class MountRequest(ForkedCall):
    """A request to a mount, under way. Call `close` in the end."""

    def __init__(self, mount: Mount, request: dict[str, Any], pid: int | None = None) -> None:
        """Send `request`, an object of JSON, to `mount`, a Mount.

        `pid`: the only process that may answer, or None for any process of the owner.
        """
        self.mount = mount
        """The mount that is asked."""
        super().__init__(partial(_request_in_child, mount, request, pid))

    def reply(self, seconds: float | None) -> dict[str, Any] | None:
        """Wait at most `seconds` for the reply, an object of JSON; without end if `seconds` is None.

        Returns None if there is no reply yet. Raises MountError if there will be none.
        """
        try:
            result = self.result(seconds)
            if result is None:
                return None
            head, _, text = result.partition(b"\n")
            found = parse_object(text, errors="surrogateescape") if text else None
        except ValueError as error:
            raise invalid_reply(self.mount, error) from error
        kind, _, number = head.decode().partition(" ")
        mountpoint = self.mount.mountpoint
        if found is not None and kind == "socket":
            return {**found, "pid": int(number)}
        if found is not None and kind == "file":
            return {"status": found}
        if kind == "errno" and int(number) == errno.ENOTCONN:
            raise MountError(dead_mount_message(mountpoint))
        if kind == "errno" and int(number) == errno.ENOENT:
            raise MountError(f"no replica is mounted on {mountpoint}")
        if kind == "errno":
            raise MountError(f"cannot ask the mount on {mountpoint}: {os.strerror(int(number))}")
        if kind == "file":
            raise MountError(f"{mountpoint}/{STATUS_NAME} is no status file of a replica")
        if os.geteuid() not in (0, self.mount.owner):
            raise MountError(f"cannot ask the mount on {mountpoint}: only the user who mounted it may, and root")
        raise MountError(
            f"no replica answers for the mount on {mountpoint}, which is of the type {self.mount.kind}: "
            "it has no control socket; its log says why"
        )


def invalid_reply(mount: Mount, reason: ValueError) -> MountError:
    """Return the error for a malformed reply of `mount`. `reason`: the ValueError that says what is wrong."""
    return MountError(f"the mount on {mount.mountpoint} sent an invalid reply: {reason}")


def dead_mount_message(mountpoint: str) -> str:
    """Return the message for a dead mount on `mountpoint`, with the command that removes the mount."""
    clear = f"blockcopy umount {shlex.quote(mountpoint)}"
    return f"{mountpoint} is a mount whose program died; clear it with: {clear} (or mount again with --replace)"


# In the child


def _request_in_child(mount: Mount, request: dict[str, Any], pid: int | None) -> bytes:
    """Send `request`, an object of JSON, to `mount`. Returns bytes: a line that says who answered, and the answer.

    The line is socket PID, file, errno NUMBER or nobody. `pid`: the only process that may answer, or None.
    """
    for path in _sockets(mount):
        with contextlib.suppress(OSError):
            peer, reply = _exchange(path, mount.owner, request, pid)
            if reply:
                return b"socket %d\n%s" % (peer, reply)
    if _errno_of(os.statvfs, mount.mountpoint) == _DEAD:
        return b"errno %d\n" % errno.ENOTCONN
    if request != {"command": "status"}:
        return b"nobody\n"
    try:
        return b"file\n" + _read_status_file(f"{mount.mountpoint}/{STATUS_NAME}")
    except NotADirectoryError:
        return b"nobody\n"
    except OSError as error:
        return b"errno %d\n" % (error.errno or errno.EIO)


def _read_status_file(path: str) -> bytes:
    """Return the bytes of the file `path`. Returns no bytes if `path` is no regular file.

    Another user's mount may have a link there.

    Raises OSError if the file cannot be opened or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise
    try:
        return _read(partial(os.read, descriptor)) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)


def _sockets(mount: Mount) -> list[str]:
    """Return the paths of the sockets with the name of `mount`, the newest first.

    A mount that is ending may have the same name.
    """
    found = []
    for folder in runtime_dir_candidates(mount.owner):
        if is_private(folder, mount.owner):
            for path in folder.glob(socket_name(mount.device, "*")):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    if stat.S_ISSOCK(status.st_mode):
                        found.append((status.st_ctime_ns, str(path)))
    return [path for _, path in sorted(found, reverse=True)[:_MAX_SOCKETS]]


def socket_name(device: str, pid: int | str) -> str:
    """Return the name of a mount's control socket. `device`: MAJOR:MINOR. `pid`: the process, or * for a pattern.

    The process id is in the name because a mount that is ending may have the same device number.
    """
    return f"{device}-{pid}.sock"


def _exchange(path: str, owner: int, request: dict[str, Any], pid: int | None) -> tuple[int, bytes]:
    """Send `request`, an object of JSON, to the socket `path`. Returns the process id of its server, and the reply.

    The kernel reports the process id. `owner`: a user id. The reply is bytes.
    `pid`: the only process that may be the server, or None.
    Raises OSError if the server is another process, or not one of `owner`.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        peer, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != owner or pid not in (None, peer):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return peer, _read(connection.recv)


def _read(read_some: Callable[[int], bytes]) -> bytes:
    """Return all bytes up to the end, or more bytes than a reply may have.

    `read_some`: called with a number of bytes, returns at most so many bytes.
    """
    found = bytearray()
    while len(found) <= _MAX_REPLY and (data := read_some(1 << 16)):
        found += data
    return bytes(found)
