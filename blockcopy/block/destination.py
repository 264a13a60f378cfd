"""A Destination: a Device that is guarded against changes by other programs during the copy.

`block.device` reads, writes, and punches holes for zeros. Here each of these calls also checks for changes.

No lock stops another program from removing, truncating or writing a file. The next write beyond the new end
hides a truncation. The file is long again then, with zeros in place of the copy. So each write checks the size
before and after.

    truncated    fewer bytes than before, or than the copy needs
    written      an mtime that no write of ours has set
    removed      the path leads nowhere, or to another file
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from copy import copy

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device
from blockcopy.errors import DestinationLostError


class Destination(Device):
    """A device that only we may write. Thread-safe, except `read_cached`.

    Each method raises DestinationLostError once another program has changed the device, DeviceError for a failure.
    """

    def __init__(self, path: str, fd: int) -> None:
        """Take ownership of `fd`, an open file descriptor of the file or device at `path`."""
        super().__init__(path, fd)
        self.lost: DestinationLostError | None = None
        """The error that every later call raises. None if no foreign change was detected."""
        self._checking = threading.Lock()  # guards the attributes below
        self._writers = 0
        self._min_size = self.size()
        self._has_exact_times = self.has_exact_times()
        self._mtime_ns = self.status().st_mtime_ns

    def require_size(self, size: int) -> None:
        """Set the minimum size to `size` bytes. From now on, only a shorter device counts as truncated."""
        with self._checking:
            self._min_size = size

    def check(self) -> None:
        """Check that no other program has truncated the device or written to it.

        Writes show only if the file system keeps exact times. Raises DestinationLostError if there was a change.
        """
        with self._checking:
            self._check()

    def check_in_place(self) -> None:
        """Check that this device is still at its path, and unchanged by other programs.

        Raises DestinationLostError if not. Blocks while a file system on the path hangs.
        """
        super().check_in_place()
        self.check()

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at byte `offset`, and check before and after for changes by other programs.

        Raises DestinationLostError if there was a change, DeviceError if the write fails.
        """
        if self.is_block_device:
            super().write(offset, data)
            return
        self._begin_change()  # not `_changing`: this is called often
        end = None
        try:
            super().write(offset, data)
            end = offset + len(memoryview(data))
        finally:
            self._end_change(end)

    def write_zeros(self, offset: int, length: int, *, sparse: bool) -> None:
        """Write `length` zero bytes at byte `offset`, and check before and after for changes by other programs.

        `sparse`: punch a hole if the file system can. Raises errors as `write()` does.
        """
        with self._changing(0):
            super().write_zeros(offset, length, sparse=sparse)

    def grow(self, size: int) -> None:
        """Extend a regular file to `size` bytes, and check before and after for changes by other programs.

        Raises errors as `write()` does.
        """
        with self._changing(size):
            super().grow(size)

    def read(self, offset: int, length: int) -> bytes:
        """Read and return exactly `length` bytes at byte `offset`. Then check for changes by other programs.

        Raises DestinationLostError if there was a change, DeviceError if the read fails or the device ends early.
        """
        data = super().read(offset, length)
        self.check_without_blocking()
        return data

    def read_cached(self, offset: int, length: int) -> memoryview | None:
        """Return a memoryview of `length` bytes at byte `offset`, read from the page cache.

        Checks as `read()` does. Returns None if the read would wait for the disk. The result is valid until the
        next call. Call from one thread only.
        """
        data = super().read_cached(offset, length)
        if data is not None:
            self.check_without_blocking()
        return data

    def sync(self, *, times: bool = True) -> None:
        """Wait until everything written is on stable storage, then check for changes by other programs.

        `times`: wait for the times of a file too.
        Raises DestinationLostError if there was a change, DeviceError if the sync fails.
        """
        super().sync(times=times)
        self.check()

    def check_without_blocking(self) -> None:
        """Check as `check()` does, but only if the file system certainly answers at once.

        Safe to call from trio's thread. Raises DestinationLostError if another program has changed the device.
        """
        if self.lost is not None:
            raise copy(self.lost)
        if self._has_exact_times:
            self.check()

    def _begin_change(self) -> None:
        """Check for changes by others, before a change by us. `_end_change` must follow."""
        with self._checking:
            self._check()
            self._writers += 1

    def _end_change(self, end: int | None) -> None:
        """Check for changes by others, after a change by us.

        `end`: the file has at least so many bytes after our change. None if the change failed.
        """
        with self._checking:
            self._writers -= 1
            status = self.status()
            if not self._writers:
                self._mtime_ns = status.st_mtime_ns
            if end is not None:
                self._min_size = max(self._min_size, end)
                self._check(status)

    @contextlib.contextmanager
    def _changing(self, end: int) -> Iterator[None]:
        """Return a context manager that checks for changes by others, before and after a change by us.

        `end`: the file has at least so many bytes after our change. A block device needs no check: it refuses
        writes beyond its end.
        """
        if self.is_block_device:
            yield
            return
        self._begin_change()
        try:
            yield
        except BaseException:
            self._end_change(None)
            raise
        self._end_change(end)

    def _check(self, status: os.stat_result | None = None) -> None:
        """Check for changes by others. `status`: of this moment, if it is known."""
        if self.lost is None:
            status = status or self.status()
            size = self.size() if self.is_block_device else status.st_size
            if size < self._min_size:
                self.lost = DestinationLostError(
                    f"{self.path} was truncated while it was in use: it has {size} bytes of {self._min_size}. "
                    "Start again"
                )
            elif self._has_exact_times and not self._writers and status.st_mtime_ns != self._mtime_ns:
                self.lost = DestinationLostError(
                    f"{self.path} was written by another program while it was in use. Start again"
                )
        if self.lost is not None:
            raise copy(self.lost)
