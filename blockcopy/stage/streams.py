"""The input and output streams of a stage. Usually pipes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import select
import time
from collections.abc import Sequence
from typing import Callable, NamedTuple, Union

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device
from blockcopy.errors import DeviceError, OutputError, StreamError

PIPE_SIZE = 1024 * 1024
"""Bytes that pipes are enlarged to. The default of 64 KiB costs two wake-ups a block."""


class InputStream:
    """The bytes of file descriptor `fd`, as they arrive. One thread reads; any thread may call `wake()`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = memoryview(b"")  # bytes that were read ahead
        enlarge_pipe(fd)
        self._wake_read, self._wake_write = os.pipe()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        self.noise = b""
        """The bytes that `skip_past` has skipped so far. Thread-safe."""

    def __enter__(self) -> InputStream:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    def wake(self) -> None:
        """Interrupt the reader: all reads return 0 from now on, as at the end of the stream. Thread-safe."""
        os.write(self._wake_write, b"x")

    def read_into(self, buffer: memoryview) -> int:
        """Wait for at least one byte, and read the available bytes into `buffer`, up to its length.

        Returns the number of bytes read, 0 at the end. Raises StreamError if the read fails.
        """
        if self._rest:
            count = min(len(self._rest), len(buffer))
            buffer[:count] = self._rest[:count]
            self._rest = self._rest[count:]
            return count
        try:
            ready = self._poll.poll()
            if any(fd == self._wake_read for fd, _ in ready):
                return 0
            return os.readv(self._fd, [buffer])
        except OSError as error:
            raise StreamError(f"cannot read the input: {error.strerror}") from error

    def discard(self) -> None:
        """Read and discard all bytes until the stream ends or fails. `wake` does not interrupt this."""
        buffer = memoryview(bytearray(PIPE_SIZE))
        with contextlib.suppress(OSError):
            while os.readv(self._fd, [buffer]):
                pass

    def skip_past(self, mark: bytes, max_noise: int) -> bool:
        """Skip everything up to and including the bytes `mark`.

        Keeps the bytes before the mark in the attribute `noise`. Returns False if the stream ends before the mark.
        Raises StreamError after about `max_noise` bytes.
        """
        received = bytearray()
        buffer = memoryview(bytearray(4096))
        while (at := received.find(mark)) < 0:
            self.noise = bytes(received)
            if len(received) > max_noise:
                raise StreamError(f"more than {max_noise} bytes were printed before the stream began")
            count = self.read_into(buffer)
            if not count:
                return False
            received += buffer[:count]
        self._rest = memoryview(bytes(received[at + len(mark) :]))
        self.noise = bytes(received[:at])
        return True


class DeviceFrame(NamedTuple):
    """A frame of `header`, then `length` bytes at byte `offset` of `device`.

    Its bytes are spliced from the device to the pipe by the kernel if possible, otherwise read.
    """

    device: Device
    offset: int
    length: int
    header: bytes
    fallback: Callable[[], Sequence[Output]]
    """Called without arguments if the device lacks some bytes, and nothing was sent.

    Returns what to send instead.
    """

    def __len__(self) -> int:
        """Return the number of bytes on the wire."""
        return len(self.header) + self.length


Output = Union[Buffer, DeviceFrame]
"""What `OutputStream.write` accepts."""


READER_GONE = "the reader of the output has gone away"
"""Message for a closed pipe."""


