"""The two ends of a stage: the stream that it reads and the stream that it writes, on pipes."""

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
"""What a pipe is enlarged to: the default of 64 KiB costs a wake-up for half a block."""


class InputStream:
    """The bytes of a descriptor as they come, for one reader thread; `wake` ends its waiting."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = memoryview(b"")  # was read, and not given to anybody yet
        enlarge_pipe(fd)
        self._wake_read, self._wake_write = os.pipe()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        self.noise = b""
        """The bytes that `skip_past` has passed over so far. Thread-safe."""

    def __enter__(self) -> InputStream:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    def wake(self) -> None:
        """From any thread: what is read from now on is the end of the stream."""
        os.write(self._wake_write, b"x")

    def read_into(self, buffer: memoryview) -> int:
        """What has arrived, as far as `buffer` has room, waiting for at least one byte: how many; 0 at the end."""
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

    def skip_past(self, mark: bytes, most: int) -> bool:
        """Pass over all that comes before `mark`, which is kept as `noise`, and over the mark. Returns False if
        the stream ends without it.

        Raises StreamError for more than about `most` bytes of noise.
        """
        received = bytearray()
        buffer = memoryview(bytearray(4096))
        while (at := received.find(mark)) < 0:
            self.noise = bytes(received)
            if len(received) > most:
                raise StreamError(f"more than {most} bytes were printed before the stream began")
            count = self.read_into(buffer)
            if not count:
                return False
            received += buffer[:count]
        self._rest = memoryview(bytes(received[at + len(mark) :]))
        self.noise = bytes(received[:at])
        return True


class FromDevice(NamedTuple):
    """`header`, then `length` bytes at `offset` of `device`, to be sent without being looked at."""

    device: Device
    offset: int
    length: int
    header: bytes
    instead: Callable[[], Sequence[Output]]
    """Returns what is sent if not all of these bytes can be had. Nothing was sent then, the header neither."""

    def __len__(self) -> int:
        return len(self.header) + self.length


Output = Union[Buffer, FromDevice]


GONE = "whoever reads the output has gone away"


class OutputStream:
    """A descriptor that is written in full or not at all."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._splices = hasattr(os, "splice")  # since Python 3.10; until it is found that this is no pipe
        self._way: tuple[int, int] | None = None  # a pipe of our own: its two ends
        self.seconds_per_byte = 0.0
        """What writing took of late: little where a pipe has room, and its reader's pace where that is slow."""
        enlarge_pipe(fd)

    def write(self, outputs: Sequence[Output]) -> None:
        """All of `outputs`, in order. OutputError where the reader went away or the disk is full."""
        started = time.perf_counter()
        size = sum(map(len, outputs))
        for is_device, group in itertools.groupby(outputs, key=lambda output: isinstance(output, FromDevice)):
            if is_device:
                for each in group:
                    if isinstance(each, FromDevice):
                        self._send(each)
            else:
                self._write([memoryview(each) for each in group if not isinstance(each, FromDevice)])
        if size:
            seconds = time.perf_counter() - started
            self.seconds_per_byte += (seconds / size - self.seconds_per_byte) * min(1, size / _OF_LATE)

    def _write(self, views: list[memoryview]) -> None:
        try:
            while views:
                try:
                    written = os.writev(self._fd, views[:1024])
                except BlockingIOError:
                    self._await_room()
                    continue
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]
        except OSError as error:
            raise self._error(error) from error

    def _await_room(self) -> None:
        """Return when more can be written to a descriptor that does not block: others may share it with us."""
        room = select.poll()
        room.register(self._fd, select.POLLOUT)
        room.poll()

    def release(self) -> None:
        """Close what writing needed. The descriptor itself stays open."""
        way, self._way = self._way, None
        for fd in way or ():
            os.close(fd)

    def _send(self, stretch: FromDevice) -> None:
        if self._splices and self._fill(stretch):
            self._write([memoryview(stretch.header)])
            self._pour(stretch.length)
            return
        try:
            data = stretch.device.read(stretch.offset, stretch.length)
        except DeviceError:
            self.write(stretch.instead())
        else:
            self._write([memoryview(stretch.header), memoryview(data)])

    def _fill(self, stretch: FromDevice) -> bool:
        """Move the bytes into a pipe of our own, without a copy, before a header promises them to the reader.

        Returns False if they cannot be had so. What is wrong with the device, reading tells.
        """
        if self._way is None:
            self._way = os.pipe()
            enlarge_pipe(self._way[1])
        device, offset, length, *_ = stretch
        end = offset + length
        with contextlib.suppress(OSError):
            while offset < end and (count := device.splice_to(self._way[1], offset, end - offset)):
                offset += count
        if offset < end:
            self._skip(length - (end - offset))
        return offset == end

    def _skip(self, count: int) -> None:
        while self._way is not None and count:
            count -= len(os.read(self._way[0], count))

    def _pour(self, length: int) -> None:
        """Pass on what is in the pipe."""
        while self._way is not None and length:
            try:
                length -= os.splice(self._way[0], self._fd, length)
            except BlockingIOError:
                self._await_room()
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    raise self._error(error) from error
                self._splices = False  # nothing that can be spliced to: from now on all is read
                data = os.read(self._way[0], length)
                self._write([memoryview(data)])
                length -= len(data)

    @staticmethod
    def _error(error: OSError) -> OutputError:
        if error.errno in (errno.EPIPE, errno.ECONNRESET):
            return OutputError(GONE)
        return OutputError(f"cannot write the output: {error.strerror}")


_OF_LATE = 4 * 1024 * 1024
"""Bytes after which what was before counts for little."""


def enlarge_pipe(fd: int) -> None:
    """Give a pipe PIPE_SIZE bytes where that is allowed; anything else stays as it is."""
    set_pipe_size = getattr(fcntl, "F_SETPIPE_SZ", 1031)  # Python 3.9 does not name it
    try:
        if fcntl.fcntl(fd, set_pipe_size + 1) < PIPE_SIZE:  # F_GETPIPE_SZ
            fcntl.fcntl(fd, set_pipe_size, PIPE_SIZE)
    except OSError:
        return  # no pipe, or above the user's limit: slower, not wrong


def refuse_terminal(fd: int) -> None:
    """A stage's output is not for eyes: BlockcopyError where `fd` is a terminal."""
    if os.isatty(fd):
        raise OutputError("the output is a terminal; binary data goes into a pipe or a file")
