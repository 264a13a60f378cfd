"""A disk that forgets: an NBD server with a volatile write cache, as disks have one.

What was written since the last flush is at risk. A cut loses a random part of it, sector by sector, whatever the
order of the writes. Of a sector that was written twice, the first version may have reached the platter before.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from pathlib import Path
from typing import NamedTuple

SECTOR = 4096
"""Bytes that are written as a whole, or not at all."""

_SHARES = (0.1, 0.5, 0.9, 1.0)
"""How likely an unflushed sector is lost in a cut. A cut chooses one of these."""

_EARLY = 0.3
"""How likely an unflushed sector has been written to the platter when it is written once more."""

_LENGTH = 32 << 20
"""The longest request, in bytes."""

# The NBD protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_OPTION, _REPLY = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE_REPLY = 0x25609513, 0x67446698
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _INFO_REPLY, _UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
_FUA = 1
_FEATURES = 1 | 4 | 8 | 32 | 64  # there are features: flush, FUA, trim, zeroes
_ERROR_IO = 5


class Loss(NamedTuple):
    """What a cut lost: `lost` of the `unflushed` sectors."""

    lost: int
    unflushed: int


class ForgetfulDisk:
    """A disk on the file `image`, served on a socket. `cut` forgets; `close` ends the server."""

    def __init__(self, image: Path, path: Path, choose: random.Random) -> None:
        """Serve `image` at the socket `path`. `choose`: what a cut loses is chosen by it."""
        self.image = image
        self.url = f"nbd+unix:///?socket={path}"
        """Where QEMU finds the disk."""
        self.halted = threading.Event()
        """Set while the disk answers nothing any more: see `halt_at`."""
        self._choose = choose
        self._file = os.open(image, os.O_RDWR)
        self._size = os.fstat(self._file).st_size
        self._before: dict[int, bytes] = {}  # by sector: what the platter has of an unflushed sector
        self._lock = threading.Lock()
        self._clients: list[threading.Thread] = []
        self._flushes_left = -1  # until the disk halts
        self._is_over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def halt_at(self, flush: int) -> None:
        """Answer nothing any more from a flush on: `flush` is 1 for the next. It may be done or not.

        So a cut that waits for `halted` is in the middle of it. The cut ends this.
        """
        with self._lock:
            self._flushes_left = flush

    def cut(self) -> Loss:
        """Lose a random part of what was not flushed. The guest is off. Returns how much was lost."""
        self._await_clients()
        share = self._choose.choice(_SHARES)
        lost = [sector for sector in sorted(self._before) if self._choose.random() < share]
        for sector in lost:
            os.pwrite(self._file, self._before[sector], sector * SECTOR)
        loss = Loss(len(lost), len(self._before))
        self._before.clear()
        return loss

    def close(self) -> None:
        """End the server. The guest is off. Keeps what was written."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept
        self._listener.close()
        self._accepting.join()
        self._await_clients()
        os.close(self._file)

    def _await_clients(self) -> None:
        """Wait until all that the guest sent before its end has been done, or until where the disk halted."""
        self._is_over.set()
        for each in self._clients:
            each.join()
        self._clients.clear()
        self._is_over.clear()
        self.halted.clear()
        self._flushes_left = -1

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._clients.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(EOFError, ConnectionError):
            if self._greet(connection):
                while not self.halted.is_set() and self._answer(connection):
                    pass

    def _greet(self, connection: socket.socket) -> bool:
        """Agree with the client. Returns False if it wants no disk."""
        connection.sendall(b"NBDMAGIC" + struct.pack(">QH", _OPTION, 1))
        _receive(connection, 4)

        def reply(kind: int, data: bytes = b"") -> None:
            connection.sendall(struct.pack(">QIII", _REPLY, option, kind, len(data)) + data)

        while True:
            _, option, length = struct.unpack(">QII", _receive(connection, 16))
            _receive(connection, length)
            if option == _EXPORT_NAME:
                connection.sendall(struct.pack(">QH", self._size, _FEATURES) + bytes(124))
                return True
            if option in (_INFO, _GO):
                reply(_INFO_REPLY, struct.pack(">HQH", 0, self._size, _FEATURES))
                reply(_INFO_REPLY, struct.pack(">HIII", 3, 512, SECTOR, _LENGTH))
                reply(_ACK)
                if option == _GO:
                    return True
            elif option == _ABORT:
                reply(_ACK)
                return False
            else:
                reply(_UNSUPPORTED)

    def _answer(self, connection: socket.socket) -> bool:
        """Answer the next request. Returns False if it ends the connection."""
        _, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", _receive(connection, 28))
        data, error = b"", 0
        if kind == _READ:
            data = os.pread(self._file, length, offset)
        elif kind == _WRITE:
            self._write(offset, _receive(connection, length), durable=bool(flags & _FUA))
        elif kind in (_TRIM, _ZEROES):
            self._write(offset, bytes(length), durable=bool(flags & _FUA))
        elif kind == _FLUSH:
            self._flush()
        elif kind == _DISCONNECT:
            return False
        else:
            error = _ERROR_IO
        connection.sendall(struct.pack(">IIQ", _SIMPLE_REPLY, error, handle) + data)
        return True

    def _flush(self) -> None:
        with self._lock:
            self._flushes_left -= 1
            halts = self._flushes_left == 0
            if not halts or self._choose.random() < 0.5:
                self._before.clear()
        if halts:
            self.halted.set()
            self._is_over.wait()

    def _write(self, offset: int, data: bytes | bytearray, *, durable: bool) -> None:
        sectors = range(offset // SECTOR, -(-(offset + len(data)) // SECTOR))
        with self._lock:
            for sector in sectors:
                if sector not in self._before or self._choose.random() < _EARLY:
                    self._before[sector] = os.pread(self._file, SECTOR, sector * SECTOR)
            os.pwrite(self._file, data, offset)
            if durable:
                for sector in sectors:
                    del self._before[sector]


def _receive(connection: socket.socket, length: int) -> bytearray:
    """Return the next `length` bytes. Raises EOFError if the connection ends before."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data
