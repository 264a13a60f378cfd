"""Further connections of a push: each hands its two streams over to the `receive` that owns the destination.

    ssh → receive --join TOKEN ── its standard input and output, over a Unix socket ──► receive → destination

There is one process that claims, writes and syncs the destination, with as many streams as there are connections.
A joined process has nothing left to do. It stays until the owner closes the socket, because its ssh session ends
with it. The socket has an abstract name, so no file is left behind whatever ends the owner. Each end asks the
kernel whether the other end is of the same user. The token also keeps out other processes of that user.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Callable

from blockcopy.errors import DeviceError
from blockcopy.stage.streams import InputStream, OutputStream

_MAX_STREAMS = 64
"""Most connections that are served at once."""

_HAND_OVER_SECONDS = 10
"""Seconds for a joining process to hand over its streams."""

_TOKEN_BYTES = 16

Serve = Callable[[InputStream, OutputStream], None]
"""Serves the streams of one connection until they end. Called in a thread for each connection."""


class Joins:
    """A listening socket for further connections. Entering the context makes it; leaving it ends all of them."""

    def __init__(self) -> None:
        self.token: str | None = None
        """The secret of further connections, in hexadecimal digits. None if this host has no such sockets."""
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()  # guards the attributes below
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._inputs: set[InputStream] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Joins:
        token = os.urandom(_TOKEN_BYTES).hex()
        with contextlib.suppress(OSError):  # then there is one connection
            listening = socket.socket(socket.AF_UNIX)
            try:
                listening.bind(_address(token))
                listening.listen(_MAX_STREAMS)
            except OSError:
                listening.close()
                raise
            self._socket, self.token = listening, token
        return self

    def start(self, serve: Serve) -> None:
        """Begin to accept connections. Each is passed to `serve`, in a thread of its own.

        `serve` must catch all errors, and must return once its input ends.
        """
        if self._socket is not None:
            self._start(self._accept, self._socket, serve)

    def close(self) -> None:
        """End all connections, and wait until each is served. All reads of their streams return 0."""
        with self._lock:
            self._closing = True
            for stream in self._inputs:
                stream.wake()
            for each in self._sockets:  # one that has handed over nothing yet
                _shut_down(each)
        if self._socket is not None:
            _shut_down(self._socket)  # wakes the thread that accepts
        while self._threads:
            self._threads.pop().join()
        if self._socket is not None:
            self._socket.close()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="join")
        thread.start()
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def _accept(self, listening: socket.socket, serve: Serve) -> None:
        with contextlib.suppress(OSError):  # `close` has shut the socket down
            while True:
                joined, _ = listening.accept()
                with self._lock:
                    is_welcome = not self._closing and len(self._sockets) < _MAX_STREAMS
                    if is_welcome:
                        self._sockets.add(joined)
                        self._start(self._serve, joined, serve)
                if not is_welcome:
                    joined.close()

    def _serve(self, joined: socket.socket, serve: Serve) -> None:
        """Take the streams of the process behind the socket `joined`, pass them to `serve`, and close them."""
        fds: list[int] = []
        try:
            fds = self._take_streams(joined)
            if len(fds) == 2:
                with InputStream(fds[0]) as stream, self._waking(stream):
                    output = OutputStream(fds[1])
                    serve(stream, output)
                    output.release()
        finally:
            for fd in fds:
                os.close(fd)
            with self._lock:
                self._sockets.discard(joined)
            joined.close()

    @contextlib.contextmanager
    def _waking(self, stream: InputStream) -> Iterator[None]:
        """Return a context manager within which `close` wakes the reader of `stream`."""
        with self._lock:
            self._inputs.add(stream)
            if self._closing:
                stream.wake()
        try:
            yield
        finally:
            with self._lock:
                self._inputs.discard(stream)

    def _take_streams(self, joined: socket.socket) -> list[int]:
        """Return the descriptors of input and output that come over `joined`. Returns [] if they are refused."""
        if not _is_ours(joined):
            return []
        joined.settimeout(_HAND_OVER_SECONDS)
        try:
            token, fds, *_ = socket.recv_fds(joined, 4 * _TOKEN_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return []
        if len(fds) == 2 and hmac.compare_digest(token, str(self.token).encode()):
            return fds
        for fd in fds:
            os.close(fd)
        return []


def join(token: str) -> None:
    """Hand standard input and output over to the `receive` of `token`. Returns once that process is done with them.

    Raises DeviceError if there is no such process of this user.
    """
    with socket.socket(socket.AF_UNIX) as owner:
        with DeviceError.on_os_error("join", "the other connection of this copy"):
            owner.connect(_address(token))
            if not _is_ours(owner):
                raise DeviceError("the socket of the other connection of this copy is another user's")
            socket.send_fds(owner, [token.encode()], [0, 1])
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1):  # from now on only the owner decides when the streams end
            os.dup2(nothing, fd)
        with contextlib.suppress(ConnectionError):
            owner.recv(1)


def _address(token: str) -> str:
    """Return the abstract name of the socket for `token`. All users can list the name, but not the token."""
    return "\0blockcopy-" + hashlib.sha256(token.encode()).hexdigest()[:32]


def _is_ours(connected: socket.socket) -> bool:
    """Return whether the process at the other end of the socket `connected` runs as our user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return bool(uid == os.geteuid())


def _shut_down(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
