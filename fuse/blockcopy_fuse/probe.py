"""Asking a mount, by a child process that can be left behind.

    Place ── child: control socket of the mount's owner … else MOUNTPOINT/status.json ──► bytes, bounded

Whoever touches a mount that stands still may wait in the kernel, where not even SIGKILL ends it. So the parent
touches nothing but mountinfo. The mount's owner is another user perhaps: the socket is believed to be the
mount's only where the kernel says that its process is that user's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from blockcopy.errors import MountError
from blockcopy.paths.runtime_dir import is_private, runtime_dir_candidates
from blockcopy.protocol.strict_json import parse_object
from blockcopy_fuse import STATUS_NAME, mountinfo, status_schema

ANSWER_SECONDS = 5
"""How long a mount may take to tell its status, which waits for nobody."""

_SOCKETS = 8
"""Sockets of one mount's name that are tried, at most."""


class MountUnresponsiveError(MountError):
    """A mount that gives no answer."""

    def __init__(self, mountpoint: str) -> None:
        super().__init__(
            f"the mount on {mountpoint} gave no answer within {ANSWER_SECONDS} s: its program stands still, or "
            "all that it can do at once is waiting for the source"
        )


_ENDING_SECONDS = 0.2
"""How long a process that is killed may take to end. It is left then: one that waits for a dead disk may never."""

_left: set[int] = set()
"""Processes that were left, or whose end was not collected yet."""


class Child:
    """A process that runs `work` and tells what it returns. To be closed."""

    def __init__(self, work: Callable[[], bytes], most: int = status_schema.MOST_BYTES) -> None:
        """`most`: bytes of an answer that are taken."""
        self._most = most
        self._said = bytearray()
        self._pipe, theirs = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                _leave_all_but(theirs)
                _write(theirs, work()[: most + 1])
            finally:
                os._exit(0)
        os.close(theirs)

    def answer(self, seconds: float | None) -> bytes | None:
        """Return all that was said, or None if that did not end within `seconds`; None: wait for ever.

        Raises ValueError if it is too much.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while len(self._said) <= self._most:
            left = None if end is None else max(0, end - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            data = os.read(self._pipe, 1 << 16)
            if not data:
                return bytes(self._said)
            self._said += data
        raise ValueError(f"it said more than {self._most} bytes")

    def close(self) -> None:
        """End it, and leave it if it cannot be ended now."""
        os.close(self._pipe)
        with contextlib.suppress(ProcessLookupError):  # where SIGCHLD is ignored, ended ones are gone at once
            os.kill(self._pid, signal.SIGKILL)
            process = os.pidfd_open(self._pid)
            select.select([process], [], [], _ENDING_SECONDS)
            os.close(process)
        _left.add(self._pid)
        for pid in list(_left):  # those before it, too: who asks each second must not gather them
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            _left.discard(pid)


def _leave_all_but(kept: int) -> None:
    """Hold nothing of the parent's that others wait for: its streams, its session, its folder."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):  # the one that lists them
                os.close(int(name))


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Place(NamedTuple):
    """A FUSE mount that is there, of the user `owner`."""

    mountpoint: str
    entry: mountinfo.Entry
    owner: int


def locate(mountpoint: str) -> Place | None:
    """Return the FUSE mount at a path, without touching it. Returns None if there is none.

    Raises MountUnresponsiveError if the path itself gives no answer.
    """
    path = os.path.abspath(mountpoint)
    entry = mountinfo.at(path)
    if entry is None:
        real = _in_child(partial(_realpath, path), mountpoint)
        path = os.fsdecode(real)
        entry = mountinfo.at(path)
    if entry is None or entry.owner is None:
        return None
    return Place(path, entry, entry.owner)


def _realpath(path: str) -> bytes:
    return os.fsencode(os.path.realpath(path))


def await_answer(path: str, mountpoint: str) -> None:
    """Return when a file of a mount is there. MountError if it cannot be had; MountUnresponsiveError."""
    found = int(_in_child(partial(_errno_of, path), mountpoint) or errno.EIO)  # nothing, of a child that was killed
    if found:
        raise MountError(f"the mount on {mountpoint} does not answer: {os.strerror(found)}")


def _errno_of(path: str) -> bytes:
    try:
        os.stat(path)
    except OSError as error:
        return b"%d" % (error.errno or errno.EIO)
    return b"0"


def is_dead(place: Place) -> bool:
    """Whether nobody serves the mount any more. MountUnresponsiveError."""
    return _in_child(partial(_dead, place.mountpoint), place.mountpoint) == b"dead"


def _dead(mountpoint: str) -> bytes:
    try:
        os.statvfs(mountpoint)  # not stat: the kernel answers that from what it remembers
    except OSError as error:
        return b"dead" if error.errno == errno.ENOTCONN else b""
    return b""


