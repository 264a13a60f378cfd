"""The volume: the bytes of the source as a reader sees them, with the size of the source."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from blockcopy.block.buffers import Buffer
from blockcopy.errors import BlockcopyError, SourceError
from blockcopy.replica.hydration.hydrator import Hydrator
from blockcopy.replica.hydration.lanes import Lane
from blockcopy.replica.read_stats import ReadStats
from blockcopy.replica.readahead import ReadAhead

logger = logging.getLogger(__name__)

_READ_THREADS = 8
"""Most threads that read the destination at once."""


class Volume:
    """A readable view of the source. Any number of trio tasks may call `read` at once."""

    def __init__(
        self, hydrator: Hydrator, lane: Lane, nursery: trio.Nursery, give_up_after: Callable[[int], float]
    ) -> None:
        """Make a volume that reads the destination of `hydrator`.

        `hydrator`, `lane`: fetch missing blocks.
        `nursery`: runs the read-ahead.
        `give_up_after`: called with a number of blocks, returns the seconds after which a read of them fails.
        """
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
        self.read_stats.reads += 1
        self.read_stats.bytes += length
        while True:
            generation = self._blockmap.generation
            if not self._blockmap.complete and length:
                await self._ensure(self._geometry.span(offset, length))
            data = self._device.read_cached(offset, length)
            if data is not None and self._blockmap.generation == generation:
                return data
            read = await trio.to_thread.run_sync(self._device.read, offset, length, limiter=self._threads)
            if self._blockmap.generation == generation:  # else a sync failed, and these bytes may be old ones
                return read

    async def _ensure(self, blocks: range) -> None:
        """Make `blocks`, a range, present, and start the read-ahead."""
        missing = self._blockmap.any_missing(blocks)
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
