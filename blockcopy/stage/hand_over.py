"""A process that only opens a further connection of a copy: it hands its two streams over, and waits.

Another process of this host has a socket for that (see `join`), and serves the streams. This process stays until
they are served, because its ssh session ends with it. It is sent to hosts as this text alone, so that it starts
fast. So this module imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from typing import NoReturn

MAX_REPORT = 4096
"""Bytes of a report: an exit status in one byte, then a message in UTF-8."""

_LOST = 137, "the process that served this connection has ended"
"""The report if there is none: the status of a shell whose program was killed."""


def hand_over(address: str, token: str, mark: bytes = b"") -> tuple[int, str]:
    """Hand standard input and output over to the process with the socket `address`, and wait for its report.

    `token`: the secret for that process. `mark`: bytes to write to standard output before. Returns the status with
    which to exit, and a message, which is empty if the status is 0. Raises OSError if there is no such process, and
    PermissionError if it is another user's. Call from a process with one thread.
    """
    with socket.socket(socket.AF_UNIX) as owner:
        owner.connect(address)
        if not is_ours(owner):
            raise PermissionError(errno.EPERM, "the socket is another user's")
        if mark:
            os.write(1, mark)
        socket.send_fds(owner, [token.encode()], [0, 1])
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):  # from now on only the owner decides when the streams end
            os.dup2(nothing, fd)
        report = b""
        with contextlib.suppress(ConnectionError):
            while len(report) < MAX_REPORT and (received := owner.recv(MAX_REPORT)):
                report += received
    return (report[0], report[1:].decode(errors="replace")) if report else _LOST


def is_ours(connected: socket.socket) -> bool:
    """Return whether the process at the other end of the socket `connected` runs as our user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return bool(uid == os.geteuid())


def main(address: str, token: str, mark: bytes) -> NoReturn:
    """Hand the streams over, as `hand_over` does with `address`, `token` and `mark`. Exit as the report says."""
    try:
        status, message = hand_over(address, token, mark)
    except OSError as error:
        status, message = 1, f"cannot join the other connection of this copy: {error}"
    if message:
        os.write(2, f"ERROR: {message}\n".encode(errors="replace"))
    sys.exit(status)
