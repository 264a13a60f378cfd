"""The volume: the bytes of the source, and of the user, as readers see them. It has the size of the source.

A read of bytes that are available never waits for the source. Nor does a write of whole pages. A write that covers
a page in part makes that page available first.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.block.geometry import Extent
from blockcopy.errors import BlockcopyError, DeviceError, SourceError
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.lanes import Lane
from blockcopy.replica.read_stats import ReadStats
from blockcopy.replica.readahead import ReadAhead
from blockcopy.replica.state.user_pages import PAGE_SIZE

logger = logging.getLogger(__name__)

_READ_THREADS = 8
"""Most threads that read the destination at once."""

_WRITE_THREADS = 8
"""Most threads that write to it at once."""

_SLOW_SECONDS = 0.01
"""Seconds of a slow write. After one, the next writes go to threads: no other request waits for the disk then."""

_WARY_SECONDS = 0.1
"""Seconds for which writes go to threads after a slow write."""


class Volume:
    """A view of the source that can be read and written. Any number of trio tasks may call `read` and `write`."""

    def __init__(
        self,
        hydrator: Hydrator,
        lane: Lane,
        nursery: trio.Nursery,
        give_up_after: Callable[[int], float],
        before_write: Callable[[], Awaitable[None]],
    ) -> None:
        """Make a volume that reads and writes the destination of `hydrator`.

        `hydrator`, `lane`: fetch missing blocks.
        `nursery`: runs the read-ahead.
        `give_up_after`: called with a number of blocks, returns the seconds after which a read of them fails.
        `before_write`: an async function without arguments, called before the first write. A write fails if it
        raises, and the next one calls it again.
        """
        self._before_write: Callable[[], Awaitable[None]] | None = before_write
        self._writer = hydrator.writer
        self._write_threads = trio.CapacityLimiter(_WRITE_THREADS)
        self._wary_until = -math.inf
        self.written_bytes = 0
        """Bytes that users wrote since the start."""
        self._device = hydrator.device
        self._blockmap = hydrator.blockmap
        self._geometry = hydrator.blockmap.geometry
        self.size = self._geometry.size
        self._hydrator = hydrator
        self._lane = lane
        self._nursery = nursery
        self._give_up_after = give_up_after
        self._threads = trio.CapacityLimiter(_READ_THREADS)
        self._read_ahead = ReadAhead(self._geometry.block_count, lane.window)
        self.read_stats = ReadStats()

    async def read(self, offset: int, length: int) -> Buffer:
        """Return `length` bytes at `offset`, or fewer at the end of the source.

        The buffer is used again: it is valid until the task of the caller next awaits anything.
        Raises BlockcopyError if the bytes cannot be had.
        """
        length = max(0, min(length, self.size - offset))
        extent = Extent(offset, length)
        self.read_stats.reads += 1
        self.read_stats.bytes += length
        while True:
            generation = self._blockmap.generation
            if not self._blockmap.complete and length:
                await self._make_available(extent)
            if self._blockmap.user.is_lost(extent):
                raise self._lost(extent)
            data = self._device.read_cached(offset, length)
            if data is not None and self._blockmap.generation == generation:
                return data
            read = await trio.to_thread.run_sync(self._device.read, offset, length, limiter=self._threads)
            if self._blockmap.generation == generation:  # else a sync failed, and these bytes may be old ones
                return read

    async def write(self, offset: int, data: Buffer) -> int:
        """Write `data` at `offset`, and return how many bytes were written: fewer only at the end of the source.

        Raises ReadOnlyError if no writes are accepted. Raises DeviceError with the errno ENOSPC beyond the end.
        Raises BlockcopyError if the bytes cannot be written, or if a page that they share cannot be had.
        """
        view = memoryview(data)
        extent = Extent(offset, min(len(view), self.size - offset))
        if not len(view):
            return 0
        if extent.length <= 0:
            raise DeviceError.from_os_error("write beyond the end of", self._device.path, OSError(errno.ENOSPC, ""))
        if self._before_write is not None:
            await self._before_write()
            self._before_write = None
        if extent.offset % PAGE_SIZE or extent.end % PAGE_SIZE:
            await self._make_edges_available(extent)
        self._writer.check_accepts()
        is_free = self._writer.claim(extent)
        try:
            await self._write(extent, view[: extent.length], may_wait=not is_free)
            if self._writer.failure is None:
                self._hydrator.note_write(extent)
        except BaseException:
            self._blockmap.interrupt(extent)
            raise
        finally:
            self._writer.release(extent)
        if self._writer.failure is not None:  # a sync has failed meanwhile, perhaps of these bytes
            self._blockmap.user.lose(extent)
            self._writer.check_accepts()
        self.written_bytes += extent.length
        return extent.length

    async def _make_edges_available(self, extent: Extent) -> None:
        """Make the pages available that `extent` covers in part. Raises DeviceError if one of them is lost."""
        pages = list(self._blockmap.user.cut(extent))
        while missing := [page for page in pages if not self._blockmap.is_available(page)]:
            for page in missing:
                await self._make_available(page)
        for page in pages:
            if self._blockmap.user.is_lost(page):
                raise self._lost(page)

    async def _write(self, extent: Extent, data: memoryview, *, may_wait: bool) -> None:
        """Write `data` at `extent`, which is claimed. `may_wait`: bytes of the source land in the extent just now.

        A write into the page cache takes microseconds, and a change of threads costs more. So the event loop itself
        writes, unless writes have been slow lately.
        """
        now = time.monotonic()
        if may_wait or now < self._wary_until:
            write = partial(self._writer.write, extent, data)
            await trio.to_thread.run_sync(write, limiter=self._write_threads)
            return
        self._writer.write_at_once(extent, data)
        ended = time.monotonic()
        if ended - now > _SLOW_SECONDS:
            self._wary_until = ended + _WARY_SECONDS

    def _lost(self, extent: Extent) -> DeviceError:
        """Return the error for `extent`, of which a failed sync lost a page."""
        return DeviceError(
            f"{extent.length} bytes at {extent.offset} of {self._device.path} are lost: they were written, and a "
            "sync has failed. Write whole pages of 4096 bytes there"
        )

    async def _make_available(self, extent: Extent) -> None:
        """Make the blocks of `extent` present, and start the read-ahead, unless its pages are the user's."""
        blocks = self._geometry.span(*extent)
        missing = not self._blockmap.is_available(extent)
        for ahead in self._read_ahead.record_read(blocks, waits=missing):
            if self._blockmap.any_missing(ahead):
                self._nursery.start_soon(self._fetch_ahead, ahead)
        if not missing:
            return
        seconds = self._give_up_after(len(blocks))
        with self.read_stats.wait(), trio.move_on_after(seconds):
            await self._hydrator.ensure(blocks, self._lane)
            return
        raise SourceError(
            f"the source did not send blocks {blocks.start} to {blocks.stop - 1} within {seconds:g} s"
        )

    async def _fetch_ahead(self, blocks: range) -> None:
        try:
            await self._hydrator.ensure(blocks, self._lane)
        except BlockcopyError as error:
            logger.debug("read-ahead of blocks %d to %d failed: %s", blocks.start, blocks.stop - 1, error)
