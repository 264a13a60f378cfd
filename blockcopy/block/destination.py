"""A destination as long as it is ours: it notices that somebody else changed it.

Nothing stops another program from removing a file, cutting it, or writing to it. A cut is masked by the next
write behind it: then zeros stand where the copy was. So the size is looked at around each write.

    cut          fewer bytes than were there, or than are needed
    written      a time of modification that no write of ours has made
    removed      the path leads to nothing, or elsewhere
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from copy import copy

from blockcopy.block.buffers import Buffer
from blockcopy.block.device import Device
from blockcopy.errors import DestinationLostError


class Destination(Device):
    """A device that is written by us alone, or raises DestinationLostError. Thread-safe."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.lost: DestinationLostError | None = None
        """Raised by every read and write from now on."""
        self._looking = threading.Lock()  # of what follows
        self._writers = 0
        self._needed = self.size()
        self._tells = self.has_exact_times()
        self._mtime_ns = self.status().st_mtime_ns

    def require_size(self, size: int) -> None:
        """Count fewer bytes than `size` as a cut, and nothing else."""
        with self._looking:
            self._needed = size

    def check(self) -> None:
        """Raise DestinationLostError if it was cut or, as far as its time tells, written by somebody else."""
        with self._looking:
            self._look()

    def check_in_place(self) -> None:
        super().check_in_place()
        self.check()

    def write(self, offset: int, data: Buffer) -> None:
        with self._changing(offset + len(memoryview(data))):
            super().write(offset, data)

    def write_zeros(self, offset: int, length: int, *, sparse: bool) -> None:
        with self._changing(0):
            super().write_zeros(offset, length, sparse=sparse)

    def grow(self, size: int) -> None:
        with self._changing(size):
            super().grow(size)

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        self.check_without_blocking()
        return data

    def read_cached(self, offset: int, length: int) -> memoryview | None:
        data = super().read_cached(offset, length)
        if data is not None:
            self.check_without_blocking()
        return data

    def sync(self) -> None:
        super().sync()
        self.check()

    def check_without_blocking(self) -> None:
        """Do as `check`, but ask nothing of a file system that may not answer. May be called from trio's thread."""
        if self.lost is not None:
            raise copy(self.lost)
        if self._tells:
            self.check()

    @contextlib.contextmanager
    def _changing(self, end: int) -> Iterator[None]:
        """Surround a change of ours, after which there are at least `end` bytes. A device bounds it by itself."""
        if self.is_block_device:
            yield
            return
        with self._looking:
            self._look()
            self._writers += 1
        try:
            yield
        finally:
            with self._looking:
                self._writers -= 1
                if not self._writers:
                    self._mtime_ns = self.status().st_mtime_ns
        with self._looking:
            self._needed = max(self._needed, end)
            self._look()

    def _look(self) -> None:
        if self.lost is None:
            status = self.status()
            size = self.size() if self.is_block_device else status.st_size
            if size < self._needed:
                self.lost = DestinationLostError(
                    f"{self.path} was made shorter while it was in use: it has {size} bytes of {self._needed}. "
                    "Start again"
                )
            elif self._tells and not self._writers and status.st_mtime_ns != self._mtime_ns:
                self.lost = DestinationLostError(
                    f"{self.path} was written by another program while it was in use. Start again"
                )
        if self.lost is not None:
            raise copy(self.lost)
