"""Views of a device: its pages in the page cache, mapped into memory and read without a copy."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Callable

from blockcopy.block import syscalls
from blockcopy.block.geometry import Extent

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_HUGE_PAGE = 2 * 1024 * 1024
"""Bytes of a huge page. Some machines have a multiple of this."""


class Views:
    """The views of one open device. After an error of the device, there are no more. Thread-safe."""

    def __init__(self, fd: int, size: Callable[[], int]) -> None:
        """Map nothing of the file descriptor `fd` yet. `size`: called to get the device's current bytes."""
        self._fd = fd
        self._size = size
        self._mapped: tuple[int, memoryview] | None = None
        self._possible = True
        self._changed = threading.Condition()  # guards the attributes below
        self._count = 0
        self._paused = False

    def acquire(self, offset: int, length: int, extents: Sequence[Extent]) -> memoryview | None:
        """Return a memoryview of `length` bytes at byte `offset`, with the ranges `extents` read into memory.

        Returns None if the kernel cannot map the bytes, or while views are paused. See `Device.view()`.
        """
        with self._changed:
            if not self._possible or self._paused:
                return None
            self._count += 1
        view = None
        try:
            if self._mapped is None or len(self._mapped[1]) < offset + length:
                self._mapped = syscalls.map_to_read(self._fd, self._size())
            address, mapped = self._mapped
            if len(mapped) >= offset + length:
                for extent in extents:
                    start = extent.offset - extent.offset % _PAGE_SIZE
                    syscalls.populate(address + start, extent.end - start)
                view = mapped[offset : offset + length]
        except OSError as error:
            # A device that failed once, or became shorter, may do so again during an access to the view.
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOMEM):
                self._possible = False
        finally:
            if view is None:
                self.release(offset, length)
        return view

    def release(self, offset: int, length: int) -> None:
        """Unmap the pages of a view of `length` bytes at byte `offset`, and count it as released."""
        if self._mapped is not None:
            # The kernel may have mapped a huge page for a part of the view. That page would stay mapped, count as
            # our memory, and could not be dropped from the cache. Other views of it map it again when accessed.
            start, end = offset - offset % _HUGE_PAGE, offset + length
            self._unpopulate(start, end + -end % _HUGE_PAGE)
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager within which no page is mapped, and no view is granted.

        Its start waits until all views are released.
        """
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._count)
        try:
            self._unpopulate(0, sys.maxsize)
            yield
        finally:
            self._paused = False

    def close(self) -> None:
        """Give up the mapping, which disappears when the last view is gone."""
        self._mapped = None

    def _unpopulate(self, start: int, end: int) -> None:
        address, mapped = self._mapped or (0, b"")
        end = min(end, len(mapped))
        if start < end:
            with contextlib.suppress(OSError):  # refused for locked memory
                syscalls.unpopulate(address + start, end - start)