def _in_child(work: Callable[[], bytes], mountpoint: str) -> bytes:
    child = Child(work)
    try:
        said = child.answer(ANSWER_SECONDS)
    finally:
        child.close()
    if said is None:
        raise MountUnresponsiveError(mountpoint)
    return said


class Asking:
    """A request to a mount, under way. To be closed, or asked until it is answered."""

    def __init__(self, place: Place, request: dict[str, Any], pid: int | None = None) -> None:
        """`pid`: the one process that may answer; whichever it is, if None."""
        self._place = place
        self._child: Child | None = Child(partial(_ask, place, request, pid))

    def answer(self, seconds: float | None) -> dict[str, Any] | None:
        """Return the reply, once; None if there is none so far. MountError if there will be none."""
        if self._child is None:
            raise MountError(f"the mount on {self._place.mountpoint} was asked once, and answered")
        try:
            said = self._child.answer(seconds)
            if said is None:
                return None
            head, _, text = said.partition(b"\n")
            found = parse_object(text, errors="surrogateescape") if text else None
        except ValueError as error:
            self.close()
            raise MountError(
                f"what the mount on {self._place.mountpoint} says is not a replica's: {error}"
            ) from error
        self.close()
        return _reply(self._place, head.decode(), found)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def _reply(place: Place, how: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the child found out as a reply of a control socket."""
    kind, _, number = how.partition(" ")
    if found is not None and kind == "socket":
        return {**found, "pid": int(number)}
    if found is not None and kind == "file":
        return {"status": found}
    if kind == "errno" and int(number) == errno.ENOTCONN:
        raise MountError(dead_mount(place.mountpoint))
    if kind == "errno" and int(number) == errno.ENOENT:
        raise MountError(f"no replica is mounted on {place.mountpoint}")
    if kind == "errno":
        raise MountError(f"cannot ask the mount on {place.mountpoint}: {os.strerror(int(number))}")
    if kind == "file":
        raise MountError(f"{place.mountpoint}/{STATUS_NAME} is not a replica's")
    if os.geteuid() not in (0, place.owner):
        raise MountError(f"cannot ask the mount on {place.mountpoint}: only the user who mounted it may, and root")
    raise MountError(
        f"no replica answers for the mount on {place.mountpoint}, which is of the type {place.entry.kind}: "
        "it has no control socket; its log says why"
    )


def not_a_replicas(place: Place, why: ValueError) -> MountError:
    """Return the error for an answer that cannot be believed."""
    return MountError(f"what the mount on {place.mountpoint} says is not a replica's: {why}")


def dead_mount(mountpoint: str) -> str:
    """Return what to say of one."""
    return f"{mountpoint} is a mount whose program died; clear it with: fusermount3 -uz {mountpoint}"


# In the child


def _ask(place: Place, request: dict[str, Any], pid: int | None) -> bytes:
    for path in _sockets(place):
        with contextlib.suppress(OSError):
            peer, reply = _exchange(path, place.owner, request, pid)
            if reply:
                return b"socket %d\n%s" % (peer, reply)
    if _dead(place.mountpoint):
        return b"errno %d\n" % errno.ENOTCONN
    if request != {"command": "status"}:
        return b"nobody\n"
    try:
        with open(f"{place.mountpoint}/{STATUS_NAME}", "rb", buffering=0) as file:
            return b"file\n" + _read(partial(os.read, file.fileno()))
    except NotADirectoryError:
        return b"nobody\n"
    except OSError as error:
        return b"errno %d\n" % (error.errno or errno.EIO)


def _sockets(place: Place) -> list[str]:
    """Return the sockets of the mount's name, latest first: one that is ending may have the same number."""
    found = []
    for folder in runtime_dir_candidates(place.owner):
        if is_private(folder, place.owner):
            for path in folder.glob(socket_name(place.entry.device, "*")):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    if stat.S_ISSOCK(status.st_mode):
                        found.append((status.st_ctime_ns, str(path)))
    return [path for _, path in sorted(found, reverse=True)[:_SOCKETS]]


def socket_name(device: str, pid: int | str) -> str:
    """Return the name of the socket of a mount. `device`: its number, MAJOR:MINOR; an ending one may share it."""
    return f"{device}-{pid}.sock"


def _exchange(path: str, owner: int, request: dict[str, Any], pid: int | None) -> tuple[int, bytes]:
    """Return who serves a socket, as the kernel says, and the reply. OSError if it is not the owner's process."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        peer, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != owner or pid not in (None, peer):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return peer, _read(connection.recv)


def _read(take: Callable[[int], bytes]) -> bytes:
    """Read to the end, or to the bound."""

    def pieces() -> Iterator[bytes]:
        left = status_schema.MOST_BYTES + 1
        while left > 0 and (data := take(min(left, 1 << 16))):
            left -= len(data)
            yield data

    return b"".join(pieces())