class OutputStream:
    """A stream to file descriptor `fd`. Each write is complete or an error. Call from one thread only."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._splices = hasattr(os, "splice")  # Python 3.10 or later; False once `fd` proves to be no pipe
        self._pipe: tuple[int, int] | None = None  # our pipe between device and `fd`: read end, write end
        self.seconds_per_byte = 0.0
        """Recent time of writing one byte. Small if the pipe has room, else the pace of a slow reader."""
        self.written = 0
        """Bytes written so far."""
        enlarge_pipe(fd)

    def write(self, outputs: Sequence[Output]) -> None:
        """Write all of `outputs`, a sequence of bytes and DeviceFrames, in order.

        Raises OutputError if the reader is gone, or if the disk is full.
        """
        started = time.perf_counter()
        size = sum(map(len, outputs))
        for is_device, group in itertools.groupby(outputs, key=lambda output: isinstance(output, DeviceFrame)):
            if is_device:
                for each in group:
                    if isinstance(each, DeviceFrame):
                        self._send(each)
            else:
                self._write([memoryview(each) for each in group if not isinstance(each, DeviceFrame)])
        if size:
            seconds = time.perf_counter() - started
            self.seconds_per_byte += (seconds / size - self.seconds_per_byte) * min(1, size / _RECENT_BYTES)

    def _write(self, views: list[memoryview]) -> None:
        try:
            while views:
                try:
                    written = os.writev(self._fd, views[:1024])
                except BlockingIOError:
                    self._await_writable()
                    continue
                self.written += written
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]
        except OSError as error:
            raise self._error(error) from error

    def _await_writable(self) -> None:
        """Wait until a non-blocking descriptor is writable. Another process may have made it non-blocking."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll()

    def release(self) -> None:
        """Close the internal pipe. The descriptor itself stays open."""
        pipe, self._pipe = self._pipe, None
        for fd in pipe or ():
            os.close(fd)

    def _send(self, frame: DeviceFrame) -> None:
        if self._splices and self._fill(frame):
            self._write([memoryview(frame.header)])
            self._pour(frame.length)
            return
        try:
            data = frame.device.read(frame.offset, frame.length)
        except DeviceError:
            self.write(frame.fallback())
        else:
            self._write([memoryview(frame.header), memoryview(data)])

    def _fill(self, frame: DeviceFrame) -> bool:
        """Splice the bytes of `frame` into our pipe, before its header promises them to the reader.

        Returns False if the device does not give all bytes. A read reports the reason then.
        """
        if self._pipe is None:
            self._pipe = os.pipe()
            enlarge_pipe(self._pipe[1])
        device, offset, length, *_ = frame
        end = offset + length
        with contextlib.suppress(OSError):
            while offset < end and (count := device.splice_to(self._pipe[1], offset, end - offset)):
                offset += count
        if offset < end:
            left = length - (end - offset)
            while left:
                left -= len(os.read(self._pipe[0], left))
        return offset == end

    def _pour(self, length: int) -> None:
        """Pass `length` bytes of our pipe on to the reader."""
        while self._pipe is not None and length:
            try:
                count = os.splice(self._pipe[0], self._fd, length)
                length -= count
                self.written += count
            except BlockingIOError:
                self._await_writable()
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    raise self._error(error) from error
                self._splices = False  # `fd` takes no splice: everything is read from now on
                data = os.read(self._pipe[0], length)
                self._write([memoryview(data)])
                length -= len(data)

    @staticmethod
    def _error(error: OSError) -> OutputError:
        if error.errno in (errno.EPIPE, errno.ECONNRESET):
            return OutputError(READER_GONE)
        return OutputError(f"cannot write the output: {error.strerror}")


_RECENT_BYTES = 4 * 1024 * 1024
"""Bytes after which earlier writes hardly count in `seconds_per_byte`."""


def enlarge_pipe(fd: int) -> None:
    """Enlarge the pipe `fd` to PIPE_SIZE bytes if the user's limit permits. Does nothing if `fd` is no pipe."""
    set_pipe_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 does not name it
    try:
        if fcntl.fcntl(fd, set_pipe_size + 1) < PIPE_SIZE:  # F_GETPIPE_SZ
            fcntl.fcntl(fd, set_pipe_size, PIPE_SIZE)
    except OSError:
        return  # no pipe, or above the user's limit: slower, but correct


def refuse_terminal(fd: int) -> None:
    """Raise OutputError if `fd` is a terminal: a stage's output is binary."""
    if os.isatty(fd):
        raise OutputError("the output is a terminal; send binary data into a pipe or a file")
