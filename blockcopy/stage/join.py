"""Further connections of a copy: each hands its two streams over to the process that serves the first.

    ssh → STAGE --join TOKEN ── its standard input and output, over a Unix socket ──► STAGE → source or destination

One process opens and serves the device, with the streams of all connections. `hand_over` is the other end.
The socket has an abstract name, so no file is left behind whatever ends the owner. Each end asks the kernel whether
the other end is of the same user. The token also keeps out other processes of that user.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Callable

from blockcopy.errors import BlockcopyError, DeviceError, InternalError, as_user_error
from blockcopy.stage.hand_over import MAX_REPORT, hand_over, is_ours
from blockcopy.stage.streams import InputStream, OutputStream

logger = logging.getLogger(__name__)

_MAX_STREAMS = 64
"""Most connections that are served at once."""

_HAND_OVER_SECONDS = 10
"""Seconds for a joining process to hand over its streams."""

_TOKEN_BYTES = 16

Serve = Callable[[InputStream, OutputStream], None]
"""Serves the streams of one connection until they end. Called in a thread for each connection.

A BlockcopyError is reported to the process that has handed the streams over, which exits with its status."""


class Joins:
    """The owner's end: a socket for further connections, made by `listen`. Leaving the context ends all of them."""

    def __init__(self) -> None:
        self.token: str | None = None
        """The secret of further connections, in hexadecimal digits. None before `listen`, or without a socket."""
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()  # guards the attributes below
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._inputs: set[InputStream] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Joins:
        return self

    def listen(self) -> str | None:
        """Make the socket. Returns the attribute `token`, which is None if this host has no such sockets."""
        token = os.urandom(_TOKEN_BYTES).hex()
        with contextlib.suppress(OSError):  # then there is one connection
            listening = socket.socket(socket.AF_UNIX)
            try:
                listening.bind(address_of(token))
                listening.listen(_MAX_STREAMS)
            except OSError:
                listening.close()
                raise
            self._socket, self.token = listening, token
        return self.token

    def start(self, serve: Serve) -> None:
        """Begin to accept connections. Each is passed to `serve`, which must return once its input ends."""
        if self._socket is not None:
            self._start(self._accept, self._socket, serve)

    def open(self, serve: Serve) -> str | None:
        """Make the socket, and begin to pass connections to `serve`, unless that was done before.

        Returns the attribute `token`.
        """
        if self._socket is None and self.listen() is not None:
            self.start(serve)
        return self.token

    def finish(self) -> None:
        """Accept no more connections. Returns once each that there is has ended by itself."""
        self._stop_accepting()
        self._join()

    def close(self) -> None:
        """End all connections, and wait until each is served. All reads of their streams return 0."""
        with self._lock:
            self._closing = True
            for stream in self._inputs:
                stream.wake()
            for each in self._sockets:  # one that has handed over nothing yet; reports can still be sent
                _shut_down(each, socket.SHUT_RD)
        self._stop_accepting()
        self._join()
        if self._socket is not None:
            self._socket.close()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stop_accepting(self) -> None:
        if self._socket is not None:
            _shut_down(self._socket)  # wakes the thread that accepts

    def _join(self) -> None:
        while self._threads:
            self._threads.pop().join()

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
                    try:
                        report = _report_of(serve, stream, output)
                    finally:
                        output.release()
                with contextlib.suppress(OSError):  # its session has ended before
                    joined.sendall(report)
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
        if not is_ours(joined):
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


def _report_of(serve: Serve, stream: InputStream, output: OutputStream) -> bytes:
    """Return the report on `serve(stream, output)` for the process that has handed the two streams over."""
    try:
        serve(stream, output)
    except Exception as raised:  # whatever it is: the other connections go on
        error = as_user_error(raised)
        if isinstance(error, InternalError):
            logger.error("internal error in a further connection", exc_info=raised)
        return bytes([error.exit_code]) + str(error).encode(errors="replace")[: MAX_REPORT - 1]
    return bytes([0])


def join(token: str) -> None:
    """Hand standard input and output over to the stage of `token`. Returns once that stage has served them.

    Raises DeviceError if there is no such process of this user, and the BlockcopyError that it reports.
    """
    with DeviceError.on_os_error("join", "the other connection of this copy"):
        status, message = hand_over(address_of(token), token)
    if status:
        raise BlockcopyError.relayed(message, status)


def address_of(token: str) -> str:
    """Return the abstract name of the socket for `token`. All users can list the name, but not the token."""
    return "\0blockcopy-" + hashlib.sha256(token.encode()).hexdigest()[:32]


def _shut_down(each: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(how)
